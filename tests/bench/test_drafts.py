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
    replies = [Decoded(1.0, first + right + [True, False] + wrong, 6), Decoded(1.0, first + wrong, 2)]
    assert acceptance(replies, 2) == [2 / 4, 1 / 4]
    assert acceptance([Decoded(1.0, [False] * 3, 0)], 2) is None


@pytest.mark.parametrize("draft", ["auxiliary", "auto"])
def test_rows_by_task_arm_and_draft(draft: str) -> None:
    tokenizer = chat_tokenizer()
    tokenizer._eos_token_ids.clear()
    model, _ = paired(llama(), small_llama(), ((0,), (0,), (1,), (2,)), tokenizer=tokenizer)
    sweep = Sweep([20], 1, parse_arms("full,kvp-4"), 2, 512)
    result = measure_drafts(model, "tiny", list(range(5, 60)), sweep, Drafting(draft, 2), new_tokens=24)
    rows = result["rows"]
    assert [(row["task"], row["arm"], row["draft"]) for row in rows] == [
        (task, arm, who) for task in TASKS for arm in ("full", "kvp-4") for who in ("none", draft)
    ]
    for plain, drafted in zip(rows[::2], rows[1::2], strict=True):
        assert (plain["ratio"], plain["acceptance"], plain["drafted_tokens"]) == (1.0, None, 0)
        assert drafted["ratio"] == pytest.approx(drafted["tps"]["median"] / plain["tps"]["median"])
        assert len(drafted["tps"]["samples"]) == 2
        if draft == "auto" and plain["arm"] == "full":  # the auxiliary would have to read more than is answered
            assert drafted["acceptance"] is None
            continue
        assert 0 <= drafted["acceptance"][1] <= drafted["acceptance"][0] <= 1
        assert drafted["drafted_tokens"] > 0


def test_what_cannot_be_measured_is_refused(fitted: Path, kvp: Kvp) -> None:
    model, _ = paired(llama(), small_llama(), ((0,), (0,), (1,), (2,)), tokenizer=chat_tokenizer())
    with pytest.raises(InputError, match="not after auxiliary"):
        sweep = Sweep([20], 1, parse_arms("auxiliary"), 1, 512)
        measure_drafts(model, "tiny", [5, 6], sweep, Drafting("auxiliary"), new_tokens=2)
    for options, reason in ((("--model", fitted), "cannot draft"), (("--preset", "small"), "random weights")):
        result = kvp("bench", "decode", *options, "--draft", "auto", "--prompt-tokens", "20")
        assert (result.code, reason in result.err) == (2, True)
