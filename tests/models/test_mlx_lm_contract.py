"""What we rely on inside mlx-lm. When it moves, this fails first and says where."""

import ctypes
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm.generate  # noqa: F401 - its name is also a function's, so it is taken from sys.modules
import pytest
from mlx_lm.models.cache import ConcatenateKVCache, KVCache, RotatingKVCache, make_prompt_cache
from support.tiny import llama

from kvp_mlx.device.machine import matmul_flops_per_s

generate = sys.modules["mlx_lm.generate"]


def test_cache_grows_through_update_and_fetch_and_trims() -> None:
    keys, values = mx.random.normal((2, 1, 2, 5, 4))
    for cache in (KVCache(), ConcatenateKVCache()):
        fetched = cache.update_and_fetch(keys, values)
        assert cache.offset == 5
        assert mx.array_equal(fetched[0], keys).item()
        cache.update_and_fetch(keys, values)
        assert cache.offset == 10
        assert mx.array_equal(cache.keys_and_values()[1][..., 5:, :], values).item()
    cache = KVCache()
    cache.update_and_fetch(keys, values)
    cache.trim(2)
    cache.update_and_fetch(values, keys)
    assert cache.offset == 8
    assert mx.array_equal(cache.keys_and_values()[0][..., 3:, :], values).item()


def test_rotating_cache_is_written_to_its_end_in_order() -> None:
    keys = mx.random.normal((1, 2, 12, 4))
    cache = RotatingKVCache(max_size=5)
    for start, stop in ((0, 1), (1, 8), (8, 9), (9, 12)):
        cache._update_concat(keys[..., start:stop, :], keys[..., start:stop, :])
    assert (cache.offset, cache._idx) == (12, cache.keys.shape[2])
    assert mx.array_equal(cache.keys[..., -5:, :], keys[..., -5:, :]).item()


def test_state_is_what_generate_step_evaluates() -> None:
    cache = KVCache()
    cache.update_and_fetch(mx.ones((1, 2, 5, 4)), mx.ones((1, 2, 5, 4)))
    mx.eval([cache.state])
    assert cache.keys_and_values()[0].shape == (1, 2, 5, 4)


def test_generate_step_takes_a_filled_cache_and_the_rest_of_the_prompt() -> None:
    model = llama()
    ids = mx.array([5, 6, 7, 8])
    cache = make_prompt_cache(model)
    model(ids[None, :3], cache=cache)
    continued = [token for token, _ in generate.generate_step(ids[3:], model, prompt_cache=cache, max_tokens=5)]
    assert continued == [token for token, _ in generate.generate_step(ids, model, max_tokens=5)]


def test_names_we_import_exist() -> None:
    for name in (
        "DEFAULT_PREFILL_STEP_SIZE",
        "GenerationResponse",
        "generation_stream",
        "wired_limit",
        "stream_generate",
    ):
        assert hasattr(generate, name)


@pytest.mark.skipif(sys.platform != "linux", reason="only there is the BLAS ours to choose")
def test_the_fast_blas_stands_before_mlx_in_this_very_process() -> None:
    try:
        ctypes.CDLL("libopenblas.so.0")
    except OSError:
        pytest.skip("OpenBLAS is not installed")
    maps = Path("/proc/self/maps").read_text()
    loaded = [line.split("/")[-1] for line in maps.splitlines() if "/" in line]
    assert any(name.startswith("libopenblas") for name in loaded)
    assert matmul_flops_per_s(mx.float32, rows=256, width=1024) > 20e9  # the bundled BLAS does 6e9


def test_entries_behind_a_shorter_write_survive_it() -> None:
    keys, values = mx.random.normal((2, 1, 2, 300, 4))
    cache = KVCache()
    cache.update_and_fetch(keys, values)
    cache.trim(300 - 10)
    cache.update_and_fetch(values[..., :20, :], keys[..., :20, :])
    cache.offset = 300
    expected = mx.concatenate([keys[..., :10, :], values[..., :20, :], keys[..., 30:, :]], axis=2)
    assert mx.array_equal(cache.keys_and_values()[0], expected).item()
