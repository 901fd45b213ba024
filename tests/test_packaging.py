"""The wheel, installed away from the checkout, next to a file that shares a folder's name."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", str(out), str(ROOT)]
    subprocess.run(command, check=True)
    return next(out.glob("*.whl"))


def test_one_top_level_name_with_its_data(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"kvp_mlx"}
    for name in ("convert/gguf.py", "bench/ttft.py", "py.typed", "data/demo.md", "data/smollm2-135m/kvp.json"):
        assert f"kvp_mlx/{name}" in names
    on_disk = {str(path.relative_to(ROOT)) for folder in ("kvp_mlx",) for path in (ROOT / folder).rglob("*.py")}
    assert on_disk <= set(names)


def test_runs_outside_the_checkout_beside_decoys(wheel: Path, tmp_path: Path) -> None:
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    for decoy in ("convert.py", "bench.py"):
        (work / decoy).write_text("raise RuntimeError('the decoy was imported')\n")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True)
    code = (
        "import kvp_mlx, kvp_mlx.convert.gguf, kvp_mlx.bench.ttft, kvp_mlx.cli.main;"
        f"assert kvp_mlx.__file__.startswith({str(site)!r}), kvp_mlx.__file__;"
        "print(kvp_mlx.bundle.describe('smollm2-135m')['auxiliary']['kind'])"
    )
    environment = os.environ | {"PYTHONPATH": str(site)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=work, env=environment, capture_output=True, text=True, check=False
    )
    assert result.stdout.strip() == "prefix", result.stderr
