"""What a prompt is made of, and what is refused before a model has to read it."""

import json
import re
import shlex
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Kvp
from support.directories import TEXT

import kvp_mlx
from kvp_mlx.cli.main import COMMANDS, load_command
from kvp_mlx.engine.prefill import PrefillTimes
from kvp_mlx.engine.reply import Piece, until

SMALL = ("--max-tokens", 1, "--json")


def tokens(outcome) -> int:
    assert outcome.code == 0, outcome.err
    return outcome.json()["prompt_tokens"]


def test_what_is_piped_in_follows_the_prompt(bundle: Path, kvp: Kvp) -> None:
    piped = kvp("generate", "Sum up.", "--model", bundle, *SMALL, stdin=b"The harbour.")
    assert tokens(piped) == tokens(kvp("generate", "Sum up.\n\nThe harbour.", "--model", bundle, *SMALL))
    alone = kvp("generate", "-m", bundle, *SMALL, stdin=b"The harbour.")
    assert tokens(alone) == tokens(kvp("generate", "-p", "The harbour.", "-m", bundle, *SMALL))


def test_several_files_go_in_their_order_by_their_names(bundle: Path, tmp_path: Path, kvp: Kvp) -> None:
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    a.write_text("First")
    b.write_text("Second")
    both = kvp("generate", "Why?", "--prompt-file", b, "--prompt-file", a, "--model", bundle, *SMALL)
    whole = f"{b}:\nSecond\n\n{a}:\nFirst\n\nWhy?"
    assert tokens(both) == tokens(kvp("generate", whole, "--model", bundle, *SMALL))
    assert kvp("generate", "--prompt-file", "-", "--prompt-file", "-", stdin=b"x").code == 2


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_marks_and_carriage_returns_never_reach_the_model(
    mark: bytes, end: bytes, bundle: Path, tmp_path: Path, kvp: Kvp
) -> None:
    path, expected = tmp_path / "text.txt", "How many?\nCount.\n"
    path.write_bytes(mark + expected.encode().replace(b"\n", end))
    count = tokens(kvp("generate", expected, "--model", bundle, *SMALL))
    assert tokens(kvp("generate", "--prompt-file", path, "--model", bundle, *SMALL)) == count
    assert tokens(kvp("generate", "--model", bundle, *SMALL, stdin=path.read_bytes())) == count
    said = kvp("chat", "--model", bundle, "--max-tokens", 1, stdin=f"/file {path} Why?\n".encode())
    plain = tokens(kvp("generate", f"{expected}\n\nWhy?", "--model", bundle, *SMALL))
    assert f"{plain} new tokens on 0 cached" in said.err


def test_text_with_nul_characters_is_refused(bundle: Path, tmp_path: Path, kvp: Kvp) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("How many?".encode("utf-16-le"))
    for outcome in (
        kvp("generate", "--prompt-file", path, "--model", bundle),
        kvp("generate", "--model", bundle, stdin=path.read_bytes()),
        kvp("cache", "build", path, "--model", bundle),
    ):
        assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
        assert "NUL characters" in outcome.err


def test_a_huge_text_is_refused_at_once(bundle: Path, tmp_path: Path, kvp: Kvp) -> None:
    path = tmp_path / "huge.txt"
    path.write_text(TEXT * 60_000)
    start = time.perf_counter()
    for outcome in (
        kvp("generate", "--prompt-file", path, "--model", bundle),
        kvp("generate", "--model", bundle, stdin=path.read_bytes()),
        kvp("cache", "build", path, "--model", bundle),
    ):
        assert (outcome.code, outcome.err.count("\n")) == (2, 1)
        assert "context window of 512 tokens" in outcome.err
    said = kvp("chat", "--model", bundle, stdin=f"/file {path}\n/file\n".encode())
    assert "context window of 512 tokens" in said.err
    assert "no file is attached" in said.err
    assert time.perf_counter() - start < 12  # tokenising it takes longer than that, once


OPTIONS_THAT_MAY_COME_ONCE = [
    ["generate", "Hi", "--max-tokens", "3", "--max-tokens", "4"],
    ["generate", "Hi", "--temp", "0.5", "--temperature", "0.7"],
    ["generate", "Hi", "-m", "a", "--model", "b"],
    ["generate", "Hi", "--json", "--json"],
    ["chat", "--refine", "--no-refine"],
    ["bench", "ttft", "--rounds", "1", "--rounds", "2"],
    ["cache", "build", "x", "--name", "a", "--name", "b"],
]


@pytest.mark.parametrize("arguments", OPTIONS_THAT_MAY_COME_ONCE)
def test_an_option_given_twice_is_refused(arguments: list[str], kvp: Kvp) -> None:
    outcome = kvp(*arguments)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert "given twice" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--seed", "-1"], "--seed"),
        (["--seed", "99999999999999999999"], "--seed"),
        (["--temperature", "nan"], "--temperature"),
        (["--min-p", "nan"], "--min-p"),
        (["--repetition-penalty", "0"], "--repetition-penalty"),
        (["--repetition-penalty", "-2"], "--repetition-penalty"),
        (["--stop", ""], "--stop"),
        (["--prefill", "full", "--recompute", "0.5"], "recompute"),
        (["--prefill", "full", "--exact-tail", "5"], "exact tail"),
        (["--quality", "exact", "--exact-head", "3"], "exact head"),
        (["--chat-template-args", "{"], "--chat-template-args"),
        (["--chat-template-args", "[1]"], "--chat-template-args"),
        (["--chat-template-args", '{"tokenize": false}'], "tokenize"),
        (["--chat-template-args", "[" * 100_000], "--chat-template-args"),
    ],
)
@pytest.mark.parametrize("command", [["generate", "Hi"], ["chat"]])
def test_contradictions_and_impossible_values(command: list[str], arguments: list[str], named: str, kvp: Kvp) -> None:
    outcome = kvp(*command, *arguments)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert named in outcome.err
    assert "report" not in outcome.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--raw", "--system", "Be brief."],
        ["--raw", "--chat-template-args", "{}"],
        ["--cache", "x", "--system", "Be brief."],
        ["--json", "--json-stream"],
        ["--prompt", "again"],
        ["--kv-bits", "5"],
        ["--kv-bits", "8"],  # heads of 16 features
    ],
)
def test_more_contradictions_of_generate(arguments: list[str], bundle: Path, kvp: Kvp) -> None:
    outcome = kvp("generate", "Hi", "--model", bundle, *arguments)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)


def test_a_system_prompt_and_template_arguments_reach_the_template(bundle: Path, kvp: Kvp) -> None:
    model = kvp_mlx.load(str(bundle))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    expected = len(model.tokenizer.apply_chat_template(messages, add_generation_prompt=True))
    assert tokens(kvp("generate", "Hi", "--system", "Be brief.", "-m", bundle, *SMALL)) == expected
    config = bundle / "base" / "tokenizer_config.json"
    data = json.loads(config.read_text())
    data["chat_template"] = "{{ 'long ' * 30 if deep else 'short' }}" + data["chat_template"]
    config.write_text(json.dumps(data))
    short = tokens(kvp("generate", "Hi", "-m", bundle, *SMALL))
    deep = ("--chat-template-args", '{"deep": true}')
    assert tokens(kvp("generate", "Hi", *deep, "-m", bundle, *SMALL)) > short + 20
    turn = kvp("chat", *deep, "-m", bundle, "--max-tokens", 1, stdin=b"Hi\n")
    assert f"{short} new tokens" not in turn.err


@pytest.mark.parametrize(
    ("template", "named"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "chat template"),
        ("{{ messages[0].content * 2**22 }}", "the model's chat template writes"),
        ([{"name": "rag", "template": "x"}, {"name": "tool_use", "template": "y"}], "rag, tool_use"),
    ],
)
def test_a_template_that_refuses_is_found_before_the_first_message(
    template: object, named: str, bundle: Path, tmp_path: Path, kvp: Kvp
) -> None:
    config = bundle / "base" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": template}))
    (tmp_path / "doc.txt").write_text("text")
    for arguments in (["generate", "Hi"], ["chat"], ["cache", "build", tmp_path / "doc.txt"]):
        outcome = kvp(*arguments, "--model", bundle, stdin=b"")
        assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
        assert named in outcome.err
        assert "report" not in outcome.err


def pieces(*texts: str):
    for number, text in enumerate(texts, 1):
        end = "length" if number == len(texts) else None
        yield Piece(text, number, end, "full", 0, 1, 0, 1, 0, 1, 0, PrefillTimes(), 1.0, 1.0, number, 1.0)


@pytest.mark.parametrize(
    ("texts", "stop", "expected", "reason"),
    [
        (["a", "b", "c"], [], "abc", "length"),
        (["a", "b", "c"], [""], "abc", "length"),
        (["one ", "two", " three"], ["two"], "one ", "stop"),
        (["one t", "w", "o three"], ["two"], "one ", "stop"),
        (["one t", "w", "ig"], ["two"], "one twig", "length"),
        (["on", "e tw"], ["two"], "one tw", "length"),
        (["abab", "ac"], ["abac"], "ab", "stop"),
        (["x END y"], ["STOP", "END", "y"], "x ", "stop"),
    ],
)
def test_an_answer_ends_before_a_stop_string(texts: list[str], stop: list[str], expected: str, reason: str) -> None:
    shown, last = "", None
    for last in until(pieces(*texts), stop):
        shown += last.text
        assert expected.startswith(shown)  # nothing is shown that would have to be taken back
    assert shown == expected
    assert last.finish_reason == reason


def test_stop_sampling_and_json_lines(bundle: Path, kvp: Kvp) -> None:
    common = ("generate", "Hi", "--model", bundle, "--max-tokens", 8)
    whole = kvp(*common, "--json").json()
    lines = [json.loads(line) for line in kvp(*common, "--json-stream").out.splitlines()]
    assert "".join(line["text"] for line in lines) == whole["text"]
    assert [line["token"] for line in lines] == whole["tokens"]
    assert lines[-1].keys() > {"prompt_tokens", "ttft_ms", "finish_reason"}
    mark = whole["text"][3:5]
    cut = kvp(*common, "--stop", mark, "--json").json()
    assert cut["text"] == whole["text"][: whole["text"].index(mark)]
    assert cut["finish_reason"] == "stop"
    hot = (*common, "--temp", 2.0, "--seed", 1, "--json")
    assert kvp(*hot, "--top-k", 1).json()["tokens"] == whole["tokens"]
    assert kvp(*hot, "--min-p", 1.0).json()["tokens"] == whole["tokens"]
    assert kvp(*hot, "--top-k", 1_000_000).json()["tokens"] == kvp(*hot).json()["tokens"]
    assert kvp(*common, "--repetition-penalty", 5.0, "--json").json()["tokens"] != whole["tokens"]


def test_a_cut_answer_says_so_and_an_ended_one_does_not(bundle: Path, kvp: Kvp) -> None:
    common = ("generate", "Hi", "--model", bundle)
    text = kvp(*common, "--max-tokens", 4, "--json").json()["text"]
    cut = kvp(*common, "--max-tokens", 4)
    assert "[cut off after 4 tokens; --max-tokens allows more]" in cut.err
    assert cut.out == f"{text}\n"
    assert "cut off" not in kvp(*common, "--max-tokens", 4, "--stop", text[0]).err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_short_help_and_an_example(name: str, kvp: Kvp) -> None:
    command = load_command(name)
    check_example(command, f"kvp {name}")
    for child, found in getattr(command, "commands", {}).items():
        check_example(found, f"kvp {name} {child}")
        assert kvp(name, child, "-h").code == 0


def check_example(command: Any, path: str) -> None:
    """The example names a command, with options and values that it takes."""
    examples = re.split(r"&&|\|", command.epilog.removeprefix("Example: "))
    example = shlex.split(next(part for part in examples if path in part))
    words = path.split()
    if hasattr(command, "commands"):
        words.append(example[len(words)])
        command = command.commands[words[-1]]
    assert example[: len(words)] == words
    command.make_context(path, example[len(words) :])


def test_the_packages_names_are_what_it_shows() -> None:
    for name in ("load", "load_any", "stream_generate", "Dial", "__version__", *dir(kvp_mlx)):
        assert getattr(kvp_mlx, name) is not None
    assert "importlib" not in dir(kvp_mlx)


def test_refinement_by_option(bundle: Path, kvp: Kvp) -> None:
    common = ("generate", TEXT, "--model", bundle, "--prefill", "kvp", "--max-tokens", 12, "--json")
    plain, refined = kvp(*common).json(), kvp(*common, "--refine-tokens", 40).json()
    assert (plain["refine_tokens"], refined["refine_tokens"]) == (0, 40)
    assert plain["refined_tokens"] == plain["exact_tokens"] < refined["prompt_tokens"] < refined["refined_tokens"]
    assert plain["tokens"][0] == refined["tokens"][0]
    for other in (("--kv-bits", 8), ("--prefill", "full")):
        command = [each for each in common if each not in ("--prefill", "kvp")] if "--prefill" in other else common
        outcome = kvp(*command, "--refine-tokens", 4, *other)
        assert (outcome.code, outcome.out) == (2, ""), outcome.err


def test_the_narrowest_nucleus_is_the_likeliest_token(bundle: Path, kvp: Kvp) -> None:
    common = ("generate", "Hi", "--model", bundle, "--max-tokens", 6, "--json")
    drawn = kvp(*common, "--temperature", 5, "--top-p", 0, "--seed", 1).json()["tokens"]
    assert drawn == kvp(*common).json()["tokens"]


def test_info_fits_a_screen(kvp: Kvp) -> None:
    lines = kvp("info").out.splitlines()
    assert len(lines) <= 20
    assert max(map(len, lines)) <= 120
    assert "start" in kvp("info", "--json").json()["training"]
