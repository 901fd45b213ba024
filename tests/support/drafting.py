"""Bundles whose auxiliary often drafts what the base says, and what decoding with drafts has to leave behind."""

from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from kvp_mlx.bundle.loading import KVPModel
from kvp_mlx.engine.context import Context
from kvp_mlx.engine.dial import Dial
from kvp_mlx.engine.prefill import base_prefill, catch_up_auxiliary
from kvp_mlx.engine.reply import reply

from .tiny import chat_tokenizer, entries_of, llama, paired, pruned

ONE_EACH = ((0,), (1,), (2,), (3,))


def near(noise: float = 0.02, **changes: Any) -> nn.Module:
    """Return a copy of ``llama`` that agrees with it often, and not always."""
    other = llama(**changes)
    for number, layer in enumerate(other.layers):
        weight = layer.mlp.down_proj.weight
        layer.mlp.down_proj.weight = weight + noise * mx.random.normal(weight.shape, key=mx.random.key(number))
    return other


@cache
def bundle(kind: str = "model", ends: bool = False, noise: float = 0.02, **changes: Any) -> KVPModel:
    """Return a bundle whose auxiliary drafts; without ``ends`` no token ends an answer."""
    tokenizer = chat_tokenizer()
    if kind == "pruned":
        half = ((0,), (0,), (1,), (1,))
        model, _ = paired(llama(), pruned(llama(), [0, 2]), half, retained=[0, 2], tokenizer=tokenizer)
    else:
        model, _ = paired(llama(**changes), near(noise, **changes), ONE_EACH, tokenizer=tokenizer)
    if not ends:
        tokenizer._eos_token_ids.clear()
    return model


def check_replay(context: Context, ids: list[int], dial: Dial) -> None:
    """Compare both caches with those of a context that reads the same tokens."""
    other, tokens = Context(context.model), context.tokens
    for _ in reply(other, ids, dial, max_tokens=1):
        pass
    other.keep(len(ids))
    if len(tokens) > len(ids):
        base_prefill(context.model, mx.array([tokens[len(ids) :]]), other.cache)
    held = context.auxiliary_cache[0].offset
    if unread := [*ids, *tokens[len(ids) :]][other.auxiliary_cache[0].offset : held]:
        catch_up_auxiliary(context.model, mx.array([unread]), other.auxiliary_cache)
    for mine, theirs, length in (
        (context.cache, other.cache, len(tokens)),
        (context.auxiliary_cache, other.auxiliary_cache, held),
    ):
        assert {layer.offset for layer in mine} == {length}
        for one, expected in zip(entries_of(mine), entries_of(theirs), strict=True) if length else ():
            for part in ("keys", "values"):
                np.testing.assert_allclose(
                    getattr(one, part), getattr(expected, part)[..., :length, :], atol=1e-4, rtol=0
                )
