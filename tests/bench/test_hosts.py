"""``kvp bench flops --hosts``: the arithmetic, against one written down again."""

import json
from pathlib import Path

import pytest
from conftest import Kvp

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN = 8, 64, 8, 4, 8, 96
CONFIG = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "intermediate_size": FFN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "rms_norm_eps": 1e-5,
    "vocab_size": 97,
}
TOKENS, HOSTS, LINK, LATENCY, TFLOPS, PREFIX = 4097, 4, 2.0, 10.0, 0.5, 3


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "config.json"


def flops(layers: int, tokens: int, entries: float) -> float:
    projections = HIDDEN * HEAD_DIM * (2 * HEADS + 2 * KV_HEADS) + 3 * HIDDEN * FFN
    return layers * tokens * (2 * projections + 4 * HEADS * HEAD_DIM * entries)


def test_time_is_computing_shared_and_sums_in_a_ring(config: Path, kvp: Kvp) -> None:
    own = ("--hosts", HOSTS, "--link", LINK, "--latency", LATENCY, "--tflops", TFLOPS, "--layers", PREFIX)
    outcome = kvp("bench", "flops", "--base", config, "--prompt-tokens", TOKENS, *own, "--json")
    assert outcome.code == 0, outcome.err
    result = outcome.json()
    read, width = TOKENS - 1, KV_HEADS * HEAD_DIM
    only_kv, step = 4 * read * HIDDEN * width, flops(LAYERS, 1, TOKENS)
    maps = (LAYERS - PREFIX - 1) * only_kv
    for arm, layers, more in (("full", LAYERS - 1, 0), ("kvp", PREFIX, maps)):
        total = flops(layers, read, (read + 1) / 2) + only_kv + more + step
        alone, spread = (next(r for r in result["rows"] if (r["arm"], r["hosts"]) == (arm, n)) for n in (1, HOSTS))
        assert alone["tflop"] == spread["tflop"] == pytest.approx(total / 1e12)
        assert alone["total_s"] == pytest.approx(total / TFLOPS / 1e12)
        sums = 2 * (2 * layers + LAYERS)  # two chunks of the prompt, and the first step
        sent = 2 * HIDDEN * 2 * (layers * read + LAYERS) * 2 * (HOSTS - 1) / HOSTS
        assert spread["all_reduces"] == sums
        assert spread["exchange_s"] == pytest.approx(sums * LATENCY * 1e-6 + 8 * sent / (LINK * 1e9))
        assert spread["total_s"] == pytest.approx(alone["total_s"] / HOSTS + spread["exchange_s"])
    assert result["assumptions"]["hosts"] == HOSTS
    assert result["rows"][0]["speedup"] == 1


def test_the_table_names_what_it_assumes(config: Path, kvp: Kvp) -> None:
    outcome = kvp("bench", "flops", "--base", config.parent, "--hosts", 2, "--link", 40)
    assert outcome.code == 0
    for part in ("15 TFLOP/s a host", "40 Gbit/s", "50 us an all-reduce", "2 bytes a value", "4 of 8 layers"):
        assert part in outcome.err
    assert "KB/token" in outcome.out


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--hosts", 3, "--link", 40), "4 key/value heads of layer 0 cannot be spread evenly over 3 hosts"),
        (("--hosts", 2), "--base, --hosts and --link go together"),
        (("--hosts", 2, "--link", 0), "--link must be a number above 0, not 0"),
        (("--hosts", 2, "--link", "inf"), "--link is a finite number, not inf"),
        (("--hosts", 2, "--link", 1, "--tflops", "nan"), "--tflops is a finite number, not nan"),
        (("--hosts", 2, "--link", 1, "--latency", -1), "--latency must be a number from 0 up, not -1"),
        (("--hosts", 2, "--link", 40, "--layers", 8), "--layers must lie between 1 and 7"),
    ],
)
def test_refuses_what_makes_no_sense(options: tuple, named: str, config: Path, kvp: Kvp) -> None:
    outcome = kvp("bench", "flops", "--base", config, *options)
    assert (outcome.code, named in outcome.err) == (2, True), outcome.err


def test_sums_that_take_no_time_but_the_link_s(config: Path, kvp: Kvp) -> None:
    own = ("--hosts", 2, "--link", LINK, "--latency", 0, "--prompt-tokens", 2, "--json")
    for row in kvp("bench", "flops", "--base", config, *own).json()["rows"]:
        values = 2 * HIDDEN * (LAYERS + (LAYERS - 1 if row["arm"] == "full" else LAYERS // 2))
        assert row["exchange_s"] == pytest.approx((row["hosts"] - 1) * 8 * 2 * values / (LINK * 1e9))


SHAPES = {  # of Llama 3.1
    "8B": {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "num_hidden_layers": 80, "intermediate_size": 28672, "num_attention_heads": 64},
}
LINKS = {"Ethernet": (10, 200), "Thunderbolt 4": (40, 100), "Thunderbolt 5": (80, 20)}
"""Gbit/s, and microseconds an all-reduce, as docs/distributed.md assumes them."""


def test_the_page_has_what_the_command_says(tmp_path: Path, kvp: Kvp) -> None:
    page = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text()
    for size, shape in SHAPES.items():
        own = {"model_type": "llama", "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256}
        (tmp_path / "config.json").write_text(json.dumps(CONFIG | own | shape))
        for name, (link, latency) in LINKS.items():
            options = ("--hosts", 4, "--link", link, "--latency", latency, "--prompt-tokens", 8192, "--json")
            rows = kvp("bench", "flops", "--base", tmp_path / "config.json", *options).json()["rows"]
            seconds = " | ".join(f"{row['total_s']:.1f}" for row in rows)
            assert f"| {size} | {name}, {link} Gbit/s, {latency} us | {seconds} |" in page
