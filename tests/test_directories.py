"""Directories appear whole or not at all, and only what is ours is replaced or removed."""

import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from support.directories import write_llama

from kvp_mlx.errors import InputError, KVPError
from kvp_mlx.files import directories, write_json, write_text
from kvp_mlx.files.directories import (
    atomic_directory,
    check_removable,
    directory_bytes,
    recover,
    remove_directory,
    require_free,
    strangers,
    sweep,
)


@pytest.fixture
def ours(bundle: Path) -> Path:
    """A bundle with its base, a card and an auxiliary: all that we write."""
    write_llama(bundle / "auxiliary", seed=3, tokenizer=False)
    (bundle / "README.md").write_text("---\nlibrary_name: mlx\n---\n# mine\n")
    return bundle


def link_to(target: Path, place: Path) -> None:
    place.symlink_to(target)


STRANGERS = {
    ".git/": lambda d: (d / ".git").mkdir(),
    "thesis.tex": lambda d: (d / "thesis.tex").write_text("years"),
    "notes.md": lambda d: (d / "notes.md").write_text("years"),
    "README.md": lambda d: (d / "README.md").write_text("# My project"),
    "config.json": lambda d: (d / "config.json").write_text("{}"),
    "kvp.json": lambda d: (d / "kvp.json").write_text("{}"),
    "tokenizer.json": lambda d: (d / "tokenizer.json").write_text("[1]"),
    "data.json": lambda d: (d / "data.json").write_text("{}"),
    "main.py": lambda d: (d / "main.py").write_text(""),
    "embeddings.safetensors": lambda d: shutil.copy(d / "predictor.safetensors", d / "embeddings.safetensors"),
    "predictor.safetensors": lambda d: (d / "predictor.safetensors").write_bytes(b"\x07" + bytes(7) + b"garbage"),
    "model.safetensors": lambda d: link_to(d / "predictor.safetensors", d / "model.safetensors"),
    "auxiliary": lambda d: (shutil.rmtree(d / "auxiliary"), link_to(d / "base", d / "auxiliary")),
    "base/thesis.tex": lambda d: (d / "base" / "thesis.tex").write_text("years"),
    "base/photos/": lambda d: (d / "base" / "photos").mkdir(),
    "base/config.json": lambda d: (d / "base" / "config.json").write_text("{}"),
    "merges.txt": lambda d: os.mkfifo(d / "merges.txt"),
}


def test_what_we_write_is_ours(ours: Path) -> None:
    assert strangers(ours) == []
    check_removable(ours, "it")
    require_free(ours, force=True)


@pytest.mark.parametrize("name", STRANGERS)
def test_what_is_not_ours_is_named_and_kept(name: str, ours: Path) -> None:
    STRANGERS[name](ours)
    before = sorted(ours.rglob("*"))
    for refuse in (lambda: require_free(ours, force=True), lambda: check_removable(ours, "it")):
        with pytest.raises(InputError) as refused:
            refuse()
        assert f"holds {name}, which" in str(refused.value)
    assert sorted(ours.rglob("*")) == before


def test_links_and_the_folder_that_one_is_in_are_not_removed(
    ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(ours)
    with pytest.raises(InputError, match="is a link"):
        check_removable(tmp_path / "link", "it")
    for here in (ours, ours / "base"):
        monkeypatch.chdir(here)
        for name in (Path(), ours, Path("..") / here.name):
            if name.resolve() == here or here == ours:
                with pytest.raises(InputError, match="the folder that you are in"):
                    check_removable(name, "it")


def test_what_came_in_meanwhile_is_kept(ours: Path) -> None:
    with pytest.warns(UserWarning, match=r"diary\.txt"), atomic_directory(ours) as work:
        (work / "kvp.json").write_text("new")
        (ours / "diary.txt").write_text("today")
    assert (ours / "kvp.json").read_text() == "new"
    (kept,) = ours.parent.glob("bundle.*.old")
    assert (kept / "diary.txt").read_text() == "today"


KILLED = """
import os, signal, sys
from pathlib import Path
from kvp_mlx.files import directories
if sys.argv[2] == "two renames":
    directories._swap = lambda first, second: False
moves = []
rename = Path.replace
def replace(self, target):
    if len(moves) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    moves.append(self)
    return rename(self, target)
Path.replace = replace
with directories.atomic_directory(Path(sys.argv[1])) as work:
    (work / "config.json").write_text('{"model_type": "new"}')
"""


@pytest.mark.parametrize(("way", "moves"), [("one exchange", 0), ("two renames", 0), ("two renames", 1)])
def test_a_kill_in_the_middle_of_a_replacement_loses_nothing(way: str, moves: int, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write_json(out / "config.json", {"model_type": "old"})
    command = [sys.executable, "-c", KILLED, str(out), way, str(moves)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    recover(out)
    assert json.loads((out / "config.json").read_text())["model_type"] in ("old", "new")
    with atomic_directory(out) as work:
        (work / "config.json").write_text("{}")
    assert (out / "config.json").read_text() == "{}"


REMOVED_BY_HALF = """
import os, signal, sys
from pathlib import Path
from kvp_mlx.files import directories
unlink = os.unlink
def last(*args, **options):
    unlink(*args, **options)
    os.kill(os.getpid(), signal.SIGKILL)
os.unlink = last
directories.remove_directory(Path(sys.argv[1]))
"""


def test_a_kill_in_the_middle_of_a_removal_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("one.json", "two.json"):
        write_json(out / name, {})
    command = [sys.executable, "-c", REMOVED_BY_HALF, str(out)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".out.*/*.json"))) == 1
    recover(out)  # only what was left aside by a replacement is put back
    assert not out.exists()


def test_what_a_kill_left_aside_does_not_come_back_for_what_was_removed(tmp_path: Path) -> None:
    out, old = tmp_path / "out", tmp_path / ".out.0123abcd.old"
    for place in (out, old):
        place.mkdir()
    remove_directory(out)
    recover(out)
    assert not list(tmp_path.iterdir())


def test_a_replaced_directory_is_removed_under_a_name_that_is_not_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, removed, remove = tmp_path / "out", [], shutil.rmtree
    out.mkdir()
    monkeypatch.setattr(directories.shutil, "rmtree", lambda path, **_: removed.append(path.name) or remove(path))
    with atomic_directory(out) as work:
        (work / "config.json").write_text("{}")
    assert len(removed) == 1
    assert not removed[0].endswith(".old")


def test_only_leftovers_are_swept(tmp_path: Path) -> None:
    leftovers = (".gone.0123abcd", ".out.0123abcd", ".out.0123abcd.old")
    others = (".gone.0123abcd.old", ".out.0123abcx", "out", ".out.12345678.zip", ".git")  # the first: an only copy
    for name in (*leftovers, *others):
        (tmp_path / name).mkdir()
    sweep(tmp_path)
    assert len(list(tmp_path.iterdir())) == 8  # all too young
    for place in tmp_path.iterdir():
        os.utime(place, (0, 0))
    sweep(tmp_path, "out")
    assert {place.name for place in tmp_path.iterdir()} == {*others, ".gone.0123abcd"}
    sweep(tmp_path)
    assert {place.name for place in tmp_path.iterdir()} == set(others)


def test_a_full_disk_is_said_to_be_one(tmp_path: Path) -> None:
    with pytest.raises(KVPError, match="No space left"), atomic_directory(tmp_path / "out"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


def test_private_files_are_the_users_alone(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        (tmp_path / "made before").mkdir(mode=0o755)
        for folder in ("new", "made before"):
            write_text(tmp_path / folder / "x.json", "text", private=True)
        with atomic_directory(tmp_path / "cache", private=True) as work:
            (work / "cache.json").write_text("{}")
    finally:
        os.umask(before)
    for place in tmp_path.rglob("*"):
        assert stat.S_IMODE(place.stat().st_mode) & 0o077 == 0, place


def test_the_size_of_a_directory_is_that_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    for place, size in (("a/one", 10), ("a/b/two", 5)):
        (tmp_path / place).write_bytes(b"x" * size)
    (tmp_path / "a" / "nowhere").symlink_to(tmp_path / "gone")
    assert directory_bytes(tmp_path / "a") == 15
    assert directory_bytes(tmp_path / "gone") == 0
