"""Reading a prompt with the auxiliary: what the predictor takes, and what the base goes on from."""

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from ..bundle.loading import KVPModel
from ..device.streams import parts, side_by_side
from ..models.entries import append_raw
from ..models.families import Cache
from ..models.sections import RawLayer, run_layers, section
from .pace import Pace, Steps, groups


@dataclass
class AuxiliaryReading:
    """A part of a prompt on its way through the auxiliary.

    Attributes:
        x: what the next layer takes.
        captured: what was heard so far.
    """

    x: mx.array
    captured: dict[int, RawLayer] = field(default_factory=dict)

    def run(self, model: KVPModel, cache: Cache, layers: slice) -> None:
        """Run some of the auxiliary's layers, listening to the predictor's sources; lazy."""
        numbers = [number for number in model.predictor.sources if layers.start <= number < layers.stop]
        view = section(model.auxiliary, layers.start, layers.stop)
        self.x, captured = run_layers(view, self.x, cache[layers], [number - layers.start for number in numbers])
        self.captured |= {number: captured[number - layers.start] for number in numbers}

    def inputs(self, model: KVPModel, cache: Cache, before: dict[str, mx.array] | None = None) -> dict[str, mx.array]:
        """Return the predictor's inputs when all layers have run; an exact prefix listens to one layer more.

        ``before`` are those of the tokens right before, if they were read.
        """
        if model.has_exact_prefix:
            end = read_layers(model)
            _, last = run_layers(section(model.auxiliary, end, end + 1), self.x, cache[end:], [0])
            self.captured[end] = last[0]
        return model.predictor.inputs(self.captured, before)


@dataclass
class ReadPart:
    """A part of a prompt as the auxiliary has read it, on a stream of its own.

    Attributes:
        stream: of mlx.
        inputs: the predictor's.
        below: what the base goes on from where it reads a token itself.
        hidden: what the projections of the layer behind an exact prefix read of it ``(B, T, hidden)``.
    """

    stream: Any
    inputs: dict[str, mx.array]
    below: mx.array
    hidden: mx.array | None


def read_layers(model: KVPModel) -> int:
    """Return how many of the auxiliary's layers are run to their end."""
    return model.config.auxiliary.layers if model.has_exact_prefix else len(model.auxiliary.layers)


def auxiliary_prefill(model: KVPModel, ids: mx.array, cache: Cache) -> tuple[dict[str, mx.array], mx.array]:
    """Let the auxiliary read ``ids`` (B, T) on top of its ``cache``; lazy.

    Returns the predictor's inputs, and what the base goes on with where it reads a token itself: an exact prefix's
    residual stream (B, T, hidden), else the ids. No logits, final norm, last attention output or last FFN are
    computed.
    """
    reading = AuxiliaryReading(ids)
    reading.run(model, cache, slice(0, read_layers(model)))
    return reading.inputs(model, cache), reading.x if model.has_exact_prefix else ids


def write_predicted(model: KVPModel, inputs: dict[str, mx.array], cache: Cache, following: int | None = None) -> None:
    """Predict what feeds the base's ``cache`` and append what its layers make of it; lazy.

    ``following`` are the prompt's tokens after these (see ``Predictor``).
    """
    if inputs:
        tokens = next(iter(inputs.values())).shape[1]
        append_raw(model.base, model.predictor(inputs, following), cache, tokens)


def auxiliary_cache_for(model: KVPModel, cache: Cache) -> Cache:
    """Return the cache the auxiliary fills: the base's own first layers for a prefix, else a fresh one."""
    return cache[: len(model.auxiliary.layers)] if model.is_prefix else make_prompt_cache(model.auxiliary)


def reading_parts(
    model: KVPModel,
    chunk: mx.array,
    rows: int,
    cache: Cache,
    pace: Pace | None,
    before: dict[str, mx.array] | None = None,
) -> Steps[list[ReadPart]]:
    """Let the auxiliary read a chunk (B, T) on top of its ``cache``; returns its parts, evaluated.

    Args:
        model: the bundle.
        chunk: token ids.
        rows: all that the prompt has (batch times tokens), for ``side_by_side``.
        cache: the auxiliary's.
        pace: pause between groups of layers, too.
        before: the predictor's inputs of the chunk before.
    """
    layers = read_layers(model)
    started: list[tuple[Any, mx.array, AuxiliaryReading]] = []
    for group in groups(pace, layers, chunk.size):
        with side_by_side(rows) as streams:
            started = started or [(stream, part, AuxiliaryReading(part)) for stream, part in parts(chunk, streams)]
            for stream, _, reading in started:
                with mx.stream(stream):
                    reading.run(model, cache, group)
            if group.stop < layers:
                mx.eval(state_of(cache[group]), [reading.x for _, _, reading in started])
        if group.stop < layers:
            yield
    read: list[ReadPart] = []
    with side_by_side(rows):
        for stream, part, reading in started:
            with mx.stream(stream):
                inputs = before = reading.inputs(model, cache, before)
            if model.has_exact_prefix:
                read.append(ReadPart(stream, inputs, reading.x, reading.captured[layers].hidden))
            else:
                read.append(ReadPart(stream, inputs, part, None))
        mx.eval(state_of(cache), [(part.inputs, part.below) for part in read])
    yield
    return read


def state_of(cache: Cache) -> list[Any]:
    """Return a cache's arrays, to be evaluated."""
    return [layer.state for layer in cache]
