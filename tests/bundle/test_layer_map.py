"""Layer maps and retained layers, against method.md section 3."""

import pytest

from kvp_mlx.bundle.layer_map import prefix_layer_map, pruned_layer_map, spread_layer_map, widened
from kvp_mlx.errors import InputError
from kvp_mlx.models.pruning import retained_layers

KVP_C = [(28, 20), (28, 16), (36, 28), (36, 20), (36, 16)]
KVP_LP = [(layers, fraction) for layers in (28, 36) for fraction in (0.75, 0.5, 0.25)]


def sources(layer_map):
    """Return the single source of every base layer."""
    return [source for (source,) in layer_map]


def naive(base_layers, auxiliary_layers):
    """Return the proportional map that method.md calls wrong."""
    return [layer * auxiliary_layers // base_layers for layer in range(base_layers)]


def times(counts):
    """Spell out ``[(first, last, repeats), ...]`` as source indices, last included."""
    return [j for first, last, repeats in counts for j in range(first, last + 1) for _ in range(repeats)]


@pytest.mark.parametrize(
    ("base_layers", "auxiliary_layers", "counts"),
    [
        (28, 20, [(0, 7, 2), (8, 19, 1)]),
        (28, 16, [(0, 11, 2), (12, 15, 1)]),
        (36, 28, [(0, 7, 2), (8, 27, 1)]),
        (36, 20, [(0, 15, 2), (16, 19, 1)]),
        (36, 16, [(0, 3, 3), (4, 15, 2)]),
    ],
)
def test_the_first_layers_of_a_smaller_model_serve_one_more(base_layers, auxiliary_layers, counts):
    assert sources(spread_layer_map(base_layers, auxiliary_layers)) == times(counts)


def test_spread_maps_spelled_out():
    assert spread_layer_map(5, 3) == ((0,), (0,), (1,), (1,), (2,))
    assert spread_layer_map(4, 4) == ((0,), (1,), (2,), (3,))
    assert spread_layer_map(3, 1) == ((0,), (0,), (0,))
    assert sources(spread_layer_map(28, 20)) == [
        *(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7),
        *(8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19),
    ]


@pytest.mark.parametrize(("base_layers", "auxiliary_layers"), KVP_C)
def test_spread_maps_are_not_proportional(base_layers, auxiliary_layers):
    assert sources(spread_layer_map(base_layers, auxiliary_layers)) != naive(base_layers, auxiliary_layers)


@pytest.mark.parametrize(("base_layers", "auxiliary_layers"), [(3, 4), (3, 0), (0, 0), (3, -1)])
def test_spread_refuses_an_auxiliary_deeper_than_the_base_or_empty(base_layers, auxiliary_layers):
    with pytest.raises(InputError, match=f"auxiliary of {auxiliary_layers} layers"):
        spread_layer_map(base_layers, auxiliary_layers)


def test_retained_layers_spelled_out():
    assert retained_layers(8, 0.75) == [0, 1, 2, 4, 5, 6]
    assert retained_layers(8, 0.5) == [0, 2, 4, 6]
    assert retained_layers(8, 0.25) == [0, 4]
    assert retained_layers(6, 0.75) == [0, 1, 2, 4, 5]


@pytest.mark.parametrize(
    ("base_layers", "fraction", "kept"),
    [(28, 0.75, 21), (28, 0.5, 14), (28, 0.25, 7), (36, 0.75, 27), (36, 0.5, 18), (36, 0.25, 9)],
)
def test_published_pruned_models_have_their_depth(base_layers, fraction, kept):
    assert len(retained_layers(base_layers, fraction)) == kept


@pytest.mark.parametrize("fraction", [0.6, 1.0, 0, 75])
def test_other_fractions_are_refused(fraction):
    with pytest.raises(InputError, match=f"not {fraction}"):
        retained_layers(28, fraction)


@pytest.mark.parametrize(("base_layers", "fraction"), KVP_LP)
def test_pruned_maps_read_the_largest_retained_layer_not_above(base_layers, fraction):
    retained = retained_layers(base_layers, fraction)
    read = [retained[source] for source in sources(pruned_layer_map(base_layers, retained))]
    period = {0.75: (0, 1, 2, 2), 0.5: (0, 0, 2, 2), 0.25: (0, 0, 0, 0)}[fraction]
    assert read == [layer - layer % 4 + period[layer % 4] for layer in range(base_layers)]


def test_pruned_maps_spelled_out():
    assert sources(pruned_layer_map(8, [0, 1, 2, 4, 5, 6])) == [0, 1, 2, 2, 3, 4, 5, 5]
    assert sources(pruned_layer_map(8, [0, 2, 4, 6])) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert sources(pruned_layer_map(8, [0, 4])) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert sources(pruned_layer_map(5, [0, 3])) == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("base_layers", [28, 36])
def test_the_proportional_map_fails_three_quarters(base_layers):
    retained = retained_layers(base_layers, 0.75)
    assert sources(pruned_layer_map(base_layers, retained)) != naive(base_layers, len(retained))


@pytest.mark.parametrize("retained", [[], [1, 2], [0, 2, 1], [0, 0, 1], [0, 4], [0, 9]])
def test_retained_layers_must_rise_from_zero_within_the_base(retained):
    with pytest.raises(InputError, match="must rise from 0 and stay below 4"):
        pruned_layer_map(4, retained)


def test_prefix_maps_read_the_layer_after_the_prefix_and_keep_its_own_pairs():
    assert prefix_layer_map(6, 2) == (None, None, None, (2,), (2,), (2,))
    assert prefix_layer_map(6, 1) == (None, None, (1,), (1,), (1,), (1,))
    assert prefix_layer_map(6, 5) == (None,) * 6


@pytest.mark.parametrize("layers", [0, -1, 6, 7])
def test_a_prefix_leaves_at_least_one_layer_on_either_side(layers):
    with pytest.raises(InputError, match="between 1 and 5"):
        prefix_layer_map(6, layers)


def test_widened_maps_take_the_nearest_sources_lower_ones_first():
    assert widened(((3,), (0,), (7,)), 1, 8) == ((3,), (0,), (7,))
    assert widened(((3,), (0,), (7,)), 2, 8) == ((2, 3), (0, 1), (6, 7))
    assert widened(((3,), (0,), (7,)), 3, 8) == ((2, 3, 4), (0, 1, 2), (5, 6, 7))
    assert widened(((1,),), 3, 3) == ((0, 1, 2),)


def test_widened_maps_leave_exact_layers_alone():
    assert widened(prefix_layer_map(5, 2), 2, 3) == (None, None, None, (1, 2), (1, 2))


@pytest.mark.parametrize("count", [0, -1, 4])
def test_widening_stays_within_the_auxiliary(count):
    with pytest.raises(InputError, match="1 to 3 auxiliary layers"):
        widened(((0,), (1,)), count, 3)
