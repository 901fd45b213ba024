"""A conversation as the ``openai`` package has it answered."""

from typing import Any

import openai

HARBOUR = [{"role": "system", "content": "Keep the light."}, {"role": "user", "content": "Who climbs the stairs?"}]


def ask(client: openai.OpenAI, messages: list = HARBOUR, **options: Any) -> Any:
    return client.chat.completions.create(model="tiny", messages=messages, **{"max_tokens": 12} | options)
