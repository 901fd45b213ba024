"""The lines that commands say about an answer."""

from support.tiny import chat_tokenizer, llama, prefixed

from kvp_mlx.cli.output import summary
from kvp_mlx.engine.conversation import Conversation
from kvp_mlx.engine.dial import Dial


def test_a_summary_names_the_path_and_the_counts():
    model, _ = prefixed(llama(), 1, tokenizer=chat_tokenizer())
    conversation = Conversation(model)

    def say(text, dial):
        return summary(list(conversation.reply(text, dial=dial, max_tokens=4))[-1])

    assert say("w1 w2", Dial("kvp", 0, 0)).startswith("5 new tokens on 0 cached, 4 of them predicted, ")
    held = len(conversation.context.tokens)
    assert f"new tokens on {held} cached, full prefill, first" in say("w1", Dial("full", 0, 0))
    assert " s (2 tokens recomputed), then " in say("w3 w4 w5", Dial("kvp", 0, 2))
    assert "recomputed" not in say("w3 w4 w5", Dial("kvp", 0, 0))
