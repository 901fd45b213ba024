"""``kvp eval dial``: what it measures, what it chooses, and what it leaves in the bundle."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import Kvp
from mlx_lm.models.cache import make_prompt_cache
from support.directories import TEXT

import kvp_mlx
from kvp_mlx.arms.kinds import parse_arm
from kvp_mlx.bundle.config import MeasuredDial, read_config
from kvp_mlx.bundle.named import ALIAS, DATA
from kvp_mlx.engine.prefill import base_prefill
from kvp_mlx.evaluate.answer import Question, generate
from kvp_mlx.evaluate.tasks.squad import f1
from kvp_mlx.evaluate.trade_off import own_answer, questions_of, soonest, store_dials
from kvp_mlx.train.loop import TrainOptions
from kvp_mlx.train.recovery import token_losses
from kvp_mlx.train.run import train_bundle


def row(
    prompt_tokens: int, sooner: float, recovery: float, tail: int = 0, path: str = "kvp", gain: float = 0.2
) -> dict[str, Any]:
    setting = {"path": path, "exact_head": 4, "exact_tail": tail, "recompute": 0.1, "context_gain": gain}
    return setting | {"prompt_tokens": prompt_tokens, "sooner": sooner, "recovery": recovery}


def test_the_soonest_that_keeps_the_promise() -> None:
    rows = [
        *(row(100, 1.0, 1.0, path="full"), row(100, 1.3, 0.91, 8), row(100, 0.9, 0.99, 64)),
        *(row(200, 1.0, 1.0, path="full"), row(200, 2.0, 0.92, 8), row(200, 1.5, 0.98, 32), row(200, 1.2, 1.0, 64)),
        *(row(400, 1.0, 1.0, path="full"), row(400, 3.0, 0.5, 8)),
        *(row(800, 1.0, 1.0, path="full", gain=-0.1), row(800, 2.0, 3.0, 8, gain=-0.1)),
    ]
    chosen = [
        (dial.quality, dial.from_tokens, dial.path, dial.exact_tail, dial.sooner)
        for dial in soonest(rows, {"fast": 0.9, "balanced": 0.97})
    ]
    assert chosen == [
        ("fast", 0, "full", None, None),
        ("fast", 100, "auto", 8, 1.3),
        ("fast", 200, "auto", 8, 2.0),
        ("fast", 400, "full", None, None),
        ("balanced", 0, "full", None, None),
        ("balanced", 200, "auto", 32, 1.5),
        ("balanced", 400, "full", None, None),
    ]


def test_answers_speak_against_a_recovery() -> None:
    rows = [row(100, 2.0, 0.99, 8), row(100, 1.5, 0.966, 16), row(100, 1.4, 0.98, 32), row(100, 1.2, 0.99, 64)]
    for each, high in zip(rows, (0.89, 1.2, 0.96, 0.97), strict=True):
        each["retention"] = {"mean": high - 0.1, "interval": [high - 0.2, high]}
    chosen = {dial.quality: dial.exact_tail for dial in soonest(rows, {"fast": 0.9, "balanced": 0.97})}
    assert chosen == {"fast": 16, "balanced": 16}
    chosen = {dial.quality: dial.exact_tail for dial in soonest([rows[0], *rows[2:]], {"fast": 0.9, "balanced": 0.97})}
    assert chosen == {"fast": 32, "balanced": 64}
    assert [dial.retention for dial in soonest(rows, {"fast": 0.9})] == [None, pytest.approx(1.1)]


@pytest.fixture
def options(tmp_path: Path) -> tuple[Any, ...]:
    (tmp_path / "text.txt").write_text(TEXT * 8)
    common = ("--data", tmp_path / "text.txt", "--continuation-tokens", 8, "--limit", 2, "--heads", "0", "--tails", "4")
    return (*common, "--prompt-tokens", "40,60", "--recompute", "0,0.5")


def test_what_was_measured_is_kept_and_followed(bundle: Path, options: tuple, kvp: Kvp) -> None:
    outcome = kvp("eval", "dial", bundle, *options, "--fast", 0, "--balanced", 1, "--write", "--json")
    assert outcome.code == 0, outcome.err
    result = outcome.json()
    settings = [(row["prompt_tokens"], row["path"], row["recompute"], row["documents"]) for row in result["rows"]]
    assert settings == [(n, *setting, 2) for n in (40, 60) for setting in (("full", 0), ("kvp", 0), ("kvp", 0.5))]
    assert (result["prompt_tokens"], result["promises"]) == ([40, 60], {"fast": 0, "balanced": 1})
    written = read_config(bundle)
    assert [dial.model_dump(mode="json") for dial in written.dials] == result["dials"]
    for quality in ("fast", "balanced"):
        assert next(dial for dial in written.dials if dial.quality == quality).path == "full"
    assert kvp("info", bundle).out.count("full prefill") >= 2
    kvp_mlx.load(str(bundle))  # the hashes fit

    before = (bundle / "kvp.json").read_bytes()
    shown = kvp("eval", "dial", bundle, *options)
    assert "recompute 0.50" in shown.out and "balanced  from     0 tokens: full prefill" in shown.out
    assert (bundle / "kvp.json").read_bytes() == before


def test_refinement_is_measured_and_kept(bundle: Path, options: tuple, kvp: Kvp) -> None:
    outcome = kvp("eval", "dial", bundle, *options, "--refine-tokens", 9, "--json")
    assert outcome.code == 0, outcome.err
    assert {(row["path"], row["refine_tokens"]) for row in outcome.json()["rows"]} == {("full", 0), ("kvp", 9)}
    row = {"prompt_tokens": 90, "path": "kvp", "exact_head": 0, "exact_tail": 4, "recompute": 0.0, "refine_tokens": 9}
    full, kept = soonest([row | {"recovery": 1.0, "sooner": 2.0, "context_gain": 1.0}], {"fast": 0.9})
    assert (full.refine_tokens, kept.refine_tokens) == (None, 9)


def test_a_measured_dial_is_what_a_quality_means(bundle: Path, kvp: Kvp) -> None:
    data = json.loads((bundle / "kvp.json").read_text())
    data["dials"] = [
        {"quality": "balanced", "from_tokens": 0, "path": "full"},
        {"quality": "balanced", "from_tokens": 150, "exact_head": 3, "exact_tail": 5, "recompute": 0, "sooner": 1.5},
    ]
    (bundle / "kvp.json").write_text(json.dumps(data))

    def told(words: int, *options: object) -> tuple[str, int, int]:
        outcome = kvp("generate", "w " * words, "--model", bundle, "--raw", "--max-tokens", 1, "--json", *options)
        assert outcome.code == 0, outcome.err
        found = outcome.json()
        return found["prefill"], found["exact_head"], found["exact_tail"]

    assert told(135)[0] == "full"  # by its constants it would be predicted
    assert told(135, "--quality", "fast") == ("kvp", 0, 32)
    assert told(200) == ("kvp", 3, 5)
    assert told(200, "--exact-tail", 9) == ("kvp", 3, 9)
    assert told(135, "--prefill", "kvp") == ("kvp", 32, 32)
    assert told(200, "--prefill", "full")[0] == told(200, "--quality", "exact")[0] == "full"
    model = kvp_mlx.load(str(bundle))
    (piece,) = kvp_mlx.stream_generate(model, "w " * 200, raw=True, max_tokens=1)
    assert (piece.path, piece.exact_tail) == ("kvp", 5)
    assert "balanced    from   150 tokens: head 3, tail 5, recompute 0, 1.50x sooner" in kvp("info", bundle).out


def test_training_drops_what_was_measured_on_other_maps(fitted: Path, texts: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(fitted, tmp_path / "bundle")
    store_dials(bundle, [MeasuredDial(quality="fast", from_tokens=9, exact_tail=5)])
    assert read_config(bundle).dials
    options = TrainOptions(minutes=None, tokens=128, window=64, right=16)
    train_bundle(str(bundle), [str(texts)], tmp_path / "out", options)
    assert read_config(tmp_path / "out").dials == ()


def test_a_run_that_was_killed_goes_on(bundle: Path, options: tuple, tmp_path: Path, kvp: Kvp) -> None:
    log = tmp_path / "dial.jsonl"
    whole = kvp("eval", "dial", bundle, *options, "--log", log, "--json").json()
    lines = log.read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + 2 * 2
    log.write_bytes(b"".join(lines[:3]) + lines[3][:20])
    assert kvp("eval", "dial", bundle, *options, "--log", log).code == 0
    again = log.read_bytes().splitlines(keepends=True)
    assert (again[:3], len(again)) == (lines[:3], 5)
    log.write_bytes(b"".join(lines))
    assert kvp("eval", "dial", bundle, *options, "--log", log, "--json").json()["rows"] == whole["rows"]

    other = kvp("eval", "dial", bundle, *options, "--log", log, "--seed", 9)
    assert (other.code, other.err.count("\n")) == (2, 1)
    assert "was begun with other" in other.err


@pytest.mark.parametrize("name", [ALIAS, str(DATA / ALIAS), "owner/name"])
def test_only_a_bundle_of_ones_own_is_written(name: str, options: tuple, kvp: Kvp) -> None:
    outcome = kvp("eval", "dial", name, *options, "--write")
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert "copy its directory" in outcome.err


@pytest.mark.parametrize("option", [("--recompute", "x"), ("--recompute", "2"), ("--prompt-tokens", "4,60")])
def test_what_cannot_be_measured_is_named(option: tuple, bundle: Path, options: tuple, kvp: Kvp) -> None:
    place = options.index(option[0])
    outcome = kvp("eval", "dial", bundle, *options[:place], *option, *options[place + 2 :])
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1


def test_answers_are_scored_in_place_of_text(bundle: Path, options: tuple, tmp_path: Path, kvp: Kvp) -> None:
    answered = {"question": "Which?", "answers": ["word", "b"]}
    records = [{"title": f"t{n % 2}", "context": f"{n} {TEXT[:80]}"} | answered for n in range(80)]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, records)))
    asked = ("--questions", tmp_path / "asked.jsonl", "--heads", "0", "--tails", "0,40", "--limit", 3, "--seed", 1)
    outcome = kvp("eval", "dial", bundle, *asked, "--prompt-tokens", 300, "--json")
    assert outcome.code == 0, outcome.err
    result = outcome.json()
    (full, predicted, tailed) = result["rows"]
    assert full["prompt_tokens"] <= 300
    assert (full["documents"], full["recovery"], result["continuation_tokens"]) == (3, 1, None)
    assert (predicted["exact_tail"], tailed["exact_tail"]) == (0, 40)

    model = kvp_mlx.load(str(bundle))
    asked_items = questions_of(model, [str(tmp_path / "asked.jsonl")], 300, 1, 3)
    assert full["prompt_tokens"] == round(sum(len(prompt) for prompt, _, _ in asked_items) / 3)
    gains, scores, agreed = [], [], []
    for prompt, text, item in asked_items:
        assert (text, item.answers) == ((), ["word", "b"])
        assert model.text_tokenizer.decode(prompt).rstrip().endswith("Answer:")
        head = base_prefill(model, mx.array([prompt[:-1]]))
        own = own_answer(model, prompt, head).tokens
        arms = [Question(parse_arm(arm), prompt) for arm in ("full", "kvp-40")]
        (expected,), (other,) = generate(model, arms, stop=("\n",), max_tokens=32)
        assert own == expected.tokens
        scores.append([f1(answer.text, item.answers) for answer in (expected, other)])
        agreed.append(f1(other.text, [expected.text]))
        losses = [
            token_losses(model.base, cache, [prompt[-1], *own]) for cache in (make_prompt_cache(model.base), head)
        ]
        gains.append(losses[0].mean() - losses[1].mean())
    assert full["context_gain"] == pytest.approx(np.mean(gains), abs=1e-3)
    assert [full["score"], tailed["score"]] == pytest.approx(np.mean(scores, axis=0), abs=1e-3)
    assert (full["agreement"], tailed["agreement"]) == (1, pytest.approx(np.mean(agreed), abs=1e-3))

    for wrong in ((*asked, *options[:2]), ()):
        outcome = kvp("eval", "dial", bundle, *wrong)
        assert (outcome.code, outcome.err.count("\n")) == (2, 1)
        assert "--questions" in outcome.err
