"""Caches of recurrent and latent layers against NumPy, written from the papers: no code of ours or mlx-lm's."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from support.architectures import random_ids, tiny_model

from kvp_mlx.models.attention import last_attention
from kvp_mlx.models.entries import append_raw
from kvp_mlx.models.families import kinds_of, mixer_of, targets_of, text_model
from kvp_mlx.models.sections import run_layers

TOKENS = 11


def random_outputs(model, layer: int, tokens: int = TOKENS) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(layer)
    return {target.name: rng.normal(size=(2, tokens, target.width)) for target in targets_of(model)[layer]}


def written(model, layer: int, outputs: dict[str, np.ndarray], chunk: int):
    """Append random outputs to one layer's cache, some positions at a time."""
    cache = make_prompt_cache(model)
    for start in range(0, TOKENS, chunk):
        raw = {name: mx.array(x[:, start : start + chunk], mx.float32) for name, x in outputs.items()}
        append_raw(model, {layer: raw}, cache)
    return cache[layer]


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def delta_state(outputs: dict[str, np.ndarray], mixer) -> tuple[np.ndarray, np.ndarray]:
    """Return a convolution's tail and the state (B, heads, value features, key features), token by token.

    S <- g S + b (v - g S k) k^T with g = exp(-exp(A) softplus(a + bias)) and unit keys (arXiv 2412.06464).
    """
    kernel, heads = np.array(mixer.conv1d.weight)[..., 0], mixer.num_v_heads  # (channels, K)
    x = np.concatenate([outputs[name] for name in ("queries", "keys", "values")], axis=-1)
    padded = np.pad(x, [(0, 0), (kernel.shape[1] - 1, 0), (0, 0)])
    mixed = silu(sum(padded[:, i : i + TOKENS] * kernel[:, i] for i in range(kernel.shape[1])))
    width = outputs["keys"].shape[-1]
    keys = mixed[..., width : 2 * width].reshape(2, TOKENS, mixer.num_k_heads, -1)
    keys = np.repeat(keys / np.sqrt((keys**2).sum(-1, keepdims=True) + 1e-6), heads // mixer.num_k_heads, axis=2)
    values = mixed[..., 2 * width :].reshape(2, TOKENS, heads, -1)
    state = np.zeros((2, heads, values.shape[-1], keys.shape[-1]))
    for token in range(TOKENS):
        pace = np.log1p(np.exp(outputs["a"][:, token] + np.array(mixer.dt_bias)))
        state = state * np.exp(-np.exp(np.array(mixer.A_log)) * pace)[..., None, None]
        key, strength = keys[:, token], 1 / (1 + np.exp(-outputs["b"][:, token]))
        error = values[:, token] - np.einsum("bhvk,bhk->bhv", state, key)
        state = state + np.einsum("bh,bhv,bhk->bhvk", strength, error, key)
    return padded[:, TOKENS:], state


@pytest.mark.parametrize("chunk", [1, 4, TOKENS])
@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_next"])
def test_the_state_of_a_gated_delta_net(name: str, chunk: int) -> None:
    model = text_model(tiny_model(name))
    outputs = random_outputs(model, 1)
    cache = written(model, 1, outputs, chunk)
    tail, state = delta_state(outputs, mixer_of(model, 1))
    np.testing.assert_allclose(cache[0], tail, atol=1e-5)
    np.testing.assert_allclose(cache[1], state, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 4, TOKENS])
def test_the_tail_of_a_short_convolution(chunk: int) -> None:
    model = tiny_model("lfm2")
    outputs = random_outputs(model, 1)
    cache = written(model, 1, outputs, chunk)
    np.testing.assert_allclose(cache[0], (outputs["b"] * outputs["x"])[:, -2:], atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 4, TOKENS])
def test_latents_are_normed_and_their_keys_rotated(chunk: int) -> None:
    model = tiny_model("glm4_moe_lite")
    outputs, mixer = random_outputs(model, 1), mixer_of(model, 1)
    keys, values = written(model, 1, outputs, chunk).keys_and_values()  # the latent, the rotated key
    latent, key = np.split(outputs["latent"], [mixer.kv_lora_rank], axis=-1)
    latent = latent / np.sqrt((latent**2).mean(-1, keepdims=True) + 1e-5) * np.array(mixer.kv_a_layernorm.weight)
    angles = np.arange(TOKENS)[:, None] * 10000.0 ** (-np.arange(0, key.shape[-1], 2) / key.shape[-1])
    turned = (key[..., ::2] + 1j * key[..., 1::2]) * np.exp(1j * angles)
    np.testing.assert_allclose(keys[:, 0], latent, atol=1e-5)
    np.testing.assert_allclose(values[:, 0], np.stack([turned.real, turned.imag], -1).reshape(key.shape), atol=1e-5)


def test_attention_to_latents_is_that_to_the_keys_made_of_them() -> None:
    model, ids = tiny_model("glm4_moe_lite"), random_ids(TOKENS, 2)
    cache = make_prompt_cache(model)
    _, captured = run_layers(model, ids, cache, [1])
    mixer = mixer_of(model, 1)
    latents, turned = (np.array(part)[:, 0] for part in cache[1].keys_and_values())
    weight = np.array(mixer.embed_q.weight)  # (heads, rank, plain features)
    keys = np.einsum("bsr,hrd->bhsd", latents, weight)
    keys = np.concatenate([keys, np.repeat(turned[:, None], len(weight), axis=1)], axis=-1)
    low = np.array(captured[1].hidden) @ np.array(mixer.q_a_proj.weight).T
    low = low / np.sqrt((low**2).mean(-1, keepdims=True) + 1e-5) * np.array(mixer.q_a_layernorm.weight)
    queries = (low @ np.array(mixer.q_b_proj.weight).T).reshape(2, TOKENS, len(weight), -1).swapaxes(1, 2)
    plain, rotary = np.split(queries, [weight.shape[2]], axis=-1)
    angles = np.arange(TOKENS)[:, None] * 10000.0 ** (-np.arange(0, rotary.shape[-1], 2) / rotary.shape[-1])
    rotated = (rotary[..., ::2] + 1j * rotary[..., 1::2]) * np.exp(1j * angles)
    queries = np.concatenate([plain, np.stack([rotated.real, rotated.imag], -1).reshape(rotary.shape)], axis=-1)
    scores = queries @ keys.swapaxes(-1, -2) / np.sqrt(queries.shape[-1])
    weights = np.exp(np.where(np.tri(TOKENS, dtype=bool), scores, -np.inf))
    expected = (weights / weights.sum(-1, keepdims=True))[:, :, -3:]
    found = last_attention(model, 1, captured[1].hidden, cache[1], 3)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen3_next", "gpt_oss", "gemma3_text", "deepseek_v3", "lfm2"])
def test_new_caches_are_those_that_the_model_makes(name: str) -> None:
    model = tiny_model(name)
    for kind, own in zip(kinds_of(model), make_prompt_cache(model), strict=True):
        assert (type(kind.new_cache()), vars(kind.new_cache())) == (type(own), vars(own))


def test_targets_are_the_narrowest() -> None:
    """Neither the delta net's gate nor its whole queries are predicted, and of a latent layer nothing else."""
    delta = {target.name: (target.width, target.last) for target in targets_of(text_model(tiny_model("qwen3_5")))[0]}
    assert delta == {"queries": (16, 3), "keys": (16, None), "values": (48, None), "a": (4, None), "b": (4, None)}
    assert [(t.name, t.width, t.last) for t in targets_of(tiny_model("deepseek_v3"))[0]] == [("latent", 24, None)]
