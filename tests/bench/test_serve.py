"""``kvp bench serve`` with real servers on tiny models."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import Kvp
from kvp_mlx.bench.serve import ARMS
from support.waiting import wait_until

SHORT = ("--prompt-tokens", "40,150", "--clients", "2", "--new-tokens", 5, "--rounds", 2)


@pytest.mark.long
def test_rows_of_both_servers(fitted: Path, tmp_path: Path, kvp: Kvp) -> None:
    out = tmp_path / "serve.json"
    outcome = kvp("bench", "serve", "--model", fitted, *SHORT, "--out", out, "--json")
    assert outcome.code == 0, outcome.err
    result = outcome.json()
    assert json.loads(out.read_text()) == result
    assert {"chip", "mlx_lm"} <= result["machine"].keys()
    assert (result["precision"], result["quality"]) == ("float32", "balanced")
    places = [(row["prompt_tokens"], row["clients"], row["arm"]) for row in result["rows"]]
    assert places == [(tokens, clients, arm) for tokens, clients in ((40, 1), (150, 1), (40, 2)) for arm in ARMS]
    for row in result["rows"]:
        assert (
            row["prompt_tokens"] - 12 < row["read_tokens"] < row["prompt_tokens"] + 8
        )  # the template's first ones are known
        assert len(row["ttft_ms"]["samples"]) == 2 * row["clients"]
        is_ours = row["arm"] != "mlx-lm-server"
        assert (row["engine_ms"] is not None) == is_ours
        assert (row["http_ms"] is not None) == (is_ours and row["clients"] == 1)
        if is_ours:
            assert 0 < row["engine_ms"]["median"] < row["ttft_ms"]["median"]
        is_long = row["prompt_tokens"] == 150
        assert row["paths"] == {"auto": ["kvp" if is_long else "full"], "full": ["full"]}.get(row["arm"], [])
        assert (row["tps"] is not None) == (row["clients"] == 2)
        assert row["tps"] is None or row["tps"]["median"] > 0
    one, two = result["rows"][1:3]
    assert one["speedup"] == two["ttft_ms"]["median"] / one["ttft_ms"]["median"]


def test_an_arm_predicts_short_prompts_too(fitted: Path, kvp: Kvp) -> None:
    how = ("--prompt-tokens", "90", "--clients", "1", "--new-tokens", 3, "--rounds", 1, "--json")
    outcome = kvp("bench", "serve", "--model", fitted, "--arms", "kvp,auto", *how)
    assert outcome.code == 0, outcome.err
    rows = outcome.json()["rows"]
    assert [(row["arm"], row["paths"]) for row in rows] == [("kvp", ["kvp"]), ("auto", ["full"])] * 2
    assert min(row["read_tokens"] for row in rows) > 78  # nobody had asked that before


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--arms", "full,psychic"), "psychic"),
        (("--clients", "0"), "--clients"),
        (("--prompt-tokens", "500"), "context window"),
    ],
)
def test_what_cannot_be_run_is_refused(options: tuple, named: str, fitted: Path, kvp: Kvp) -> None:
    outcome = kvp("bench", "serve", "--model", fitted, *options)
    assert outcome.code == 2
    assert named in outcome.err


def test_prediction_needs_a_predictor(base_dir: Path, kvp: Kvp) -> None:
    outcome = kvp("bench", "serve", "--model", base_dir, "--prompt-tokens", "40", "--new-tokens", 5)
    assert outcome.code == 2
    assert "no predictor" in outcome.err


@pytest.mark.skipif(shutil.which("pgrep") is None, reason="no pgrep here (apt-get install procps)")
def test_an_interrupt_of_the_command_alone_ends_its_servers(fitted: Path) -> None:
    how = ("--arms", "full,mlx-lm-server", "--prompt-tokens", "150", "--clients", "8", "--new-tokens", "64")
    command = [sys.executable, "-m", "kvp_mlx", "bench", "serve", "--model", str(fitted), *how, "--rounds", "200"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True) as process:
        wait_until(lambda: len(children_of(process.pid)) == 2, seconds=60)
        time.sleep(3)  # asking them
        servers = children_of(process.pid)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    assert len(servers) == 2
    wait_until(lambda: not any(Path(f"/proc/{server}").exists() for server in servers), seconds=10)


def children_of(pid: int) -> list[str]:
    return subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout.split()
