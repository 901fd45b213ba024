"""``kvp convert``: what the command adds to the converters."""

from pathlib import Path

import pytest
from conftest import Kvp


def test_the_defaults_alias_is_a_source_and_a_tokeniser(
    base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kvp: Kvp
) -> None:
    monkeypatch.setattr("kvp_mlx.bundle.named.ensure_base", lambda *_, **__: base_dir)
    alias, out = "smollm2-135m", tmp_path / "out"
    result = kvp("convert", "hf", alias, "--tokenizer", alias, "--out", out, "--json").json()
    assert result["source"] == alias
    assert (out / "tokenizer.json").read_bytes() == (base_dir / "tokenizer.json").read_bytes()
    for arguments in (["nothing"], [alias, "--tokenizer", "nothing", "--force"]):
        outcome = kvp("convert", "hf", *arguments, "--out", out)
        assert outcome.code == 2
        assert f"nothing is no directory, Hub id (owner/name) or '{alias}'." in outcome.err
