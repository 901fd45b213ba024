"""The command line as design.md section 6 promises it, run in this process on tiny models."""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import Kvp
from mlx_lm.generate import generate_step
from support.directories import TEXT

import kvp_mlx
from kvp_mlx.bundle import loading
from kvp_mlx.cli.main import COMMANDS, load_command

GENERATE_KEYS = {
    "text",
    "tokens",
    "prompt_tokens",
    "prefill",
    "exact_tail",
    "ttft_ms",
    "auxiliary_prefill_ms",
    "predict_ms",
    "first_step_ms",
    "generation_tps",
    "peak_memory_bytes",
    "finish_reason",
}


def test_help_comes_in_under_a_second() -> None:
    def seconds() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "kvp_mlx", "--help"], check=True, capture_output=True)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(3)) < 1.0


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_take_little_time_and_no_mlx(option: str) -> None:
    run = (
        f"import sys, runpy; sys.argv = ['kvp', {option!r}]\ntry:\n    runpy.run_module('kvp_mlx', run_name='__main__')"
    )
    code = f"{run}\nfinally:\n    print(sorted({{name.split('.')[0] for name in sys.modules}}), file=sys.stderr)"

    def run_once() -> tuple[float, str]:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, result.stderr

    outcomes = [run_once() for _ in range(3)]
    assert min(seconds for seconds, _ in outcomes) < 0.3
    assert "'kvp_mlx'" in outcomes[0][1]
    assert "'mlx" not in outcomes[0][1]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_all_and_of_one_say_the_same(name: str, kvp: Kvp) -> None:
    assert load_command(name).get_short_help_str(200) == COMMANDS[name].help
    outcome = kvp(name, "--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert COMMANDS[name].help.split(".")[0][:40] in " ".join(outcome.out.split())


def test_an_unknown_command_is_answered_with_the_nearest(kvp: Kvp) -> None:
    assert "Did you mean 'chat'?" in kvp("chta").err


def test_the_device_is_chosen_before_mlx_lm_takes_its_stream() -> None:
    code = (
        "import sys; sys.argv = ['kvp', 'bench', 'ttft', '--device', 'cpu', '--help'];"
        "from kvp_mlx.cli import device;"
        "was = device.use_device; device.use_device = lambda d: (print('mlx_lm' in sys.modules), was(d));"
        "from kvp_mlx.cli.main import main; main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("False\n")


def test_version_and_bare_command(kvp: Kvp) -> None:
    assert kvp("--version").out == f"kvp-mlx {kvp_mlx.__version__}\n"
    assert "generate" in kvp().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["frobnicate"],
        ["generate", "--no-such-option"],
        ["generate", "hi", "--max-tokens", "0"],
        ["generate", "hi", "--prefill", "psychic"],
        ["generate", "hi", "--exact-tail", "-1"],
        ["generate"],
        ["fit", "base"],
        ["bench", "ttft", "--prompt-tokens", "many"],
        ["bench", "ttft", "--out", "/no/such/folder/x.json"],
        ["bench", "ttft", "--out", "/tmp"],
    ],
)
def test_bad_usage_is_one_line_and_code_2(arguments: list[str], kvp: Kvp) -> None:
    outcome = kvp(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("kvp: ")
    assert outcome.err.count("\n") == 1


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = os.environ | {"KVP_DEBUG": "1"}
    command = [sys.executable, "-m", "kvp_mlx", "info", "/nowhere/at/all"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert "Traceback" in result.stderr
    assert result.returncode != 0


def test_generate_json_has_the_contracts_keys(bundle: Path, kvp: Kvp) -> None:
    outcome = kvp("generate", TEXT, "--model", bundle, "--max-tokens", 5, "--prefill", "kvp", "--json")
    result = outcome.json()
    assert outcome.code == 0
    assert result.keys() >= GENERATE_KEYS
    assert result["prefill"] == "kvp"
    assert result["finish_reason"] in ("stop", "length")
    parts = result["auxiliary_prefill_ms"] + result["predict_ms"] + result["first_step_ms"]
    assert 0 < parts <= result["ttft_ms"] + 0.05


def test_full_path_answers_as_mlx_lm_does(bundle: Path, kvp: Kvp) -> None:
    model = kvp_mlx.load(str(bundle))
    ids = mx.array(model.tokenizer.encode(TEXT))
    expected = [token for token, _ in generate_step(ids, model.base, max_tokens=6)]
    result = kvp("generate", TEXT, "--raw", "--model", bundle, "--max-tokens", 6, "--prefill", "full", "--json").json()
    assert result["prefill"] == "full"
    assert result["tokens"] == expected[: len(result["tokens"])]
    assert len(result["tokens"]) == 6 or result["tokens"][-1] == 2


def test_question_follows_the_file_and_stdin_is_a_file(bundle: Path, tmp_path: Path, kvp: Kvp) -> None:
    path = tmp_path / "document.txt"
    path.write_text("The harbour.")
    common = ("--model", bundle, "--max-tokens", 1, "--json")
    from_file = kvp("generate", "Why?", "--prompt-file", path, *common).json()
    from_stdin = kvp("generate", "Why?", "--prompt-file", "-", *common, stdin=b"The harbour.").json()
    from_argument = kvp("generate", "The harbour.\n\nWhy?", *common).json()
    assert from_file["prompt_tokens"] == from_stdin["prompt_tokens"] == from_argument["prompt_tokens"]


def test_auto_predicts_long_prompts_only(bundle: Path, kvp: Kvp) -> None:
    common = ("--model", bundle, "--max-tokens", 1, "--json")
    assert kvp("generate", "Hi", *common).json()["prefill"] == "full"
    assert kvp("generate", TEXT * 2, *common).json()["prefill"] == "kvp"
    assert kvp("generate", TEXT * 2, "--prefill", "full", *common).json()["prefill"] == "full"


def test_seed_makes_sampling_repeatable(bundle: Path, kvp: Kvp) -> None:
    common = ("generate", "Hi", "--model", bundle, "--max-tokens", 12, "--temperature", 1.5, "--json", "--seed")
    first, second, other = (kvp(*common, seed).json()["tokens"] for seed in (3, 3, 4))
    assert first == second
    assert first != other


@pytest.mark.parametrize(
    ("content", "named"), [(None, "cannot be read"), (b"", "empty"), (b" \n", "empty"), (b"caf\xe9", "UTF-8")]
)
def test_bad_prompt_file(content: bytes | None, named: str, tmp_path: Path, kvp: Kvp) -> None:
    path = tmp_path / "prompt.txt"
    if content is not None:
        path.write_bytes(content)
    outcome = kvp("generate", "--prompt-file", path)
    assert outcome.code == 2
    assert named in outcome.err
    assert outcome.err.count("\n") == 1


def test_prompt_longer_than_the_context_window(bundle: Path, kvp: Kvp) -> None:
    outcome = kvp("generate", TEXT * 20, "--model", bundle)
    assert outcome.code == 2
    assert "context window 512" in outcome.err


def test_answer_stops_where_the_context_window_ends(bundle: Path, kvp: Kvp) -> None:
    model = kvp_mlx.load(str(bundle))
    text = model.tokenizer.decode(model.tokenizer.encode(TEXT * 20)[:505])
    result = kvp("generate", text, "--raw", "--model", bundle, "--max-tokens", 50, "--json").json()
    assert result["prompt_tokens"] + len(result["tokens"]) <= 512


def test_chat_holds_a_conversation_in_a_pipe(bundle: Path, kvp: Kvp) -> None:
    outcome = kvp("chat", "--model", bundle, "--max-tokens", 4, stdin=b"Hello there\n\nAnd again\n")
    assert outcome.code == 0
    turns = [line for line in outcome.err.splitlines() if "new tokens on" in line]
    assert len(turns) == 2
    assert " on 0 cached" in turns[0]
    assert " on 0 cached" not in turns[1]


def test_info_tells_kind_sizes_and_recipe(bundle: Path, kvp: Kvp) -> None:
    result = kvp("info", bundle, "--json").json()
    assert result["auxiliary"] == {
        "kind": "prefix",
        "layers": 2,
        "retained_layers": None,
        "fingerprint": None,
        "adapter_rank": None,
        "alias": None,
    }
    assert result["predictor"]["preceding"] == 1
    assert result["predictor"]["parameters"] == (2 * 64 + 1) * 2 * 32 + (2 * 64 + 1)  # maps, estimator
    assert result["training"]["method"] == "ridge"
    assert result["size_bytes"]["predictor"] == (bundle / "predictor.safetensors").stat().st_size
    assert "hidden_state of a token and the 1 before it" in kvp("info", bundle).out


def test_info_counts_what_quantised_maps_hold(bundle: Path, tmp_path: Path, kvp: Kvp) -> None:
    path = shutil.copytree(bundle, tmp_path / "quantised") / "predictor.safetensors"
    tensors = mx.load(str(path))
    for name in [name for name in tensors if name.startswith("maps.") and name.endswith(".weight")]:
        parts = mx.quantize(tensors.pop(name), group_size=64, bits=6)
        names = (name.replace("weight", part) for part in ("weight", "scales", "biases"))
        tensors |= dict(zip(names, parts, strict=True))
    mx.save_safetensors(str(path), tensors)
    config = json.loads((bundle / "kvp.json").read_text())
    (path.parent / "kvp.json").write_text(json.dumps(config | {"sha256": {}}))
    counts = [kvp("info", each, "--json").json()["predictor"]["parameters"] for each in (bundle, path.parent)]
    assert counts[0] == counts[1]
    assert kvp("generate", "w1 w2 w3", "--model", path.parent, "--max-tokens", 1).code == 0


def test_doctor_is_quick_and_tells_the_remedy(monkeypatch: pytest.MonkeyPatch, kvp: Kvp) -> None:
    start = time.perf_counter()
    checks = {check["name"]: check for check in kvp("doctor", "--json").json()["checks"]}
    assert time.perf_counter() - start < 5
    assert {check["status"] for check in checks.values()} <= {"OK", "WARN"}
    monkeypatch.setenv("KVP_CACHE_DIR", "/proc/kvp")
    outcome = kvp("doctor")
    assert outcome.code == 1
    assert "KVP_CACHE_DIR" in outcome.out


def test_missing_blas_is_a_warning_not_a_failure(bundle: Path) -> None:
    hide = "import kvp_mlx.device.blas as b; b.OPENBLAS = 'libnot-there.so.0'; from kvp_mlx.cli.main import main; "
    run = f"import sys; sys.argv = ['kvp', 'generate', 'hi', '--model', {str(bundle)!r}, '--max-tokens', '1']; main()"
    result = subprocess.run([sys.executable, "-c", hide + run], capture_output=True, text=True, check=False)
    assert result.returncode == 0
    if sys.platform == "linux":
        assert "libnot-there.so.0" in result.stderr
        assert "apt-get install" in result.stderr


def test_bytes_that_are_not_utf8_on_the_command_line(bundle: Path, kvp: Kvp) -> None:
    outcome = kvp("generate", "caf\udce9", "--model", bundle)  # how Python hands over a stray byte
    assert outcome.code == 2
    assert "UTF-8" in outcome.err


def test_bytes_that_are_not_utf8_in_a_chat(bundle: Path, kvp: Kvp) -> None:
    outcome = kvp("chat", "--model", bundle, stdin=b"caf\xe9\n")
    assert outcome.code == 2
    assert "UTF-8" in outcome.err


def test_what_libraries_print_stays_out_of_the_json(bundle: Path, kvp: Kvp, monkeypatch: pytest.MonkeyPatch) -> None:
    load = loading.load_model
    monkeypatch.setattr("kvp_mlx.bundle.loading.load_model", lambda path: print("[WARNING] noise") or load(path))
    outcome = kvp("generate", "Hi", "--model", bundle, "--max-tokens", 1, "--json")
    assert outcome.json()["prompt_tokens"] > 0
    assert "[WARNING] noise" in outcome.err


@pytest.mark.parametrize("rank", ["x", ""])
def test_a_host_without_a_number_is_named(rank: str) -> None:
    command = [sys.executable, "-m", "kvp_mlx", "generate", "x"]
    done = subprocess.run(command, env=os.environ | {"MLX_RANK": rank}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"MLX_RANK is '{rank}'" in done.stderr


def test_a_chunk_has_as_many_tokens_as_mlx_can_count(kvp: Kvp) -> None:
    outcome = kvp("bench", "ttft", "--prefill-step-size", 2**31)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "--prefill-step-size" in outcome.err
