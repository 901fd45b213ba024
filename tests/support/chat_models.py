"""Tiny model directories whose chat template knows tools and thoughts, in Qwen's manner."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from .directories import write_llama

THINKING = ["<think>", "</think>"]
TOOL_TEMPLATE = """{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}
{% endif %}Tools:
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
Call as <tool_call>
{"name": ...}
</tool_call><|im_end|>
{% elif messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}
{%- for m in messages %}{% if m.role != 'system' or not loop.first %}<|im_start|>{{ m.role }}
{% if m.role == 'tool' %}{{ m.name }}: {% endif %}
{%- if m.reasoning_content %}<think>
{{ m.reasoning_content }}
</think>

{% endif %}{{ m.content }}
{%- for tool_call in m.tool_calls or [] %}{% set tool_call = tool_call.function %}
<tool_call>
{"name": "{{ tool_call.name }}", "arguments": {{ tool_call.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking and thinks_aloud %}<think>
{% endif %}{% endif %}"""


def write_tool_model(directory: Path, *, thinks_aloud: bool = False, **changes: object) -> Path:
    """Write a random Llama whose template takes tools.

    Args:
        directory: to write.
        thinks_aloud: its tokeniser has marks for thoughts, and its prompts end inside them.
        changes: go into its config.
    """
    write_llama(directory, **{"max_position_embeddings": 2048, "vocab_size": 304, **changes})
    path = directory / "tokenizer_config.json"
    template = TOOL_TEMPLATE.replace("thinks_aloud", str(thinks_aloud).lower())
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    if thinks_aloud:
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        tokenizer.add_tokens([AddedToken(mark, special=False) for mark in THINKING])
        tokenizer.save(str(directory / "tokenizer.json"))
    return directory
