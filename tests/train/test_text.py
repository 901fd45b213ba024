"""The text that ``kvp train`` reads: windows, batches, places, and what is held back."""

import gzip
import itertools
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from support.tiny import chat_tokenizer

import kvp_mlx
from kvp_mlx.errors import InputError
from kvp_mlx.train.loop import Trained, TrainOptions, gradients_of, split_points
from kvp_mlx.train.objectives import continuation_losses
from kvp_mlx.train.recovery import RecoveryMeasurement
from kvp_mlx.train.run import endless_windows, hold_back
from kvp_mlx.train.teacher import make_batch, teach
from kvp_mlx.train.text import PromptWindow, bucketed, data_files, token_windows


def numbers(count: int, first: int = 0) -> str:
    """Text in which every word stands once, so that a stretch of it tells where it was."""
    return " ".join(str(10**6 + i) for i in range(first, first + count))


def test_packed_windows_have_exactly_the_length_and_lose_nothing(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    names = [f"w{i}" for i in range(90)]
    file = tmp_path / "a.jsonl"
    documents = [" ".join(names[i : i + 10]) for i in range(0, 80, 10)]
    file.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    windows = list(token_windows([file], tokenizer, 33, 0, packed=True))
    assert {len(window) for window in windows} == {33}
    flat = [token for window in windows for token in window]
    end = tokenizer.eos_token_id
    pieces = " ".join(tokenizer.decode([token]) if token != end else "|" for token in flat).split(" | ")
    assert set(pieces[:-1]) <= set(documents)
    assert any(documents[i].startswith(pieces[-1].removesuffix(" |")) for i in range(8))
    assert len(windows) == 8 * 11 // 33
    assert list(token_windows([file], tokenizer, 33, 1, packed=True)) != windows


def test_bucketed_batches_hold_windows_of_about_the_same_length() -> None:
    rng = random.Random(0)
    windows = [[i] * rng.randint(32, 512) for i in range(4 * 16 * 5 + 3)]
    batches = list(bucketed(iter(windows), 4, seed=0))
    assert sorted(window[0] for batch in batches for window in batch) == list(range(len(windows)))
    padded = [1 - sum(map(len, batch)) / (len(batch) * max(map(len, batch))) for batch in batches]
    plain = [windows[start : start + 4] for start in range(0, len(windows), 4)]
    as_they_come = [1 - sum(map(len, batch)) / (len(batch) * max(map(len, batch))) for batch in plain]
    assert np.mean(padded) < 0.25 * np.mean(as_they_come)
    lengths = [len(batch[0]) for batch in batches[:16]]
    assert lengths != sorted(lengths)
    assert list(bucketed(iter(windows), 4, seed=0)) == batches
    assert list(bucketed(iter(windows[:3]), 1, seed=0)) == [[window] for window in windows[:3]]


def test_place_named_twice_counts_twice_in_another_order(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    (tmp_path / "a.txt").write_text(" ".join(f"w{i % 92}" for i in range(4000)))
    once, twice = data_files([tmp_path / "a.txt"]), data_files([tmp_path / "a.txt", tmp_path / "a.txt"])
    alone = list(token_windows(once, tokenizer, 64, 0))
    both = list(token_windows(twice, tokenizer, 64, 0))
    assert len(both) == 2 * len(alone)
    first, second = both[::2], both[1::2]
    assert first == alone
    assert sorted(second) == sorted(first)
    assert second != first


def test_folders_and_patterns_are_expanded(tmp_path: Path) -> None:
    for name in ("x/a.txt", "x/y/b.jsonl.gz", "x/y/c.md", "x/ignored.bin", "z.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    assert [path.name for path in data_files([tmp_path / "x"])] == ["a.txt", "b.jsonl.gz", "c.md"]
    assert [path.name for path in data_files([tmp_path / "**" / "*.txt"])] == ["a.txt", "z.txt"]
    assert [path.name for path in data_files([str(tmp_path / "*.txt"), str(tmp_path / "x" / "*.txt")])] == [
        "z.txt",
        "a.txt",
    ]
    with pytest.raises(InputError, match=r"ignored\.bin"):
        data_files([tmp_path / "x" / "*.bin"])


@pytest.mark.parametrize("packed", [True, False])
def test_held_back_text_is_never_trained_on(packed: bool, starts: dict[str, Path], tmp_path: Path) -> None:
    """Not a stretch of it, in whatever window, over three passes; all the rest is."""
    for name, first in (("a.txt", 0), ("b.txt", 10**5)):
        (tmp_path / name).write_text(numbers(1200, first))
    model = kvp_mlx.load(str(starts["prefix"]))
    files = data_files([tmp_path])
    options = TrainOptions(minutes=None, tokens=1, window=64, packed=packed)
    held_back = hold_back(files, model, options)
    assert len(held_back) >= 4
    windows = held_back.values()
    words = [set(re.findall(r"\b1\d{6}\b", model.text_tokenizer.decode(window))) for window in windows]
    secret = set.union(*words)
    per_pass = 2 * 1200 * 8 // 64
    windows = list(itertools.islice(endless_windows(files, model, options, held_back), 3 * per_pass))
    text = [set(re.findall(r"\b1\d{6}\b", model.text_tokenizer.decode(window))) for window in windows]
    seen = set.union(*text)
    assert secret & seen == set()
    assert len(seen) > 1800


def test_chat_turns_and_text_are_read(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    turns = [{"role": "user", "content": "w1 " * 30}, {"role": "assistant", "content": "w2 " * 30}]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps({"messages": turns}).encode()))
    (window,) = token_windows(data_files([tmp_path]), tokenizer, 200, 0)
    expected = ["<user>", *["w1"] * 30, "<end>", "<assistant>", *["w2"] * 30, "<end>"]
    assert tokenizer.decode(window).split() == expected


@pytest.mark.parametrize("packed", [True, False])
def test_prompts_and_completions_stay_by_themselves(packed: bool, tmp_path: Path) -> None:
    tokenizer, record = chat_tokenizer(), {"prompt": "w1 " * 40, "completion": " w2" * 30}
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n" + json.dumps({"text": "w3 " * 200}))
    windows = list(token_windows(data_files([tmp_path]), tokenizer, 64, 0, packed=packed))
    (own,) = (window for window in windows if isinstance(window, PromptWindow))
    assert tokenizer.decode(own).split() == [*["w1"] * 34, *["w2"] * 30]  # the prompt's beginning had no room
    assert own.prompt_tokens == 34
    others = {word for window in windows if window is not own for word in tokenizer.decode(window).split()}
    assert others <= {"w3", tokenizer.eos_token}
    assert make_batch([own]).prompt_tokens == 34
    assert all(make_batch([window]).prompt_tokens is None for window in windows if window is not own)


def test_a_long_completion_leaves_half_a_window_to_the_prompt(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "w1 " * 50, "completion": "w2 " * 90}))
    (window,) = token_windows(data_files([tmp_path]), chat_tokenizer(), 64, 0)
    assert isinstance(window, PromptWindow)
    assert (len(window), window.prompt_tokens) == (64, 32)


def test_records_that_are_too_short_are_left_out_as_text_is(tmp_path: Path) -> None:
    records = [{"prompt": "w1 " * tokens, "completion": "w2 w2"} for tokens in (29, 30)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    (window,) = token_windows(data_files([tmp_path]), chat_tokenizer(), 64, 0)
    assert len(window) == 32


def test_validation_keeps_prompts_back_as_well_as_text(starts: dict[str, Path], tmp_path: Path) -> None:
    """Six of each, and no question about a prompt that was kept back is trained on."""
    (tmp_path / "a.txt").write_text(numbers(2000))
    records = [
        {"prompt": numbers(6, 10**5 + 100 * (n % 15)), "completion": f" {numbers(2, 10**5 + 50 * n)}"}
        for n in range(30)
    ]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, records)))
    model, files = kvp_mlx.load(str(starts["prefix"])), data_files([tmp_path])
    options = TrainOptions(minutes=None, tokens=1, window=64)
    held_back = hold_back(files, model, options)
    asked = {piece: window for piece, window in held_back.items() if isinstance(window, PromptWindow)}
    assert (len(held_back), len(asked)) == (12, 6)
    windows = list(itertools.islice(endless_windows(files, model, options, held_back), 200))
    prompts = {tuple(w[: w.prompt_tokens]) for w in windows if isinstance(w, PromptWindow)}
    assert len(prompts) == 9
    assert not prompts & {tuple(window[: window.prompt_tokens]) for window in asked.values()}
    both = RecoveryMeasurement(model, list(held_back.values()), 16).measure()
    assert both["documents"] == 12
    assert both["arms"]["full"]["recovery"] == 1


def test_what_follows_a_prompt_is_what_is_trained(starts: dict[str, Path]) -> None:
    """One split, at the prompt's end, and no more after it than a split has."""
    window = PromptWindow(range(5, 65))
    window.prompt_tokens = 40
    options = TrainOptions(minutes=None, tokens=1, window=64, right=16, splits=4)
    assert split_points(make_batch([window]), options, random.Random(0)) == [(40, 56)]
    losses = TrainOptions(minutes=None, tokens=1, window=64, right=128, splits=4)
    assert split_points(make_batch([window]), losses, random.Random(0)) == [(40, 60)]
    model = kvp_mlx.load(str(starts["prefix"]))
    batch = make_batch([window])
    ((part, _),) = gradients_of(model, Trained(model, losses), batch, losses.settled(model), random.Random(0))
    teacher = teach(model, batch)
    assert teacher.reading is not None
    divergence, _ = continuation_losses(model, teacher, teacher.reading, batch, 40, 60)
    assert part["continuation"].item() == pytest.approx(divergence.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("record", "named"),
    [
        ({"prompt": "w1", "completion": " "}, "'completion' is empty"),
        ({"prompt": "", "completion": "w1"}, "'completion' is empty"),
        ({"prompt": "w1"}, "both 'prompt' and 'completion'"),
    ],
)
def test_half_a_record_is_named(record: dict[str, str], named: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n" + json.dumps(record))
    with pytest.raises(InputError, match=rf"a\.jsonl, line 2.*{named}"):
        list(token_windows(data_files([tmp_path]), chat_tokenizer(), 64, 0))
