"""Several processes over mlx's ring: the same tokens as one, what travels, and what becomes of them when one goes."""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import mlx.nn as nn
import pytest
from conftest import Kvp
from mlx_lm import convert
from support.directories import prose, write_llama
from support.ring import Ring
from support.ring_answers import ARMS, NEW_TOKENS, PACKED, PROMPT_TOKENS, answers, stay_packed
from support.tiny import llama, openelm

from kvp_mlx.arms.kinds import parse_arm
from kvp_mlx.bundle.loading import load
from kvp_mlx.device import hosts as hosts_file
from kvp_mlx.errors import InputError, UnsupportedModelError
from kvp_mlx.models.sharding import check_shardable, shard
from kvp_mlx.train.fit import FitOptions, fit_bundle

GONE_SECONDS = 10
FLOAT_BYTES = 4


@pytest.fixture(scope="module")
def bundles(
    starts: dict[str, Path], base_dir: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A bundle of each kind; the small auxiliary's heads could not be shared by two hosts."""
    folder = tmp_path_factory.mktemp("kinds")
    small = write_llama(folder / "small", seed=3, hidden_size=48, num_hidden_layers=2, num_key_value_heads=1)
    options = FitOptions(auxiliary=str(small), tokens=256, window=64)
    fit_bundle(str(base_dir), [str(texts)], folder / "model", options)
    return starts | {"model": folder / "model"}


@pytest.fixture
def prompt(tmp_path: Path) -> Path:
    (tmp_path / "prompt.txt").write_text(prose(60, 4))
    return tmp_path / "prompt.txt"


@pytest.fixture(scope="module")
def found(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What two hosts answered by each bundle and arm."""
    with Ring(tmp_path_factory.mktemp("ring"), "-m", "support.ring_answers", *bundles.values()) as ring:
        code, out, err = ring.outcome()
        assert (code, err) == (0, "")
        return json.loads(out)


def test_two_hosts_answer_as_one_does(bundles: dict[str, Path], found: dict[str, dict]) -> None:
    for place in bundles.values():
        model = load(str(place))
        for arm in ARMS:
            assert found[f"{place} {arm}"]["tokens"] == answers(model, arm), (place, arm)


@pytest.fixture(scope="module")
def quantised(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Bundles of bases in 4 and 8 bits, whose input features are two groups of 32 or more on each host."""
    folder, places = tmp_path_factory.mktemp("quantised"), []
    write_llama(folder / "base", intermediate_size=128)
    for bits, kind in ((4, {"layers": 1}), (8, {"prune": 0.5})):
        convert(str(folder / "base"), str(folder / f"base-{bits}"), quantize=True, q_bits=bits, q_group_size=32)
        places.append(folder / f"bundle-{bits}")
        fit_bundle(str(folder / f"base-{bits}"), [str(texts)], places[-1], FitOptions(tokens=256, window=64, **kind))
    return places


@pytest.mark.parametrize("packed", [(), (PACKED,)])
def test_a_quantised_base_is_spread_as_well(
    packed: tuple[str, ...], quantised: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As CPUs run it, in fp32, and packed, as GPUs do."""
    with Ring(tmp_path, "-m", "support.ring_answers", *packed, *quantised) as ring:
        code, out, err = ring.outcome()
        assert (code, err) == (0, "")
    if packed:
        stay_packed(monkeypatch.setattr)
    for place in quantised:
        model = load(str(place))
        assert any(isinstance(part, nn.QuantizedLinear) for part in model.base.modules()) == bool(packed)
        for arm in ARMS:
            assert json.loads(out)[f"{place} {arm}"]["tokens"] == answers(model, arm), (place, arm)


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux counts")
def test_hosts_send_what_the_work_says(bundles: dict[str, Path], found: dict[str, dict]) -> None:
    model, hidden = load(str(bundles["prefix"])), 64
    depth, prefix = len(model.base.layers), model.config.auxiliary.layers
    layers = {"full": depth - 1, "kvp": prefix}  # the last layer only fills its cache; prediction sends nothing
    for arm, count in layers.items():
        values = 2 * 2 * hidden * (count * (PROMPT_TOKENS - 1) + depth * NEW_TOKENS)  # two prompts, two sums a layer
        assert found[f"{bundles['prefix']} {arm}"]["sent_bytes"] == pytest.approx(FLOAT_BYTES * values, rel=0.02)


def test_bench_reports_hosts_and_what_they_sum(bundles: dict[str, Path], tmp_path: Path) -> None:
    options = ("--prompt-tokens", 64, "--rounds", 1, "--arms", "full,kvp", "--batch-size", 2, "--json")
    with Ring(tmp_path, "-m", "kvp_mlx", "bench", "ttft", "--model", bundles["prefix"], *options) as ring:
        code, out, err = ring.outcome()
        assert ring.outcome(1)[1:] == ("", "")
    assert code == 0, err
    result = json.loads(out)
    assert result["hosts"] == 2
    full, kvp = result["rows"]
    assert full["summed_bytes_per_token"] == FLOAT_BYTES * 2 * 64 * (3 * 63 + 4) / 64
    assert kvp["summed_bytes_per_token"] == FLOAT_BYTES * 2 * 64 * (1 * 63 + 4) / 64
    assert kvp["ttft_ms"]["median"] > 0


def test_the_first_host_alone_talks_and_chooses(
    bundles: dict[str, Path], prompt: Path, tmp_path: Path, kvp: Kvp
) -> None:
    own = ("generate", "--model", bundles["pruned"], "--prompt-file", prompt, "--raw", "--prefill", "kvp", "--json")
    command = (*own, "--temperature", 1, "--seed", 7, "--repetition-penalty", 1.2, "--max-tokens", 16, "--stop", "zz")
    alone = kvp(*command).json()
    with Ring(tmp_path, "-m", "kvp_mlx", *command, "--draft", "auto") as ring:
        code, out, err = ring.outcome()
        assert (code, "kvp:" in err) == (0, False)
        assert ring.outcome(1) == (0, "", "")
    assert json.loads(out)["tokens"] == alone["tokens"]
    assert json.loads(out)["prefill"] == "kvp"
    assert json.loads(out)["draft"] is None
    with Ring(tmp_path, "-m", "kvp_mlx", *command, "--draft", "auxiliary") as ring:
        code, _, err = ring.outcome()
    assert (code, "the base is spread over several hosts" in err) == (2, True)


def test_a_chat_goes_on_over_turns(bundles: dict[str, Path], tmp_path: Path, kvp: Kvp) -> None:
    lines = "one two\nthree\n/quality exact\n/edit four\n/clear\nfive\n"
    command = ("chat", "--model", bundles["prefix"], "--max-tokens", 6, "--prefill", "kvp", "--exact-tail", 2)
    alone = kvp(*command, "--no-refine", stdin=lines.encode())
    with Ring(tmp_path, "-m", "kvp_mlx", *command) as ring:
        code, out, err = ring.outcome(text=lines)
        assert ring.outcome(1) == (0, "", "")
    assert code == alone.code == 0
    assert out == alone.out
    assert "predicted" in err


@pytest.mark.parametrize("gone", [0, 1])
def test_a_host_that_is_killed_ends_the_other(bundles: dict[str, Path], tmp_path: Path, gone: int) -> None:
    command = ("chat", "--model", bundles["prefix"], "--max-tokens", 4)
    with Ring(tmp_path, "-m", "kvp_mlx", *command) as ring:
        ring.processes[0].stdin.write("hello\n")
        ring.processes[0].stdin.flush()
        ring.wait_for("\n")  # an answer; now both hosts wait
        ring.processes[gone].kill()
        start = time.monotonic()
        code, _, err = ring.outcome(1 - gone)
    assert time.monotonic() - start < GONE_SECONDS
    assert code == 1
    assert f"kvp: {hosts_file.gone(f'host {gone}')}" in err


def test_a_fit_that_loses_a_host_writes_nothing(base_dir: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "written" / "out"
    command = ("fit", base_dir, "--layers", 1, "--data", texts, "--tokens", 10**9, "--window", 64, "--out", out)
    with Ring(tmp_path, "-m", "kvp_mlx", *command) as ring:
        while not out.parent.exists() or not list(out.parent.iterdir()):
            assert ring.processes[0].poll() is None
            time.sleep(0.05)
        ring.processes[1].kill()
        assert ring.outcome(0)[0] == 1
    assert list(out.parent.iterdir()) == []


def test_two_hosts_fit_what_one_does(base_dir: Path, texts: Path, tmp_path: Path, kvp: Kvp) -> None:
    command = ("fit", base_dir, "--prune", 0.5, "--data", texts, "--tokens", 1000, "--window", 64, "--json", "--out")
    alone = kvp(*command, tmp_path / "alone").json()
    with Ring(tmp_path, "-m", "kvp_mlx", *command, tmp_path / "both") as ring:
        code, out, err = ring.outcome()
        assert (code, "kvp:" in err) == (0, False)
        assert ring.outcome(1) == (0, "", "")
    assert json.loads(out)["tokens"] == alone["tokens"] == 1000
    one, two = (load(str(tmp_path / name)) for name in ("alone", "both"))
    for block in one.predictor.blocks:
        for part in ("weight", "bias"):
            mine, theirs = (model.predictor.maps[block.name][part] for model in (one, two))
            assert abs(mine - theirs).max().item() < 1e-3
    assert abs(one.predictor.deviation.linear.weight - two.predictor.deviation.linear.weight).max().item() < 1e-3


def test_uneven_heads_are_refused_once(base_dir: Path, tmp_path: Path) -> None:
    named = "2 key/value heads of layer 0 cannot be spread evenly over 3 hosts; use 1 or 2."
    with Ring(tmp_path, "-m", "kvp_mlx", "generate", "hello", "--model", base_dir, hosts=3) as ring:
        assert ring.outcome() == (2, "", f"kvp: {named}")
        assert [ring.outcome(rank) for rank in (1, 2)] == [(2, "", "")] * 2


def test_bad_usage_is_told_by_a_first_host_that_is_slower(tmp_path: Path) -> None:
    program = (
        "import os, sys, time; from kvp_mlx.cli.main import main; from kvp_mlx.device.hosts import joined; joined();"
        "time.sleep(2.5 * (os.environ['MLX_RANK'] == '0')); sys.argv[1:] = ['generate', '--quality', 'superb']; main()"
    )
    with Ring(tmp_path, "-c", program) as ring:
        code, out, err = ring.outcome()
        assert (code, out, "Invalid value for '--quality'" in err) == (2, "", True)
        assert ring.outcome(1) == (2, "", "")


def test_architectures_that_cannot_be_spread_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match="architecture 'openelm' over hosts"):
        check_shardable(openelm(), 2)
    with pytest.raises(InputError, match=r"8 query heads of layer 0 .* over 3 hosts; use 1 or 2\."):
        check_shardable(llama(num_key_value_heads=6, num_attention_heads=8), 3)
    uneven = llama(num_key_value_heads=4, num_attention_heads=8)
    uneven.layers[2].self_attn.n_kv_heads = 3
    with pytest.raises(InputError, match=r"3 key/value heads of layer 2 .* over 2 hosts; use one\."):
        check_shardable(uneven, 2)


def test_groups_of_weights_that_hosts_cannot_share_are_refused_by_name() -> None:
    """Packed weights are cut between groups alone."""
    group = SimpleNamespace(size=lambda: 2, rank=lambda: 1)
    even, uneven = (llama(intermediate_size=features) for features in (128, 96))
    for model in (even, uneven):
        nn.quantize(model, group_size=32, bits=4)
    shard(even, SimpleNamespace(size=2, group=group))
    assert even.layers[0].mlp.down_proj.scales.shape == (64, 2)
    with pytest.raises(InputError, match=r"2 hosts cannot share this model evenly .*group size 32"):
        shard(uneven, SimpleNamespace(size=2, group=group))


@pytest.mark.parametrize(
    ("command", "named"),
    [
        (("demo",), "'kvp demo' runs on one machine; mlx.launch starts generate, chat, serve, "),
        (("generate", "--prompt-file", "-"), "stdin cannot be read to its end; name a file."),
        (("bench", "ttft", "--preset", "openelm-1_1b-kvp-lp-0_25"), "a published pair runs on one host"),
    ],
)
def test_what_mlx_launch_cannot_start_is_refused(
    command: tuple, named: str, monkeypatch: pytest.MonkeyPatch, kvp: Kvp
) -> None:
    monkeypatch.setenv(hosts_file.LAUNCHED, "0")
    outcome = kvp(*command)
    assert (outcome.code, named in outcome.err) == (2, True), outcome.err


def test_hosts_read_what_one_does_from_parts(bundles: dict[str, Path]) -> None:
    whole, parts = load(str(bundles["pruned"])), [load(str(bundles["pruned"])) for _ in range(2)]
    widths = {(layer, name): width // 2 for b in whole.predictor.blocks for layer, name, width in b.targets}
    for rank, part in enumerate(parts):
        part.predictor.keep_part(widths, rank)
    for block in whole.predictor.blocks:
        mine = [part.predictor.maps[block.name].weight for part in parts]
        start = 0
        for number, (_, _, width) in enumerate(block.targets):
            rows = whole.predictor.maps[block.name].weight[start : start + width]
            half = slice(number * width // 2, (number + 1) * width // 2)
            assert (rows[: width // 2] == mine[0][half]).all().item()
            assert (rows[width // 2 :] == mine[1][half]).all().item()
            start += width
    assert parse_arm("kvp").work(parts[0], 64, 1).flops < parse_arm("kvp").work(whole, 64, 1).flops
