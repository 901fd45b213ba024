"""Several turns: what prediction costs from turn to turn, and what refinement gives back.

Every conversation is replayed under each arm with the same words: its replies are given (or the full model's own, where
the data has none), so that all arms answer the same question at every turn. Per turn, with the base reading the reply
on top of each arm's context: ``agreement``, the share of positions whose most likely token is the full arm's, and
``kl``, the mean divergence from the full arm's distribution, in nats per token. The synthetic set states facts and asks
for them later: ``recall`` is the share of questions whose asked-for word is the most likely one, token by token.
"""

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.utils import common_prefix_len

from ..bundle.loading import KVPModel
from ..engine.clock import FirstStep
from ..engine.context import Context
from ..engine.decode import decode
from ..engine.dial import FULL, PREDICT, Dial
from ..engine.prefill import Progress
from ..engine.prompt import render
from ..engine.refining import refine, refining
from ..engine.reply import first_token_on
from ..errors import InputError
from ..models.sections import output_head, run_layers
from .records import TEXTS, read_records

ARMS = ("full", "kvp", "kvp+refine")
REPLY_TOKENS = 32
MAX_TURNS = 10

NAMES = ("Clara", "Peter", "Maria", "Henry", "Laura", "Simon", "Alice", "David", "Emma", "Paul")
CITIES = ("Paris", "London", "Berlin", "Rome", "Madrid", "Vienna", "Boston", "Chicago", "Dublin", "Tokyo")
COLOURS = ("green", "blue", "red", "black", "white", "yellow", "brown", "orange", "purple", "grey")
FACTS = (
    ("My sister's name is {}.", "What is my sister's name?", "Your sister's name is", NAMES),
    ("I live in {}.", "Which city do I live in?", "You live in", CITIES),
    ("My car is {}.", "What colour is my car?", "Your car is", COLOURS),
    ("My best friend is called {}.", "What is my best friend called?", "Your best friend is called", NAMES),
    ("I was born in {}.", "Where was I born?", "You were born in", CITIES),
)
TALK = (
    "The weather has been mild all week, and the garden needs little water. In the mornings I walk along the river, "
    "where the boats are being painted for the season.",
    "Work was slow today. We moved the old shelves into the cellar, sorted the papers by year, and found a box of "
    "letters that nobody had opened since the house was sold.",
    "Yesterday I cooked a soup with beans and carrots, and it was better on the second day. The recipe came from a "
    "magazine that lay in the waiting room of the dentist.",
    "On Sunday there was a concert in the park. The band played for two hours, the children danced in front of the "
    "stage, and afterwards everybody helped to carry the chairs.",
    "The train was late again, so I read half of my book on the platform. It tells of a lighthouse keeper who counts "
    "the ships that pass and writes down where they may be going.",
)


@dataclass(frozen=True)
class Exchange:
    """One turn of a script.

    Attributes:
        message: what the user says.
        reply: what the assistant says; None: what the full model says.
        asked: the part of the reply that had to be remembered.
    """

    message: str
    reply: str | None = None
    asked: str | None = None


Script = list[Exchange]


def synthetic_scripts(count: int, seed: int = 0) -> list[Script]:
    """Return ten-turn conversations: odd turns state a fact amid talk, even ones ask for an earlier fact.

    The question at turn 2 asks for turn 1's fact; later ones for any of those before, all equally often.
    """
    rng, scripts = random.Random(seed), []
    for _ in range(count):
        facts, talk = rng.sample(FACTS, 5), rng.sample(TALK, 5)
        stated: list[tuple[str, str, str]] = []
        script: Script = []
        for (statement, question, answer, words), around in zip(facts, talk, strict=True):
            word = rng.choice(words)
            stated.append((question, answer, word))
            script.append(Exchange(f"{around} {statement.format(word)}", "Thank you for telling me."))
            asked, opening, asked_word = rng.choice(stated)
            message = f"{rng.choice(TALK)} Now tell me: {asked}"
            script.append(Exchange(message, f"{opening} {asked_word}.", asked_word))
        scripts.append(script)
    return scripts


def message_scripts(records: list[dict[str, Any]], turns: int, count: int) -> list[Script]:
    """Return scripts of records with ``messages`` (user, assistant, ...) or ``turns`` (the user's alone).

    Args:
        records: one conversation each; those of fewer turns are left out, longer ones cut.
        turns: turns per script.
        count: scripts at most.
    """
    scripts = []
    for record in records:
        if "turns" in record:
            script = [Exchange(text) for text in record["turns"]]
        else:
            texts = [message["content"] for message in record["messages"] if message["role"] != "system"]
            script = [Exchange(text, reply) for text, reply in zip(texts[::2], texts[1::2], strict=False)]
        if len(script) >= turns:
            scripts.append(script[:turns])
    return scripts[:count]


def read_conversations(path: str) -> list[dict[str, Any]]:
    """Read a file of conversations.

    Raises:
        InputError: unreadable, or something else.
    """
    records = read_records([path], {})
    if not all("messages" in record or TEXTS[1](record.get("turns")) for record in records):
        raise InputError(f"{path} holds records without 'messages' or 'turns' (a list of texts); name another file.")
    return records


def script_sets(files: dict[str, list[dict[str, Any]]], count: int, seed: int) -> dict[str, list[Script]]:
    """Return sets of scripts by name: the synthetic one, and one of each file of ``read_conversations``.

    Args:
        files: records by path; those with ``turns`` of the user give scripts of two turns, others of ``MAX_TURNS``.
        count: scripts of each set at most.
        seed: makes the synthetic ones.

    Raises:
        InputError: a file without a conversation of that length.
    """
    scripts = {"synthetic": synthetic_scripts(count, seed)}
    for path, records in files.items():
        length = 2 if "turns" in records[0] else MAX_TURNS
        name = path if Path(path).name in scripts else Path(path).name
        scripts[name] = message_scripts(records, length, count)
        if not scripts[name]:
            raise InputError(f"{path} has no conversation of {length} turns; name another file.")
    return scripts


class Replay:
    """One arm of one conversation: messages, and the context that holds them.

    Args:
        model: the bundle.
        arm: one of ``ARMS``.
        exact_tail: new tokens before the last that the base reads itself.
    """

    def __init__(self, model: KVPModel, arm: str, exact_tail: int):
        self.model, self.arm = model, arm
        self.dial = FULL if arm == "full" else Dial("kvp", 0, exact_tail)
        self.context = Context(model)
        self.messages: list[dict[str, str]] = []
        self.ids: list[int] = []
        self.predicted_tokens = 0

    def read(self, message: str) -> FirstStep:
        """Take the user's message and read it, up to the first token, on the clock."""
        self.messages.append({"role": "user", "content": message})
        self.ids = render(self.model.text_tokenizer, self.messages)
        reused = self.context.keep(common_prefix_len(self.context.tokens, self.ids[:-1]))
        dial = self.dial.settled(self.model.config, len(self.ids), reused, 0)
        self.predicted_tokens = dial.predicted_tokens(len(self.ids), reused) if dial.path == "kvp" else 0
        first = first_token_on(self.context, self.ids, dial)
        self.context.grown_to(self.ids)
        return first

    def logits(self, reply: list[int]) -> mx.array:
        """Let the base read what is left of the prompt and the reply (but its last token); returns (tokens, vocab).

        The first row is what the prompt leads to. The context then holds all that was read.
        """
        ids = self.ids + reply[:-1]
        held = min(len(self.context.tokens), len(self.ids) - 1)
        self.context.keep(held)
        hidden, _ = run_layers(self.model.base, mx.array([ids[held:]]), self.context.cache)
        logits = output_head(self.model.base, hidden[:, len(self.ids) - 1 - held :]).astype(mx.float32)[0]
        mx.eval(logits, [layer.state for layer in self.context.cache])
        self.context.grown_to(ids)
        return logits

    def close_turn(self, reply: str) -> None:
        """Add the assistant's reply; the arm with refinement now has the time until the next message."""
        self.messages.append({"role": "assistant", "content": reply})
        if self.arm == "kvp+refine":
            refine(self.context)


def measure_sets(
    model: KVPModel, sets: dict[str, list[Script]], *, exact_tail: int, progress: Progress = lambda done, total: None
) -> dict[str, Any]:
    """Measure every set of ``script_sets``; returns by name how many conversations, and the rows of their turns."""
    return {
        name: {
            "conversations": len(scripts),
            "turns": measure_turns(model, scripts, exact_tail=exact_tail, progress=progress),
        }
        for name, scripts in sets.items()
    }


def measure_turns(
    model: KVPModel, scripts: list[Script], *, exact_tail: int = 8, progress: Progress = lambda done, total: None
) -> list[dict[str, Any]]:
    """Replay conversations of equally many turns under every arm.

    Returns:
        One row per turn: turn, context_tokens (the mean), new_tokens, per arm ``agreement``, ``kl``, ``recall`` (None
        where nothing was asked), ``predicted_tokens`` and ``ttft_ms`` (median), and ``fresh_ttft_ms``, the full
        prefill of the whole conversation so far (at turn 2 and the last, else None).
    """
    rows: list[list[dict[str, Any]]] = []
    for number, script in enumerate(scripts):
        rows.append(list(_measured_turns(model, script, exact_tail)))
        progress(number + 1, len(scripts))
    return [_mean_row(turn, same) for turn, same in enumerate(zip(*rows, strict=True), 1)]


def _measured_turns(model: KVPModel, script: Script, exact_tail: int) -> Iterator[dict[str, Any]]:
    """Replay one conversation; yields one row per turn."""
    arms = {arm: Replay(model, arm, exact_tail) for arm in ARMS}
    for number, exchange in enumerate(script, 1):
        before = len(arms["full"].context.tokens)
        first = {arm: replay.read(exchange.message) for arm, replay in arms.items()}
        full = arms["full"]
        reply = exchange.reply if exchange.reply is not None else _greedy_reply(full, first["full"])
        tokens = model.text_tokenizer.encode(reply, add_special_tokens=False)[:REPLY_TOKENS]
        true = full.logits(tokens)
        row: dict[str, Any] = {
            "context_tokens": len(full.ids),
            "new_tokens": len(full.ids) - before,
            "fresh_ttft_ms": _fresh_ttft_ms(model, full.ids) if number in (2, len(script)) else None,
        }
        for arm, replay in arms.items():
            logits = true if arm == "full" else replay.logits(tokens)
            row[arm] = compared(logits, true) | {
                "recall": None if exchange.asked is None else _recalled(model, logits, tokens, exchange),
                "predicted_tokens": replay.predicted_tokens,
                "ttft_ms": first[arm].ttft_ms,
            }
            replay.close_turn(reply)
        yield row


def compared(logits: mx.array, true: mx.array) -> dict[str, float]:
    """Return agreement and KL(true || other) of logits (tokens, vocab), means over the tokens."""
    log_p, log_q = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (true, logits))
    kl = (mx.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean().item()
    agreement = (mx.argmax(logits, axis=-1) == mx.argmax(true, axis=-1)).astype(mx.float32).mean().item()
    return {"agreement": float(agreement), "kl": float(kl)}  # type: ignore[arg-type]


def _recalled(model: KVPModel, logits: mx.array, tokens: list[int], exchange: Exchange) -> float:
    """Return 1.0 if the asked-for word's tokens are all the most likely ones, else 0.0."""
    before = (exchange.reply or "").split(exchange.asked or "")[0].rstrip()
    start = len(model.text_tokenizer.encode(before, add_special_tokens=False))
    word = len(model.text_tokenizer.encode(f"{before} {exchange.asked}", add_special_tokens=False))
    best = mx.argmax(logits[start:word], axis=-1).tolist()
    return float(best == tokens[start:word])


def _greedy_reply(replay: Replay, first: FirstStep) -> str:
    """Return the beginning of what the full model answers after its first step."""
    pieces = decode(first, replay.model.text_tokenizer, replay.ids, max_tokens=REPLY_TOKENS)
    text = "".join(piece.text for piece in pieces)
    replay.context.keep(len(replay.ids) - 1)
    return text.replace("\N{REPLACEMENT CHARACTER}", "").strip() or "..."


def _fresh_ttft_ms(model: KVPModel, ids: list[int]) -> float:
    """Return the time to the first token by full prefill, without any cache."""
    dial = FULL.settled(model.config, len(ids), 0, 0)
    return first_token_on(Context(model), ids, dial).ttft_ms


def _mean_row(turn: int, rows: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """Average the same turn of several conversations."""

    def mean(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return round(float(np.mean(known)), 4) if known else None

    def median(values: list[float]) -> float:
        return round(float(np.median(values)), 1)

    result: dict[str, Any] = {
        "turn": turn,
        "context_tokens": mean([row["context_tokens"] for row in rows]),
        "new_tokens": mean([row["new_tokens"] for row in rows]),
        "fresh_ttft_ms": None if rows[0]["fresh_ttft_ms"] is None else median([row["fresh_ttft_ms"] for row in rows]),
    }
    for arm in ARMS:
        result[arm] = {
            name: mean([row[arm][name] for row in rows]) for name in ("agreement", "kl", "recall", "predicted_tokens")
        } | {"ttft_ms": median([row[arm]["ttft_ms"] for row in rows])}
    return result


def yield_times_ms(model: KVPModel, tokens: int = 2048) -> dict[str, float]:
    """Return how long refinement takes from one point where it can be left to the next: median and largest.

    Args:
        model: the bundle.
        tokens: predicted context to refine; cut to the context window.
    """
    count = min(tokens, model.context_length or tokens)
    ids = [*np.random.default_rng(0).integers(0, model.vocabulary_size, count).tolist(), 0]
    context, steps = Context(model), []
    context.read(ids, PREDICT.settled(model.config, len(ids), 0, 0))
    start = time.perf_counter()
    for _ in refining(context):
        steps.append(1e3 * (time.perf_counter() - start))
        start = time.perf_counter()
    return {"tokens": count, "median": float(np.median(steps)), "largest": float(np.max(steps))}
