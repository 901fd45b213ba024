"""Time to first token of any arm, on the engine's clock."""

from typing import Any

import mlx.core as mx

from ..bundle.loading import KVPModel
from ..device.streams import default_step_size
from ..engine.clock import FirstToken, Ready, time_engine, time_first_token
from ..engine.dial import PREDICT, Dial
from ..engine.prefill import PrefillTimes
from .arm import Arm, Engine, Reading


def first_token(
    model: KVPModel,
    arm: Arm,
    ids: mx.array,
    dial: Dial = PREDICT,
    *,
    step_size: int | None = None,
    seed: int = 0,
    engine: Engine | None = None,
) -> FirstToken:
    """Take the first token of prompts by one arm: from token ids in hand to the token's value on the host.

    Args:
        model: the bundle.
        arm: which way.
        ids: whole prompts of one length ``(B, N)``, evaluated.
        dial: how the arms that predict read, where their names do not say so.
        step_size: tokens per chunk (default: ``default_step_size()``).
        seed: of the arm ``random``.
        engine: of an arm that has its own, opened beforehand; see ``Kind.engine``.

    Returns:
        Tokens and times; of an arm without an engine of its own also the model that decodes, and its cache of the
        whole prompt.
    """
    if arm.kind.engine is not None:
        opened, size = engine or arm.kind.engine(ids.shape[1]), step_size or default_step_size()
        return time_engine(lambda: opened(model, ids, size), model.base)

    def read(times: PrefillTimes) -> Ready:
        return arm.get_ready(model, ids, Reading(dial, step_size, seed, with_last=True, times=times))

    last: Any = ids[:, -1].tolist()
    return time_first_token(read, last)
