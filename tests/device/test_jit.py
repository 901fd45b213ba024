"""mlx loads compiled code from a folder by its name: nobody else may be able to put any there."""

import os
import stat
from pathlib import Path

import mlx.core as mx
import pytest

from kvp_mlx.device import jit


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary directory that everybody shares, and a cache of one's own."""
    monkeypatch.setenv("KVP_CACHE_DIR", str(tmp_path / "own"))
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    monkeypatch.setenv("TMPDIR", str(shared))
    return shared


def compiled_files(folder: Path) -> list[Path]:
    """Compile something that no other test does, and return what lies in the folder then."""
    function = mx.compile(lambda a, b: mx.exp(a) * b + a - float(os.getpid() % 1000) - 0.125)
    mx.eval(function(mx.ones(3), mx.ones(3)))
    return list(folder.glob("*.so"))


def test_the_folder_is_made_for_the_user_alone(temporary: Path) -> None:
    folder = jit.secure_folder()
    assert folder == jit.compile_folder()
    assert temporary in folder.parents
    for place in (folder, *folder.parents[:2]):
        assert stat.S_IMODE(place.stat().st_mode) == 0o700


def test_mlx_compiles_there(temporary: Path) -> None:
    if mx.default_device().type != mx.DeviceType.cpu:
        pytest.skip("GPUs compile elsewhere")
    assert compiled_files(jit.secure_folder())


def planted_by_all(shared: Path) -> None:
    (shared / "mlx").mkdir()
    (shared / "mlx").chmod(0o777)


def planted_link(shared: Path) -> None:
    (shared / "elsewhere").mkdir()
    (shared / "mlx").symlink_to(shared / "elsewhere")


def planted_deep(shared: Path) -> None:
    jit.secure_folder().chmod(0o777)


def no_sticky_bit(shared: Path) -> None:
    shared.chmod(0o777)


@pytest.mark.parametrize("plant", [planted_by_all, planted_link, planted_deep, no_sticky_bit])
def test_a_folder_that_others_can_write_to_is_not_used(plant: object, temporary: Path, tmp_path: Path) -> None:
    plant(temporary)
    folder = jit.secure_folder()
    assert tmp_path / "own" in folder.parents
    assert jit.is_secure(folder)
    assert stat.S_IMODE((tmp_path / "own" / "compiled").stat().st_mode) == 0o700
    assert jit.secure_folder() == folder
