"""The tasks ``document`` and ``completion``: what is asked, how long it is, and what counts as right."""

import json
import random
import shutil
from pathlib import Path

import pytest
from conftest import Kvp
from mlx_lm.convert import convert

import kvp_mlx
from kvp_mlx.bundle.loading import KVPModel
from kvp_mlx.errors import InputError
from kvp_mlx.evaluate.task import Item
from kvp_mlx.evaluate.tasks import completion, document

CODE = '''"""What it does."""
import os

# A comment.


def first(numbers):
    """Return the first.

    Or nothing.
    """
    return take(
        numbers,
        "text",
    )


VALUE = first([1, 2])
'''


@pytest.fixture(scope="module")
def model(fitted: Path) -> KVPModel:
    return kvp_mlx.load(str(fitted))


@pytest.fixture
def squad(tmp_path: Path) -> Path:
    records = [
        {"id": f"{title}{n}", "title": title, "context": f"{title} paragraph {n} tells of ship {n}. " * 2}
        | {"question": f"What of {n}?", "answers": [f"ship {n}"]}
        for title, count in (("Long", 12), ("Short", 2))
        for n in range(count)
    ]
    path = tmp_path / "squad.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_documents_are_neighbouring_paragraphs_of_one_article(squad: Path, model: KVPModel) -> None:
    run = document.run([str(squad)], lengths=(400, 480))
    items = run.items(model)
    assert {item.id for item in items} == {f"Long{n}" for n in range(12)}  # the other article is too short
    sizes = {400: [], 480: []}
    for item in items:
        numbers = [n for n in range(12) if f"Long paragraph {n} " in item.prompt]
        assert numbers == list(range(numbers[0], numbers[-1] + 1))
        assert int(item.id[4:]) in numbers
        sizes[item.extra["length"]].append(len(document.ANSWER.encode(model, item)))
    for length, found in sizes.items():
        assert length - 70 < min(found) <= max(found) <= length  # another paragraph would not fit
    again = document.run([str(squad)], lengths=(400, 480), limit=3).items(model)
    assert [item.prompt for item in again] == [item.prompt for item in items[:3]]
    assert [item.prompt for item in document.run([str(squad)], (400, 480), seed=1).items(model)[:3]] != [
        item.prompt for item in again
    ]
    with pytest.raises(InputError, match="context window"):
        document.run([str(squad)], lengths=(600,)).items(model)


def test_the_asked_paragraph_lies_anywhere() -> None:
    paragraphs = {str(n): 10 for n in range(9)}
    places = set()
    for seed in range(40):
        found = document.document_around("4", paragraphs, 35, random.Random(seed)).split("\n\n")
        assert len(found) == 3
        places.add(found.index("4"))
    assert places == {0, 1, 2}
    for asked in ("0", "8"):  # at an end of the article the room goes to the other side
        assert len(document.document_around(asked, paragraphs, 35, random.Random(0)).split("\n\n")) == 3


def test_lines_worth_predicting() -> None:
    lines = [CODE[start:].partition("\n")[0] for start in completion.code_lines(CODE)]
    assert lines[:3] == ["import os", "def first(numbers):", "    return take("]
    assert lines[3:] == ["        numbers,", "VALUE = first([1, 2])"]
    broken = "import os\nx = (\n    '''never closed\n"
    assert completion.code_lines(broken) == [0, 10]


def test_a_prompt_is_what_stands_before_the_line(model: KVPModel, tmp_path: Path) -> None:
    text = "".join(f"value_{n} = {n} * number\n\n" for n in range(60))
    (tmp_path / "a.py").write_text(text)
    (tmp_path / "short.py").write_text("x = 1\n")
    run = completion.run([str(tmp_path)], lengths=(80, 120))
    items = run.items(model)
    assert {item.extra["length"] for item in items} == {80, 120}
    for item in items:
        assert item.prompt + item.answers[0] + "\n" in text
        assert item.prompt.startswith(("value_", "\n"))
        assert 0.6 * item.extra["length"] < len(completion.ANSWER.encode(model, item)) <= item.extra["length"]
    assert len({item.answers[0] for item in items}) == len(items)
    fewer = completion.run([str(tmp_path)], (80, 120), limit=2)
    assert [item.prompt for item in fewer.items(model)] == [item.prompt for item in items[:2]]
    assert fewer.options == run.options
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "x = 1\n"}) + "\n")
    same = completion.run([str(tmp_path / "a.jsonl")], (80, 120)).items(model)
    assert [item.prompt for item in same] == [item.prompt for item in items]


def test_scores_of_a_line() -> None:
    item = Item("0", "", ["    return x + 1"])
    assert completion.score(item, "\n  return x + 1 \nmore") == {"exact_match": 1, "edit_similarity": 1}
    near = completion.score(item, "return x + 2")
    assert near["exact_match"] == 0
    assert 0.8 < near["edit_similarity"] < 1
    assert completion.score(item, " \n")["edit_similarity"] == 0


def test_the_commands_and_another_copy_of_the_base(
    squad: Path, tmp_path: Path, base_dir: Path, bundle: Path, kvp: Kvp
) -> None:
    convert(str(base_dir), str(tmp_path / "q8"), quantize=True, q_bits=8, q_group_size=32)
    (tmp_path / "code.py").write_text("".join(f"value_{n} = {n} * number\n" for n in range(60)))
    recipes = []
    for copy in ([], ["--base", tmp_path / "q8"]):
        common = ("--limit", 1, "--arms", "full,kvp", "--json", *copy)
        asked = kvp("eval", "document", bundle, "--data", squad, "--prompt-tokens", "400", "--max-tokens", 2, *common)
        line = kvp("eval", "completion", bundle, "--data", tmp_path / "code.py", "--prompt-tokens", "90", *common)
        assert (asked.code, line.code) == (0, 0), asked.err + line.err
        assert set(asked.json()["arms"]["full"]["metrics"]) == {"f1", "exact_match"}
        assert set(line.json()["arms"]["kvp"]["metrics"]) == {"exact_match", "edit_similarity"}
        assert line.json()["prompt_tokens"] <= 90
        recipes.append(line.json()["recipe"])
    assert recipes[0]["base"] != recipes[1]["base"]
    assert recipes[0]["predictor"] == recipes[1]["predictor"]
    shutil.rmtree(bundle / "base")  # the copy runs, so the base is not needed
    assert kvp("eval", "completion", bundle, "--data", tmp_path / "code.py", "--prompt-tokens", "90", *common).code == 0
    empty = tmp_path / "empty.py"
    empty.write_text("\n")
    for data in (empty, tmp_path / "none.py"):
        outcome = kvp("eval", "completion", bundle, "--data", data, "--prompt-tokens", "90", *common)
        assert (outcome.code, outcome.err.count("\n")) == (2, 1)
