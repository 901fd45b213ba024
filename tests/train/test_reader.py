"""What people's data files hold: byte order marks, line ends, gzip bombs, half characters, messages of other shapes."""

import gzip
import json
import resource
from pathlib import Path

import pytest
from conftest import Kvp
from support.directories import write_llama
from support.tiny import chat_tokenizer

from kvp_mlx.errors import InputError
from kvp_mlx.evaluate.records import read_records, read_texts
from kvp_mlx.models.loading import load_tokenizer
from kvp_mlx.train import reader
from kvp_mlx.train import text as training_text
from kvp_mlx.train.reader import read_json_lines, read_text_pieces
from kvp_mlx.train.text import pack, read_documents, token_windows

BOM = b"\xef\xbb\xbf"
LINES = "Eine Zeile mit Ümläuten.\nZwei.\n\nDrei."


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.md"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", BOM])
def test_text_is_read_alike_however_it_was_saved(name: str, end: str, mark: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / name, mark + LINES.replace("\n", end).encode())
    assert list(read_text_pieces(path)) == [LINES]
    assert list(read_documents(path, chat_tokenizer())) == [LINES]
    assert read_texts([str(path)]) == [LINES]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", BOM])
def test_json_lines_are_read_alike_however_they_were_saved(name: str, end: str, mark: bytes, tmp_path: Path) -> None:
    record = json.dumps({"text": LINES}, ensure_ascii=False)
    path = write(tmp_path / name, mark + end.join([record, "", record, ""]).encode())
    assert list(read_documents(path, chat_tokenizer())) == [LINES, LINES]
    assert read_records([str(path)], {}) == [{"text": LINES}] * 2
    assert [where for _, where in read_json_lines(path)] == [f"{path}, line 1", f"{path}, line 3"]


BAD_LINES = {
    "half a character": ('{"text": "a \\ud800 b"}', "lone surrogate"),
    "half a character in a name": ('{"\\udfff": 1, "text": "a"}', "lone surrogate"),
    "nested without end": ('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested"),
    "a number": ("7", "object"),
    "a list": ("[]", "object"),
    "null": ("null", "object"),
    "Latin-1": ('{"text": "caf\udce9"}', "UTF-8"),
    "an endless number": ('{"text": ' + "1" * 10_000 + "}", "JSON"),
    "text that is none": ('{"text": ["a"]}', "'text'"),
    "nothing that is known": ('{"prompt": "a"}', "'text'"),
    "no messages": ('{"messages": []}', "messages"),
    "messages that are none": ('{"messages": "hello"}', "messages"),
    "one message that is none": ('{"messages": ["hello"]}', "'role'"),
    "other names": ('{"messages": [{"from": "human", "value": "hello"}]}', "'role'"),
    "a role that is none": ('{"messages": [{"role": 1, "content": "hello"}]}', "'role'"),
    "no content": ('{"messages": [{"role": "user"}]}', "'content'"),
    "content that is a number": ('{"messages": [{"role": "user", "content": 5}]}', "content"),
    "an image": ('{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}', "image_url"),
    "a part without text": ('{"messages": [{"role": "user", "content": [{"type": "text"}]}]}', "part"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named(name: str, tmp_path: Path) -> None:
    line, named = BAD_LINES[name]
    good = '{"text": "a"}\n'
    path = write(tmp_path / "a.jsonl", (good + line + "\n" + good).encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError) as error:
        list(read_documents(path, chat_tokenizer()))
    assert f"{path}, line 2" in str(error.value)
    assert named in str(error.value)
    assert len(str(error.value)) < 300 + len(str(path))


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        ("How many?", "How many?"),
        ([{"type": "text", "text": "How "}, {"type": "text", "text": "many?"}], "How many?"),
        (["How ", {"text": "many?"}], "How many?"),
        ([], ""),
        (None, ""),
    ],
)
def test_content_comes_in_parts_or_not_at_all(content: object, shown: str, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "Nine."}]
    path = write(tmp_path / "a.jsonl", json.dumps({"messages": messages}).encode())
    ((record, _),) = read_json_lines(path)
    assert [message["content"] for message in record["messages"]] == [shown, "Nine."]
    assert read_records([str(path)], {}) == [record]


@pytest.mark.parametrize("data", [b"text \xff\xfe", "text".encode("utf-16"), b"a\0b", b"\xff\xfet\0e\0"])
def test_what_is_no_text_is_named(data: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", data)
    for read in (lambda: list(read_text_pieces(path)), lambda: read_texts([str(path)])):
        with pytest.raises(InputError, match="UTF-8"):
            read()


def test_a_long_text_comes_in_pieces_that_cut_no_character(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "PIECE_BYTES", 7)
    text = "aé€😀\r\n" * 40
    for name in ("a.txt", "a.txt.gz"):
        pieces = list(read_text_pieces(write(tmp_path / name, BOM + text.encode())))
        assert len(pieces) > 20
        assert "".join(pieces) == text.replace("\r\n", "\n")


def test_a_long_file_is_shuffled_pool_by_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = chat_tokenizer()
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"w{i} " * 40}) + "\n" for i in range(40)))
    whole = list(token_windows([path], tokenizer, 40, 0))
    monkeypatch.setattr(training_text, "POOL_CHARACTERS", 1000)
    pooled = list(token_windows([path], tokenizer, 40, 0))
    assert sorted(pooled) == sorted(whole)
    assert pooled != whole


def test_a_gzip_bomb_is_never_held_whole(tmp_path: Path) -> None:
    """A gigabyte of text in a megabyte of file; the first windows of it come at once."""
    path = tmp_path / "bomb.txt.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(64):
            file.write(b"w1 w2 w3 " * (2**24 // 9))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert len(next(token_windows([path], chat_tokenizer(), 64, 0))) == 64
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
    assert grown < 600, f"{grown} MiB"


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "LINE_BYTES", 1000)
    path = write(tmp_path / "a.jsonl.gz", b'{"text": "' + b"a" * 10_000 + b'"}')
    with pytest.raises(InputError, match="line 1"):
        list(read_json_lines(path))


def test_data_without_text_is_refused_by_every_reader(tmp_path: Path) -> None:
    for name, data in (("a.txt", b""), ("b.txt", BOM), ("c.jsonl", b"\r\n \n"), ("d.txt", b" \n")):
        path = write(tmp_path / name, data)
        with pytest.raises(InputError, match="no text"):
            read_texts([str(path)])
        with pytest.raises(InputError, match="--data"):
            list(token_windows([path], chat_tokenizer(), 64, 0))


BOS_TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"


def with_bos(directory: Path) -> object:
    """A tokeniser that begins every text with BOS, and a template that writes it too."""
    write_llama(directory)
    data = json.loads((directory / "tokenizer.json").read_text())
    name, number = next((token["content"], token["id"]) for token in data["added_tokens"])
    piece = {"SpecialToken": {"id": name, "type_id": 0}}
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [piece, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [piece, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {name: {"id": name, "ids": [number], "tokens": [name]}},
    }
    (directory / "tokenizer.json").write_text(json.dumps(data))
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(
        json.dumps(config | {"bos_token": name, "chat_template": BOS_TEMPLATE})
    )
    return load_tokenizer(directory, {})


def test_conversations_are_encoded_as_for_generation(tmp_path: Path) -> None:
    tokenizer = with_bos(tmp_path / "model")
    messages = [{"role": "user", "content": "How many hens? " * 20}, {"role": "assistant", "content": "Nine. " * 20}]
    path = write(tmp_path / "a.jsonl", json.dumps({"messages": messages}).encode())
    (window,) = token_windows([path], tokenizer, 2000, 0)
    assert window == tokenizer.apply_chat_template(messages)
    assert window.count(tokenizer.bos_token_id) == 1
    plain = tokenizer.apply_chat_template(messages, tokenize=False)
    path = write(tmp_path / "b.jsonl", json.dumps({"text": plain}).encode())
    assert list(token_windows([path], tokenizer, 2000, 0)) == [window]
    path = write(tmp_path / "c.jsonl", json.dumps({"text": "How many hens? " * 20}).encode())
    (window,) = token_windows([path], tokenizer, 2000, 0)
    assert window == tokenizer.encode("How many hens? " * 20)
    assert window[0] == tokenizer.bos_token_id


def test_packing_needs_no_end_token() -> None:
    tokenizer = chat_tokenizer()
    end = tokenizer.eos_token_id
    assert end in next(pack(iter(["w1 w2"] * 5), tokenizer, 10))

    class Endless:
        eos_token_id = None
        bos_token = None
        encode = staticmethod(tokenizer.encode)

    (window,) = pack(iter(["w1 w2"] * 5), Endless(), 10)
    assert window == tokenizer.encode("w1 w2") * 5


def test_the_commands_name_the_line(fitted: Path, base_dir: Path, tmp_path: Path, kvp: Kvp) -> None:
    path = write(tmp_path / "a.jsonl", (json.dumps({"text": LINES}) + '\n{"text": "\\ud800"}\n').encode())
    for command in (
        ("fit", base_dir, "--layers", 1, "--data", path, "--out", tmp_path / "x"),
        ("train", base_dir, "--layers", 1, "--data", path, "--out", tmp_path / "x", "--tokens", 64),
        ("eval", "context", fitted, "--data", path),
        ("eval", "perplexity", fitted, "--data", path),
        ("eval", "squad", fitted, "--data", path),
        ("eval", "turns", fitted, "--data", path),
    ):
        outcome = kvp(*command)
        assert outcome.code == 2, command
        assert outcome.err.count("\n") == 1, outcome.err
        assert "a.jsonl, line" in outcome.err
        assert [entry.name for entry in tmp_path.iterdir()] == ["a.jsonl"]
