"""From a conversation, as every protocol has it, to the prompt's token ids by the model's chat template.

Messages are in the form that chat templates take: ``role`` (system, user, assistant, tool) and ``content`` (text). An
assistant's may have ``reasoning_content`` and ``tool_calls``, a tool's has ``tool_call_id``. Tools and calls are
OpenAI's, ``{"type": "function", "function": {"name", "description", "parameters"}}`` and ``{"id", "type", "function":
{"name", "arguments"}}``, but the arguments are an object.
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tool_parsers import json_tools
from mlx_lm.utils import common_prefix_len

from ..bundle.loading import KVPModel
from ..engine.prompt import Message, check_size, render
from ..errors import InputError

Tool = dict[str, Any]
TOOLS_PROMPT = """You may call these functions, given as JSON schemas, one a line:
{tools}
To call one, answer with nothing but
{start}
{{"name": "NAME", "arguments": {{...}}}}
{end}"""
"""What a model reads of tools whose chat template has no place for them."""
UNLIKE_ANY = "\ufdd1"
"""A noncharacter, with which nobody's message begins."""


@dataclass(frozen=True)
class Prompt:
    """A rendered conversation.

    Attributes:
        ids: the whole prompt, the assistant's turn opened.
        stable_tokens: of these, how many of the first ones every turn of the conversation shares.
    """

    ids: list[int]
    stable_tokens: int = 0


def prompt_of(
    model: KVPModel,
    messages: Sequence[Message],
    tools: Sequence[Tool] = (),
    *,
    template_arguments: dict[str, Any] | None = None,
    thinks: bool = True,
) -> Prompt:
    """Return the prompt for the assistant's next message; takes tens of milliseconds for a long conversation.

    Args:
        model: its tokeniser and chat template.
        messages: the conversation so far (see above); nothing in them forges turns or calls.
        tools: that may be called.
        template_arguments: for the chat template (``enable_thinking``, ...).
        thinks: leave thinking to the model; False: the answer follows at once (it must keep to a grammar).

    Raises:
        InputError: no chat template, one that refuses the conversation, or text that no context window holds.
    """
    tokenizer = model.text_tokenizer
    if not tokenizer.has_chat_template:
        raise InputError("this model has no chat template; ask for a plain completion instead.")
    if not messages:
        raise InputError("there are no messages; send at least one.")
    check_size(model, json.dumps([list(messages), list(tools)], ensure_ascii=False), "the conversation")
    arguments = dict(template_arguments or {})
    if not thinks:
        arguments["enable_thinking"] = False
    messages = _with_names(_system_first(messages))
    if tokenizer.has_tool_calling:
        arguments["tools"] = list(tools) or None
    else:
        messages = _tools_as_text(messages, tools)
    ids = render(tokenizer, messages, arguments=arguments)
    if not thinks and opens_thinking(tokenizer, ids):
        ids += tokenizer.encode(tokenizer.think_end + "\n\n", add_special_tokens=False)
    return Prompt(ids, common_prefix_len(_head(tokenizer, messages[0], arguments), ids))


def opens_thinking(tokenizer: TokenizerWrapper, ids: list[int]) -> bool:
    """Return whether a prompt ends inside the assistant's thoughts."""
    if not tokenizer.has_thinking:
        return False
    return str(tokenizer.decode(ids[-16:])).rstrip().endswith(tokenizer.think_start)


def _system_first(messages: Sequence[Message]) -> list[Message]:
    """Return messages with all those of the system at the beginning as one, since most templates take only one."""
    number = next((n for n, message in enumerate(messages) if message["role"] != "system"), len(messages))
    if number < 2:
        return list(messages)
    text = "\n\n".join(message["content"] for message in messages[:number])
    return [{"role": "system", "content": text}, *messages[number:]]


def _with_names(messages: list[Message]) -> list[Message]:
    """Return messages in which the result of a call names the function, as some templates want it."""
    names = {call["id"]: call["function"]["name"] for each in messages for call in each.get("tool_calls") or []}
    return [
        message | {"name": names[message["tool_call_id"]]} if message.get("tool_call_id") in names else message
        for message in messages
    ]


def _tools_as_text(messages: list[Message], tools: Sequence[Tool]) -> list[Message]:
    """Return a conversation that tells of tools, calls and results in plain text."""
    told = [_call_as_text(message) for message in messages]
    if not tools:
        return told
    listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    text = TOOLS_PROMPT.format(tools=listed, start=json_tools.tool_call_start, end=json_tools.tool_call_end)
    if told[0]["role"] != "system":
        return [{"role": "system", "content": text}, *told]
    return [{"role": "system", "content": f"{told[0]['content']}\n\n{text}"}, *told[1:]]


def _call_as_text(message: Message) -> Message:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    calls = [
        f"{json_tools.tool_call_start}\n{json.dumps(call['function'], ensure_ascii=False)}\n{json_tools.tool_call_end}"
        for call in message.get("tool_calls") or []
    ]
    if not calls:
        return message
    return {"role": "assistant", "content": "\n".join([message["content"], *calls]).lstrip()}


def _head(tokenizer: TokenizerWrapper, first: Message, arguments: dict[str, Any]) -> list[int]:
    """Return ids that differ from those of any conversation just behind this system message and these tools."""
    system = first["content"] if first["role"] == "system" else None
    if system is None and not arguments.get("tools"):
        return []
    return _head_of(tokenizer, system, json.dumps(arguments))


@functools.lru_cache(maxsize=64)
def _head_of(tokenizer: TokenizerWrapper, system: str | None, arguments: str) -> list[int]:
    start = [] if system is None else [{"role": "system", "content": system}]
    return render(tokenizer, [*start, {"role": "user", "content": UNLIKE_ANY}], arguments=json.loads(arguments))
