"""Where conversions read and write: existing outputs, links, full disks, kills. The old output survives all of it."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import Kvp, Outcome
from support import corenet

MAP = ",".join(map(str, corenet.LAYER_MAP))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return corenet.save(corenet.kv_prediction(), tmp_path / "in" / "c.pt")


def arguments(source: Path, out: Path) -> list[str]:
    return ["convert", "kvp", str(source), "--layer-map", MAP, "--out", str(out)]


def process(*command: object, **options: object) -> Outcome:
    """Run ``kvp`` as a process of its own."""
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **options)
    return Outcome(result.returncode, result.stdout, result.stderr)


def kvp_command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "kvp_mlx", *map(str, arguments)]


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def assert_one_line(outcome: Outcome, code: int) -> None:
    assert outcome.code == code, outcome.err
    assert outcome.err.startswith("kvp: ")
    assert outcome.err.count("\n") == 1
    assert "report it" not in outcome.err


def leftovers(out: Path) -> list[Path]:
    return list(out.parent.glob(f".{out.name}.*"))


@pytest.fixture
def old(source: Path, tmp_path: Path, kvp: Kvp) -> Path:
    """An output of another checkpoint at the place where the next one is to go."""
    other = corenet.save(corenet.kv_prediction(seed=7), tmp_path / "other.pt")
    assert kvp(*arguments(other, tmp_path / "out")).code == 0
    return tmp_path / "out"


def test_an_existing_output_needs_force(old: Path, source: Path, kvp: Kvp) -> None:
    before = contents(old)
    assert_one_line(kvp(*arguments(source, old)), 2)
    assert contents(old) == before
    assert kvp(*arguments(source, old), "--force").code == 0
    assert contents(old) != before
    assert contents(old).keys() == before.keys()
    assert not leftovers(old)


def test_force_that_fails_leaves_the_old_output(old: Path, source: Path, kvp: Kvp) -> None:
    before = contents(old)
    tensors = torch.load(source)
    tensors["auxiliary.norm.weight"][3] = float("nan")
    torch.save(tensors, source)
    assert_one_line(kvp(*arguments(source, old), "--force"), 2)
    assert contents(old) == before
    assert not leftovers(old)


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_what_is_not_a_bundle_is_never_replaced(force: list[str], source: Path, tmp_path: Path, kvp: Kvp) -> None:
    mine = tmp_path / "out"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    assert_one_line(kvp(*arguments(source, mine), *force), 2)
    assert contents(mine) == {"thesis.txt": b"years of work"}
    file = tmp_path / "file"
    file.write_text("x")
    assert_one_line(kvp(*arguments(source, file), *force), 2)
    assert file.read_text() == "x"


PLACES: dict[str, Callable[[Path], Path]] = {
    "the input itself": lambda source: source,
    "inside the input": lambda source: source / "out",
    "around the input": lambda source: source.parent,
    "the input by another way": lambda source: source.parent / ".." / source.parent.name,
}


@pytest.mark.parametrize("place", PLACES)
def test_the_input_is_never_overwritten(place: str, source: Path, kvp: Kvp) -> None:
    before = source.read_bytes()
    assert_one_line(kvp(*arguments(source, PLACES[place](source)), "--force"), 2)
    assert source.read_bytes() == before


def test_links_are_followed(source: Path, tmp_path: Path, kvp: Kvp) -> None:
    (tmp_path / "link.pt").symlink_to(source)
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    assert kvp(*arguments(tmp_path / "link.pt", tmp_path / "out")).code == 0
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "real" / "kvp.json").exists()
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    assert_one_line(kvp(*arguments(source, tmp_path / "circle")), 2)
    (tmp_path / "to-input").symlink_to(source.parent)
    assert_one_line(kvp(*arguments(tmp_path / "link.pt", tmp_path / "to-input"), "--force"), 2)
    assert source.exists()


@pytest.fixture
def unprivileged() -> list[str]:
    """Root may read and write everything, so give that up."""
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("root without setpriv")
    return ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search"]


def test_unreadable_source(source: Path, tmp_path: Path, unprivileged: list[str]) -> None:
    source.chmod(0)
    out = tmp_path / "out"
    for command in (arguments(source, out), ["convert", "openelm", source, "--out", out]):
        outcome = process(*unprivileged, *kvp_command(*command))
        assert_one_line(outcome, 2)
        assert "is not readable" in outcome.err or "cannot be read (Permission denied)" in outcome.err


def test_unwritable_place(source: Path, tmp_path: Path, unprivileged: list[str]) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    outcome = process(*unprivileged, *kvp_command(*arguments(source, tmp_path / "locked" / "out")))
    assert_one_line(outcome, 2)
    assert "Permission denied" in outcome.err


@pytest.mark.parametrize("options", [[], ["--q-bits", "4", "--q-group-size", "32"]])
def test_no_file_may_grow_half_way(options: list[str], old: Path, source: Path) -> None:
    """The operating system refuses to write on after 100 kB of a file, as a full disk or quota does."""
    before = contents(old)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # noqa: E731
    outcome = process(*kvp_command(*arguments(source, old), "--force", *options), preexec_fn=limit)
    assert_one_line(outcome, 1)
    assert "cannot write" in outcome.err
    assert contents(old) == before
    assert not leftovers(old)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], check=False)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_full_disk(small_disk: Path, source: Path, kvp: Kvp) -> None:
    outcome = kvp(*arguments(source, small_disk / "out"))
    assert_one_line(outcome, 1)
    assert "cannot write" in outcome.err
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_killed_in_the_middle(how: signal.Signals, old: Path, tmp_path: Path, kvp: Kvp) -> None:
    wide = corenet.Shape(1024, 64, [(4, 1, 2048)] * 4, vocabulary=4096)  # 120 MB
    small = corenet.Shape(64, 48, corenet.AUXILIARY.layers, vocabulary=4096)
    big = corenet.save(corenet.kv_prediction(wide, small, [0, 1, 2, 0]), tmp_path / "big.pt")
    before = contents(old)
    command = kvp_command("convert", "kvp", big, "--layer-map", "0,1,2,0", "--out", old, "--force")
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while running.poll() is None and not leftovers(old):
        time.sleep(0.001)
    running.send_signal(signal.SIGSTOP)  # or it ends before the signal comes, where the machine is busy
    assert running.poll() is None and leftovers(old), "it was not caught in the middle"
    running.send_signal(how)
    running.send_signal(signal.SIGCONT)
    assert running.wait(60) == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}[how]
    assert contents(old) == before
    if how is not signal.SIGKILL:
        assert not leftovers(old)
        return
    assert kvp("convert", "kvp", big, "--layer-map", "0,1,2,0", "--out", old, "--force").code == 0
    assert contents(old) != before


def test_an_openelm_directory_is_replaced_only_by_force(tmp_path: Path, kvp: Kvp) -> None:
    source, out = corenet.save(corenet.openelm(corenet.BASE), tmp_path / "c.pt"), tmp_path / "out"
    other = corenet.save(corenet.openelm(corenet.BASE, seed=3), tmp_path / "d.pt")
    assert kvp("convert", "openelm", other, "--out", out).code == 0
    before = contents(out)
    assert_one_line(kvp("convert", "openelm", source, "--out", out), 2)
    assert contents(out) == before
    assert kvp("convert", "openelm", source, "--out", out, "--force").code == 0
    assert contents(out) != before
    assert_one_line(kvp("convert", "openelm", out, "--out", out / "again"), 2)
    assert_one_line(kvp("convert", "hf", out, "--out", out, "--force"), 2)
