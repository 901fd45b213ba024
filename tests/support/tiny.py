"""Tiny seeded models in fp32, and KVPModels made of them, each with the oracle that it has to agree with."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.models import llama as mlx_lm_llama
from mlx_lm.models import openelm as mlx_lm_openelm
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvp_mlx.bundle.config import AuxiliaryConfig, BaseConfig, BundleConfig, PredictorConfig, RecomputeConfig
from kvp_mlx.bundle.loading import KVPModel, build_predictor
from kvp_mlx.models.families import Cache
from kvp_mlx.models.sections import prefix_model

from .oracle import Entries, KVPrediction, Llama, Maps, OpenELM, Transformer

VOCABULARY = 97
LayerMap = Sequence[tuple[int, ...] | None]


def llama(seed: int = 0, **changes: Any) -> nn.Module:
    """Return a Llama of 4 layers with grouped queries."""
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "intermediate_size": 96,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-5,
        "vocab_size": VOCABULARY,
    }
    return _randomised(mlx_lm_llama.Model(mlx_lm_llama.ModelArgs(**(config | changes))), seed)


def openelm(seed: int = 0, **changes: Any) -> nn.Module:
    """Return an OpenELM of 4 layers, no two with the same heads and FFN width."""
    config = {
        "model_type": "openelm",
        "head_dim": 16,
        "num_transformer_layers": 4,
        "model_dim": 64,
        "vocab_size": VOCABULARY,
        "ffn_dim_divisor": 32,
        "num_query_heads": [4, 4, 8, 8],
        "num_kv_heads": [2, 1, 4, 2],
        "ffn_multipliers": [0.5, 1.0, 1.5, 2.0],
    }
    return _randomised(mlx_lm_openelm.Model(mlx_lm_openelm.ModelArgs(**(config | changes))), seed)


def small_llama(seed: int = 1) -> nn.Module:
    """Return a Llama that differs from ``llama`` in depth, width, heads and head_dim."""
    changes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 12}
    return llama(seed, intermediate_size=64, num_key_value_heads=4, rope_theta=500.0, **changes)


def small_openelm(seed: int = 1) -> nn.Module:
    """Return an OpenELM that differs from ``openelm`` in depth, width, heads and head_dim."""
    changes = {"num_query_heads": [2, 4, 4], "num_kv_heads": [1, 4, 2], "ffn_multipliers": [1.0, 0.5, 2.0]}
    return openelm(seed, model_dim=48, num_transformer_layers=3, head_dim=12, **changes)


def quantised(model: nn.Module) -> nn.Module:
    """Quantise to 8 bits wherever the width allows, as mlx-lm does."""

    def fits(_: str, module: nn.Module) -> bool:
        return hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0

    nn.quantize(model, group_size=32, bits=8, class_predicate=fits)
    return model


FAMILIES: dict[str, Callable[[], nn.Module]] = {"llama": llama, "openelm": openelm}
BASES: dict[str, Callable[[], nn.Module]] = FAMILIES | {
    "llama-8bit": lambda: quantised(llama()),
    "openelm-8bit": lambda: quantised(openelm()),
}


def _randomised(model: nn.Module, seed: int) -> nn.Module:
    """Give every parameter a value that shows when it is left out: norms away from 1, biases away from 0."""
    rng = np.random.default_rng(seed)

    def draw(name: str, old: mx.array) -> mx.array:
        if old.ndim == 1:
            return mx.array(rng.uniform(0.5, 1.5, old.shape), mx.float32)
        std = 0.2 if "embed" in name else 1.5 / old.shape[-1] ** 0.5
        return mx.array(rng.normal(0, std, old.shape), mx.float32)

    model.update(tree_map_with_path(draw, model.parameters()))
    mx.eval(model.parameters())
    return model


def arrays(model: nn.Module) -> dict[str, np.ndarray]:
    """Return a model's parameters under mlx-lm's names, quantised ones dequantised."""
    flat = dict(tree_flatten(model.parameters()))
    for name, module in model.named_modules():
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
            packed = (flat.pop(f"{name}.{part}") for part in ("weight", "scales", "biases"))
            flat[f"{name}.weight"] = mx.dequantize(*packed, group_size=module.group_size, bits=module.bits)
    return {name: np.array(array) for name, array in flat.items()}


def oracle_of(model: nn.Module) -> Transformer:
    """Return the NumPy twin of an mlx-lm model."""
    return {"llama": Llama, "openelm": OpenELM}[model.model_type](vars(model.args), arrays(model))


def token_ids(length: int, batch: int = 1, seed: int = 0) -> np.ndarray:
    """Return random token ids (batch, length)."""
    return np.random.default_rng(seed).integers(0, VOCABULARY, (batch, length))


def paired(
    base: nn.Module,
    auxiliary: nn.Module,
    layer_map: LayerMap,
    *,
    reads: str = "keys_values",
    retained: Sequence[int] | None = None,
    preceding: int = 0,
    **parts: Any,
) -> tuple[KVPModel, KVPrediction]:
    """Return a KVPModel with random maps, kind ``model`` (or ``pruned``, with ``retained``), and its oracle."""
    config = AuxiliaryConfig(
        kind="pruned" if retained else "model",
        layers=len(auxiliary.layers),
        retained_layers=tuple(retained) if retained else None,
    )
    base_oracle, auxiliary_oracle = oracle_of(base), oracle_of(auxiliary)
    maps = _random_maps(base_oracle, auxiliary_oracle, layer_map, reads, preceding)
    oracle = KVPrediction(base_oracle, auxiliary_oracle, layer_map, reads, maps, preceding)
    return _assembled(base, auxiliary, config, oracle, **parts), oracle


def prefixed(
    base: nn.Module,
    layers: int,
    layer_map: LayerMap | None = None,
    *,
    reads: str = "hidden_state",
    preceding: int = 0,
    **parts: Any,
) -> tuple[KVPModel, KVPrediction]:
    """Return a KVPModel of kind ``prefix`` with random maps, and its oracle."""
    oracle = oracle_of(base)
    if layer_map is None:
        layer_map = [None if layer <= layers else (layers,) for layer in range(oracle.depth)]
    maps = _random_maps(oracle, oracle, layer_map, reads, preceding)
    oracle = KVPrediction(oracle, oracle, layer_map, reads, maps, preceding)
    config = AuxiliaryConfig(kind="prefix", layers=layers)
    return _assembled(base, prefix_model(base, layers), config, oracle, **parts), oracle


def pruned(base: nn.Module, retained: Sequence[int]) -> nn.Module:
    """Return a copy of some layers of a Llama or OpenELM with weights of its own."""
    args, layers = copy.copy(base.args), len(retained)
    if base.model_type == "llama":
        args.num_hidden_layers, args.layer_types = layers, ["full_attention"] * layers
    else:
        args.num_transformer_layers = layers
        for name in ("num_query_heads", "num_kv_heads", "ffn_multipliers"):
            setattr(args, name, [getattr(args, name)[layer] for layer in retained])
    return _randomised(type(base)(args), seed=2)


def itself(base: nn.Module) -> KVPModel:
    """Return a KVPModel whose auxiliary is the base and whose maps change nothing: prediction is exact."""
    twin = oracle_of(base)
    layer_map = [(layer,) for layer in range(twin.depth)]
    widths = {layer: _widths(twin, "keys_values", (layer,)) for layer in range(twin.depth)}
    maps = {(layer, kind): (np.eye(w), np.zeros(w)) for layer, w in widths.items() for kind in ("keys", "values")}
    config = AuxiliaryConfig(kind="model", layers=twin.depth)
    return _assembled(base, base, config, KVPrediction(twin, twin, layer_map, "keys_values", maps))


def estimating(model: KVPModel) -> KVPModel:
    """Return a bundle that can recompute, the weights of its estimator of deviation random."""
    model.predictor.add_estimator()
    linear = model.predictor.deviation.linear
    linear.weight = 0.2 * mx.random.normal(linear.weight.shape, key=mx.random.key(3))
    return replace(model, config=model.config.model_copy(update={"recompute": RecomputeConfig()}))


def _assembled(
    base: nn.Module,
    auxiliary: nn.Module,
    config: AuxiliaryConfig,
    oracle: KVPrediction,
    tokenizer: TokenizerWrapper | None = None,
    base_config: dict[str, Any] | None = None,
) -> KVPModel:
    predictor = PredictorConfig(input=oracle.reads, layer_map=tuple(oracle.layer_map), preceding=oracle.preceding)
    bundle = BundleConfig(base=BaseConfig(fingerprint="none", path="base"), auxiliary=config, predictor=predictor)
    maps = build_predictor(base, auxiliary, bundle)
    maps.load_weights([(name, mx.array(array, mx.float32)) for name, array in _wide(oracle).items()])
    mx.eval(maps.parameters())
    return KVPModel(base, auxiliary, maps, tokenizer, bundle, base_config or {})


def _widths(model: Transformer, reads: str, sources: Sequence[int]) -> int:
    """Return the features of several layers' readings together."""
    read = model.forward(np.zeros((1, 1), int)).readings
    return sum(getattr(read[layer], "hidden" if reads == "hidden_state" else "keys").shape[-1] for layer in sources)


def _random_maps(base: Transformer, auxiliary: Transformer, layer_map: LayerMap, reads: str, preceding: int) -> Maps:
    rng = np.random.default_rng(7)
    maps = {}
    for layer, sources in enumerate(layer_map):
        if sources is not None:
            width = (1 + preceding) * _widths(auxiliary, reads, sources)
            shape = (_widths(base, "keys_values", (layer,)), width)
            for kind in ("keys", "values"):
                maps[layer, kind] = rng.normal(0, shape[1] ** -0.5, shape), rng.normal(0, 0.5, shape[0])
    return maps


def _wide(oracle: KVPrediction) -> dict[str, np.ndarray]:
    """Lay the maps out as predictor.safetensors does: one wide map per source, its base layers in order."""
    wide = {}
    for sources in dict.fromkeys(sources for sources in oracle.layer_map if sources is not None):
        layers = [layer for layer, theirs in enumerate(oracle.layer_map) if theirs == sources]
        keys, values = ([(layer, kind) for layer in layers] for kind in ("keys", "values"))
        groups = {"hidden": keys + values} if oracle.reads == "hidden_state" else {"keys": keys, "values": values}
        for read, targets in groups.items():
            name = f"maps.{read}_{'_'.join(map(str, sources))}"
            wide[f"{name}.weight"] = np.concatenate([oracle.maps[target][0] for target in targets])
            wide[f"{name}.bias"] = np.concatenate([oracle.maps[target][1] for target in targets])
    return wide


def assert_cache_equal(cache: Cache, expected: Sequence[Entries], atol: float = 1e-4) -> None:
    """Check an mlx-lm cache, entry by entry, against the oracle's."""
    assert len(cache) == len(expected)
    for layer, (mine, theirs) in enumerate(zip(cache, expected, strict=True)):
        assert mine.offset == len(theirs), f"layer {layer}"
        keys, values = mine.keys_and_values()
        np.testing.assert_allclose(np.array(keys), theirs.keys, atol=atol, rtol=0, err_msg=f"keys of layer {layer}")
        np.testing.assert_allclose(
            np.array(values), theirs.values, atol=atol, rtol=0, err_msg=f"values of layer {layer}"
        )


def entries_of(cache: Cache) -> list[Entries]:
    """Return an mlx-lm cache in the oracle's form."""
    return [Entries(*map(np.array, layer.keys_and_values()), np.arange(layer.offset)) for layer in cache]


def chat_tokenizer(template: str | None = None) -> TokenizerWrapper:
    """Return a word-level tokeniser of ``VOCABULARY`` words whose text survives decoding and encoding.

    Args:
        template: chat template; default: role mark, content, end mark, separated by spaces.
    """
    marks = ["<unk>", "<end>", "<system>", "<user>", "<assistant>"]
    words = marks + [f"w{i}" for i in range(VOCABULARY - len(marks))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>")
    fast.chat_template = template or CHAT_TEMPLATE
    return TokenizerWrapper(fast)


CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
