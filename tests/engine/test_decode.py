"""The first token, handed out before mlx-lm has computed the second, and chunks in parts side by side."""

from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.generate import stream_generate
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper
from support import tiny

import kvp_mlx
from kvp_mlx.device import streams
from kvp_mlx.engine import auxiliary, prefill
from kvp_mlx.engine.clock import Ready, greedy, time_first_token
from kvp_mlx.engine.decode import decode

PROMPT = mx.arange(3, 40)


def pieces(stream: Iterator) -> list[tuple]:
    return [(piece.text, piece.token, piece.generation_tokens, piece.finish_reason) for piece in stream]


def both(model: kvp_mlx.KVPModel, **options: object) -> tuple[list[tuple], list[tuple]]:
    """Return the pieces of our stream and of mlx-lm's, the generator seeded alike."""
    mx.random.seed(5)
    first = time_first_token(read(model), PROMPT[-1:].tolist(), sampler=options.get("sampler", greedy))
    ours = pieces(decode(first, model.text_tokenizer, PROMPT.tolist(), **options))
    mx.random.seed(5)
    common = {"prompt_cache": make_prompt_cache(model.base), "prefill_step_size": 8}
    return ours, pieces(stream_generate(model.base, model.text_tokenizer, PROMPT, **common, **options))


def read(model: kvp_mlx.KVPModel) -> Callable[[prefill.PrefillTimes], Ready]:
    return lambda times: Ready(model.base, kvp_mlx.base_prefill(model, PROMPT[None, :-1], prefill_step_size=8))


@pytest.fixture(scope="module")
def model(fitted: Path) -> kvp_mlx.KVPModel:
    return kvp_mlx.load(str(fitted))


@pytest.mark.parametrize("max_tokens", [1, 2, 12])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_same_pieces_as_mlx_lm(max_tokens: int, temperature: float, model: kvp_mlx.KVPModel) -> None:
    ours, theirs = both(model, max_tokens=max_tokens, sampler=make_sampler(temp=temperature))
    assert ours == theirs
    assert len(ours) == max_tokens


def test_an_answer_that_ends_at_once(model: kvp_mlx.KVPModel, monkeypatch: pytest.MonkeyPatch) -> None:
    first = both(model, max_tokens=2)[0][0][1]
    monkeypatch.setattr(TokenizerWrapper, "eos_token_ids", property(lambda self: {first}))
    ours, theirs = both(model, max_tokens=12)
    assert ours == theirs
    assert [piece[3] for piece in ours] == ["stop"]


def test_the_base_has_run_once_when_the_first_piece_comes(
    model: kvp_mlx.KVPModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    plain = type(model.base).__call__

    def counting(self: object, ids: mx.array, *rest: object, **options: object) -> mx.array:
        calls.append(ids.shape[1])
        return plain(self, ids, *rest, **options)

    monkeypatch.setattr(type(model.base), "__call__", counting)
    stream = kvp_mlx.stream_generate(model, PROMPT.tolist(), prefill="kvp", exact_head=0, exact_tail=0, max_tokens=8)
    next(stream)
    assert calls == [1]
    list(stream)
    assert calls in ([1] * 8, [1] * 9)  # mlx-lm may have begun one more


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_parts_side_by_side_change_nothing(batch: int, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if mx.default_device().type != mx.DeviceType.cpu:
        pytest.skip("GPUs run one stream")
    monkeypatch.setattr(streams, "MIN_ROWS", 4)
    monkeypatch.setattr(streams, "openblas_threads", lambda: 3)
    used = []
    plain = streams.parts
    monkeypatch.setattr(auxiliary, "parts", lambda *args: used.append(len(plain(*args))) or plain(*args))
    bundle, oracle = tiny.prefixed(tiny.FAMILIES[family](), 2)
    ids = tiny.token_ids(29, batch)
    cache = prefill.predict_base_cache(bundle, mx.array(ids), prefill_step_size=10)
    assert used == [3, 3, 3] if batch == 3 else used == [2, 2, 2]
    tiny.assert_cache_equal(cache, oracle.prefill(ids)[0])


def test_a_prompt_gets_its_room_at_once(model: kvp_mlx.KVPModel) -> None:
    ids = mx.array([list(range(3, 63))])
    for fill in (prefill.predict_base_cache, prefill.base_prefill):
        cache = fill(model, ids, prefill_step_size=16)
        assert {layer.keys.shape[2] for layer in cache} == {64}
        fill(model, ids, cache, prefill_step_size=16)
        assert {layer.offset for layer in cache} == {120}
        assert all(121 <= layer.keys.shape[2] <= 128 for layer in cache)
        assert not any("step" in vars(layer) for layer in cache)
        before = mx.array(cache[-1].keys_and_values()[0])
        for _ in range(20):  # mlx-lm's own growth goes on from any size
            model.base(ids[:, :1], cache=cache)
        assert mx.array_equal(cache[-1].keys_and_values()[0][..., :120, :], before)
        assert cache[-1].offset == 140
