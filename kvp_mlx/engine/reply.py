"""A request from token ids to streamed text: keep the common prefix, choose the path, read, decode, count, clock."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import Any

from mlx_lm.generate import GenerationResponse, wired_limit
from mlx_lm.utils import common_prefix_len

from ..bundle.loading import KVPModel
from ..device.streams import default_step_size
from ..errors import InputError
from .calibration import auto_min_tokens
from .clock import Chooser, FirstStep, Ready, greedy, time_first_token
from .context import Context
from .decode import LogitsProcessor, decode, processed
from .dial import QUALITIES, Dial, Path, dial_of
from .prefill import PrefillTimes, Progress
from .prompt import allowed_tokens, encode
from .refining_network import RefiningNetwork, refining_network
from .speculative import DRAFT_TOKENS, Draft, Drafting, speculate


@dataclass
class Piece:
    """One piece of a streamed answer, with what is known so far.

    Attributes:
        text: the next piece of text (may be empty).
        token: the token id it came from.
        finish_reason: None while streaming, then ``stop`` or ``length``.
        path: the path that ran, ``kvp`` or ``full``.
        exact_tail: prompt tokens before the last that the base read itself on top of the prediction.
        prompt_tokens: length of the prompt: ``cached_tokens`` and ``new_tokens``.
        cached_tokens: held by the context when the request came.
        new_tokens: the rest of the prompt.
        predicted_tokens: how many of those were predicted, and not read exactly before or after.
        exact_tokens: how many of the prompt's first tokens have the entries that full prefill gives.
        recomputed_tokens: how many tokens the base read on top of the prediction, the exact tail included.
        times: what reading the prompt took, part by part.
        ttft_ms: from the token ids to the first token's value on the host.
        first_step_ms: of that, the last prompt token, unless it was read with others, and sampling.
        generation_tokens: tokens generated so far.
        generation_tps: as mlx-lm counts it, all generated tokens over the time since the first one.
        from_draft: whether the auxiliary had proposed this token.
        drafted_tokens: how many it has proposed so far.
        refined_tokens: how many of the first tokens, of prompt and answer, have been read exactly by now.
    """

    text: str
    token: int
    finish_reason: str | None
    path: str
    exact_tail: int
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    predicted_tokens: int
    exact_tokens: int
    recomputed_tokens: int
    times: PrefillTimes
    ttft_ms: float
    first_step_ms: float
    generation_tokens: int
    generation_tps: float
    from_draft: bool = False
    drafted_tokens: int = 0
    refined_tokens: int = 0


def reply(
    context: Context,
    ids: list[int],
    dial: Dial = QUALITIES["balanced"],
    *,
    max_tokens: int = 256,
    sampler: Chooser | None = None,
    logits_processors: Sequence[LogitsProcessor] = (),
    stop: Sequence[str] = (),
    prefill_step_size: int | None = None,
    progress: Progress | None = None,
    draft: Draft = "none",
    draft_tokens: int = DRAFT_TOKENS,
    **options: Any,
) -> Generator[Piece, None, None]:
    """Answer a prompt on what a context holds of it, yielding text as it is generated.

    The context then holds prompt and answer. Stopping early (closing the iterator, an exception in ``progress``) leaves
    it valid: with what was read and generated until then.

    Args:
        context: caches that may hold the beginning of the prompt; what does not belong to it is dropped.
        ids: the whole prompt.
        dial: how it is read; of a quality, as the bundle measured it (``Dial.at``).
        max_tokens: tokens to generate at most; the context window may allow fewer.
        sampler: from log-probabilities ``(1, vocab)`` to a token ``(1,)``; greedy by default.
        logits_processors: as mlx-lm's; they see the whole prompt.
        stop: texts before the first of which the answer ends.
        prefill_step_size: prompt tokens per chunk (default: ``default_step_size()``).
        progress: called with (tokens done, tokens to do) after every chunk.
        draft: whether the auxiliary proposes tokens that the base then reads at once; see ``Drafting``.
        draft_tokens: how many at a time.
        options: passed to mlx-lm's ``stream_generate`` (kv_bits, ...).

    Raises:
        InputError: a prompt that does not fit the context window, a share that the bundle cannot recompute, an
            auxiliary that cannot draft (see ``Drafting``), or a ``draft_model``, whose own cache would lack the prompt.
    """
    model = context.model
    is_quantised = context.is_quantised or options.get("kv_bits") is not None
    if (is_quantised or draft != "none") and dial.refine_tokens and "refine_tokens" in dial.given:
        raise InputError("quantised caches and drafted replies are not refined; leave out these, or refine_tokens.")
    dial = dial.at(model.config, len(ids))
    dial.share(model.config)  # refused before anything changes
    if dial.path == "auto" and context.is_quantised:
        dial = replace(dial, path="full")  # nothing is predicted on top of a quantised cache
    if options.pop("draft_model", None) is not None:
        raise InputError(
            "a draft_model of one's own has not read what the context holds; leave it out, or let the auxiliary draft."
        )
    drafting = Drafting(draft, draft_tokens).settled(model, is_quantised=is_quantised)
    max_tokens = allowed_tokens(model, len(ids), max_tokens)
    choosing: dict[str, Any] = {"sampler": sampler, "logits_processors": logits_processors}
    with wired_limit(model.base):  # around prefill and decoding, so that nothing is unwired in between
        cached = context.keep(common_prefix_len(context.tokens, ids[:-1]))
        settled = dial.settled(model.config, len(ids), cached, auto_min_tokens(model))
        generated: list[int] = []
        refining: RefiningNetwork | None = None
        if model.hosts is not None:
            size = prefill_step_size = prefill_step_size or default_step_size()
            how = {"max_tokens": max_tokens, "stop": stop, "prefill_step_size": size, **options}
            model.hosts.tell({"ids": ids, "cached": cached, "dial": asdict(settled), "how": how})
            choosing["sampler"] = model.hosts.first_choice(sampler or greedy)
        try:
            first = first_token_on(context, ids, settled, **choosing, step_size=prefill_step_size, progress=progress)
            options["prefill_step_size"] = prefill_step_size or default_step_size()
            exact = len(ids) if context.exact_tokens == len(context.tokens) else context.exact_tokens
            speculation = speculate(context, ids, first, drafting, max_tokens=max_tokens, **choosing)
            if not speculation and not is_quantised:
                refining = refining_network(context, ids, settled.refine_tokens)
            first = first if refining is None else replace(first, network=refining)

            def pieces() -> Generator[Piece, None, None]:
                plain = decode(first, model.text_tokenizer, ids, max_tokens=max_tokens, **choosing, **options)
                for piece in speculation.responses(model.text_tokenizer) if speculation else plain:
                    generated.append(piece.token)
                    drafted_tokens = speculation.drafted_tokens if speculation else 0
                    refined_tokens = refining.exact_tokens if refining else exact
                    counts = {"refined_tokens": refined_tokens, "drafted_tokens": drafted_tokens}
                    yield _piece(piece, first, settled, len(ids), cached, exact, len(generated), **counts)

            with closing(pieces()) as stream:
                yield from until(stream, stop)
        finally:
            if refining is None:
                context.grown_to(ids + generated)
            else:
                refining.leave(context, ids + generated)


def until(pieces: Iterator[Piece], stop: Sequence[str]) -> Iterator[Piece]:
    """End a streamed text before the first stop string; see ``StopTexts``."""
    stops = StopTexts(stop)
    for piece in pieces:
        text = stops.add(piece.text, is_last=piece.finish_reason is not None)
        if stops.found is not None:
            yield replace(piece, text=text, finish_reason="stop")
            return
        yield replace(piece, text=text)


class StopTexts:
    """Finds stop strings in a text that comes in pieces.

    Attributes:
        found: the stop string before which the text ended.

    Args:
        stop: the stop strings; empty ones are none.
    """

    def __init__(self, stop: Sequence[str]):
        self.found: str | None = None
        self._marks = [mark for mark in stop if mark]
        self._waiting = ""

    def add(self, text: str, *, is_last: bool) -> str:
        """Return what may be shown after one more piece; what may be the beginning of a stop string waits."""
        text = self._waiting + text
        if found := [(place, mark) for mark in self._marks if (place := text.find(mark)) >= 0]:
            place, self.found = min(found, key=lambda each: each[0])
            return text[:place]
        waiting = 0 if is_last else max((_overlap(text, mark) for mark in self._marks), default=0)
        self._waiting = text[len(text) - waiting :]
        return text[: len(text) - waiting]


def _overlap(text: str, mark: str) -> int:
    """Return how many characters at the end of a text are the beginning of a stop string."""
    longest = min(len(text), len(mark) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(mark[:length])), 0)


def _piece(
    piece: GenerationResponse,
    first: FirstStep,
    dial: Dial,
    prompt_tokens: int,
    cached_tokens: int,
    exact_tokens: int,
    generated: int,
    *,
    drafted_tokens: int,
    refined_tokens: int,
) -> Piece:
    """Return mlx-lm's record of a token with what is known of the prompt."""
    return Piece(
        text=piece.text,
        token=piece.token,
        finish_reason=piece.finish_reason,
        path=dial.path,
        exact_tail=dial.exact_tail,
        prompt_tokens=prompt_tokens,
        cached_tokens=cached_tokens,
        new_tokens=prompt_tokens - cached_tokens,
        predicted_tokens=dial.predicted_tokens(prompt_tokens, cached_tokens) if dial.path == "kvp" else 0,
        exact_tokens=exact_tokens,
        recomputed_tokens=first.times.recomputed_tokens,
        times=first.times,
        ttft_ms=first.ttft_ms,
        first_step_ms=first.first_step_ms,
        generation_tokens=generated,
        generation_tps=piece.generation_tps,
        from_draft=piece.from_draft,
        drafted_tokens=drafted_tokens,
        refined_tokens=refined_tokens,
    )


def first_token_on(
    context: Context,
    ids: list[int],
    dial: Dial,
    *,
    sampler: Chooser | None = None,
    logits_processors: Sequence[LogitsProcessor] = (),
    step_size: int | None = None,
    progress: Progress | None = None,
) -> FirstStep:
    """Read a prompt on what a context holds of it, up to its first token, on the clock.

    Args:
        context: holds a beginning of the prompt, shorter than it, and nothing else.
        ids: the whole prompt.
        dial: settled.
        sampler: see ``reply``.
        logits_processors: see ``reply``.
        step_size: tokens per chunk.
        progress: see ``reply``.
    """

    def read(times: PrefillTimes) -> Ready:
        context.remember()
        output = context.read(ids, dial, with_last=True, times=times, step_size=step_size, progress=progress)
        context.remember()
        return Ready(context.model.base, context.lend(), output)

    return time_first_token(read, ids[-1:], sampler=sampler or greedy, process=processed(ids, logits_processors))


def stream_generate(
    model: KVPModel,
    prompt: str | list[int],
    *,
    quality: str = "balanced",
    prefill: Path | None = None,
    exact_head: int | None = None,
    exact_tail: int | None = None,
    recompute: float | None = None,
    refine_tokens: int | None = None,
    raw: bool = False,
    system: str | None = None,
    template_arguments: dict[str, Any] | None = None,
    context: Context | None = None,
    **options: Any,
) -> Iterator[Piece]:
    """Answer a prompt, yielding text as it is generated.

    Args:
        model: the bundle; it needs a tokeniser.
        prompt: text, or token ids.
        quality: ``fast``, ``balanced`` or ``exact``; what is given beside it wins.
        prefill: ``kvp`` (predict), ``full`` (the base reads everything) or ``auto`` (predict long prompts).
        exact_head: predicting, the base itself reads this many of the first prompt tokens.
        exact_tail: predicting, it reads this many before the last, on top of the prediction.
        recompute: predicting, the share of the prompt's tokens that the base reads itself, on average over layers.
        refine_tokens: having predicted, it reads this many more of the tokens beside each one that it generates.
        raw: skip the chat template.
        system: a system message.
        template_arguments: for the chat template (``enable_thinking``, ...).
        context: may hold the beginning of the prompt (a saved cache); extended in place.
        options: as ``reply`` takes them: max_tokens, sampler, logits_processors, stop, progress, draft, kv_bits, ...

    Raises:
        InputError: see ``encode`` and ``reply``.
    """
    dial = dial_of(quality, prefill, exact_head, exact_tail, recompute, refine_tokens)
    ids = encode(model, prompt, raw=raw, system=system, template_arguments=template_arguments)
    yield from reply(context or Context(model), ids, dial, **options)
