"""`kvp eval TASK` on tiny models: what is asked and scored, the JSON contract, and logs that survive a kill."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import Kvp
from support.directories import TEXT
from support.tiny import llama, prefixed

import kvp_mlx
from kvp_mlx.arms.kinds import parse_arms
from kvp_mlx.engine.prompt import encode
from kvp_mlx.evaluate.passages import grid_items
from kvp_mlx.evaluate.records import hashes, read_texts
from kvp_mlx.evaluate.summary import summarise
from kvp_mlx.evaluate.task import Item
from kvp_mlx.evaluate.tasks import chat_agreement, gsm8k, humaneval, mcq, needle, quote, triviaqa

RECORDS: dict[str, list[dict[str, Any]]] = {
    "triviaqa": [{"question": f"the old town {i}?", "answers": ["the lamp", "lamp"]} for i in range(4)],
    "squad": [{"context": TEXT, "question": f"what {i}?", "answers": ["the harbour"]} for i in range(3)],
    "gsm8k": [{"question": f"2 and {i}?", "answer": f"2+{i}\n#### {2 + i}"} for i in range(4)],
    "mcq": [{"query": f"Question: the {i}?", "choices": ["the lamp", "x", "a book"], "gold": i % 3} for i in range(5)],
    "chat": [{"turns": [f"the harbour {i}", "and now"]} for i in range(3)],
    "humaneval": [
        {"task_id": f"t/{i}", "prompt": "def f():\n", "test": "def check(f): f()\n", "entry_point": "f"}
        for i in range(2)
    ],
}
EXTRA = {"triviaqa": ["--max-tokens", 4], "gsm8k": ["--shots", 1, "--max-tokens", 4]}
SHORT = {"needle": ["--prompt-tokens", "120,150", "--depths", "0,1"], "quote": ["--prompt-tokens", "150"]}


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Path]:
    files = {}
    for task, records in RECORDS.items():
        files[task] = tmp_path / f"{task}.jsonl"
        files[task].write_text("".join(json.dumps(record) + "\n" for record in records))
    return files


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text(TEXT * 20)
    return path


@pytest.mark.parametrize(
    "task", ["triviaqa", "squad", "gsm8k", "mcq", "chat", "humaneval", "needle", "quote", "perplexity"]
)
def test_every_task_speaks_the_contract(
    task: str, data: dict[str, Path], texts: Path, fitted: Path, tmp_path: Path, kvp: Kvp
) -> None:
    options = [*EXTRA.get(task, []), *SHORT.get(task, [])]
    if task == "humaneval":
        options += ["--allow-code-execution", "--samples", 1]
    if task == "perplexity":
        options += ["--prompt-tokens", 30, "--continuation-tokens", 10]
    out = tmp_path / "out.json"
    common = ["--data", data.get(task, texts), "--arms", "full,kvp,kvp-8,static-0.5", "--limit", 2, "--out", out]
    outcome = kvp("eval", task, fitted, *common, *options, "--json")
    assert outcome.code == 0, outcome.err
    result = outcome.json()
    assert result == json.loads(out.read_text())
    assert (result["task"], result["n"]) == (task, 2)
    assert list(result["arms"]) == ["full", "kvp", "kvp-8", "static-0.5"]
    for arm in result["arms"].values():
        low, high = arm["interval"]
        assert low - 1e-9 <= arm["score"] <= high + 1e-9
        assert arm["ttft_ms"] > 0
    assert result["arms"]["full"]["difference"]["mean"] == 0
    assert result["arms"]["full"]["flops_ratio"] == 1 < result["arms"]["kvp"]["flops_ratio"]
    assert {"base", "predictor", "seed", "data"} <= result["recipe"].keys()
    assert ("grid" in result) == (task in SHORT)
    if task == "chat":
        assert result["arms"]["full"]["score"] == 1
        assert result["arms"]["full"]["metrics"]["kl_per_token"] == pytest.approx(0, abs=1e-5)


def test_the_table_and_the_refusals(data: dict[str, Path], fitted: Path, tmp_path: Path, kvp: Kvp) -> None:
    outcome = kvp("eval", "mcq", fitted, "--data", data["mcq"], "--limit", 1, "--scoring", "predicted")
    assert outcome.code == 0
    assert "full" in outcome.out and "TTFT" in outcome.out
    (problem, _) = RECORDS["humaneval"]
    odd = {
        "hub": {"context": TEXT, "question": "what?", "answers": {"text": ["the harbour"], "answer_start": [4]}},
        "bare": {"question": "who?", "answers": "the keeper"},
        "letter": {"query": "who?", "choices": ["a", "b"], "gold": "B"},
        "blank": {"query": "who?", "choices": ["yes", " "], "gold": 0},
        "system": {"messages": [{"role": "system", "content": "Be brief."}]},
        "beyond": {"query": "who?", "choices": ["a", "b"], "gold": 2},
        "unanswerable": {"context": TEXT, "question": "what?", "answers": []},
        "list": [1],
        "empty": {"turns": []},
        "unchecked": problem | {"test": "def checker(f): f()\n"},
        "untested": {key: value for key, value in problem.items() if key != "test"},
        "test": problem | {"test": ["def check(f): f()"]},
        "call": problem | {"entry_point": "f(); import os; f"},
        "keyword": problem | {"entry_point": "lambda"},
        "number": problem | {"entry_point": 3},
        "another": problem | {"entry_point": "g"},
    }
    for name, record in odd.items():
        data[name] = tmp_path / f"{name}.jsonl"
        data[name].write_text(json.dumps(record) + "\n\n")
    text = tmp_path / "text.txt"
    text.write_text("words")
    (tmp_path / "short.txt").write_text(TEXT)
    runs = ["--allow-code-execution"]
    refused = {
        "psychic": ("mcq", "--data", data["mcq"], "--arms", "psychic"),
        "the arm mlx-lm can only be timed": ("mcq", "--data", data["mcq"], "--arms", "full,mlx-lm"),
        "'query'": ("mcq", "--data", data["chat"]),
        "no.jsonl": ("squad", "--data", "no.jsonl"),
        "JSON lines": ("squad", "--data", text),
        "--allow-code-execution": ("humaneval", "--data", data["humaneval"]),
        "--depths": ("needle", "--depths", "2"),
        "--prompt-tokens": ("quote", "--prompt-tokens", "many"),
        "name a file": ("mcq", "--data", data["mcq"], "--out", tmp_path),
        "examples": ("triviaqa", "--data", data["triviaqa"], "--shots", "4"),
        "'answers' is not a list of texts": ("squad", "--data", data["hub"]),
        "line 1: 'answers'": ("triviaqa", "--data", data["bare"]),
        "'gold' is not a whole number": ("mcq", "--data", data["letter"]),
        "a choice of 'who?' is blank": ("mcq", "--data", data["blank"]),
        "'messages' or 'question'": ("chat", "--data", data["system"]),
        "'gold' is 2 where there are 2 choices": ("mcq", "--data", data["beyond"]),
        "nothing that squad could ask": ("squad", "--data", data["unanswerable"]),
        "nothing that perplexity could ask": ("perplexity", "--data", tmp_path / "short.txt"),
        "no JSON object": ("chat", "--data", data["list"]),
        "needs 'turns'": ("chat", "--data", data["empty"]),
        "unchecked.jsonl, line 1: 'test' is not source": ("humaneval", "--data", data["unchecked"], *runs),
        "untested.jsonl, line 1: the record lacks 'test'": ("humaneval", "--data", data["untested"], *runs),
        "test.jsonl, line 1: 'test' is not source": ("humaneval", "--data", data["test"], *runs),
        "call.jsonl, line 1: 'entry_point' is not a fun": ("humaneval", "--data", data["call"], *runs),
        "keyword.jsonl, line 1: 'entry_point' is not a fun": ("humaneval", "--data", data["keyword"], *runs),
        "number.jsonl, line 1: 'entry_point' is not a fun": ("humaneval", "--data", data["number"], *runs),
        "t/0: its prompt begins no function g": ("humaneval", "--data", data["another"], *runs),
        "kvp-8 is no arm of it": ("mcq", "--data", data["mcq"], "--scoring", "predicted", "--arms", "full,kvp-8"),
        "fast is no arm of it": ("mcq", "--data", data["mcq"], "--scoring", "predicted", "--arms", "full,fast"),
    }
    for named, arguments in refused.items():
        task, *rest = arguments
        outcome = kvp("eval", task, fitted, *rest)
        assert (outcome.code, outcome.out) == (2, ""), arguments
        assert named in outcome.err


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "ttft_ms"} for row in rows]


def test_killed_and_resumed_is_as_uninterrupted(data: dict[str, Path], fitted: Path, tmp_path: Path, kvp: Kvp) -> None:
    def run(log: Path, *more: object) -> dict[str, Any]:
        command = (
            "eval",
            "squad",
            fitted,
            "--data",
            data["squad"],
            "--arms",
            "full,kvp",
            "--log",
            log,
            "--max-tokens",
            4,
        )
        outcome = kvp(*command, *more, "--json")
        assert outcome.code == 0, outcome.err
        return outcome.json()

    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    run(whole)
    lines = whole.read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + 3 * 2
    rows = [json.loads(line) for line in lines]
    for cut in (0, 5, len(lines[0]), sum(map(len, lines[:4])) + 7, sum(map(len, lines)) - 1):
        killed.write_bytes(b"".join(lines)[:cut])
        run(killed)
        again = [json.loads(line) for line in killed.read_text().splitlines()]
        assert timeless(again) == timeless(rows), cut
    before = whole.read_bytes()
    run(whole, "--limit", 2)  # all known: nothing is measured again
    assert whole.read_bytes() == before
    outcome = kvp("eval", "squad", fitted, "--data", data["squad"], "--log", whole, "--seed", 1)
    assert outcome.code == 2
    assert "another" in outcome.err
    for other in ("no log\n", '{"mine": 1}', '{"mine": 1}\n{"mine": 2}', '{"recipe": 1'):
        whole.write_text(other)
        assert kvp("eval", "squad", fitted, "--data", data["squad"], "--log", whole).code == 2
        assert whole.read_text() == other


def test_a_larger_limit_extends_a_smaller_one(data: dict[str, Path]) -> None:
    few = mcq.items([str(data["mcq"])], seed=3)
    assert [item.id for item in few] == [str(i) for i in range(5)]
    prompts = {item.prompt for item in few}
    assert len(prompts) == 5
    assert [item.prompt for item in mcq.items([str(data["mcq"])], seed=3)] == [item.prompt for item in few]


def test_prompts_are_the_papers(data: dict[str, Path]) -> None:
    shot, *asked = triviaqa.items([str(data["triviaqa"])], 0, 0)
    with_shot = triviaqa.items([str(data["triviaqa"])], 1, 0)
    assert shot.prompt == f"Question: {shot.prompt[10:-8]}\nAnswer:"
    assert [item.prompt for item in with_shot] == [f"{shot.prompt} the lamp\n{item.prompt}" for item in asked]
    problem = gsm8k.items([str(data["gsm8k"])], 1, 0)[0]
    assert problem.prompt.count("Question: ") == 2
    assert "\n#### " in problem.prompt
    assert humaneval.items([str(data["humaneval"])])[0].id == "t/0"


def test_a_chats_first_message_is_its_users(tmp_path: Path) -> None:
    system, path = {"role": "system", "content": "Be brief."}, tmp_path / "chats.jsonl"
    asked = [{"role": "user", "content": f"what of {i}?"} for i in range(2)]
    path.write_text("".join(json.dumps({"messages": [system, each, system]}) + "\n" for each in asked))
    assert {item.prompt for item in chat_agreement.items([str(path)], 0)} == {each["content"] for each in asked}


def test_recipes_tell_files_of_one_name_and_their_order(tmp_path: Path) -> None:
    places = [tmp_path / name / "a.jsonl" for name in ("one", "two")]
    for number, place in enumerate(places):
        place.parent.mkdir()
        place.write_text(json.dumps({"query": f"who is {number}?", "choices": ["a", "b"], "gold": 0}) + "\n")
    there, back = (hashes([str(place) for place in order]) for order in (places, places[::-1]))
    assert list(there) == list(back) == ["a.jsonl", "a.jsonl #2"]
    assert list(there.values()) == list(back.values())[::-1]


def test_work_is_that_of_all_prompts() -> None:
    model, arms = prefixed(llama(), 1)[0], parse_arms("full,kvp-16")
    rows = [
        {"arm": arm.name, "item": str(tokens), "score": 1.0, "metrics": {}, "ttft_ms": 1.0, "prompt_tokens": tokens}
        for tokens in (20, 30, 200)
        for arm in arms
    ]
    full, predicted = (sum(arm.work(model, tokens).flops for tokens in (20, 30, 200)) for arm in arms)
    found = summarise("squad", model, arms, rows)["arms"]["kvp-16"]["flops_ratio"]
    assert found == pytest.approx(full / predicted)
    assert found != pytest.approx(arms[0].work(model, 30).flops / arms[1].work(model, 30).flops)


def test_a_log_of_qualities_is_of_one_dial(data: dict[str, Path], fitted: Path, tmp_path: Path, kvp: Kvp) -> None:
    bundle = shutil.copytree(fitted, tmp_path / "bundle")
    log = ("--log", tmp_path / "rows.jsonl", "--limit", 2, "--max-tokens", 3)
    command = ("eval", "squad", bundle, "--data", data["squad"], *log, "--arms")
    assert kvp(*command, "full,fast").code == 0
    config = json.loads((bundle / "kvp.json").read_text())
    dial = {"quality": "fast", "from_tokens": 0, "path": "full"}
    (bundle / "kvp.json").write_text(json.dumps(config | {"dials": [dial]}))
    outcome = kvp(*command, "full,fast")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "begun with other data" in outcome.err


def test_humaneval_in_a_chat_begins_the_answers_code_block(data: dict[str, Path], fitted: Path, kvp: Kvp) -> None:
    model, item = kvp_mlx.load(str(fitted)), humaneval.items([str(data["humaneval"])])[0]
    text = model.text_tokenizer.decode(humaneval.prompt_ids(model, item, chat=True))
    question, _, answer = text.rpartition("assistant")
    assert f"```python\n{item.prompt}```" in question
    assert answer.endswith("```python\n") and answer.count("```") == 1
    options = ("--chat", "--allow-code-execution", "--limit", 1, "--arms", "full", "--json")
    outcome = kvp("eval", "humaneval", fitted, "--data", data["humaneval"], *options)
    assert outcome.code == 0, outcome.err
    assert outcome.json()["recipe"]["chat"] is True


def test_sums_in_a_chat_are_a_users_message(data: dict[str, Path], fitted: Path) -> None:
    model, place = kvp_mlx.load(str(fitted)), [str(data["gsm8k"])]
    bare, asked = (gsm8k.run(place, shots=0, chat=chat) for chat in (False, True))
    (item, *_) = asked.items(model)
    assert item.prompt == bare.items(model)[0].prompt
    assert asked.encode(model, item) == encode(model, item.prompt) != bare.encode(model, item)
    assert asked.options == bare.options | {"chat": True}


def test_scores_of_answers() -> None:
    problem = Item("1", "", [" 1,200"])
    assert gsm8k.score(problem, r"so \(\boxed{1200}\) in 3 years")["exact_match"] == 1
    assert gsm8k.score(problem, r"\[\boxed{\$1,200}\]. #### 5")["exact_match"] == 1
    assert gsm8k.score(problem, r"\boxed{1200}, or rather \boxed{7}")["exact_match"] == 0
    for right in (r"\boxed{1200\text{ miles}} in 3 hours", r"\boxed{1{,}200}", r"\boxed{1,\!200}", r"\boxed{x}: 1200"):
        assert gsm8k.score(problem, right)["exact_match"] == 1, right
    assert gsm8k.score(problem, " so\n#### 1200")["exact_match"] == 1
    assert gsm8k.score(problem, "it is 1200.")["exact_match"] == 1
    assert gsm8k.score(problem, "1200 or 7")["exact_match"] == gsm8k.score(problem, "")["exact_match"] == 0
    assert needle.score(Item("1", "", ["54321"]), "It is 54321.")["found"] == 1
    item = Item("1", "", ["The lamp is lit."])
    assert quote.score(item, '"The lamp\n is lit."') == {"verbatim": 1, "similarity": pytest.approx(0.94, abs=0.02)}
    assert quote.score(item, "The lamp was lit.")["verbatim"] == 0


@pytest.mark.parametrize("task", [needle, quote])
def test_hidden_things_stand_where_the_grid_says(task: Any, fitted: Path) -> None:
    tokenizer = kvp_mlx.load(str(fitted)).text_tokenizer
    made = grid_items(task.ask, [TEXT * 30], tokenizer, [250, 400], [0.0, 1.0], 0, 8)
    assert [(item.extra["length"], item.extra["depth"]) for item in made[:5]] == [
        *((250, 0.0), (250, 1.0), (400, 0.0), (400, 1.0), (250, 0.0))
    ]
    for item in made:
        passage = item.prompt.split("\n\n")[0]
        hidden = item.answers[0] if task is needle else f"[[ {item.answers[0]} ]]"
        place = passage.index(hidden) / len(passage)
        assert place < 0.5 if item.extra["depth"] == 0 else place >= 0.4
        assert len(tokenizer.encode(passage)) <= item.extra["length"] + 40


@pytest.mark.parametrize("task", [needle, quote])
def test_the_shipped_sample_serves_every_cell(task: Any, fitted: Path) -> None:
    tokenizer = kvp_mlx.load(str(fitted)).text_tokenizer
    made = grid_items(task.ask, read_texts([]), tokenizer, [300, 600, 2400], [0.0, 0.5, 1.0], 0, 18)
    assert len(made) == 18
    assert all(item.answers[0] in item.prompt.split("\n\n")[0] for item in made)
