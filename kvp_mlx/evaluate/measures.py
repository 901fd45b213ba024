"""How each task is measured: what arms do with items, as rows of the log (see ``loop``)."""

import math
import zlib
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.sample_utils import apply_top_p

from ..arms.arm import Arm
from ..bundle.loading import KVPModel
from .answer import Question, Sampler, continuation_losses, generate, predicted_losses, reply_log_probabilities
from .loop import BATCH, Asked, Measure, Row, one_by_one
from .sandbox import passes
from .scores import pass_at_k
from .tasks import GENERATIONS, HUMANEVAL_MAX_TOKENS, HUMANEVAL_STOP, Item, humaneval_program

CHAT_TOKENS = 16
TOP_P = 0.95


def encode_item(model: KVPModel, text: str, chat: bool) -> list[int]:
    """Return a prompt's token ids, through the chat template where ``chat`` and the model has one."""
    tokenizer = model.text_tokenizer
    if chat and tokenizer.chat_template is not None:
        return tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
    return tokenizer.encode(text)


def measure_generation(task: str, max_tokens: int | None = None) -> Measure:
    """Return how a task with one greedy answer is measured."""
    form = GENERATIONS[task]

    def measure(model: KVPModel, asked: Sequence[Asked]) -> Iterator[Row]:
        questions = [Question(arm, encode_item(model, item.prompt, form.chat)) for arm, item in asked]
        answers = generate(model, questions, stop=form.stop, max_tokens=max_tokens or form.max_tokens)
        for question, (_, item), (answer,) in zip(questions, asked, answers, strict=True):
            metrics = form.score(item, answer.text)
            score = next(iter(metrics.values()))
            yield _row(score, metrics, answer.ttft_ms, len(question.ids), text=answer.text)

    return measure


def _row(score: float, metrics: dict[str, float], ttft_ms: float, prompt_tokens: int, **more: Any) -> Row:
    return {"score": score, "metrics": metrics, "ttft_ms": ttft_ms, "prompt_tokens": prompt_tokens} | more


def measure_choice(scoring: str) -> Measure:
    """Return how multiple choice is measured: the likeliest continuation wins.

    Args:
        scoring: ``continuation`` (the arm reads the question, the base goes on), or ``predicted``, the paper's (arm
            kvp only: all keys and values are predicted, the choice's too; ``runs.all_predicted``).
    """

    def measure(model: KVPModel, arm: Arm, item: Item) -> Row:
        prompt, choices = split_choices(model, item.prompt, item.answers)
        losses, ttft_ms = continuation_losses(model, arm, prompt, choices)
        if scoring == "predicted" and arm.kind == "kvp":
            losses = [predicted_losses(model, prompt, choice)[0] for choice in choices]
        likelihoods = [-float(loss.sum()) for loss in losses]
        per_letter = [value / len(text.lstrip()) for value, text in zip(likelihoods, item.answers, strict=True)]
        right = {
            "accuracy": float(np.argmax(likelihoods) == item.extra["gold"]),
            "accuracy_per_letter": float(np.argmax(per_letter) == item.extra["gold"]),
        }
        return _row(right["accuracy"], right, ttft_ms, len(prompt), likelihoods=likelihoods)

    return one_by_one(measure)


def split_choices(model: KVPModel, prompt: str, choices: Sequence[str]) -> tuple[list[int], list[list[int]]]:
    """Return a prompt's tokens and each choice's, cut where the prompt alone ends (as lm-evaluation-harness does)."""
    encode = model.text_tokenizer.encode
    ids = encode(prompt)
    return ids, [encode(prompt + choice)[len(ids) :] for choice in choices]


@one_by_one
def measure_perplexity(model: KVPModel, arm: Arm, item: Item) -> Row:
    """Return an item's mean negative log-likelihood in nats per token; ``perplexity`` is the exponential of a mean."""
    prompt, rest = item.extra["prompt"], item.extra["rest"]
    losses, ttft_ms = continuation_losses(model, arm, prompt, [rest])
    return _row(float(losses[0].mean()), {}, ttft_ms, len(prompt))


def perplexity(values: np.ndarray) -> float:
    """Return exp of the mean."""
    return math.exp(values.mean())


def measure_chat(model: KVPModel, asked: Sequence[Asked]) -> Iterator[Row]:
    """Yield how arms agree with the full model's greedy reply, all being led along that reply.

    Score: share of the reply's first 16 tokens that are the arm's greedy choice too. Also the first token alone, and
    the mean divergence KL(full || arm) in nats per token.
    """
    whole = Arm("full", "full")
    for _, of_item in groupby(asked, key=lambda pair: pair[1].id):
        pairs = list(of_item)
        ids = encode_item(model, pairs[0][1].prompt, chat=True)
        ((reply,),) = generate(model, [Question(whole, ids)], max_tokens=CHAT_TOKENS)
        full, _ = reply_log_probabilities(model, whole, ids, reply.tokens)
        for arm, _ in pairs:
            own, ttft_ms = reply_log_probabilities(model, arm, ids, reply.tokens)
            agree = own.argmax(axis=-1) == np.array(reply.tokens)
            divergence = (np.exp(full) * (full - own)).sum(axis=-1).mean()
            metrics = {"first_token": float(agree[0]), "kl_per_token": float(divergence)}
            yield _row(float(agree.mean()), metrics, ttft_ms, len(ids))


def measure_humaneval(samples: int, temperature: float, seed: int) -> Measure:
    """Return how completions are measured: generated, and run in ``sandbox``.

    Args:
        samples: completions per problem; one is greedy, more are drawn with top-p ``TOP_P``.
        temperature: of the drawing; 0 is greedy.
        seed: of the drawing, which every problem, arm and sample has its own of.
    """

    def measure(model: KVPModel, asked: Sequence[Asked]) -> Iterator[Row]:
        for start in range(0, len(asked), step := max(1, BATCH // samples)):
            batch = asked[start : start + step]
            questions = [
                Question(arm, encode_item(model, item.prompt, chat=False), samplers_of(item)) for arm, item in batch
            ]
            found = generate(model, questions, stop=HUMANEVAL_STOP, max_tokens=HUMANEVAL_MAX_TOKENS)
            for question, (_, item), answers in zip(questions, batch, found, strict=True):
                texts = [answer.text for answer in answers]
                passed = [passes(humaneval_program(item, text)) for text in texts]
                metrics = {f"pass@{k}": pass_at_k(samples, sum(passed), k) for k in (1, 10, 100) if k <= samples}
                prompt_tokens, ttft_ms = len(question.ids), answers[0].ttft_ms
                yield _row(metrics["pass@1"], metrics, ttft_ms, prompt_tokens, passed=passed, texts=texts)

    def samplers_of(item: Item) -> tuple[Sampler | None, ...]:
        if samples == 1 or temperature == 0:
            return (None,) * samples
        seeds = [hash_of(f"{seed} {item.id} {number}") for number in range(samples)]
        return tuple(seeded_sampler(temperature, each) for each in seeds)

    return measure


def seeded_sampler(temperature: float, seed: int) -> Sampler:
    """Return a sampler with top-p 0.95 and random numbers of its own, so that it draws alike in any batch."""
    keys = [mx.random.key(seed)]

    def sample(logprobs: mx.array) -> mx.array:
        keys[0], key = mx.random.split(keys[0])
        return mx.random.categorical(apply_top_p(logprobs, TOP_P) / temperature, key=key)

    return sample


def hash_of(text: str) -> int:
    """Return a number that is the same in every process."""
    return zlib.crc32(text.encode())
