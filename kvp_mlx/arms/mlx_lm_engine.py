"""The arm ``mlx-lm``: its own ``generate_step``, to the first token of a prompt from scratch."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step, generation_stream
from mlx_lm.models.cache import make_prompt_cache

from ..bundle.loading import KVPModel
from .arm import Engine


def open_engine(_: int) -> Engine:
    """Return the engine; ``generate_step`` takes one prompt, so a batch is read in the same steps beside it."""
    return first_tokens


def first_tokens(model: KVPModel, ids: mx.array, step_size: int) -> list[int]:
    """Return the greedy first token of each of the prompts ``ids`` (B, N)."""
    if ids.shape[0] > 1:
        return batch_first_tokens(model.base, ids, step_size)
    steps = generate_step(ids[0], model.base, prefill_step_size=step_size, max_tokens=1)
    return [int(next(steps)[0])]


def batch_first_tokens(base: nn.Module, ids: mx.array, step_size: int) -> list[int]:
    """Do for a batch just what ``generate_step`` does for one prompt."""
    cache, read = make_prompt_cache(base), ids.shape[1] - 1
    with mx.stream(generation_stream):
        for start in range(0, read, step_size):
            base(ids[:, start : min(start + step_size, read)], cache=cache)
            mx.eval([layer.state for layer in cache])
            mx.clear_cache()
        tokens: Any = mx.argmax(base(ids[:, -1:], cache=cache)[:, -1], axis=-1).tolist()
    return tokens
