"""``--draft`` of ``kvp generate``, ``kvp chat`` and ``kvp serve``."""

from pathlib import Path

import pytest
from conftest import Kvp


@pytest.fixture(scope="module")
def twin(starts: dict[str, Path]) -> Path:
    """Return a bundle with a pruned auxiliary."""
    return starts["pruned"]


def test_generate_tells_what_the_draft_proposed(twin: Path, kvp: Kvp) -> None:
    common = ("generate", "--raw", "one two three four", "--model", twin, "--max-tokens", 12, "--json", "--seed", 1)
    for sampling in ((), ("--temperature", 1.0, "--top-p", 0.9, "--repetition-penalty", 1.2)):
        for path in ("full", "kvp"):
            plain, drafted = (
                kvp(*common, *sampling, "--prefill", path, *options).json()
                for options in ((), ("--draft", "auxiliary", "--draft-tokens", 2))
            )
            assert drafted["tokens"] == plain["tokens"]
            assert plain["draft"] is None
            counts = drafted["draft"]
            assert counts["tokens"] >= counts["accepted"] >= 0
            assert counts["acceptance"] == pytest.approx(counts["accepted"] / counts["tokens"], abs=1e-3)


def test_a_prefix_is_refused_in_one_line(fitted: Path, kvp: Kvp) -> None:
    for command in (("generate", "--raw", "one two"), ("chat",), ("serve", "--port", 0)):
        result = kvp(*command, "--model", fitted, "--draft", "auxiliary")
        assert (result.code, "the auxiliary cannot draft" in result.err) == (2, True)
    assert kvp("generate", "--raw", "one", "--model", fitted, "--draft", "auto", "--max-tokens", 2).code == 0
    quantised = kvp("generate", "--raw", "one", "--model", fitted, "--draft", "auxiliary", "--kv-bits", 8)
    assert quantised.code == 2
