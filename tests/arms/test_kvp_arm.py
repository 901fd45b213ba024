"""The arms ``kvp``, ``kvp-N`` and ``kvp-N-R`` read as the engine does with their dial."""

import mlx.core as mx
import pytest
from support.tiny import assert_cache_equal, entries_of, estimating, llama, prefixed, token_ids

from kvp_mlx.arms.kinds import parse_arm
from kvp_mlx.engine.prefill import predict_base_cache
from kvp_mlx.errors import InputError


def test_an_arm_sets_its_own_ratio_and_tail():
    model = estimating(prefixed(llama(), 1)[0])
    ids = mx.array(token_ids(40))
    _, found = parse_arm("kvp-2-0.5").read(model, ids)
    expected = predict_base_cache(model, ids[:, :-1], exact_tail=2, recompute=0.5)
    assert_cache_equal(found, entries_of(expected))
    assert parse_arm("kvp-0-0").numbers == (0, 0.0)


@pytest.mark.parametrize("name", ["kvp-x", "kvp-1-2", "kvp-1-a", "kvp-1-0.5-3"])
def test_a_bad_arm_is_named(name):
    with pytest.raises(InputError):
        parse_arm(name)
