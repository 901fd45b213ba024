"""Writes the README's benchmark tables from ``bench/results``: ``make readme``, checked by a test."""

import json
import re
import sys
from pathlib import Path

from .report import DECODE, MEMORY, TTFT, Columns, markdown

ROOT = Path(__file__).parents[1]
TABLES: dict[str, Columns] = {"ttft": TTFT, "decode": DECODE, "memory": MEMORY}
BLOCK = re.compile(r"(<!-- (\w+) (bench/results/\S+\.json) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def render(readme: str, root: Path = ROOT) -> str:
    """Return the README with every ``<!-- ttft|decode|memory FILE -->`` block made again from its file."""

    def block(match: re.Match[str]) -> str:
        rows = json.loads((root / match[3]).read_text(encoding="utf-8"))["rows"]
        return f"{match[1]}{markdown(TABLES[match[2]], rows)}{match[5]}"

    return BLOCK.sub(block, readme)


def main() -> None:
    """Rewrite README.md in the checkout."""
    path = ROOT / "README.md"
    path.write_text(render(path.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{path} is current", file=sys.stderr)


if __name__ == "__main__":
    main()
