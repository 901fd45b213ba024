"""``kvp convert verify``: a converted model's logits beside those that PyTorch computes from the checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ...bundle.loading import load
from ...engine.prefill import predict_base_cache
from ...errors import InputError
from ...models.loading import fit_to_device, load_model, read_config
from ...models.safetensors import weight_tensors
from ..checkpoint import load_state_dict, open_checkpoint
from ..openelm import PREFIX
from ..output import NO_PROGRESS, Progress

PROMPTS = 3
PROMPT_TOKENS = 24
STEPS = 3
# Root mean square difference that passes, as a share of the logits' standard deviation; unrelated logits give 1.4.
TOLERANCES = {"F32": 1e-4, "F16": 0.02, "BF16": 0.1, "8 bits": 0.2, "4 bits": 1.0}

Logits = dict[str, tuple[np.ndarray, np.ndarray]]
"""By check: what was found and what the reference says, both ``(1, T, vocabulary)``."""


def verify_conversion(directory: Path, source: Path, *, progress: Progress = NO_PROGRESS) -> dict[str, Any]:
    """Compare a converted bundle or OpenELM directory with the checkpoint it was made from.

    The layer map, which no checkpoint holds, is taken from the bundle.

    Args:
        directory: the output of ``kvp convert kvp`` or ``kvp convert openelm``.
        source: the ``.pt`` file.
        progress: called with (prompts done, prompts to do).

    Returns:
        ``ok``, ``precision``, ``tolerance``, and ``checks`` by name (``base``; for a bundle also ``auxiliary``, and
        ``predicted``: the prompt's last token and three decoded ones): ``max_difference`` of the logits,
        ``relative_difference`` (root mean square, in standard deviations), ``argmax_equal`` of ``positions``.

    Raises:
        InputError: an unusable directory, or a checkpoint of something else.
    """
    open_checkpoint(source)  # checks it
    checkpoint = {name.removeprefix(PREFIX): tensor for name, tensor in load_state_dict(source).items()}
    is_bundle = (directory / "kvp.json").exists()
    precision = stored_precision(directory / "base" if is_bundle else directory)
    compute = _bundle_logits(directory, checkpoint) if is_bundle else _model_logits(directory, checkpoint)
    if precision not in TOLERANCES:
        raise InputError(f"{directory} is stored in {precision}, which is not verified; convert it to 8 or 4 bits.")
    rounds: list[Logits] = []
    for seed in range(PROMPTS):
        try:
            rounds.append(compute(seed))
            if any(found.shape != expected.shape for found, expected in rounds[-1].values()):
                raise IndexError("its vocabulary is another")
        except (KeyError, IndexError, RuntimeError) as error:
            raise InputError(f"{source} is not the checkpoint that {directory} was made from ({error}).") from error
        progress(seed + 1, PROMPTS)
    checks = {name: _compared([logits[name] for logits in rounds]) for name in rounds[0]}
    tolerance = TOLERANCES[precision]
    ok = all(check["relative_difference"] <= tolerance for check in checks.values())
    return {"ok": ok, "precision": precision, "tolerance": tolerance, "checks": checks}


def stored_precision(directory: Path) -> str:
    """Return ``"4 bits"`` or ``"8 bits"`` for a quantised model directory, else the safetensors name of its dtype."""
    tensors = weight_tensors(directory)
    quantization = read_config(directory).get("quantization")
    return f"{quantization['bits']} bits" if quantization else tensors[0][2].dtype


def _model_logits(directory: Path, checkpoint: dict[str, Any]) -> Callable[[int], Logits]:
    from . import reference

    model, _ = load_model(directory)
    fit_to_device(model)

    def compute(seed: int) -> Logits:
        ids = _random_ids(seed, model.args.vocab_size)
        return {"base": (_host(model(mx.array(ids))), reference.logits(checkpoint, ids)[0].numpy())}

    return compute


def _bundle_logits(directory: Path, checkpoint: dict[str, Any]) -> Callable[[int], Logits]:
    from . import reference

    model = load(str(directory))
    layer_map = [sources[0] for sources in model.config.predictor.layer_map if sources]

    def compute(seed: int) -> Logits:
        ids = _random_ids(seed, model.base.args.vocab_size)
        logits = {
            part: (_host(own(mx.array(ids))), reference.logits(reference.under(checkpoint, f"{part}."), ids)[0].numpy())
            for part, own in (("base", model.base), ("auxiliary", model.auxiliary))
        }
        prompt, following = ids[:, :-STEPS], ids[:, -STEPS:]
        cache = predict_base_cache(model, mx.array(prompt[:, :-1]))
        steps = [model.base(mx.array(ids[:, i : i + 1]), cache=cache) for i in range(prompt.shape[1] - 1, ids.shape[1])]
        expected = reference.predicted_logits(checkpoint, layer_map, prompt, following).numpy()
        return logits | {"predicted": (_host(mx.concatenate(steps, axis=1)), expected)}

    return compute


def _random_ids(seed: int, vocab_size: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab_size, (1, PROMPT_TOKENS))


def _host(logits: mx.array) -> np.ndarray:
    return np.array(logits.astype(mx.float32))


def _compared(pairs: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    found, expected = (np.concatenate(side) for side in zip(*pairs, strict=True))
    difference = found - expected
    equal = found.argmax(-1) == expected.argmax(-1)
    return {
        "max_difference": float(np.abs(difference).max()),
        "relative_difference": float(np.sqrt((difference**2).mean()) / expected.std()),
        "argmax_equal": int(equal.sum()),
        "positions": equal.size,
    }
