"""Tokenisers inside GGUF files: each table's row cuts text by the model's published rule, SentencePiece as itself."""

import json
import random
from pathlib import Path

import pytest
from conftest import Kvp
from mlx_lm.utils import load
from sentencepiece import SentencePieceProcessor
from support.corenet import PIECES, train_llama_tokenizer
from support.directories import LLAMA, write_llama, write_random
from support.gguf_files import gguf_metadata, write_file
from support.gguf_models import config_of
from tokenizers import Tokenizer

from kvp_mlx.models.loading import load_tokenizer

TEXT = "I'LL pay 12345.50 € for\n\n  x.  Don't (été) HTTPServer/foo\r\n\t!"
PIECES_OF = {
    "smollm": "I|'|LL| pay| |1|2|3|4|5|.|5|0| €| for|\n\n | x|.| | Don|'t| (|été|)| HTTPServer|/|foo|\r\n|\t|!",
    "gpt-2": "I|'|LL| pay| 12345|.|50| €| for|\n\n | x|.| | Don|'t| (|été|)| HTTPServer|/|foo|\r\n|\t|!",
    "default": "I|'|LL| pay| |123|45|.|50| €| for|\n\n | x|.| | Don|'|t| |(|été|)| HTTPServer|/|foo|\r\n\t|!",
    "qwen2": "I|'LL| pay| |1|2|3|4|5|.|5|0| €| for|\n\n| | x|.| | Don|'t| (|été|)| HTTPServer|/foo|\r\n|\t|!",
    "llama-bpe": "I|'LL| pay| |123|45|.|50| €| for|\n\n| | x|.| | Don|'t| (|été|)| HTTPServer|/foo|\r\n|\t|!",
    "gpt-4o": "I'LL| pay| |123|45|.|50| €| for|\n\n| | x|.| | Don't| (|été|)| HTTPServer|/foo|\r\n|\t|!",
}


def byte_level(text: str) -> str:
    """Return how byte-level tokenisers write bytes, GPT-2's table."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return "".join(letters[byte] for byte in text.encode())


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "model", tokenizer=False)


def convert(kvp: Kvp, model: Path, without: str = "", **metadata: object) -> Path:
    write_file(model.with_name("m.gguf"), model, without=without, **metadata)
    outcome = kvp("convert", "gguf", model.with_name("m.gguf"), "--out", model.with_name("out"))
    assert outcome.code == 0, outcome.err
    return model.with_name("out")


@pytest.mark.parametrize("name", PIECES_OF)
def test_every_rule_cuts_as_published(name: str, model: Path, kvp: Kvp) -> None:
    out = convert(kvp, model, **{"tokenizer.ggml.pre": name})
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    found = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(TEXT)]
    assert found == [byte_level(piece) for piece in PIECES_OF[name].split("|")]
    assert tokenizer.decode(tokenizer.encode(TEXT).ids) == TEXT


def test_qwen_composes_characters(model: Path, kvp: Kvp) -> None:
    out = convert(kvp, model, **{"tokenizer.ggml.pre": "qwen2"})
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert tokenizer.encode("e\u0301").ids == tokenizer.encode("\xe9").ids


def test_a_word_that_is_a_token_is_not_merged(model: Path, kvp: Kvp) -> None:
    """Llama 3's rule; no merges lead to this one."""
    tokens = list(gguf_metadata()["tokenizer.ggml.tokens"])
    tokens[280] = "xyz"
    for name, expected in (("llama-bpe", [280]), ("gpt-2", [tokens.index(letter) for letter in "xyz"])):
        out = convert(kvp, model, **{"tokenizer.ggml.pre": name, "tokenizer.ggml.tokens": tokens})
        assert Tokenizer.from_file(str(out / "tokenizer.json")).encode("xyz", add_special_tokens=False).ids == expected
        out.rename(out.with_name(f"out-{name}"))


@pytest.mark.parametrize(
    ("pre", "stated", "around"),
    [
        ("smollm", {}, ([], [])),
        ("llama-bpe", {}, ([1], [])),
        ("smollm", {"add_bos_token": True}, ([1], [])),
        ("llama-bpe", {"add_bos_token": False}, ([], [])),
        ("smollm", {"add_bos_token": True, "add_eos_token": True}, ([1], [2])),
    ],
)
def test_what_encoding_adds(pre: str, stated: dict, around: tuple, model: Path, kvp: Kvp) -> None:
    changes = {f"tokenizer.ggml.{key}": value for key, value in stated.items()} | {"tokenizer.ggml.pre": pre}
    out = convert(kvp, model, without="" if stated else "tokenizer.ggml.add_bos_token", **changes)
    _, tokenizer = load(str(out))
    plain = tokenizer.encode("hut", add_special_tokens=False)
    assert tokenizer.encode("hut") == [*around[0], *plain, *around[1]]


def test_all_ends_are_ends(model: Path, kvp: Kvp) -> None:
    out = convert(kvp, model, **{"tokenizer.ggml.eot_token_id": 0, "tokenizer.ggml.eom_token_id": 2})
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == [2, 0]


def test_user_defined_tokens_are_found_in_text(model: Path, kvp: Kvp) -> None:
    metadata = gguf_metadata()
    tokens, kinds = list(metadata["tokenizer.ggml.tokens"]), [3, 3, 3] + [1] * 297
    tokens[290], kinds[290] = "<tool_call>", 4
    out = convert(kvp, model, **{"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds})
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert 290 in tokenizer.encode("a<tool_call>b").ids
    assert "<tool_call>" in tokenizer.decode(tokenizer.encode("a<tool_call>b").ids)


def sentencepiece_metadata(path: Path) -> dict[str, object]:
    """Return what llama.cpp's converter writes of a tokenizer.model."""
    original = SentencePieceProcessor(model_file=str(path))
    kinds = []
    for i in range(len(original)):
        checks = {2: original.is_unknown, 3: original.is_control, 5: original.is_unused, 6: original.is_byte}
        kinds.append(next((kind for kind, check in checks.items() if check(i)), 1))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [original.id_to_piece(i) for i in range(len(original))],
        "tokenizer.ggml.scores": [original.get_score(i) for i in range(len(original))],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": original.bos_id(),
        "tokenizer.ggml.eos_token_id": original.eos_id(),
        "tokenizer.ggml.unknown_token_id": original.unk_id(),
        "tokenizer.ggml.add_bos_token": True,
    }


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_llama_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("without", ["", "tokenizer.ggml.unknown_token_id", "tokenizer.ggml.merges"])
def test_sentencepiece_encodes_as_itself(without: str, llama: Path, tmp_path: Path, kvp: Kvp) -> None:
    model = write_llama(tmp_path / "model", tokenizer=False, vocab_size=PIECES)
    out = convert(kvp, model, without=without, **sentencepiece_metadata(llama))
    original, found = SentencePieceProcessor(model_file=str(llama)), load(str(out))[1]
    rng = random.Random(0)
    texts = ["", " ", "  x", "x  ", "\n", "12 345", "\u4f60\u597d \U0001f642 \xe9t\xe9"]
    texts += [
        "".join(rng.choices("abc d\xe9  \n\t.,12345the and in \u597d", k=rng.randrange(1, 40))) for _ in range(300)
    ]
    for text in texts:
        ids = original.encode(text)
        assert found.encode(text) == [original.bos_id(), *ids], repr(text)
        assert found.decode(ids) == original.decode(ids), repr(text)


def test_sentencepiece_without_a_first_space(llama: Path, tmp_path: Path, kvp: Kvp) -> None:
    model = write_llama(tmp_path / "model", tokenizer=False, vocab_size=PIECES)
    out = convert(kvp, model, **sentencepiece_metadata(llama) | {"tokenizer.ggml.add_space_prefix": False})
    original, found = SentencePieceProcessor(model_file=str(llama)), load(str(out))[1]
    assert found.encode(" the and", add_special_tokens=False) == original.encode("the and")
    assert found.decode(found.encode("the and", add_special_tokens=False)) == "the and"


@pytest.mark.parametrize("architecture", ["phi3", "llama"])
def test_phi_3s_special_tokens_take_the_white_space_behind_them(
    architecture: str, llama: Path, tmp_path: Path, kvp: Kvp
) -> None:
    """As in its own tokenizer.json (``rstrip``), which llama.cpp follows as well."""
    metadata = sentencepiece_metadata(llama)
    for place, (token, kind) in {-1: ("<|user|>", 3), -2: ("<|end|>", 4), -3: ("<|endoftext|>", 3)}.items():
        metadata["tokenizer.ggml.tokens"][place], metadata["tokenizer.ggml.token_type"][place] = token, kind
    model = write_random(tmp_path / "model", config_of(architecture, vocab_size=PIECES))
    tokenizer = Tokenizer.from_file(str(convert(kvp, model, **metadata) / "tokenizer.json"))
    found = tokenizer.encode("<|user|>\nthe<|end|>\n<|endoftext|>\n", add_special_tokens=False).tokens
    assert found.count("<0x0A>") == (1 if architecture == "phi3" else 3), found
    assert [token.strip() for token in found if token.startswith("<|")] == ["<|user|>", "<|end|>", "<|endoftext|>"]


@pytest.mark.parametrize("pre", ["qwen2", "llama-bpe", "gpt-4o"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "phi3"])
def test_a_model_is_loaded_with_the_tokeniser_that_was_written(
    architecture: str, pre: str, tmp_path: Path, kvp: Kvp
) -> None:
    """Not with the class that transformers has for the type of model, and the rules and tokens of that."""
    metadata = gguf_metadata()
    tokens = ["<end>" if token == "<|endoftext|>" else token for token in metadata["tokenizer.ggml.tokens"]]
    tokens[290] = "12"
    merges = [*metadata["tokenizer.ggml.merges"], "1 2"]
    model = write_random(tmp_path / "model", config_of(architecture))
    changes = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": merges, "tokenizer.ggml.pre": pre}
    out = convert(kvp, model, **changes)
    loaded = load_tokenizer(out, json.loads((out / "config.json").read_text()))
    written = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert len(loaded) == written.get_vocab_size() == 300
    for text in ("x12", "hut 123 e\u0301\n\n  x", "<|im_start|>the<|im_end|>"):
        assert loaded.encode(text) == written.encode(text).ids


TOKENS = list(gguf_metadata()["tokenizer.ggml.tokens"])
DAMAGED: dict[str, tuple[dict, str]] = {
    "unknown model": ({"tokenizer.ggml.model": "t5"}, "GGUF tokeniser t5"),
    "unknown pre-tokeniser": ({"tokenizer.ggml.pre": "viking"}, "gpt2/viking"),
    "escapes in a name": ({"tokenizer.ggml.pre": "\x1b]0;x\x07"}, "gpt2/\\x1b]0;x\\x07"),
    "number for a model": ({"tokenizer.ggml.model": 7}, "tokenizer.ggml.model is 7"),
    "text for tokens": ({"tokenizer.ggml.tokens": "abc"}, "tokenizer.ggml.tokens is 'abc'"),
    "numbers for tokens": ({"tokenizer.ggml.tokens": [1, 2, 3]}, "tokenizer.ggml.tokens is"),
    "a token twice": ({"tokenizer.ggml.tokens": [*TOKENS[:-1], "th"]}, "lists one twice"),
    "kinds of too few": ({"tokenizer.ggml.token_type": [1, 1]}, "kinds of 2"),
    "more tokens than rows": (
        {"tokenizer.ggml.tokens": [*TOKENS, "zz"], "tokenizer.ggml.token_type": [3, 3, 3] + [1] * 298},
        "301 tokens, the model only 300",
    ),
    "merges of three": ({"tokenizer.ggml.merges": ["t h e"]}, "tokenizer.ggml.merges"),
    "merges of strangers": ({"tokenizer.ggml.merges": ["t \u4f60"]}, "the tokeniser cannot be built"),
    "end beyond the tokens": ({"tokenizer.ggml.eos_token_id": 999}, "tokenizer.ggml.eos_token_id is 999"),
    "negative end": ({"tokenizer.ggml.eos_token_id": -1}, "tokenizer.ggml.eos_token_id is -1"),
    "number for a flag": ({"tokenizer.ggml.add_bos_token": 1}, "tokenizer.ggml.add_bos_token is 1"),
    "list for a template": ({"tokenizer.chat_template": ["a"]}, "tokenizer.chat_template is"),
    "SentencePiece without scores": ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.scores"),
    "SentencePiece with too few": (
        {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.0, 1.0]},
        "300 tokens and 2 scores",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_unusable_tokenisers(name: str, model: Path, kvp: Kvp) -> None:
    changes, named = DAMAGED[name]
    source, out = model.with_name("m.gguf"), model.with_name("out")
    write_file(source, model, **changes)
    outcome = kvp("convert", "gguf", source, "--out", out)
    assert (outcome.code, outcome.out) == (2, ""), outcome.err
    assert named in outcome.err
    assert outcome.err.count("\n") == 1
    assert not out.exists()
    assert not list(out.parent.glob(".out.*"))


def test_a_tokeniser_of_ones_own_instead(model: Path, tmp_path: Path, kvp: Kvp) -> None:
    write_file(tmp_path / "m.gguf", model, **{"tokenizer.ggml.pre": "viking"})
    own = write_llama(tmp_path / "own")
    out = tmp_path / "out"
    assert kvp("convert", "gguf", tmp_path / "m.gguf", "--out", out, "--tokenizer", own).code == 0
    assert (out / "tokenizer.json").read_bytes() == (own / "tokenizer.json").read_bytes()
    assert json.loads((out / "config.json").read_text())["vocab_size"] == LLAMA["vocab_size"]
