"""The wheel, installed away from the checkout, next to a file that shares a folder's name."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build from a clean copy, since setuptools takes over what an earlier build left in build/."""
    out = tmp_path_factory.mktemp("wheel")
    source = shutil.copytree(ROOT, out / "source", ignore=shutil.ignore_patterns(".*", "build", "dist", "*.egg-info"))
    options = ["-q", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(out)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True)
    return next(out.glob("*.whl"))


def test_one_top_level_name_with_its_data(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"kvp_mlx"}
    for name in (
        "convert/gguf.py",
        "convert/bundles/kvp.py",
        "bench/ttft.py",
        "py.typed",
        "data/demo.md",
        "data/smollm2-135m/kvp.json",
    ):
        assert f"kvp_mlx/{name}" in names
    own = {str(path.relative_to(ROOT)) for path in (ROOT / "kvp_mlx").rglob("*.py")}
    mapped = {
        f"kvp_mlx/{path.relative_to(ROOT)}" for name in ("convert", "bench") for path in (ROOT / name).rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == own | mapped


def test_runs_outside_the_checkout_beside_decoys(wheel: Path, tmp_path: Path) -> None:
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    for decoy in ("convert.py", "bench.py"):
        (work / decoy).write_text("raise RuntimeError('the decoy was imported')\n")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True)
    code = (
        "import kvp_mlx, kvp_mlx.convert.gguf, kvp_mlx.bench.ttft, kvp_mlx.bundle.loading, kvp_mlx.cli.main;"
        f"assert kvp_mlx.__file__.startswith({str(site)!r}), kvp_mlx.__file__;"
        "print(kvp_mlx.bundle.loading.describe('smollm2-135m')['auxiliary']['kind'])"
    )
    environment = os.environ | {"PYTHONPATH": str(site)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=work, env=environment, capture_output=True, text=True, check=False
    )
    assert result.stdout.strip() == "prefix", result.stderr
