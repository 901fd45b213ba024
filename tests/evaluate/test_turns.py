"""Evaluation over several turns and of the dial, on tiny models where the answers are known."""

import gzip
import json

import mlx.core as mx
import numpy as np
import pytest
from support.directories import TEXT
from support.tiny import chat_tokenizer, itself, llama, prefixed

from kvp_mlx.evaluate.trade_off import Followed, dials, measure_dials
from kvp_mlx.evaluate.turns import (
    Exchange,
    compared,
    measure_turns,
    message_scripts,
    synthetic_scripts,
    yield_times_ms,
)

SCRIPT = [
    Exchange("w1 w2 w3 w4 w5 w6 w7 w8 w9 w10 w11 w12", "w20 w21 w22"),
    Exchange("w3 w5 w6 w1 w2 w14 w13 w12 w11 w10", "w30 w31", asked="w31"),
    Exchange("w4 w8 w15 w16 w23 w42 w11 w12 w13 w14", "w40 w41 w42"),
]


def test_refinement_gives_the_full_arm_what_stood_before_the_turn():
    model, _ = prefixed(llama(), 1, tokenizer=chat_tokenizer())
    rows = measure_turns(model, [SCRIPT, SCRIPT[::-1]], exact_tail=0)
    assert [row["turn"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert row["full"]["kl"] == pytest.approx(0, abs=1e-6)
        assert row["full"]["agreement"] == 1
        assert row["kvp"]["predicted_tokens"] > 5
    assert rows[0]["kvp"]["kl"] == pytest.approx(rows[0]["kvp+refine"]["kl"], abs=1e-5)
    assert rows[2]["kvp"]["kl"] > 0.01
    whole_turn_exact = measure_turns(model, [SCRIPT], exact_tail=1000)
    assert all(row["kvp"]["kl"] < 1e-6 for row in whole_turn_exact)


def test_a_perfect_prediction_loses_nothing():
    model = itself(llama())
    model.tokenizer = chat_tokenizer()
    for row in measure_turns(model, [SCRIPT], exact_tail=0):
        assert row["kvp"]["kl"] == pytest.approx(0, abs=1e-5)
        assert row["kvp"]["agreement"] == row["kvp+refine"]["agreement"] == 1
        assert row["kvp"]["recall"] == row["full"]["recall"]


def test_the_divergence_is_the_textbooks():
    p, q = np.array([[0.7, 0.2, 0.1]]), np.array([[0.1, 0.6, 0.3]])
    result = compared(mx.array(np.log(q), mx.float32), mx.array(np.log(p), mx.float32))
    assert result["kl"] == pytest.approx((p * np.log(p / q)).sum(), abs=1e-5)
    assert result["agreement"] == 0


def test_synthetic_conversations_ask_only_for_what_was_told():
    for script in synthetic_scripts(20):
        assert len(script) == 10
        assert [exchange.asked is not None for exchange in script] == [False, True] * 5
        for number, exchange in enumerate(script):
            if exchange.asked:
                told = " ".join(earlier.message for earlier in script[:number])
                assert exchange.asked in told
                assert exchange.reply.endswith(f" {exchange.asked}.")
    assert synthetic_scripts(2, seed=1) != synthetic_scripts(2, seed=2)


def test_records_become_scripts():
    messages = [{"role": r, "content": f"{r}{n}"} for n in range(3) for r in ("user", "assistant")]
    records = [{"messages": messages}, {"turns": ["a", "b"]}, {"messages": messages[:2]}]
    assert message_scripts(records, 2, 5) == [
        [Exchange("user0", "assistant0"), Exchange("user1", "assistant1")],
        [Exchange("a"), Exchange("b")],
    ]


def test_the_dial_ends_at_full_prefill():
    model, _ = prefixed(llama(), 1, tokenizer=chat_tokenizer())
    windows = [np.random.default_rng(seed).integers(5, 97, 30).tolist() for seed in range(4)]
    followed = {20: [Followed(ids[:20], ids[20:]) for ids in windows]}
    rows = measure_dials(model, followed, dials([0, 10], [0, 9, 18]))
    assert (rows[0]["path"], rows[0]["recovery"], rows[0]["sooner"]) == ("full", 1, 1)
    by_setting = {(row["exact_head"], row["exact_tail"]): row for row in rows[1:]}
    assert by_setting[10, 9]["recovery"] == pytest.approx(1, abs=1e-3)  # 19 of 19 are read by the base
    assert abs(by_setting[0, 0]["recovery"] - 1) > 0.01
    assert any(row["is_best"] for row in rows)


def test_refinement_can_be_left_after_every_layer():
    model, _ = prefixed(llama(), 1)
    times = yield_times_ms(model, tokens=300)
    assert times["tokens"] == 300
    assert 0 < times["median"] <= times["largest"] < 1000


def test_the_commands(bundle, kvp, tmp_path):
    lines = [json.dumps({"turns": [TEXT[:60], "Why?"]})]
    (tmp_path / "two.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    out = tmp_path / "turns.json"
    common = ("--limit", 1, "--data", tmp_path / "two.jsonl.gz")
    outcome = kvp("eval", "turns", bundle, *common, "--out", out, "--json")
    assert outcome.code == 0, outcome.err
    result = outcome.json()
    assert json.loads(out.read_text()) == result
    assert [len(each["turns"]) for each in result["sets"].values()] == [10, 2]
    assert result["sets"]["synthetic"]["turns"][9]["fresh_ttft_ms"] > 0
    (tmp_path / "text.txt").write_text(TEXT * 6)
    options = ("--prompt-tokens", 40, "--continuation-tokens", 8, "--heads", "0", "--tails", "0,4", "--limit", 2)
    dial = kvp("eval", "dial", bundle, "--data", tmp_path / "text.txt", *options)
    assert dial.code == 0, dial.err
    assert dial.out.count("recovery") == 3
    nowhere = tmp_path / "no" / "x.json"
    for command in (("turns", bundle, *common), ("dial", bundle, "--data", tmp_path / "text.txt", *options)):
        assert "name a file" in kvp("eval", *command, "--out", nowhere).err


@pytest.mark.parametrize("content", ["not json\n", '{"text": "a"}\n', ""])
def test_files_that_hold_no_conversations(content, bundle, kvp, tmp_path):
    (tmp_path / "x.jsonl").write_text(content)
    outcome = kvp("eval", "turns", bundle, "--data", tmp_path / "x.jsonl")
    assert outcome.code == 2
    assert "x.jsonl" in outcome.err
    assert outcome.err.count("\n") == 1
