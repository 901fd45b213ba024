"""Making predictors: maps in closed form, and training by gradient."""

from pathlib import Path

SAMPLE = Path(__file__).parents[1] / "data" / "sample" / "train.jsonl.gz"
"""Public-domain prose, so that a first run needs no data of one's own."""
