"""The tables of README.md and docs/*.md are those of the committed results."""

import json
import re
from pathlib import Path

import pytest

from kvp_mlx.evaluate.tables import BLOCK, EVALUATION, HEADLINE, ROOT, TABLES, pages, render

PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in pages()}
BLOCKS = [match for text in PAGES.values() for match in BLOCK.finditer(text)]


def test_readme_and_docs_are_covered() -> None:
    assert {"README.md", "docs/evaluation.md"} <= PAGES.keys()


@pytest.mark.parametrize("name", PAGES)
def test_tables_are_current(name: str) -> None:
    text = PAGES[name]
    assert render(text) == text, "run 'make readme'"
    assert {match[2] for match in BLOCK.finditer(text)} <= TABLES.keys()
    marks = {"<!-- end -->": BLOCK, "<!-- end evaluation -->": EVALUATION, "<!-- end headline -->": HEADLINE}
    for end, pattern in marks.items():
        assert len(pattern.findall(text)) == text.count(end), end
    assert text.count("<!-- end") == text.count("<!--") / 2, "a mark that no table belongs to"


def test_there_are_tables() -> None:
    assert len(BLOCKS) >= 2
    assert sum(len(HEADLINE.findall(text)) for text in PAGES.values()) <= 1


def test_a_changed_result_shows(tmp_path: Path) -> None:
    kind, name = next((match[2], match[3]) for match in BLOCKS if match[2] == "ttft")
    result = json.loads((ROOT / name).read_text(encoding="utf-8"))
    for row in result["rows"]:
        row["ttft_ms"]["median"] = 123456.0
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text(json.dumps(result))
    block = f"before\n<!-- {kind} {name} -->\nold\n<!-- end -->\nafter\n"
    changed = render(block, tmp_path)
    assert changed.count("123456") == len(result["rows"])
    assert changed.startswith("before\n") and changed.endswith("<!-- end -->\nafter\n")


def test_results_say_where_they_come_from() -> None:
    for name in {match[3] for match in BLOCKS}:
        machine = json.loads((ROOT / name).read_text(encoding="utf-8"))["machine"]
        assert machine.keys() >= {"chip", "cores", "memory_bytes", "system", "mlx", "mlx_lm", "kvp_mlx", "commit"}


def test_without_ours_a_table_stands_beside_mlx_lm() -> None:
    block = "<!-- ttft bench/results/2026-11-24-amd-epyc-2core-openelm-c-270m.json -->\n<!-- end -->"
    lines = render(block).splitlines()
    assert lines[1].endswith("sooner than mlx-lm |")
    assert "| mlx-lm |" in lines[3] and lines[3].endswith("| 1.00x |")
    assert "| kvp |" in lines[4] and lines[4].endswith("| 4.04x |")


def test_the_headline_sets_quality_beside_time() -> None:
    folder = "docs/results"
    text = f"<!-- headline bench/results/2026-11-25-intel-xeon-2core-default.json {folder} -->\n<!-- end headline -->"
    lines = render(text).splitlines()
    squad = json.loads((ROOT / folder / "squad.json").read_text(encoding="utf-8"))
    kept = squad["arms"]["kvp"]["score"] / squad["arms"]["full"]["score"]
    assert lines[1] == "| prompt tokens | mlx-lm | full | kvp | sooner than full | quality kept |"
    assert lines[3].startswith(f"| {squad['prompt_tokens']} |  |") and lines[3].endswith(f"| {kept:.0%} (SQuAD) |")
    assert re.fullmatch(r"\| 512 \| 2.05 s \| 1.37 s \| 1.00 s \| 1.37x \| \d+% \(needles\) \|", lines[4])
    assert lines[6].startswith("| 2048 |") and lines[6].endswith("|  |")
