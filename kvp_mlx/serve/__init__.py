"""``kvp serve``: the OpenAI and Anthropic APIs over HTTP, on the engine."""
