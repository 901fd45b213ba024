"""Every kvp command in README.md and docs/ runs, as written, in the checkout; each page by itself."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Kvp
from support import corenet
from support.corenet import PIECES, train_llama_tokenizer
from support.directories import write_llama
from support.gguf_files import write_gguf

from kvp_mlx.bundle.named import ensure_base

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMAND = re.compile(r"^\$ kvp (.*?)(?:\s+#.*)?$", re.MULTILINE)
PAGES = {
    str(path.relative_to(ROOT)): commands
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if (commands := COMMAND.findall(path.read_text()))
}

# These take the place of the options given: what would take minutes is cut short, and outputs go where they do no harm.
SHORTER = {
    "generate": ["--max-tokens", "2"],
    "demo": ["--max-tokens", "2"],
    "bench ttft": ["--prompt-tokens", "16", "--rounds", "1"],
    "bench decode": ["--prompt-tokens", "16", "--rounds", "1", "--new-tokens", "4"],
    "bench memory": ["--prompt-tokens", "16"],
    "fit": ["--tokens", "64"],
    "train": ["--minutes", "0.1", "--fit-tokens", "64", "--window", "64"],
    "eval needle": ["--limit", "1", "--prompt-tokens", "128"],
    "eval perplexity": ["--limit", "1", "--prompt-tokens", "24", "--continuation-tokens", "8"],
    "eval diagnose": ["--limit", "2", "--prompt-tokens", "24", "--continuation-tokens", "8"],
    "eval context": ["--limit", "2", "--prompt-tokens", "24", "--continuation-tokens", "8"],
}


@pytest.mark.long
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run(page: str, kvp: Kvp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("kvp_mlx", "README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    write_checkpoints(tmp_path)
    base, own = ensure_base(), tmp_path / "cache"  # the user may have saved a cache by a name that the pages use
    own.mkdir()
    (own / base.name).symlink_to(base)
    monkeypatch.setenv("KVP_CACHE_DIR", str(own))
    monkeypatch.chdir(tmp_path)
    for command in PAGES[page]:
        extra = next((more for name, more in SHORTER.items() if command.startswith(name)), [])
        outcome = kvp(*replaced(shlex.split(command), extra))
        assert outcome.code == 0, f"kvp {command}: {outcome.err}"


def replaced(arguments: list[str], extra: list[str]) -> list[str]:
    """Return a command's arguments with other values for some options, since none may come twice."""
    kept = list(arguments)
    for option in extra[::2]:
        if option in kept:
            place = kept.index(option)
            del kept[place : place + 2]
    return [*kept, *extra]


def write_checkpoints(directory: Path) -> None:
    """Write tiny files under the names that the section on converting uses."""
    train_llama_tokenizer(directory)
    base, auxiliary = (replace(shape, vocabulary=PIECES) for shape in (corenet.BASE, corenet.AUXILIARY))
    corenet.save(corenet.openelm(base), directory / "checkpoint_average.pt")
    corenet.save(corenet.kv_prediction(base, auxiliary), directory / "kv_prediction.pt")
    write_gguf(directory / "model.gguf", write_llama(directory / "llama", tokenizer=False))


def test_there_are_commands() -> None:
    assert len(PAGES["README.md"]) >= 8
    assert len(PAGES) >= 5


def test_the_two_commands_and_ci_agree() -> None:
    assert re.findall(r"^\$ (make \w+)", README, flags=re.MULTILINE)[:2] == ["make demo", "make test"]
    assert "\nmake test\n" in (ROOT / ".ci" / "run").read_text()
