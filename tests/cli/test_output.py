"""The lines that commands say about an answer."""

import pytest
from support.tiny import chat_tokenizer, llama, prefixed

from kvp_mlx.cli import output
from kvp_mlx.cli.output import summary
from kvp_mlx.engine.conversation import Conversation
from kvp_mlx.engine.dial import Dial


def test_a_summary_names_the_path_and_the_counts():
    model, _ = prefixed(llama(), 1, tokenizer=chat_tokenizer())
    conversation = Conversation(model)

    def say(text, dial):
        return summary(list(conversation.reply(text, dial=dial, max_tokens=4))[-1])

    assert say("w1 w2", Dial("kvp", 0, 0)).startswith("5 new tokens on 0 cached, 4 of them predicted, ")
    held = len(conversation.context.tokens)
    assert f"new tokens on {held} cached, full prefill, first" in say("w1", Dial("full", 0, 0))
    assert " s (2 tokens recomputed), then " in say("w3 w4 w5", Dial("kvp", 0, 2))
    assert "recomputed" not in say("w3 w4 w5", Dial("kvp", 0, 0))


def test_what_is_left_of_a_second_round_counts_from_its_own_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where one length of prompt is measured after another."""
    now = 0.0
    monkeypatch.setattr("kvp_mlx.cli.output.time.monotonic", lambda: now)
    with output.progress_lines("rows") as tell:
        for seconds in (10.0, 100.0):
            for done in range(1, 11):
                now += seconds
                tell(done, 10)
    found = [line for line in capsys.readouterr().err.splitlines() if "2 of 10" in line]
    assert found[-1] == "rows: 2 of 10, about 13 min left"
