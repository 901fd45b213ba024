# isort: off
import os

os.environ["MLX_ENABLE_TF32"] = "0"  # GPUs' shortened fp32 products would not meet the tolerances
import kvp_mlx  # noqa: F401 - before all that imports mlx: it puts the fast BLAS in front
# isort: on

import io
import json
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.directories import TEXT, prose, write_llama
from support.training import training

from kvp_mlx.cli.main import main
from kvp_mlx.train.fit import FitOptions, fit_bundle
from kvp_mlx.train.loop import TrainOptions
from kvp_mlx.train.run import train_bundle


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the long tests begin first."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Undo what a shell does to background jobs: they, and what the tests start, would ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str

    def json(self) -> dict:
        return json.loads(self.out)


Kvp = Callable[..., Outcome]


@pytest.fixture
def kvp(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Kvp:
    """Run the command line in this process, as ``kvp ARGS`` would."""

    def run(*args: object, stdin: bytes = b"") -> Outcome:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["kvp", *map(str, args)])
        monkeypatch.setattr("kvp_mlx.cli.output.SILENT_SECONDS", 600.0)  # a busy machine's lines are no errors
        monkeypatch.setattr("kvp_mlx.cli.output.STARTED", time.monotonic())
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        with pytest.raises(SystemExit) as stop:
            main()
        streams = capsys.readouterr()
        return Outcome(stop.value.code or 0, streams.out, streams.err)

    return run


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT * 8)
    return path


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="session")
def fitted(base_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prefix bundle of two layers; do not change it (see ``bundle``)."""
    out = tmp_path_factory.mktemp("bundles") / "prefix"
    fit_bundle(str(base_dir), [text_file], out, FitOptions(layers=2, tokens=600, window=64))
    return out


@pytest.fixture
def bundle(fitted: Path, tmp_path: Path) -> Path:
    """A copy of the prefix bundle with a copy of its base, to be damaged at will."""
    copy = shutil.copytree(fitted, tmp_path / "bundle")
    config = json.loads((copy / "kvp.json").read_text())
    shutil.copytree(config["base"]["path"], copy / "base")
    config["base"]["path"] = "base"
    (copy / "kvp.json").write_text(json.dumps(config))
    return copy


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two files without a repetition."""
    folder = tmp_path_factory.mktemp("texts")
    for name, seed in (("a.txt", 1), ("b.txt", 2)):
        (folder / name).write_text(prose(2500, seed))
    return folder


@pytest.fixture(scope="session")
def starts(base_dir: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A ridge bundle of each kind to start from."""
    kinds = {"prefix": {"layers": 1}, "pruned": {"prune": 0.5}}
    out = tmp_path_factory.mktemp("starts")
    for name, kind in kinds.items():
        fit_bundle(str(base_dir), [str(texts)], out / name, FitOptions(tokens=256, window=64, **kind))
    return {name: out / name for name in kinds}


@pytest.fixture(scope="session")
def finished(
    starts: dict[str, Path], base_dir: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A run of a few steps and the folder of its data; do not change either."""
    out = tmp_path_factory.mktemp("finished") / "out"
    options = TrainOptions(minutes=None, tokens=64 * 4, window=64, right=16)
    train_bundle(str(starts["prefix"]), [str(texts)], out, options)
    return out, texts


@pytest.fixture
def run(finished: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the run, to be damaged."""
    shutil.copytree(finished[0], tmp_path / "out")
    shutil.copytree(training(finished[0]), training(tmp_path / "out"))
    return tmp_path / "out"
