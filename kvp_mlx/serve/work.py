"""One request on the MLX thread: its prompt is read in slices, then its tokens become events."""

import time
from dataclasses import replace
from typing import Literal

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import StreamingDetokenizer, TokenizerWrapper
from mlx_lm.utils import common_prefix_len

from ..bundle.loading import KVPModel
from ..engine.calibration import auto_min_tokens
from ..engine.clock import FirstStep, Ready, time_first_token
from ..engine.context import Context
from ..engine.decode import LogitsProcessor, processed
from ..engine.dial import QUALITIES, Dial
from ..engine.pace import Pace, Steps
from ..engine.prefill import PrefillTimes
from ..engine.prompt import allowed_tokens
from ..engine.refining_network import RefiningNetwork, refining_network
from ..engine.reply import StopTexts
from ..engine.speculative import Drafting, Speculation, speculate
from ..engine.together import reading_together
from ..errors import KVPError
from ..models.families import Cache
from .choosing import processors_of, sampler_of
from .grammar import Grammar
from .prefixes import Prefixes
from .requests import Finished, Progress, Token, Usage
from .ticket import Ticket


class Work:
    """A request that waits, is read or is decoded.

    Attributes:
        ticket: where its events go.
        ids: the prompt.
        tokens: what its answer goes on from: the prompt, and what of the answer was chosen already.
        sampler: chooses its tokens.
        processors: change its logits before.
        max_tokens: what the context window allows of what was asked.
        left: prompt tokens that are still to be read, about.
    """

    def __init__(self, ticket: Ticket, model: KVPModel, grammar: Grammar | None, prefixes: Prefixes):
        request = ticket.request
        self.ticket, self.ids, self._model, self._grammar, self._prefixes = (
            ticket,
            request.ids,
            model,
            grammar,
            prefixes,
        )
        self.max_tokens = allowed_tokens(model, len(self.ids), request.max_tokens)
        self.sampler = sampler_of(request.sampling)
        self.processors: list[LogitsProcessor] = processors_of(request.sampling, len(self.ids))
        if grammar is not None:
            self.processors.append(grammar)
        self.tokens = self.ids
        self._context: Context | None = None
        self._first: FirstStep | None = None
        self._output: mx.array | None = None
        self._speculation: Speculation | None = None
        self.left = len(self.ids) - (prefixes.shared(self.ids[:-1], request.dial) if request.reuse else 0)
        self._detokenizer = detokenizer_of(model.text_tokenizer, goes_on=request.goes_on)
        self._stops = StopTexts(request.stop)
        self._times, self._generated = PrefillTimes(), 0

    def urgency(self) -> float:
        """Return who is to be read next: the highest ratio of time waited to work left, so that nobody starves."""
        return (time.perf_counter() - self.ticket.submitted) / self.left

    # Reading

    def begin(self, pace: Pace) -> None:
        """Take what is known of the prompt, and get ready to read the rest."""
        self._started, request = time.perf_counter(), self.ticket.request
        context = self._prefixes.take(self.ids[:-1], request.dial) if request.reuse else Context(self._model)
        self._context, self._cached = context, len(context.tokens)
        dial = replace(request.dial, path="full") if context.is_quantised else request.dial
        self.dial = self._settled(dial, self._cached)
        self._reading = self._steps(context, pace)
        self.note_progress(0)

    @property
    def context(self) -> Context:
        """What is read of it; there from ``begin`` on."""
        assert self._context is not None
        return self._context

    def _settled(self, dial: Dial, cached: int) -> Dial:
        if dial.path != "full":
            dial = replace(dial, exact_head=max(dial.exact_head, self.ticket.request.stable_tokens))
        return dial.settled(self._model.config, len(self.ids), cached, auto_min_tokens(self._model))

    def _steps(self, context: Context, pace: Pace) -> Steps[None]:
        """Read the prompt; where a cache cannot be cut later, what other turns may begin with is kept on the way."""
        stable = min(self.ticket.request.stable_tokens, len(self.ids) - 1)
        if not context.is_plain and self._cached < stable:
            yield from context.reading(self.ids[: stable + 1], QUALITIES["exact"], pace=pace, times=self._times)
            self._hold(context.copy(stable))
        before = len(context.tokens) - self._cached
        self._output = yield from context.reading(
            self.ids,
            self.dial,
            with_last=True,
            pace=pace,
            times=self._times,
            progress=lambda done, _: self.note_progress(before + done),
        )
        if not context.is_plain:
            self._hold(context.copy(len(context.tokens)))

    def note_progress(self, done: int) -> None:
        """Tell how many tokens are read, besides those that were known."""
        elapsed = 1e3 * (time.perf_counter() - self._started)
        done = min(self._cached + done, len(self.ids) - 1)
        self.left = len(self.ids) - done
        self.ticket.put(Progress(len(self.ids), self._cached, done, elapsed))

    def goes_with(self, other: "Work") -> bool:
        """Return whether one batch should read two prompts: in full, about as long, with little new in common."""
        known, *others = (len(work.ids) - work.left for work in (self, other))
        dials = [work._settled(work.ticket.request.dial, known) for work in (self, other)]
        if [known] != others or any(dial.path != "full" for dial in dials):
            return False
        common = common_prefix_len(self.ids, other.ids) - known
        return 1 < self.left / 2 <= other.left <= 2 * self.left and common <= self.left / 4

    def advance(self, pace: Pace) -> bool:
        """Read one slice; returns whether anything of the prompt is left but its last token."""
        return pace.advance(self._reading)

    @property
    def tokens_left(self) -> int:
        """How many tokens its answer may still have."""
        return self.max_tokens - self._generated

    @property
    def new_tokens(self) -> int:
        """How many tokens of the prompt were not known before."""
        return len(self.ids) - self._cached

    @property
    def is_whole(self) -> bool:
        """Whether the last token of the prompt is read, too, so that the first of the answer is there to be chosen."""
        return self._output is not None

    def first_step(self) -> bool:
        """Hand over the first token of the answer, unless ``is_whole`` after a step; returns whether it goes on."""
        context = self.context
        self._first = time_first_token(
            lambda _: Ready(self._model.base, context.lend(), self._output),
            self.ids[-1:],
            sampler=self.sampler,
            process=processed(self.ids, self.processors),
        )
        context.take_back(context.cache, self.ids)
        (token,) = self._first.tokens
        self.tokens = [*self.ids, token]
        return self.answer(token, self._first.logprobs)

    @property
    def is_refined(self) -> bool:
        """Whether the base reads more of its prompt while it decodes, where that was predicted."""
        return self.dial.refine_tokens > 0

    def refining(self) -> RefiningNetwork | None:
        """Return what decodes the rest of its answer and refines its context; None where there is nothing to refine."""
        return refining_network(self.context, self.tokens[:-1], self.dial.refine_tokens) if self._first else None

    def refined_step(self, network: RefiningNetwork) -> tuple[int, mx.array]:
        """Choose one more token on its context, which is refined; returns it with its log-probabilities."""
        context = self.context
        step = time_first_token(
            lambda _: Ready(network, context.lend()),
            self.tokens[-1:],
            sampler=self.sampler,
            process=processed(self.tokens, self.processors),
        )
        context.take_back(context.cache, self.tokens)
        (token,) = step.tokens
        self.tokens = [*self.tokens, token]
        return token, step.logprobs

    def speculation(self, drafting: Drafting) -> Speculation | None:
        """Return what decodes the rest of its answer with drafts, on its context.

        None where that does not begin with its first token, follows a schema (which cannot take back what a draft
        proposed), or has none (see ``speculate``).
        """
        if self._first is None or self._grammar is not None:
            return None
        how = {"sampler": self.sampler, "logits_processors": self.processors}
        self._speculation = speculate(self.context, self.ids, self._first, drafting, max_tokens=self.max_tokens, **how)
        return self._speculation

    def grown_to(self, answer: list[int], unread: int = 0) -> None:
        """Note what of its answer was chosen, and that its context holds that but for the last ``unread`` tokens."""
        self.tokens = self.ids + answer
        self.context.grown_to(self.tokens[: len(self.tokens) - unread])

    def stop_reading(self) -> None:
        """End the reading where it is; what was read exactly is kept."""
        if self._context is not None:
            self._reading.close()
            self.keep()

    def keep(self, cache: Cache | None = None, tokens: list[int] | None = None) -> None:
        """Keep what was read for others and for the next turn.

        Args:
            cache: a copy of the context's that was extended meanwhile.
            tokens: what it holds.
        """
        kept = self.context.copy(len(self.context.tokens))
        if cache is not None and tokens is not None:
            kept.take_back(cache, tokens)
        self._hold(kept)

    def _hold(self, context: Context) -> None:
        request = self.ticket.request
        if request.reuse:
            self._prefixes.put(context, request.dial, request.stable_tokens)

    def share(self, reading: Steps[None]) -> None:
        """Be read by what reads others as well; whoever stops leaves it to them."""

        def shared() -> Steps[None]:
            while next(reading, self) is not self:
                yield
            if len(self.context.tokens) < len(self.ids) - 1:
                raise KVPError("reading prompts together failed; see the error of another request.")

        self._reading = shared()

    # Answering

    def answer(self, token: int, logprobs: mx.array) -> bool:
        """Hand over one more token, with the end of the answer where it is the last; returns whether it goes on.

        Raises:
            KVPError: the grammar gave up.
        """
        if self._grammar is not None and self._grammar.error:
            raise KVPError(f"the JSON schema could not be followed to its end: {self._grammar.error}.")
        if not self._generated:
            self._note_first_token()
        self._generated += 1
        reason = self._reason(token)
        if token not in self._model.text_tokenizer.eos_token_ids:
            self._detokenizer.add_token(token)
        if reason is not None:
            self._detokenizer.finalize()
        text = self._stops.add(self._detokenizer.last_segment, is_last=reason is not None)
        if self._stops.found is not None:
            reason = "stop"
        self.ticket.put(Token(text, token, *self._chances(token, logprobs)))
        if reason is not None:
            self.ticket.put(Finished(reason, self.usage(), self._stops.found))
            self.ticket.put(None)
        return reason is None

    def _note_first_token(self) -> None:
        self._queue_ms = 1e3 * (self._started - self.ticket.submitted)
        self._ttft_ms = 1e3 * (time.perf_counter() - self._started)
        exact = self.context.exact_tokens
        self._exact = len(self.ids) if exact == len(self.context.tokens) else exact

    def _reason(self, token: int) -> Literal["stop", "length"] | None:
        if token in self._model.text_tokenizer.eos_token_ids or (
            self._grammar is not None and self._grammar.is_complete
        ):
            return "stop"
        return "length" if self._generated >= self.max_tokens else None

    def _chances(self, token: int, logprobs: mx.array) -> tuple[float | None, tuple[tuple[int, float], ...]]:
        """Return the log-probability of a token and the likeliest ones, where they are asked for."""
        count = self.ticket.request.top_logprobs
        if count is None:
            return None, ()
        values = np.array(logprobs.reshape(-1).astype(mx.float32))
        best = np.argsort(-values, kind="stable")[:count]
        return float(values[token]), tuple((int(one), float(values[one])) for one in best if np.isfinite(values[one]))

    def seconds(self) -> float:
        """Return how long it has been at work."""
        return time.perf_counter() - self._started

    def usage(self) -> Usage:
        """Return what the request took."""
        prompt, drafts = len(self.ids), self._speculation
        return Usage(
            path=self.dial.path,
            prompt_tokens=prompt,
            cached_tokens=self._cached,
            predicted_tokens=self.dial.predicted_tokens(prompt, self._cached) if self.dial.path == "kvp" else 0,
            recomputed_tokens=self._times.recomputed_tokens,
            exact_tokens=self._exact,
            completion_tokens=self._generated,
            queue_ms=self._queue_ms,
            ttft_ms=self._ttft_ms,
            drafted_tokens=drafts.drafted_tokens if drafts else 0,
            accepted_tokens=drafts.accepted_tokens if drafts else 0,
        )


def detokenizer_of(tokenizer: TokenizerWrapper, *, goes_on: bool) -> StreamingDetokenizer:
    """Return what makes text of an answer's tokens; where that goes on from other text, a space in front stays."""
    detokenizer: StreamingDetokenizer = tokenizer.detokenizer
    for token in tokenizer.encode("a", add_special_tokens=False) if goes_on else []:
        detokenizer.add_token(token)
    detokenizer.offset = len(detokenizer.text)
    return detokenizer


def read_together(works: list[Work], pace: Pace) -> None:
    """Let one batch read the prompts of works that have begun, of those that know as much as the first."""
    known = works[0].context
    works = [work for work in works if work.dial.path == "full" and len(work.context.tokens) == len(known.tokens)]
    if len(works) < 2 or not known.is_plain:
        return

    def note(done: int, _: int) -> None:
        for work in works:
            work.note_progress(done)

    contexts, prompts = [work.context for work in works], [work.ids for work in works]
    reading = reading_together(contexts, prompts, progress=note, pace=pace)
    for work in works:
        work.share(reading)
