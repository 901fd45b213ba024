"""The README's benchmark tables are those of the committed results."""

import json
from pathlib import Path

from kvp_mlx.bench.readme import BLOCK, ROOT, TABLES, render

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_tables_are_current() -> None:
    assert render(README) == README, "run 'make readme'"
    assert {match[2] for match in BLOCK.finditer(README)} <= TABLES.keys()
    assert len(BLOCK.findall(README)) == README.count("<!-- end -->") >= 2


def test_a_changed_result_shows(tmp_path: Path) -> None:
    kind, name = next((match[2], match[3]) for match in BLOCK.finditer(README))
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
    for name in {match[3] for match in BLOCK.finditer(README)}:
        machine = json.loads((ROOT / name).read_text(encoding="utf-8"))["machine"]
        assert machine.keys() >= {"chip", "cores", "memory_bytes", "system", "mlx", "mlx_lm", "kvp_mlx", "commit"}
