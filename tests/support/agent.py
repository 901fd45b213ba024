"""A coding agent's session of 30 turns, as its client sends it: tools, files read, edits, a history that changes.

The files are those of this checkout, cut where a client would cut them. At turn 12 the client drops the first file's
text from the history, since it was edited meanwhile; at turn 22 it puts a summary in the place of everything.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .chat_models import write_tool_model
from .directories import write_tokenizer

Message = dict[str, Any]

ROOT = Path(__file__).parents[2]
TURNS, EDITED, COMPACTED = 30, 12, 22
FILE_CHARACTERS = 6_500
VOCABULARY = 2_000
SYSTEM = """You are a careful engineer who works in a terminal, on a checkout that belongs to somebody else.

Rules of the house:
- Read a file before you change it, and change as little as the task needs.
- One tool at a time. Say in a line what you are about to do, then call the tool.
- Run the tests that cover what you touched. Never say that they pass before they ran.
- No new dependencies. No network. Nothing outside the checkout.
- Lines have at most 120 characters; every public function has a docstring that says units and errors.
- When you are done, say what changed, file by file, and what you did not look at.

The checkout is /work/checkout, its branch main, the shell bash, today a Wednesday in November."""
TASK = "`kvp bench decode` should tell tokens per second for several clients. Find out what that takes; then do it."


def tool(name: str, description: str, **parameters: str) -> dict[str, Any]:
    """Return a tool whose arguments are all text."""
    properties = {key: {"type": "string", "description": told} for key, told in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters), "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


TOOLS = [
    tool("read_file", "Returns a file with its line numbers; long ones are cut.", path="Relative to the checkout."),
    tool("search", "Finds a regular expression in the checkout.", pattern="As grep -E takes it.", folder="Where."),
    tool("edit_file", "Replaces one passage of a file.", path="The file.", old="As it stands there.", new="Instead."),
    tool("run", "Runs a command in the shell; returns the end of what it prints.", command="One line."),
]


@dataclass(frozen=True)
class Step:
    """What the assistant said at one turn, what it called, and what came back; ``user``: what was said then."""

    text: str
    name: str = ""
    arguments: tuple[tuple[str, str], ...] = ()
    result: str = ""
    user: str = ""


def reading(path: str, why: str) -> Step:
    """Return a step that reads a file."""
    lines = (ROOT / path).read_text(encoding="utf-8")[:FILE_CHARACTERS].splitlines()
    numbered = "\n".join(f"{number:5}\t{line}" for number, line in enumerate(lines, 1))
    return Step(why, "read_file", (("path", path),), numbered)


def searching(pattern: str, *found: str) -> Step:
    """Return a step that searches."""
    return Step(f"I look for {pattern}.", "search", (("pattern", pattern), ("folder", ".")), "\n".join(found))


def editing(path: str, old: str, new: str) -> Step:
    """Return a step that edits."""
    done = f"{path}: 1 passage replaced ({len(old)} characters by {len(new)})."
    return Step(f"Now {path}.", "edit_file", (("path", path), ("old", old), ("new", new)), done)


def running(command: str, printed: str) -> Step:
    """Return a step that runs something."""
    return Step("Let me see what happens.", "run", (("command", command),), printed)


def session() -> list[Step]:
    """Return the steps that follow the first 29 requests."""
    return [
        searching("def measure_", "bench/decode.py:22:def measure_decode(", "bench/ttft.py:75:def measure_ttft("),
        reading("kvp_mlx/cli/bench.py", "What people type first."),
        reading("bench/ttft.py", "It borrows its prompts and quartiles from here."),
        running(
            "git log --oneline -3 -- bench", "9f31c02 bench: one clock\n41d77aa bench: floors\n0b5ce9e bench: memory"
        ),
        Step(
            "The clock is in one place. Shall `--clients` take several numbers, as `--prompt-tokens` does?", user="Yes."
        ),
        editing("bench/decode.py", "    new_tokens: int,\n", "    new_tokens: int,\n    clients: int = 1,\n"),
        running(
            "python -m pytest -q tests/bench", "....F.......\n1 failed: decode() lacks 'clients'\n11 passed in 8.2s"
        ),
        searching("measure_decode", "kvp_mlx/cli/bench.py:141", "tests/bench/test_bench.py:212"),
        editing(
            "kvp_mlx/cli/bench.py",
            "new_tokens=new_tokens, progress",
            "new_tokens=new_tokens, clients=clients, progress",
        ),
        running("python -m pytest -q tests/bench", "............\n12 passed in 8.4s"),
        Step("That holds for one client. Several need a batch.", user="How does mlx-lm batch? Look before you write."),
        searching("class BatchGenerator", "mlx_lm/generate.py:1411:class BatchGenerator:"),
        reading("kvp_mlx/engine/decode.py", "What we have of it."),
        Step("It takes caches and goes on from there, so every client can begin where its prompt ends.", user="Go on."),
        editing(
            "bench/decode.py",
            "return seconds\n",
            "return seconds\n\n\ndef batch_seconds(caches, last, new_tokens):\n    ...\n",
        ),
        running("python -m ruff check bench", "All checks passed!"),
        running("python -m pytest -q tests/bench -k decode", "..\n2 passed in 3.1s"),
        searching("Decoding", "docs/benchmarks.md:61:## Decoding", "README.md:88:| decoding | tokens/s |"),
        editing(
            "docs/benchmarks.md",
            "## Decoding\n",
            "## Decoding\n\nWith `--clients 1,4,8` the answers run side by side.\n",
        ),
        running("python -m pytest -q tests/test_readme.py", "F\n1 failed: kvp bench decode has no --clients"),
        Step("The option itself is missing; I add it.", user="I have to leave soon. Hurry, but do not skip the tests."),
        searching("PromptLengths = ", "kvp_mlx/cli/options.py:88:PromptLengths = Annotated["),
        reading("kvp_mlx/engine/prompt.py", "How others refuse what cannot be."),
        editing(
            "kvp_mlx/cli/options.py", "Rounds = ", 'Clients = Annotated[str, typer.Option("--clients")]\nRounds = '
        ),
        running("python -m pytest -q tests/test_readme.py tests/bench", ".............\n13 passed in 41.0s"),
        Step("All pass. Is a table wanted, too?", user="Yes, one row for each number of clients."),
        editing("bench/report.py", "DECODE: Columns = {\n", 'DECODE: Columns = {\n    "clients": number("clients"),\n'),
        running("python -m pytest -q tests/bench", "............\n12 passed in 8.3s"),
        Step("Done: bench/decode.py, bench/report.py, the option and its page.", user="What did you not look at?"),
    ]


def requests() -> list[list[Message]]:
    """Return the messages of every request, in the form of OpenAI's API but the arguments as objects."""
    steps = session()
    assert len(steps) == TURNS - 1
    start: list[Message] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": TASK}]
    messages, sent = start, [start]
    for number, step in enumerate(steps, 1):
        messages = [*messages, *_messages_of(step, number)]
        if number + 1 == EDITED:
            messages = [_without_file(message, "call_2") for message in messages]
        if number + 1 == COMPACTED:
            messages = [start[0], {"role": "user", "content": _summary(steps[:number])}]
        sent.append(messages)
    return sent


def _messages_of(step: Step, number: int) -> list[Message]:
    said: Message = {"role": "assistant", "content": step.text}
    if not step.name:
        return [said, {"role": "user", "content": step.user}]
    call = {"name": step.name, "arguments": dict(step.arguments)}
    said["tool_calls"] = [{"id": f"call_{number}", "type": "function", "function": call}]
    return [said, {"role": "tool", "tool_call_id": f"call_{number}", "content": step.result}]


def _without_file(message: Message, call: str) -> Message:
    is_meant = message.get("tool_call_id") == call
    return message | {"content": "[This file was edited later; read it again.]"} if is_meant else message


def _summary(steps: list[Step]) -> str:
    done = "\n".join(f"- {step.text} {step.name} {dict(step.arguments).get('path', '')}".rstrip() for step in steps)
    return f"{TASK}\n\nThis session goes on from an earlier one, which ran out of space. So far:\n{done}\n\nGo on."


def openai_messages(messages: list[Message]) -> list[Message]:
    """Return messages as the ``openai`` package sends them."""
    return [
        message
        | {
            "tool_calls": [
                call | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"])}}
                for call in message["tool_calls"]
            ]
        }
        if "tool_calls" in message
        else message
        for message in messages
    ]


def anthropic_body(messages: list[Message]) -> dict[str, Any]:
    """Return system, tools and messages as the ``anthropic`` package sends them."""
    tools = [
        {"name": each["name"], "description": each["description"], "input_schema": each["parameters"]}
        for each in (tool["function"] for tool in TOOLS)
    ]
    system = [{"type": "text", "text": messages[0]["content"], "cache_control": {"type": "ephemeral"}}]
    return {"system": system, "tools": tools, "messages": [_anthropic_message(each) for each in messages[1:]]}


def _anthropic_message(message: Message) -> Message:
    if message["role"] == "tool":
        result = {"type": "tool_result", "tool_use_id": message["tool_call_id"], "content": message["content"]}
        return {"role": "user", "content": [result]}
    calls = [
        {"type": "tool_use", "id": call["id"], "name": call["function"]["name"], "input": call["function"]["arguments"]}
        for call in message.get("tool_calls", [])
    ]
    return {"role": message["role"], "content": [{"type": "text", "text": message["content"]}, *calls]}


def template_messages(messages: list[Message]) -> list[Message]:
    """Return messages as chat templates want them, whose tools' results name the function."""
    names = {call["id"]: call["function"]["name"] for each in messages for call in each.get("tool_calls", [])}
    return [each | {"name": names[each["tool_call_id"]]} if each["role"] == "tool" else each for each in messages]


def write_agent_model(directory: Path) -> Path:
    """Write a small random Llama with room for the session, its vocabulary made for text like this."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "tie_word_embeddings": False}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    write_tool_model(directory, vocab_size=VOCABULARY, max_position_embeddings=16_384, **sizes, **heads)
    config = (directory / "tokenizer_config.json").read_text()
    text = "\n".join(message["content"] for messages in requests() for message in messages)
    write_tokenizer(directory, text, VOCABULARY)
    (directory / "tokenizer_config.json").write_text(config)
    return directory
