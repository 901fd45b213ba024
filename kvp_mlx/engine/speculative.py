"""Decoding with a draft: the auxiliary proposes the next tokens, the base reads them at once and keeps the right ones.

mlx-lm's own ``speculative_generate_step`` does that. The auxiliary has read the prompt to predict the base's cache, so
its own cache is the draft's, and drafting costs no prefill; after full prefill it catches up first. Every token that
goes out is the base's choice.
"""

import statistics
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import GenerationResponse, generate_step, speculative_generate_step
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..bundle.loading import KVPModel
from ..errors import InputError
from ..models.cutting import TRIMMABLE, trim_to
from ..models.entries import held_positions
from ..models.families import Cache, kinds_of
from ..models.sections import is_cut
from .clock import Chooser, FirstStep, greedy
from .context import Context
from .decode import LogitsProcessor
from .pace import Pace, finish
from .pace import Steps as PausingSteps
from .prefill import base_prefill, reading_prompt

Draft = Literal["none", "auxiliary", "auto"]
"""Who drafts; ``auto`` leaves drafting out, or off, where it does not pay."""
DRAFT_TOKENS = 3
TIMED_TOKENS = 3
"""Decoded without a draft, after one more, to learn what a token costs so."""
TRIAL_ROUNDS = 3
"""In which ``auto`` drafts one token each: a wrong one costs less, and is as telling."""
FIRST_CREDIT_TOKENS, MAX_CREDIT_TOKENS = 1.5, 4.0
"""``auto`` gives drafting up when it has lost the time of so many plain tokens: few at first, more when it has won."""

Step = tuple[int, mx.array, bool]
"""A token, the base's log-probabilities (vocab,), and whether the draft had proposed it."""
Steps = Generator[Step, None, None]


@dataclass(frozen=True)
class Drafting:
    """What a request says of drafts.

    Attributes:
        who: see ``Draft``.
        tokens: to propose at a time.

    Raises:
        InputError: neither of these words, or no tokens.
    """

    who: Draft = "none"
    tokens: int = DRAFT_TOKENS

    def __post_init__(self) -> None:
        """Check the values."""
        if self.who not in get_args(Draft):
            raise InputError(f"draft is {', '.join(get_args(Draft))}, not '{self.who}'.")
        if self.tokens < 1:
            raise InputError(f"a draft has at least 1 token, not {self.tokens}.")

    def settled(self, model: KVPModel, *, is_quantised: bool) -> "Drafting":
        """Return what comes of it: ``auto`` is ``none`` where the auxiliary cannot draft.

        Args:
            model: the bundle.
            is_quantised: whether the base's cache is, or will be.

        Raises:
            InputError: ``auxiliary``, and it cannot.
        """
        reason = None if self.who == "none" else _obstacle(model, is_quantised)
        if self.who == "auxiliary" and reason is not None:
            raise InputError(f"the auxiliary cannot draft: {reason}; leave the draft out, or at auto.")
        return self if reason is None else replace(self, who="none")


NO_DRAFTS = Drafting()


def _obstacle(model: KVPModel, is_quantised: bool) -> str | None:
    if not model.config.has_predictor:
        return "this model has none"
    if is_cut(model.auxiliary):
        return "it is a model's first layers, without those that choose tokens"
    if model.hosts is not None:
        return "the base is spread over several hosts"
    kinds = {kind for network in (model.base, model.auxiliary) for kind in kinds_of(network)}
    if fixed := sorted({kind.title for kind in kinds if not isinstance(kind.new_cache(), TRIMMABLE)}):
        return f"caches of {' and '.join(fixed)} cannot go back to before a rejected token"
    return "a quantised cache (kv_bits) is decoded without" if is_quantised else None


def speculate(
    context: Context, ids: list[int], first: FirstStep, drafting: Drafting, *, max_tokens: int, **choosing: Any
) -> "Speculation | None":
    """Return the decoding of a reply with drafts; None where it has none.

    That is also where the first token ends it, and, with ``auto``, where the auxiliary has more to read than the reply
    may have tokens.
    """
    unread = len(ids) - (held_positions(context.auxiliary_cache) or 0)
    is_over = max_tokens == 1 or first.tokens[0] in context.model.text_tokenizer.eos_token_ids
    if drafting.who == "none" or is_over or (drafting.who == "auto" and unread > max_tokens):
        return None
    return Speculation(context, ids, first, drafting, max_tokens=max_tokens, **choosing)


class Speculation:
    """A reply that is decoded with drafts, from its first token on.

    Attributes:
        generated: its tokens so far; the base's cache holds the prompt and these, the last one aside.
        drafted_tokens: how many were proposed.
        accepted_tokens: how many of its tokens had been.

    Args:
        context: holds the prompt in the base's cache; the auxiliary's may lag behind.
        ids: the prompt.
        first: its first token, no end mark.
        drafting: settled, and not ``none``.
        max_tokens: tokens to generate at most, 2 or more.
        sampler: see ``reply``.
        logits_processors: see ``reply``; functions of their arguments alone, since rejected tokens pass through, too.
    """

    def __init__(
        self,
        context: Context,
        ids: list[int],
        first: FirstStep,
        drafting: Drafting,
        *,
        max_tokens: int,
        sampler: Chooser | None = None,
        logits_processors: Sequence[LogitsProcessor] = (),
    ):
        self.generated = list(first.tokens)
        self.drafted_tokens = self.accepted_tokens = 0
        self._context, self._ids, self._first, self._max_tokens = context, ids, first, max_tokens
        self._drafting, self._processors = drafting, logits_processors
        self._sampler = sampler or greedy

    @cached_property
    def _draws(self) -> "Draws":
        """From the second token on, so that they begin where the first has left the random numbers."""
        return Draws(self._sampler)

    def responses(self, tokenizer: TokenizerWrapper) -> Generator[GenerationResponse, None, None]:
        """Yield the reply as mlx-lm's ``stream_generate`` does."""
        detokenizer, prompt_tokens = tokenizer.detokenizer, len(self._ids)
        start = None
        with closing(self._steps()) as steps:
            for count, (token, logprobs, from_draft) in enumerate(steps, 1):
                reason = "stop" if token in tokenizer.eos_token_ids else "length" if count == self._max_tokens else None
                if reason != "stop":
                    detokenizer.add_token(token)
                if reason is not None:
                    detokenizer.finalize()
                yield GenerationResponse(
                    text=detokenizer.last_segment,
                    token=token,
                    logprobs=logprobs,
                    from_draft=from_draft,
                    prompt_tokens=prompt_tokens,
                    prompt_tps=1e3 * prompt_tokens / self._first.ttft_ms,
                    generation_tokens=count,
                    generation_tps=count / (time.perf_counter() - start) if start else 0.0,
                    peak_memory=mx.get_peak_memory() / 1e9,
                    finish_reason=reason,
                )
                if reason is not None:
                    return
                start = start or time.perf_counter()

    def _steps(self) -> Steps:
        """Yield the first token and those after it; the context then holds them all, and no rejected one."""
        yield self.generated[0], self._first.logprobs.squeeze(0), False
        try:
            yield from self.steps()
        except GeneratorExit:
            self.end()
            raise

    def steps(self) -> Steps:
        """Yield the tokens after the first one; where this was closed, ``end`` or ``leave_off`` comes next."""
        is_auto = self._drafting.who == "auto"
        with closing(self._measured() if is_auto else self._drafted(self._drafting.tokens)) as steps:
            for step in steps:
                self.generated.append(step[0])
                self.accepted_tokens += step[2]
                yield step

    def end(self) -> None:
        """Leave all as without a draft: the base has read every token, and one more was drawn."""
        cache, tokens = self._context.cache, self._ids + self.generated
        if unread := tokens[held_positions(cache) or 0 :]:
            base_prefill(self._context.model, mx.array([unread]), cache)
        self._draws.leave(len(self.generated), self._first.logprobs)

    def leave_off(self) -> None:
        """Let others draw the next token; what the caches hold of it goes with the context's ``grown_to``."""
        self._draws.put_back(len(self.generated))

    def _measured(self) -> Steps:
        """Decode without a draft, for its pace; then with, for as long as that is faster; then without again."""
        with closing(self._plain()) as plain:
            credit = Credit((yield from _pace(plain)))
        tokens = self._drafting.tokens
        for drafted_tokens, rounds in ((1, TRIAL_ROUNDS), (tokens, None)) if tokens > 1 else ((1, None),):
            if not credit.is_spent:
                with closing(self._drafted(drafted_tokens)) as drafted:
                    yield from credit.spend(drafted, rounds)
        yield from self._plain()

    def _plain(self) -> Steps:
        """Decode by the base alone."""
        self._rewind()
        self._draws.number = len(self.generated)
        steps = generate_step(
            mx.array(self.generated[-1:]),
            self._context.model.base,
            prompt_cache=self._context.cache,
            **self._options(),
        )
        for token, logprobs in steps:
            yield int(token), logprobs, False

    def _drafted(self, tokens: int) -> Steps:
        """Decode with drafts of so many tokens; the auxiliary reads first what it has not read."""
        self._rewind()
        finish(self.catching_up())
        context, model = self._context, self._context.model
        steps = speculative_generate_step(
            mx.array(self.generated[-1:]),
            Announced(model.base, self._announce),
            Announced(model.auxiliary, self._announce_draft),
            prompt_cache=[*context.cache, *context.auxiliary_cache],
            num_draft_tokens=tokens,
            **self._options(),
        )
        try:
            with closing(steps):
                for token, logprobs, from_draft in steps:
                    yield int(token), logprobs, from_draft
        finally:
            self._rewind()

    def catching_up(self, pace: Pace | None = None) -> PausingSteps[None]:
        """Let the auxiliary read what the base has read and it has not, with pauses."""
        cache, read = self._context.auxiliary_cache, self._ids + self.generated[:-1]
        if unread := read[held_positions(cache) or 0 :]:
            yield from reading_prompt(self._context.model.auxiliary, mx.array([unread]), cache, pace=pace)

    def _announce(self, position: int, tokens: int) -> None:
        """Note whose turn it is: the base chooses a token after each that it reads from ``position`` on."""
        self._draws.number = position + 1 - len(self._ids)

    def _announce_draft(self, position: int, tokens: int) -> None:
        """Note whose turn it is: the auxiliary chooses one token after those that it reads."""
        self._draws.number = position + tokens - len(self._ids)
        self.drafted_tokens += 1

    def _options(self) -> dict[str, Any]:
        before = mx.array(self._ids + self.generated[:-1], dtype=mx.int32)

        def seeing_all(processor: LogitsProcessor) -> LogitsProcessor:
            return lambda tokens, logits: processor(mx.concatenate([before, tokens]), logits)

        return {
            "max_tokens": self._max_tokens - len(self.generated),
            "sampler": self._draws,
            "logits_processors": [seeing_all(processor) for processor in self._processors],
        }

    def _rewind(self) -> None:
        """Trim both caches to what goes before the last token.

        mlx-lm takes back what it rejects. But it can be interrupted anywhere, and then trims by the round before.
        """
        end = len(self._ids) + len(self.generated) - 1
        trim_to(self._context.cache, end)
        trim_to(self._context.auxiliary_cache, end)


def _pace(steps: Steps) -> Generator[Step, None, float]:
    """Yield ``TIMED_TOKENS`` steps after one more; returns the median seconds of a step."""
    seconds = []
    yield next(steps)
    for _ in range(TIMED_TOKENS):
        start = time.perf_counter()
        step = next(steps)
        seconds.append(time.perf_counter() - start)
        yield step
    return statistics.median(seconds)


class Credit:
    """What drafting may still lose, counted in tokens as they are decoded without.

    Args:
        token_s: seconds that one takes.
    """

    def __init__(self, token_s: float):
        self._token_s, self._tokens, self._is_warm = token_s, FIRST_CREDIT_TOKENS, False

    @property
    def is_spent(self) -> bool:
        """Whether drafting has lost too much."""
        return self._tokens < 0

    def spend(self, steps: Steps, rounds: int | None) -> Steps:
        """Yield the tokens of so many rounds, or of fewer where the credit is spent.

        The very first round is on the house: what runs for the first time is slow. The others are taken to last as long
        as they mostly do, since a busy machine's pauses say nothing of drafts.
        """
        seconds: list[float] = []
        tokens, round_s, start = 0, 0.0, time.perf_counter()
        for step in steps:
            round_s += time.perf_counter() - start
            tokens += 1
            yield step
            if not step[2]:  # the last of its round
                if self._is_warm:
                    seconds.append(round_s)
                    won = tokens - statistics.median(seconds) / self._token_s
                    self._tokens = min(MAX_CREDIT_TOKENS, self._tokens + won)
                self._is_warm = True
                if self.is_spent or (rounds := None if rounds is None else rounds - 1) == 0:
                    return
                tokens, round_s = 0, 0.0
            start = time.perf_counter()


class Announced:
    """Stands in for a model where mlx-lm calls it; says first what it is about to read, and where."""

    def __init__(self, network: nn.Module, announce: Callable[[int, int], None]):
        self.layers, self._network, self._announce = network.layers, network, announce

    def __call__(self, ids: mx.array, cache: Cache) -> mx.array:
        """Return the model's logits for ``ids`` (1, T) on top of its cache."""
        self._announce(held_positions(cache) or 0, ids.shape[1])
        return self._network(ids, cache=cache)


@runtime_checkable
class OwnNumbers(Protocol):
    """A sampler with random numbers of its own: they go on from a state that can be put back."""

    state: Any


class MLXNumbers:
    """MLX's generator, of which all other samplers draw."""

    @property
    def state(self) -> int:
        """The seed that brings it to where it stands."""
        state: Any = mx.random.state
        high, low = state[0].tolist()
        return int(high) << 32 | int(low)

    @state.setter
    def state(self, seed: int) -> None:
        mx.random.seed(seed)


class Draws:
    """A sampler that gives base and auxiliary the same random numbers for the same token of a reply.

    The generator is put back to where it stood before that token. So these are the numbers of decoding without a
    draft: a seed gives the same tokens with and without, and the auxiliary's guess is right more often.

    Attributes:
        number: of the token that is chosen next; the reply's first, chosen before, is 0.
    """

    def __init__(self, sampler: Chooser):
        self.number = 1
        self._sampler = sampler
        self._numbers: OwnNumbers = sampler if isinstance(sampler, OwnNumbers) else MLXNumbers()
        self._states = [self._numbers.state]

    def __call__(self, logprobs: mx.array) -> mx.array:
        """Choose tokens (T,) that follow one another from log-probabilities (T, vocab)."""
        return mx.concatenate([self._choose(row) for row in mx.split(logprobs, logprobs.shape[0])])

    def _choose(self, logprobs: mx.array) -> mx.array:
        self.put_back(self.number)
        token = self._sampler(logprobs)
        if self.number == len(self._states):
            self._states.append(self._numbers.state)
        self.number += 1
        return token

    def put_back(self, number: int) -> None:
        """Put the generator back to where it stood before a token."""
        self._numbers.state = self._states[number - 1]

    def leave(self, generated: int, logprobs: mx.array) -> None:
        """Leave the generator as mlx-lm does after a reply of so many tokens: it has drawn one more."""
        self.number = len(self._states)
        while self.number <= generated:
            self._choose(logprobs)
        self.put_back(generated + 1)
