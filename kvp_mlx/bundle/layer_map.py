"""Which auxiliary layers a base layer's keys and values are predicted from (method.md section 3)."""

from ..errors import InputError

LayerMap = tuple[tuple[int, ...] | None, ...]
"""Per base layer its source layers, or None where the layer's own entries are exact (prefix)."""


def spread_layer_map(base_layers: int, auxiliary_layers: int) -> LayerMap:
    """KVP-C: consecutive base layers share an auxiliary layer; the first ``base % auxiliary`` serve one more.

    Raises:
        InputError: the auxiliary has no layers or more layers than the base.
    """
    if not 0 < auxiliary_layers <= base_layers:
        raise InputError(f"an auxiliary of {auxiliary_layers} layers cannot serve a base of {base_layers}.")
    share, rest = divmod(base_layers, auxiliary_layers)
    counts = [share + (j < rest) for j in range(auxiliary_layers)]
    return tuple((j,) for j, count in enumerate(counts) for _ in range(count))


def pruned_layer_map(base_layers: int, retained: list[int]) -> LayerMap:
    """KVP-LP: each base layer reads the auxiliary's copy of the nearest retained layer at or below it.

    Raises:
        InputError: ``retained`` does not start at layer 0, is not increasing, or leaves the base.
    """
    if not retained or retained[0] != 0 or sorted(set(retained)) != retained or retained[-1] >= base_layers:
        raise InputError(f"retained layers {retained} must rise from 0 and stay below {base_layers}.")
    return tuple((sum(kept <= i for kept in retained) - 1,) for i in range(base_layers))


def prefix_layer_map(base_layers: int, layers: int) -> LayerMap:
    """Prefix: layers 0..k are exact (k's own projections read the hidden state), later ones read layer k's input.

    Raises:
        InputError: the prefix is empty or holds every layer.
    """
    if not 0 < layers < base_layers:
        raise InputError(f"--layers must lie between 1 and {base_layers - 1} for a base of {base_layers} layers.")
    return (None,) * (layers + 1) + ((layers,),) * (base_layers - layers - 1)


def widened(layer_map: LayerMap, sources: int, auxiliary_layers: int) -> LayerMap:
    """Let each predicted layer read the ``sources`` auxiliary layers nearest to its first one.

    Raises:
        InputError: fewer than one source, or more than the auxiliary has layers.
    """
    if not 1 <= sources <= auxiliary_layers:
        raise InputError(f"each layer can read 1 to {auxiliary_layers} auxiliary layers, not {sources}.")

    def nearest(j: int) -> tuple[int, ...]:
        by_distance = sorted(range(auxiliary_layers), key=lambda other: (abs(other - j), other))
        return tuple(sorted(by_distance[:sources]))

    return tuple(None if entry is None else nearest(entry[0]) for entry in layer_map)
