"""One request on the MLX thread: its prompt is read in slices, then its tokens become events."""

import time
from dataclasses import replace
from typing import Literal

import mlx.core as mx
import numpy as np

from ..bundle.loading import KVPModel
from ..engine.calibration import auto_min_tokens
from ..engine.clock import FirstStep, time_first_token
from ..engine.context import Context
from ..engine.decode import LogitsProcessor, processed
from ..engine.dial import QUALITIES, Dial
from ..engine.pace import Pace, Steps
from ..engine.prefill import PrefillTimes
from ..engine.prompt import allowed_tokens
from ..engine.reply import StopTexts
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
        context: what is read of it, from ``begin`` on.
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
        self.context: Context | None = None
        self.left = len(self.ids) - (prefixes.shared(self.ids[:-1], request.dial) if request.reuse else 0)
        self._detokenizer = model.text_tokenizer.detokenizer
        self._stops = StopTexts(request.stop)
        self._times, self._generated = PrefillTimes(), 0

    def urgency(self) -> float:
        """Return who is to be read next: the highest ratio of time waited to work left, so that nobody starves."""
        return (time.perf_counter() - self.ticket.submitted) / self.left

    # Reading

    def begin(self, pace: Pace) -> None:
        """Take what is known of the prompt, and get ready to read the rest."""
        self._started, request = time.perf_counter(), self.ticket.request
        self.context = self._prefixes.take(self.ids[:-1], request.dial) if request.reuse else Context(self._model)
        self._cached = len(self.context.tokens)
        self.dial = self._settled(request.dial, self.context)
        self._reading = self._steps(self.context, pace)
        self._note_progress()

    def _settled(self, dial: Dial, context: Context) -> Dial:
        if dial.path != "full":
            dial = replace(dial, exact_head=max(dial.exact_head, self.ticket.request.stable_tokens))
        if context.is_quantised:
            dial = replace(dial, path="full")
        return dial.settled(self._model.config, len(self.ids), self._cached, auto_min_tokens(self._model))

    def _steps(self, context: Context, pace: Pace) -> Steps[None]:
        """Read the prompt; where a cache cannot be cut later, what other turns may begin with is kept on the way."""
        stable = min(self.ticket.request.stable_tokens, len(self.ids) - 1)
        if not context.is_plain and self._cached < stable:
            yield from context.reading(self.ids[: stable + 1], QUALITIES["exact"], pace=pace, times=self._times)
            self._hold(context.copy(stable))
        yield from context.reading(
            self.ids, self.dial, pace=pace, times=self._times, progress=lambda done, to_do: self._note_progress()
        )
        if not context.is_plain:
            self._hold(context.copy(len(context.tokens)))

    def _note_progress(self) -> None:
        assert self.context is not None
        done, elapsed = self.context.position, 1e3 * (time.perf_counter() - self._started)
        self.left = len(self.ids) - done
        self.ticket.put(Progress(len(self.ids), self._cached, done, elapsed))

    def advance(self, pace: Pace) -> bool:
        """Read one slice; returns whether anything of the prompt is left but its last token."""
        return pace.advance(self._reading)

    def first_step(self) -> FirstStep:
        """Read the last token of the prompt and choose the first one of the answer."""
        context = self.context
        assert context is not None
        first = time_first_token(
            lambda _: (self._model.base, context.lend()),
            self.ids[-1:],
            sampler=self.sampler,
            process=processed(self.ids, self.processors),
        )
        now = time.perf_counter()
        self._queue_ms = 1e3 * (self._started - self.ticket.submitted)
        self._ttft_ms = 1e3 * (now - self._started)
        context.take_back(context.cache, self.ids)
        self._exact = len(self.ids) if context.exact_tokens == len(self.ids) else context.exact_tokens
        return first

    def stop_reading(self) -> None:
        """End the reading where it is; what was read exactly is kept."""
        if self.context is not None:
            self._reading.close()
            self.keep()

    def keep(self, cache: Cache | None = None, tokens: list[int] | None = None) -> None:
        """Keep what was read for others and for the next turn.

        Args:
            cache: a copy of the context's that was extended meanwhile.
            tokens: what it holds.
        """
        assert self.context is not None
        kept = self.context.copy(len(self.context.tokens))
        if cache is not None and tokens is not None:
            kept.take_back(cache, tokens)
        self._hold(kept)

    def _hold(self, context: Context) -> None:
        request = self.ticket.request
        if request.reuse:
            self._prefixes.put(context, request.dial, request.stable_tokens)

    # Answering

    def answer(self, token: int, logprobs: mx.array) -> bool:
        """Hand over one more token, with the end of the answer where it is the last; returns whether it goes on.

        Raises:
            KVPError: the grammar gave up.
        """
        if self._grammar is not None and self._grammar.error:
            raise KVPError(f"the JSON schema could not be followed to its end: {self._grammar.error}.")
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
        prompt = len(self.ids)
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
        )
