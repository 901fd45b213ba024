"""Threads may share a model: listening and positions are views of it, so nothing in it changes while it reads."""

import sys
import threading
from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest
from support.tiny import llama, prefixed, token_ids

from kvp_mlx.arms.kinds import parse_arm
from kvp_mlx.engine.prefill import predict_base_cache

THREADS, ROUNDS = 4, 6


@pytest.fixture
def switching() -> Iterator[None]:
    """Let threads change every few bytecodes."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("switching")
def test_predictions_side_by_side_are_those_of_one_after_another() -> None:
    model, _ = prefixed(llama(), 2)
    prompts = [mx.array(token_ids(40 + 3 * number, seed=number)) for number in range(THREADS)]

    def entries(number: int) -> list[np.ndarray]:
        predicted = predict_base_cache(model, prompts[number], exact_tail=12, prefill_step_size=9)
        _, pruned = parse_arm("lazy-0.8-0.4").read(model, prompts[number])
        return [np.array(layer.keys_and_values()[0]) for layer in (*predicted, *pruned)]

    alone = [entries(number) for number in range(THREADS)]
    wrong: list[object] = []

    def work(number: int) -> None:
        try:
            for _ in range(ROUNDS):
                for found, expected in zip(entries(number), alone[number], strict=True):
                    np.testing.assert_array_equal(found, expected)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
