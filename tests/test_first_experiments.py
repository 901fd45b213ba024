"""The seed paper's first experiments (arXiv 2410.08391), at a size that a test can afford."""

import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from conftest import Kvp
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from support.directories import prose, write_llama
from support.tiny import VOCABULARY, itself, llama

import kvp_mlx
from kvp_mlx.models.loading import load_tokenizer
from kvp_mlx.train.loop import Trained, TrainOptions, train
from kvp_mlx.train.objectives import Weights
from kvp_mlx.train.recovery import RecoveryMeasurement
from kvp_mlx.train.text import token_windows


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prose") / "text.txt"
    path.write_text(prose(6000, 0))
    return path


@pytest.fixture(scope="module")
def learned_base(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that has learnt the text a little, as the paper's have: random ones have nothing to lose."""
    directory = write_llama(tmp_path_factory.mktemp("learned") / "base")
    model, config = load_model(directory)
    windows = list(token_windows([text], load_tokenizer(directory, config), 64, 0, packed=True))
    optimizer = optim.AdamW(3e-3)

    def loss(model: nn.Module, ids: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:], reduction="mean")

    step = nn.value_and_grad(model, loss)
    losses = []
    for number in range(120):
        start = 8 * number % (len(windows) - 8)
        value, gradient = step(model, mx.array(windows[start : start + 8]))
        optimizer.update(model, gradient)
        mx.eval(model.parameters(), optimizer.state)
        losses.append(value.item())
    assert losses[-1] < 0.7 * losses[0]
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(directory / "model.safetensors"), weights, metadata={"format": "mlx"})
    return directory


def test_the_three_losses_fall_together(learned_base: Path, text: Path, tmp_path: Path, kvp: Kvp) -> None:
    """(a) Base, auxiliary and consistency loss of a half-pruned auxiliary trained whole."""
    out = tmp_path / "out"
    outcome = kvp(
        *("train", learned_base, "--prune", 0.5, "--train-auxiliary", "--objective", "paper", "--data", text),
        *("--window", 64, "--fit-tokens", 16, "--batch-size", 4, "--tokens", 64 * 4 * 90, "--learning-rate", 3e-3),
        *("--out", out, "--json"),
    )
    assert outcome.code == 0, outcome.err
    log = [json.loads(line) for line in (tmp_path / "out.training" / "log.jsonl").read_text().splitlines()]
    steps = [entry for entry in log if "loss" in entry]
    for name in ("base", "auxiliary", "consistency"):
        losses = [entry[name] for entry in steps]
        print(f"{name}: {np.mean(losses[:5]):.3f} -> {np.mean(losses[-10:]):.3f}")
        spread = np.std(losses[:5]) + np.std(losses[-10:])
        assert np.mean(losses[-10:]) < np.mean(losses[:5]) - spread, name
    checks = [entry["recovery"] for entry in log if "recovery" in entry]
    assert checks[-1] > checks[0]


def random_batches(number: int) -> Iterator[list[list[int]]]:
    """Four windows of random tokens per batch, the same for the same number."""
    for seed in itertools.count(number):
        yield np.random.default_rng(seed).integers(0, VOCABULARY, (4, 48)).tolist()


@pytest.mark.long
def test_planted_linear_relation_is_recovered(tmp_path: Path) -> None:
    """(b) Base and auxiliary are one model, so the identity is the exact map; training starts from random maps."""
    model = itself(llama())
    identity = dict(tree_flatten(model.predictor.parameters()))
    rng = np.random.default_rng(0)
    start = {name: mx.array(rng.normal(0, 0.3, array.shape), mx.float32) for name, array in identity.items()}
    model.predictor.load_weights(list(start.items()))
    weights = Weights(continuation=0, consistency=1)
    options = TrainOptions(
        minutes=None, tokens=800 * 4 * 48, learning_rate=1e-2, weight_decay=0, weights=weights, window=48, right=16
    )
    held_back = np.random.default_rng(10**6).integers(0, VOCABULARY, (4, 48)).tolist()
    measurement = RecoveryMeasurement(model, held_back, 16)

    def validate() -> dict[str, float]:
        found = measurement.measure()
        return {"recovery": found["arms"]["kvp"]["recovery"], "divergence": found["divergence"]}

    train(
        *(model, Trained(model, options), random_batches, options, tmp_path),
        resume=False,
        data=["random"],
        validate=validate,
        save=lambda record: None,
    )
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [entry["consistency"] for entry in log if "loss" in entry]
    print(f"consistency: {losses[0]:.4f} -> {np.mean(losses[-10:]):.5f}")
    assert np.mean(losses[-10:]) < 0.03 * losses[0]
    ids = mx.array(held_back)
    for one, other in zip(kvp_mlx.predict_base_cache(model, ids), kvp_mlx.base_prefill(model, ids), strict=True):
        for a, b in zip(one.keys_and_values(), other.keys_and_values(), strict=True):
            assert (mx.linalg.norm(a - b) / mx.linalg.norm(b)).item() < 0.03
    for name, array in tree_flatten(model.predictor.parameters()):  # the data spans all of the maps' inputs
        np.testing.assert_allclose(np.array(array), np.array(identity[name]), atol=0.05, err_msg=name)


@pytest.mark.parametrize("prefill", ["full", "kvp"])
def test_time_to_the_first_token_of_a_one_word_answer(prefill: str, fitted: Path) -> None:
    """(c) Both paths through the engine; the parts add up to no more than the whole, that to no more than passed."""
    model = kvp_mlx.load(str(fitted))
    dial = {"prefill": prefill, "exact_head": 0, "exact_tail": 0}
    start = time.perf_counter()
    pieces = list(kvp_mlx.stream_generate(model, "The harbour lies below " * 30, **dial, max_tokens=1))
    passed_ms = 1e3 * (time.perf_counter() - start)
    last = pieces[-1]
    assert (last.path, last.generation_tokens, last.finish_reason) == (prefill, 1, "length")
    times = last.times
    parts = (times.auxiliary_prefill_ms, times.predict_ms, times.base_prefill_ms)
    assert [part > 0 for part in parts] == ([True, True, False] if prefill == "kvp" else [False, False, True])
    assert last.first_step_ms > 0
    assert sum(parts) + last.first_step_ms <= last.ttft_ms <= passed_ms
