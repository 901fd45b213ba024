"""What training needs of a batch before it looks at the maps: the frozen base's own pass over it."""

from dataclasses import dataclass

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.models.cache import make_prompt_cache

from ..bundle.loading import KVPModel
from ..engine.recompute import first_layer
from ..models.entries import open_caches
from ..models.families import Cache
from ..models.kinds import RawOutputs
from ..models.sections import run_layers, run_streams, section
from .text import PromptWindow

CHUNK = 256


@dataclass(frozen=True)
class Batch:
    """Windows padded on the right to one length.

    Attributes:
        ids: token ids (B, T).
        kept: whether a position holds a token and not padding (B, T).
        prompt_tokens: where the prompts end, if all windows tell (the shortest one's end).
    """

    ids: mx.array
    kept: mx.array
    prompt_tokens: int | None = None


@dataclass(frozen=True)
class Reading:
    """The auxiliary's pass over a batch.

    Attributes:
        inputs: the predictor's inputs (B, T, in) by map.
        cache: the entries of the layers that a prefix shares with the base; empty for the other kinds.
        hidden: the auxiliary's own output (B, T, hidden), normed; not evaluated unless asked for.
        behind: what the projections of the layer behind an exact prefix read (B, T, hidden); else None.
    """

    inputs: dict[str, mx.array]
    cache: Cache
    hidden: mx.array
    behind: mx.array | None = None


@dataclass(frozen=True)
class Teacher:
    """The base's pass over a batch.

    Attributes:
        streams: see ``sections.run_streams``, from the first layer whose entries are not exact.
        raw: what the projections returned that feed the predicted layers' caches.
        reading: the exact prefix's reading, a part of the same pass; None where the auxiliary reads by itself.
    """

    streams: list[mx.array]
    raw: dict[int, RawOutputs]
    reading: Reading | None


def make_batch(windows: list[list[int]]) -> Batch:
    """Pad windows on the right (a causal model's earlier positions do not see it)."""
    length = max(map(len, windows))
    ids = [window + [0] * (length - len(window)) for window in windows]
    kept = [[True] * len(window) + [False] * (length - len(window)) for window in windows]
    ends = [window.prompt_tokens for window in windows if isinstance(window, PromptWindow)]
    return Batch(mx.array(ids), mx.array(kept), min(ends) if len(ends) == len(windows) else None)


def exact_layers(model: KVPModel) -> int:
    """Return how many of the base's first layers have entries that are the base's own."""
    return model.config.predictor.layer_map.count(None) if model.has_exact_prefix else 0


def teach(model: KVPModel, batch: Batch) -> Teacher:
    """Run the base over a batch, in chunks, and evaluate the results."""
    exact, first = exact_layers(model), first_layer(model)
    below = section(model.base, 0, exact) if exact else None
    cache: Cache = make_prompt_cache(model.base)
    parts, inputs = [], None
    for start in range(0, batch.ids.shape[1], CHUNK):
        x, behind = batch.ids[:, start : start + CHUNK], None
        if below is not None:
            x, captured = run_layers(below, x, cache[:exact], [*model.predictor.sources, first])
            inputs, behind = model.predictor.inputs(captured, inputs), captured[first].hidden
        streams, layers = run_streams(model.base, x, cache, exact, listen=True)
        raw = {layer: one.raw for layer, one in layers.items()}
        parts.append((streams, inputs or {}, raw, [] if behind is None else [behind]))
        mx.eval(parts[-1], [layer.state for layer in cache])
    streams, inputs, raw, behind = tree_map(lambda *chunks: mx.concatenate(chunks, axis=1), *parts)
    return Teacher(streams, raw, Reading(inputs, cache[:exact], streams[-1], *behind) if exact else None)


def read(model: KVPModel, ids: mx.array) -> Reading:
    """Let the auxiliary read token ids (B, T), in one piece and differentiably."""
    cache = open_caches(model.auxiliary)
    hidden, captured = run_layers(model.auxiliary, ids, cache, model.predictor.sources)
    return Reading(model.predictor.inputs(captured), cache if model.is_prefix else [], hidden)
