"""Kinds of layer: what a layer writes into its cache, and from which projections' outputs.

What a layer writes into its cache is a function of a few projections of its input. A kind names these (``targets``):
the predictor maps a source to their outputs, and the layer's own code makes the cache of them. Nothing of that code is
written again here. ``sections`` listens to a layer by standing in for its projections and keeping what they return;
``write`` does the reverse: it calls the layer's own module with projections that return what was predicted. MLX
is lazy, so of that call only what the cache holds is ever computed: no queries, no scores, no output projection.

=============  ==================================================  ================================================
kind           targets                                             the cache
=============  ==================================================  ================================================
Attention      ``keys``, ``values`` (one of them where they agree)  KVCache: all positions
Sliding        likewise, of the last ``window`` positions          RotatingKVCache, in its own order
DeltaNet       ``keys``, ``values``, ``a``, ``b``, and ``queries``  ArraysCache: convolution's tail, state
               of the last positions (the convolution's tail)
Convolution    ``b``, ``x`` of the last positions                  ArraysCache: convolution's tail
Latent         ``latent`` (the RoPE key stands behind it)          KVCache: normed latent, rotated key
=============  ==================================================  ================================================

One file a kind. It tells from a layer and from the cache that the model makes for it whether the layer is of this
kind (``of``), where its targets stand in which projection's output (``Target``), and what mask and cache it wants.
The layer's module that looks at other positions is called its mixer throughout (``self_attn``, ``linear_attn``).
An architecture is a row of ``families``; the predictor knows names and widths of targets, and no kinds.

What is windowed (``Target.last``) need not be predicted further back than that from a prompt's end.
"""

from typing import Any

import mlx.nn as nn

from .attention import Attention
from .convolution import Convolution
from .delta import DeltaNet
from .kind import Kind, Layer, RawOutputs, Target
from .latent import Latent
from .sliding import Sliding

__all__ = ["KINDS", "Kind", "Layer", "RawOutputs", "Target", "kind_of"]

KINDS: tuple[type[Kind], ...] = (Attention, Sliding, DeltaNet, Convolution, Latent)


def kind_of(layer: nn.Module, cache: Any) -> Kind | None:
    """Return the kind of a layer for which its model makes such a cache; None where there is none for it."""
    return next((kind for kind in (one.of(layer, cache) for one in KINDS) if kind is not None), None)
