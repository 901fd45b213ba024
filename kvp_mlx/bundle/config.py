"""kvp.json: what a bundle says about itself, checked field by field."""

import json
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)

from ..errors import BundleError, InputError
from ..files import read_json, sha256_of, write_json

FORMAT_VERSION: Final = 2
MAX_PRECEDING: Final = 8
MAX_RANK: Final = 4096
HASHED_FILES: Final = ("predictor.safetensors", "adapter.safetensors")

Sources = tuple[NonNegativeInt, ...]
Alias = Literal["smollm2-135m", "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelMark(_Part):
    """What tells a model from others of its shape, in any precision (``bundle.mark``).

    Attributes:
        arguments: what config.json tells the model.
        vocabulary: hash of the tokeniser's.
        rows: the beginning of some weights' first rows, by name and shape (``NAME|OUT,IN``).
    """

    arguments: dict[str, Any]
    vocabulary: str | None
    rows: dict[str, tuple[FiniteFloat, ...]]


class BaseConfig(_Part):
    """Where the base lives: exactly one of ``path`` (relative to the bundle or absolute), ``hub_id``, ``alias``.

    A base of another fingerprint is let in if it has the ``mark``; bundles made before that was introduced have none.
    """

    fingerprint: str
    mark: ModelMark | None = None
    path: str | None = None
    hub_id: str | None = None
    revision: str | None = None
    alias: Alias | None = None

    @model_validator(mode="after")
    def _one_place(self) -> "BaseConfig":
        if sum(place is not None for place in (self.path, self.hub_id, self.alias)) != 1:
            raise ValueError("name exactly one of path, hub_id and alias")
        if "\0" in (self.path or ""):
            raise ValueError("a path cannot hold a null character")
        return self


class AuxiliaryConfig(_Part):
    """The auxiliary: the base's first ``layers`` layers (prefix), or the model in ``auxiliary/`` of that depth.

    Kind ``model`` may be a named base's (``alias``) first ``layers`` layers instead. These, and a prefix, may read the
    prompt with low-rank updates of ``adapter_rank``, kept in adapter.safetensors.
    """

    kind: Literal["prefix", "model", "pruned"]
    layers: PositiveInt
    retained_layers: tuple[NonNegativeInt, ...] | None = None
    fingerprint: str | None = None
    adapter_rank: int | None = Field(default=None, ge=1, le=MAX_RANK)
    alias: Alias | None = None

    @model_validator(mode="after")
    def _fields_of_its_kind(self) -> "AuxiliaryConfig":
        if (self.kind == "pruned") != (self.retained_layers is not None):
            raise ValueError("retained_layers belongs to kind 'pruned', and only there")
        if self.alias is not None and self.kind != "model":
            raise ValueError("alias belongs to kind 'model', and only there")
        if self.adapter_rank is not None and self.kind != "prefix" and self.alias is None:
            raise ValueError("adapter_rank belongs to kind 'prefix' or to a named model, and only there")
        if self.retained_layers is not None and len(self.retained_layers) != self.layers:
            raise ValueError(f"{len(self.retained_layers)} retained_layers do not make {self.layers} layers")
        return self


class PredictorConfig(_Part):
    """What the maps read, and for each base layer which auxiliary layers' (null: the entries are exact).

    Attributes:
        input: what they read of a layer.
        layer_map: the layers.
        preceding: of how many tokens before each one they read that, too: a causal convolution.
    """

    input: Literal["hidden_state", "keys_values"]
    layer_map: tuple[Sources | None, ...] = Field(min_length=1)
    preceding: int = Field(default=0, ge=0, le=MAX_PRECEDING)


MOST_REACH = 2**16
"""Tokens on either side of an attended one."""


class RecomputeConfig(_Part):
    """Which prompt tokens the base reads itself, unless a request's dial says how many (``engine.recompute``).

    All but ``share`` are fitted with a base; the defaults are what SmolLM2-135M-Instruct was found to want.

    Attributes:
        share: of a prompt's tokens, on average over the layers that are predicted.
        asking_tokens: tokens at the prompt's end that are looked at, to see what they attend to.
        asks: who looks: the predicted layers, through which the base reads these tokens first, or the layer behind an
            exact prefix, whose queries and keys are there in any case.
        attention_weight: of the logarithm of that attention beside the estimated deviation.
        attention_reach: tokens after an attended one that count as attended too: an answer goes on from where the
            question points to.
        attention_reach_before: tokens before an attended one that do, too.
        lower_layers: of the predicted layers, the share whose entries count most.
        upper_from: share from which on the layers above these read more than the prompt's end (all of it at 1).
    """

    share: float = Field(default=0.0, ge=0, le=1)
    asking_tokens: PositiveInt = 16
    asks: Literal["base", "prefix"] = "base"
    attention_weight: float = Field(default=0.5, ge=0, allow_inf_nan=False)
    attention_reach: int = Field(default=12, ge=0, le=MOST_REACH)
    attention_reach_before: int = Field(default=0, ge=0, le=MOST_REACH)
    lower_layers: float = Field(default=2 / 3, ge=1e-3, le=1)
    upper_from: float = Field(default=0.25, ge=0, lt=1)


class MeasuredDial(_Part):
    """How a quality reads prompts from some length on, as ``kvp eval dial --write`` measured it with this bundle.

    Attributes:
        quality: whose setting it is.
        from_tokens: length of the shortest prompts that it is for, up to the quality's next one.
        path: ``full`` where no prediction that is as good is sooner; ``auto`` predicts where that pays.
        exact_head: see ``engine.dial.Dial``, as the next three; what is left out is as without measuring.
        exact_tail: see above.
        recompute: see above.
        refine_tokens: see above.
        recovery: of the context, as measured at that length; 1 is full prefill's.
        retention: of the score of answers to questions, there, where these were asked.
        sooner: full prefill's time to the first token over its own, there.
    """

    quality: Literal["fast", "balanced"]
    from_tokens: NonNegativeInt
    path: Literal["auto", "full"] = "auto"
    exact_head: NonNegativeInt | None = None
    exact_tail: NonNegativeInt | None = None
    recompute: float | None = Field(default=None, ge=0, le=1)
    refine_tokens: NonNegativeInt | None = None
    recovery: FiniteFloat | None = None
    retention: FiniteFloat | None = None
    sooner: FiniteFloat | None = None

    @model_validator(mode="after")
    def _full_predicts_nothing(self) -> "MeasuredDial":
        if self.path == "full" and (self.exact_head or self.exact_tail or self.recompute or self.refine_tokens):
            raise ValueError("path 'full' reads everything, so that exact tokens and shares beside it have no place")
        return self


class BundleConfig(_Part):
    """The whole of kvp.json; ``training`` and ``measured`` are free-form records for people.

    Without a ``recompute`` section the predictor cannot tell which tokens to recompute. Without ``dials`` of a quality
    its constants hold (``engine.dial.QUALITIES``). ``sha256`` names the bundle's
    own weight files and their hashes; bundles made before it was introduced have none.
    """

    format_version: Literal[2] = FORMAT_VERSION
    base: BaseConfig
    auxiliary: AuxiliaryConfig
    predictor: PredictorConfig
    recompute: RecomputeConfig | None = None
    dials: tuple[MeasuredDial, ...] = ()
    training: dict[str, Any] = {}
    measured: dict[str, Any] = {}
    sha256: dict[Literal["predictor.safetensors", "adapter.safetensors"], str] = {}

    @model_validator(mode="after")
    def _prefix_that_can_ask(self) -> "BundleConfig":
        is_exact = self.auxiliary.kind == "prefix" and self.auxiliary.adapter_rank is None
        if self.recompute is not None and self.recompute.asks == "prefix" and not is_exact:
            raise ValueError("recompute: an exact prefix alone can ask (asks: prefix)")
        return self

    @model_validator(mode="after")
    def _dials_that_can_be_followed(self) -> "BundleConfig":
        places = [(dial.quality, dial.from_tokens) for dial in self.dials]
        if twice := [place for place in places if places.count(place) > 1]:
            raise ValueError(f"dials: {twice[0][0]} from {twice[0][1]} tokens on stands there twice")
        if self.recompute is None and any(dial.recompute for dial in self.dials):
            raise ValueError("dials: without a section recompute nothing can be recomputed")
        return self

    @property
    def has_predictor(self) -> bool:
        """Whether anything can be predicted: not where the prefix is the whole base, as of a model without a bundle."""
        return self.auxiliary.kind != "prefix" or self.auxiliary.layers < len(self.predictor.layer_map)

    def check_layers(self, base_layers: int, auxiliary_layers: int) -> None:
        """Check the layer map against the depth of both models.

        Args:
            base_layers: layers of the base.
            auxiliary_layers: layers that can be read (for a prefix, those that run and one more).

        Raises:
            BundleError: a wrong number of layers, or a source that the auxiliary does not have.
        """
        layer_map, is_prefix = self.predictor.layer_map, self.auxiliary.kind == "prefix"
        if len(layer_map) != base_layers:
            raise BundleError(f"kvp.json: layer_map has {len(layer_map)} entries, the base {base_layers} layers.")
        if self.auxiliary.layers + is_prefix != auxiliary_layers:
            raise BundleError(f"kvp.json: {self.auxiliary.layers} auxiliary layers do not fit the model.")
        exact = auxiliary_layers if is_prefix else 0
        if [sources is None for sources in layer_map] != [layer < exact for layer in range(base_layers)]:
            raise BundleError(f"kvp.json: the first {exact} entries of layer_map, and no others, must be null.")
        for layer, sources in enumerate(layer_map):
            if sources is not None and not (sources and max(sources) < auxiliary_layers):
                raise BundleError(
                    f"kvp.json: layer_map[{layer}] = {list(sources)} names no layers of the auxiliary's "
                    f"{auxiliary_layers}."
                )

    def check_files(self, directory: Path) -> None:
        """Compare the bundle's weight files with the hashes that were taken when they were written.

        Raises:
            BundleError: a file that is not as it was written.
        """
        for name, digest in self.sha256.items():
            if (directory / name).is_file() and sha256_of(directory / name) != digest:
                raise BundleError(
                    f"{directory / name} is not as it was written (kvp.json has another SHA-256); get the bundle again."
                )

    def save(self, directory: Path) -> None:
        """Write kvp.json into ``directory``, with the hashes of the weight files there."""
        hashes = {name: sha256_of(directory / name) for name in HASHED_FILES if (directory / name).is_file()}
        data = self.model_copy(update={"sha256": hashes}).model_dump(mode="json", exclude_none=False)
        write_json(directory / "kvp.json", data)


def read_config(directory: Path) -> BundleConfig:
    """Read and check kvp.json.

    Raises:
        BundleError: missing, not JSON, of a newer format, or with an unknown, missing or ill-typed field.
    """
    path = directory / "kvp.json"
    try:
        data = read_json(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BundleError(f"{directory} is not a bundle (no kvp.json); make one with 'kvp fit'.") from error
    except OSError as error:
        raise BundleError(f"{path} is not readable JSON ({error.strerror}); get the bundle again.") from error
    except InputError as error:
        raise BundleError(f"kvp.json is not readable JSON; get the bundle again: {error}") from error
    version = data.get("format_version") if isinstance(data, dict) else None
    if type(version) is int and version > FORMAT_VERSION:
        raise BundleError(
            f"{path} has format version {version}, newer than {FORMAT_VERSION}; run 'pip install -U kvp-mlx'."
        )
    if type(version) is int and version == 1:
        data = _from_format_1(data, path)
    try:
        return BundleConfig.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the document"
        raise BundleError(f"{path}: {where}: {first['msg']}; get the bundle again or upgrade kvp-mlx.") from error


def _from_format_1(data: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return format 1 as format 2; there the predictor named the share to recompute, and nothing else."""
    if "recompute" in data:
        raise BundleError(f"{path}: recompute: no field of format 1; get the bundle again.")
    predictor = data.get("predictor")
    share = predictor.get("recompute") if isinstance(predictor, dict) else None
    moved: dict[str, Any] = {"recompute": None if share is None else {"share": share}}
    if isinstance(predictor, dict):
        moved["predictor"] = {key: value for key, value in predictor.items() if key != "recompute"}
    return data | moved | {"format_version": FORMAT_VERSION}
