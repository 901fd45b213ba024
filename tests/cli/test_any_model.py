"""Models without a bundle: any that mlx-lm runs answers, by full prefill."""

import json
from importlib import import_module
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import Kvp
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from support.directories import TEXT, write_tokenizer

import kvp_mlx
from kvp_mlx.engine.context import Context
from kvp_mlx.errors import InputError

OTHERS = {
    "gemma": {"head_dim": 16},
    "mamba2": {  # recurrent: nothing of its cache counts or can be cut
        "num_heads": 8,
        "head_dim": 16,
        "state_size": 16,
        "conv_kernel": 4,
        "expand": 2,
        "n_groups": 1,
        "use_bias": False,
        "use_conv_bias": True,
        "chunk_size": 32,
        "time_step_limit": [0.0, 100.0],
        "time_step_rank": "auto",
        "layer_norm_epsilon": 1e-5,
    },
    "gemma3_text": {"head_dim": 16, "sliding_window": 32, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16},
}
COMMON = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
}


@pytest.fixture(params=sorted(OTHERS))
def other(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A directory of an architecture that has no row in our table."""
    kind, directory = request.param, tmp_path / request.param
    directory.mkdir()
    config = COMMON | {"model_type": kind} | OTHERS[kind]
    module = import_module(f"mlx_lm.models.{kind}")
    model = module.Model(module.ModelArgs.from_dict(config))
    rng = np.random.default_rng(0)
    weights = {name: mx.array(rng.normal(0, 0.2, a.shape), mx.float32) for name, a in tree_flatten(model.parameters())}
    mx.save_safetensors(str(directory / "model.safetensors"), weights, metadata={"format": "mlx"})
    (directory / "config.json").write_text(json.dumps(config))
    write_tokenizer(directory)
    return directory


def own(model: kvp_mlx.KVPModel, ids: list[int], count: int) -> list[int]:
    """Return what mlx-lm itself generates."""
    cache = make_prompt_cache(model.base)
    steps = generate_step(mx.array(ids), model.base, max_tokens=count, prompt_cache=cache)
    tokens = [int(token) for token, _ in steps]
    return tokens[: tokens.index(2) + 1] if 2 in tokens else tokens


def test_a_model_directory_answers_in_full_and_says_how_to_predict(base_dir: Path, kvp: Kvp) -> None:
    outcome = kvp("generate", TEXT * 2, "--model", base_dir, "--max-tokens", 6, "--json")
    result = outcome.json()
    assert (outcome.code, result["prefill"], result["predicted_tokens"]) == (0, "full", 0)
    assert outcome.err.count("\n") == 1
    assert f"kvp train {base_dir} --layers K --data TEXT --out DIR" in outcome.err
    model = kvp_mlx.load_any(str(base_dir))
    ids = model.tokenizer.apply_chat_template([{"role": "user", "content": TEXT * 2}], add_generation_prompt=True)
    assert result["tokens"] == own(model, ids, 6)


@pytest.mark.parametrize(
    "option", [["--prefill", "kvp"], ["--exact-head", "8"], ["--exact-tail", "8"], ["--recompute", "0.5"]]
)
@pytest.mark.parametrize("command", [["generate", "Hi"], ["chat"]])
def test_what_needs_a_predictor_is_refused_in_a_line(
    command: list[str], option: list[str], base_dir: Path, kvp: Kvp
) -> None:
    outcome = kvp(*command, "--model", base_dir, *option)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert option[0] in outcome.err
    assert "no predictor" in outcome.err


def test_python_refuses_prediction_too(base_dir: Path) -> None:
    model = kvp_mlx.load_any(str(base_dir))
    with pytest.raises(InputError, match="no predictor"):
        next(kvp_mlx.stream_generate(model, "Hi", prefill="kvp"))
    with pytest.raises(InputError, match="no predictor"):
        next(kvp_mlx.stream_generate(model, "Hi", recompute=0.5))


def test_other_architectures_answer_as_mlx_lm_lets_them(other: Path, kvp: Kvp) -> None:
    model = kvp_mlx.load_any(str(other))
    text = TEXT * 2  # longer than the sliding window
    ids = model.tokenizer.encode(text)
    result = kvp("generate", text, "--raw", "--model", other, "--max-tokens", 8, "--json").json()
    assert result["tokens"] == own(model, ids, 8)


def test_turns_of_other_architectures_equal_fresh_prompts(other: Path) -> None:
    """What of a cache cannot be cut or counted is read again, and never half of it."""
    model = kvp_mlx.load_any(str(other))
    context, ids = Context(model), model.tokenizer.encode(TEXT)
    for turn in range(4):
        ids = ids + list(range(10 + turn, 40 + turn))
        if turn == 2:
            ids = ids[:50]  # an edit
        pieces = list(kvp_mlx.stream_generate(model, ids, context=context, max_tokens=5))
        assert [piece.token for piece in pieces] == own(model, ids, 5)
        assert len(context.tokens) <= len(ids) + 5


def test_a_reading_that_was_stopped_leaves_nothing_half_read(other: Path) -> None:
    model = kvp_mlx.load_any(str(other))
    context, ids = Context(model), model.tokenizer.encode(TEXT)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(kvp_mlx.stream_generate(model, ids, context=context, progress=stop, prefill_step_size=16))
    pieces = list(kvp_mlx.stream_generate(model, ids, context=context, max_tokens=5))
    assert [piece.token for piece in pieces] == own(model, ids, 5)


def test_chats_with_any_model(other: Path, base_dir: Path, kvp: Kvp) -> None:
    for model in (other, base_dir):
        outcome = kvp("chat", "--model", model, "--max-tokens", 3, stdin=b"Hello\nAnd now?\n/stats\n/save x\n")
        assert outcome.code == 0
        assert outcome.err.count("full prefill, first token") == 4  # two of them by /stats
        assert "please report" not in outcome.err


def test_converting_names_the_next_step(base_dir: Path, tmp_path: Path, kvp: Kvp) -> None:
    outcome = kvp("convert", "hf", base_dir, "--out", tmp_path / "out")
    assert outcome.code == 0
    assert f"kvp chat --model {tmp_path / 'out'}" in outcome.err
    assert f"kvp train {tmp_path / 'out'} --layers K" in outcome.err


def test_a_cache_is_built_and_used_without_a_bundle(base_dir: Path, tmp_path: Path, kvp: Kvp, monkeypatch) -> None:
    monkeypatch.setenv("KVP_CACHE_DIR", str(tmp_path / "cache"))
    document = tmp_path / "doc.txt"
    document.write_text(TEXT)
    common = ("--model", base_dir)
    assert kvp("cache", "build", document, "--name", "doc", *common).code == 0
    result = kvp("generate", "Why?", "--cache", "doc", *common, "--max-tokens", 2, "--json").json()
    assert result["cached_tokens"] > 40
    assert kvp("cache", "build", document, "--predicted", *common).code == 2
    assert "removed the saved cache 'doc'" in kvp("cache", "rm", "doc").err
