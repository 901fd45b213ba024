"""What ``kvp bench decode --draft`` measures."""

from pathlib import Path

import pytest
from conftest import Kvp
from kvp_mlx.bench.drafts import TASKS, Decoded, acceptance, measure_drafts
from kvp_mlx.bench.ttft import Sweep
from support.tiny import chat_tokenizer, llama, paired, small_llama

from kvp_mlx.arms.kinds import parse_arms
from kvp_mlx.engine.speculative import Drafting
from kvp_mlx.errors import InputError


def test_acceptance_by_position_of_a_draft_of_two() -> None:
    first, right, wrong = [False], [True, True, False], [False]
    replies = [
        Decoded(1.0, first + right + [True, False] + wrong, [0, 2, 2, 2, 4, 4, 6]),
        Decoded(1.0, first + wrong, [0, 2]),
        Decoded(1.0, first + wrong + [True, False] + wrong + [True], [0, 0, 1, 1, 1, 3]),  # drafts of one, then of two
    ]
    assert acceptance(replies, 2) == [4 / 6, 1 / 5]
    assert acceptance([Decoded(1.0, [False] * 3, [0] * 3)], 2) is None


@pytest.mark.parametrize(("draft", "compared"), [("auxiliary", ()), ("auto", ("auxiliary",))])
def test_rows_by_task_arm_and_draft(draft: str, compared: tuple[str, ...]) -> None:
    tokenizer = chat_tokenizer()
    tokenizer._eos_token_ids.clear()
    model, _ = paired(llama(), small_llama(), ((0,), (0,), (1,), (2,)), tokenizer=tokenizer)
    sweep = Sweep([20], 1, parse_arms("full,kvp-4"), 2, 512)
    result = measure_drafts(model, "tiny", list(range(5, 60)), sweep, Drafting(draft, 2), new_tokens=24)
    rows, ways = result["rows"], ("none", *compared, draft)
    assert [(row["task"], row["arm"], row["draft"]) for row in rows] == [
        (task, arm, who) for task in TASKS for arm in ("full", "kvp-4") for who in ways
    ]
    for number, row in enumerate(rows):
        plain = rows[number - number % len(ways)]
        assert row["ratio"] == pytest.approx(row["tps"]["median"] / plain["tps"]["median"])
        assert len(row["tps"]["samples"]) == 2
        if row["draft"] == "none" or (row["draft"] == "auto" and row["arm"] == "full"):
            # after full prefill the auxiliary would have to read more than is answered
            assert (row["acceptance"], row["drafted_tokens"]) == (None, 0)
            continue
        assert 0 <= row["acceptance"][1] <= row["acceptance"][0] <= 1
        assert row["drafted_tokens"] > 0


def test_what_cannot_be_measured_is_refused(fitted: Path, kvp: Kvp) -> None:
    model, _ = paired(llama(), small_llama(), ((0,), (0,), (1,), (2,)), tokenizer=chat_tokenizer())
    for arm in ("auxiliary", "balanced"):
        with pytest.raises(InputError, match=f"not after {arm}"):
            sweep = Sweep([20], 1, parse_arms(arm), 1, 512)
            measure_drafts(model, "tiny", [5, 6], sweep, Drafting("auxiliary"), new_tokens=2)
    for options, reason in ((("--model", fitted), "cannot draft"), (("--preset", "small"), "random weights")):
        result = kvp("bench", "decode", *options, "--draft", "auto", "--prompt-tokens", "20")
        assert (result.code, reason in result.err) == (2, True)
