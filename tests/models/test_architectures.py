"""Every architecture of the table: with the true projections' outputs in the maps' place, prediction changes nothing.

The oracle is mlx-lm's own model. Where its cache is filled with what its own layers heard, it goes on as if it had
read the prompt itself: through every chunk size, in batches, before and beyond a window.
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from support.architectures import CONFIGS, WINDOW, bundle, random_ids, tiny_model
from support.tiny import estimating

import kvp_mlx
from kvp_mlx.bundle.predictor import Predictor
from kvp_mlx.errors import InputError
from kvp_mlx.models.entries import append_raw
from kvp_mlx.models.families import FAMILIES, Cache, kinds_of, mixer_of, text_model
from kvp_mlx.models.kinds import Layer
from kvp_mlx.models.sections import run_layers

STEPS = 20
AFTER = 5
"""Tokens that are read at once after the prompt, before single steps."""
PROMPTS = (3, WINDOW - 1, 5 * WINDOW + 3)


class Oracle(Predictor):
    """Says what the base's projections returned, whatever the maps' input is."""

    def __init__(self, predictor: Predictor, base: nn.Module, ids: mx.array):
        super().__init__(predictor.blocks)
        _, captured = run_layers(base, ids, make_prompt_cache(text_model(base)), range(len(kinds_of(base))))
        self._raw = {layer: captured[layer].raw for layer, _, _ in (t for b in self.blocks for t in b.targets)}
        self._done = 0

    def __call__(self, inputs: dict[str, mx.array], following: int | None = None) -> dict[int, dict[str, mx.array]]:
        shapes = super().__call__(inputs, following)
        end = self._done = self._done + next(iter(inputs.values())).shape[1]
        return {
            layer: {name: self._raw[layer][name][:, end - like.shape[1] : end] for name, like in outputs.items()}
            for layer, outputs in shapes.items()
        }


def logits_after(base: nn.Module, cache: list, ids: mx.array) -> np.ndarray:
    """Let the base read some tokens at once and the others one by one."""
    parts = [ids[:, :AFTER], *(ids[:, step : step + 1] for step in range(AFTER, ids.shape[1]))]
    return np.concatenate([np.array(base(part, cache=cache)) for part in parts], axis=1)


def quantised(model: nn.Module) -> nn.Module:
    def is_wide(_: str, module: nn.Module) -> bool:
        return hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0

    nn.quantize(model, group_size=32, bits=4, class_predicate=is_wide)
    return model


def test_every_row_is_tested() -> None:
    tested = {text_model(tiny_model(name)).model_type for name in CONFIGS} | CONFIGS.keys()
    assert tested == FAMILIES.keys()


def read_by_mlx_lm(base: nn.Module, ids: mx.array, step_size: int) -> Cache:
    """Return the base's cache after ids (B, T) in chunks; how it rounds depends on these, and on the CPU's kernels."""
    own: Cache = make_prompt_cache(base)
    for start in range(0, ids.shape[1], step_size):
        base(ids[:, start : start + step_size], cache=own)
    return own


@pytest.mark.parametrize(("step_size", "batch"), [(1, 3), (7, 2), (64, 1)])
@pytest.mark.parametrize("name", CONFIGS)
def test_full_is_mlx_lms_own_reading(name: str, step_size: int, batch: int) -> None:
    base = tiny_model(name)
    ids = random_ids(PROMPTS[-1] + AFTER, batch)
    own = read_by_mlx_lm(base, ids[:, : PROMPTS[-1]], step_size)
    found = kvp_mlx.base_prefill(bundle(base, 1), ids[:, : PROMPTS[-1]], prefill_step_size=step_size)
    rest = ids[:, PROMPTS[-1] :]
    np.testing.assert_array_equal(logits_after(base, found, rest), logits_after(base, own, rest))


@pytest.mark.parametrize("tokens", PROMPTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_true_outputs_make_the_cache_that_the_layers_make(name: str, tokens: int) -> None:
    base = tiny_model(name)
    ids = random_ids(tokens + AFTER + STEPS, 3)
    expected, *others = (
        logits_after(base, read_by_mlx_lm(base, ids[:, :tokens], n), ids[:, tokens:]) for n in (64, 1, 7)
    )
    atol = 1e-4 + max(float(np.abs(np.array(other) - np.array(expected)).max()) for other in others)
    depth = len(kinds_of(base))
    for layers in (1, depth // 2, depth - 1):
        model = bundle(base, layers)
        for step_size in (1, 7, 64):
            if model.predictor.blocks:
                model.predictor = Oracle(model.predictor, base, ids[:, :tokens])
            cache = kvp_mlx.predict_base_cache(model, ids[:, :tokens], prefill_step_size=step_size)
            found = logits_after(base, cache, ids[:, tokens:])
            np.testing.assert_allclose(found, expected, atol=atol, err_msg=f"{layers} layers, chunks of {step_size}")


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_next", "gpt_oss", "gemma3", "lfm2", "glm4_moe_lite", "qwen3_moe"])
@pytest.mark.parametrize("tail", [1, 5, 60])
def test_an_exact_tail_goes_on_from_what_was_predicted(name: str, tail: int) -> None:
    base = tiny_model(name)
    ids = random_ids(PROMPTS[-1] + AFTER, 2)
    own = make_prompt_cache(base)
    base(ids[:, : PROMPTS[-1]], cache=own)
    model = bundle(base, 1)
    model.predictor = Oracle(model.predictor, base, ids[:, : PROMPTS[-1]])
    cache = kvp_mlx.predict_base_cache(model, ids[:, : PROMPTS[-1]], exact_tail=tail)
    rest = ids[:, PROMPTS[-1] :]
    np.testing.assert_allclose(logits_after(base, cache, rest), logits_after(base, own, rest), atol=1e-4)


@pytest.mark.parametrize("name", ["qwen3_5", "gpt_oss", "lfm2"])
def test_recomputation_is_refused_by_kind(name: str) -> None:
    base = tiny_model(name)
    kinds = {"qwen3_5": "gated delta net", "gpt_oss": "sliding attention", "lfm2": "short convolution"}
    with pytest.raises(InputError, match=f"layers of {kinds[name]} keep no entries"):
        kvp_mlx.predict_base_cache(bundle(base, 1), random_ids(9, 1), recompute=0.5)


@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe_lite"])
def test_latents_are_computed_anew_in_their_places(name: str, share: float) -> None:
    base, ids = tiny_model(name), random_ids(60, 2)
    own = make_prompt_cache(base)
    base(ids, cache=own)
    model = estimating(bundle(base, 1))
    predicted, rewritten = (
        kvp_mlx.predict_base_cache(model, ids, recompute=part, prefill_step_size=17) for part in (0.0, share)
    )
    for layer, (mine, before, true) in enumerate(zip(rewritten, predicted, own, strict=True)):
        for one, old, exact in zip(*(cache.keys_and_values() for cache in (mine, before, true)), strict=True):
            errors = mx.abs(one - exact).max(axis=(1, 3))  # (B, 1, T, D) -> (B, T)
            if layer < 2 or share == 1.0:
                assert errors.max() < 1e-4
                continue
            assert mx.abs(old - exact).max() > 0.1
            is_kept = mx.abs(one - old).max(axis=(1, 3)) == 0
            assert 0 < is_kept.sum() < is_kept.size
            if layer == 2:  # on an exact stream
                assert mx.where(is_kept, 0, errors).max() < 1e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_the_fast_way_to_write_is_the_layers_own(name: str) -> None:
    """RoPE for several layers at once, and no call of the layer, makes what each layer's own call makes."""
    base = text_model(tiny_model(name))
    ids, kinds = random_ids(WINDOW - 1, 2), kinds_of(base)
    _, captured = run_layers(base, ids, make_prompt_cache(base), range(len(kinds)))
    fast, plain = make_prompt_cache(base), make_prompt_cache(base)
    append_raw(base, {layer: one.raw for layer, one in captured.items()}, fast)
    for number, kind in enumerate(kinds):
        kind.write(Layer(kind, mixer_of(base, number), captured[number].raw, plain[number]), captured[number].hidden)
        for mine, own in zip(tree_flatten(fast[number].state), tree_flatten(plain[number].state), strict=True):
            if isinstance(mine[1], mx.array) and fast[number].nbytes == plain[number].nbytes:
                np.testing.assert_allclose(mine[1], own[1], atol=1e-5, err_msg=f"layer {number}")


def test_what_a_window_does_not_reach_is_not_predicted() -> None:
    predictor = bundle(tiny_model("gpt_oss"), 1).predictor
    inputs = {block.name: mx.zeros((1, 20, block.in_width)) for block in predictor.blocks}
    for following, expected in ((None, 20), (0, WINDOW), (3, WINDOW - 3), (WINDOW, 0), (50, 0)):
        lengths = {
            layer: {raw.shape[1] for raw in outputs.values()} for layer, outputs in predictor(inputs, following).items()
        }
        assert lengths == {2: {expected}, 3: {20}}


@pytest.mark.parametrize("name", CONFIGS)
def test_4_bit_weights_are_read_as_they_are(name: str) -> None:
    base = quantised(tiny_model(name))
    ids = random_ids(PROMPTS[-1] + AFTER, 1)
    own = make_prompt_cache(base)
    base(ids[:, : PROMPTS[-1]], cache=own)
    model = bundle(base, 1)
    model.predictor = Oracle(model.predictor, base, ids[:, : PROMPTS[-1]])
    cache = kvp_mlx.predict_base_cache(model, ids[:, : PROMPTS[-1]])
    rest = ids[:, PROMPTS[-1] :]
    np.testing.assert_allclose(logits_after(base, cache, rest), logits_after(base, own, rest), atol=1e-3)
