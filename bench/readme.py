"""Writes the README's tables from committed results (``make readme``), checked by tests.

Those of the bench come from files of ``bench/results``, that of evaluation from the folder ``docs/results``.
"""

import json
import re
import sys
from pathlib import Path

from ..evaluate.report import read_results, summary
from .report import DECODE, MEMORY, TTFT, Columns, markdown

ROOT = Path(__file__).parents[1]
TABLES: dict[str, Columns] = {"ttft": TTFT, "decode": DECODE, "memory": MEMORY}
BLOCK = re.compile(r"(<!-- (\w+) (bench/results/\S+\.json) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
EVALUATION = re.compile(r"(<!-- evaluation (\S+) -->\n)(.*?)(<!-- end evaluation -->)", re.DOTALL)
NOT_YET = "Not measured yet on this default: `make evaluate DATA=folder`, then `make readme`.\n"


def render(readme: str, root: Path = ROOT) -> str:
    """Return the README with every ``<!-- ttft|decode|memory FILE -->``, ``<!-- evaluation FOLDER -->`` made again."""

    def block(match: re.Match[str]) -> str:
        rows = json.loads((root / match[3]).read_text(encoding="utf-8"))["rows"]
        return f"{match[1]}{markdown(TABLES[match[2]], rows)}{match[5]}"

    def evaluation(match: re.Match[str]) -> str:
        folder = root / match[2]
        return f"{match[1]}{summary(read_results(folder)) if any(folder.glob('*.json')) else NOT_YET}{match[4]}"

    return EVALUATION.sub(evaluation, BLOCK.sub(block, readme))


def main() -> None:
    """Rewrite README.md in the checkout."""
    path = ROOT / "README.md"
    path.write_text(render(path.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{path} is current", file=sys.stderr)


if __name__ == "__main__":
    main()
