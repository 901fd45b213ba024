"""How far arms agree with the full model's reply in chat."""

from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np

from ...arms.kinds import parse_arm
from ...bundle.loading import KVPModel
from ...engine.prompt import encode
from ...errors import InputError
from ..answer import Question, generate
from ..likelihood import reply_log_probabilities
from ..records import hashes, read_records, shuffled
from ..task import Asked, Item, Place, Row, Run, Task, row_of

REPLY_TOKENS = 16


def items(places: Sequence[str], seed: int) -> list[Item]:
    """Return users' messages: the first of ``turns``, of ``messages`` the first of a user, or ``question``.

    Raises:
        InputError: a record without any.
    """
    found = []
    for number, record in enumerate(shuffled(read_records(places, {}), seed)):
        messages = [record["question"]] if "question" in record else record.get("turns", record.get("messages"))
        given = messages if isinstance(messages, list) else []
        asked = [each for each in given if not isinstance(each, dict) or each.get("role", "user") == "user"]
        text = asked[0].get("content") if asked and isinstance(asked[0], dict) else asked[0] if asked else None
        if not isinstance(text, str):
            raise InputError("a record needs 'turns', 'messages' or 'question'; check --data.")
        found.append(Item(str(number), text))
    return found


def prompt_ids(model: KVPModel, item: Item) -> list[int]:
    """Return the token ids of a message in the chat template."""
    return encode(model, item.prompt)


def measure(model: KVPModel, asked: Sequence[Asked]) -> Iterator[Row]:
    """Yield how arms agree with the full model's greedy reply, all being led along that reply.

    Score: share of the reply's first 16 tokens that are the arm's greedy choice too. Also the first token alone, and
    the mean divergence KL(full || arm) in nats per token.
    """
    whole = parse_arm("full")
    for _, of_item in groupby(asked, key=lambda pair: pair[1].id):
        pairs = list(of_item)
        ids = prompt_ids(model, pairs[0][1])
        ((reply,),) = generate(model, [Question(whole, ids)], max_tokens=REPLY_TOKENS)
        full, _ = reply_log_probabilities(model, whole, ids, reply.tokens)
        for arm, _ in pairs:
            own, ttft_ms = reply_log_probabilities(model, arm, ids, reply.tokens)
            agree = own.argmax(axis=-1) == np.array(reply.tokens)
            divergence = (np.exp(full) * (full - own)).sum(axis=-1).mean()
            metrics = {"first_token": float(agree[0]), "kl_per_token": float(divergence)}
            yield row_of(float(agree.mean()), metrics, ttft_ms, len(ids))


def run(data: list[str], limit: int | None = None, seed: int = 0) -> Run:
    """Agreement with the full model's greedy reply over its first 16 tokens.

    Also the first token alone, and KL per token. Records have turns, messages or question.
    """
    return Run("chat", lambda _: items(data, seed), measure, prompt_ids, limit, seed, {"data": hashes(data)})


PLACE = Place("chat", {"data": "mt_bench_questions.jsonl.gz"}, {"limit": 80})
TASK = Task("chat", "agreement", run, places=(PLACE,))
