"""Conversions against PyTorch: checkpoints written by torch, through the real command, the same logits."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from conftest import Kvp
from mlx_lm.utils import load_model
from support import corenet
from support.torch_oracle import KVPrediction, OpenELM, part_of

import kvp_mlx
from kvp_mlx.errors import BundleError

ATOL = 1e-4
MAP_OPTION = ",".join(map(str, corenet.LAYER_MAP))


class Fixed:
    """A cache that hands a layer predicted keys and values at positions 0.. in place of its own."""

    def __init__(self, predicted: Any):
        self.pair, self.offset = predicted.keys_and_values(), 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return self.pair

    def make_mask(self, *args: Any, **options: Any) -> str:
        return "causal"


def ids_of(length: int, batch: int = 2, vocabulary: int = corenet.VOCABULARY) -> torch.Tensor:
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(5))


def to_mlx(ids: torch.Tensor) -> mx.array:
    return mx.array(ids.numpy())


def assert_same(found: mx.array, expected: torch.Tensor, atol: float = ATOL) -> None:
    found, expected = np.array(found.astype(mx.float32)), expected.numpy()
    np.testing.assert_allclose(found, expected, atol=atol, rtol=0)
    assert (found.argmax(-1) == expected.argmax(-1)).all()


def prompt_mode(model: kvp_mlx.KVPModel, ids: torch.Tensor, following: torch.Tensor) -> mx.array:
    """The product's logits of the prompt's last token and of each following one, decoded one at a time."""
    cache = kvp_mlx.predict_base_cache(model, to_mlx(ids[:, :-1]))
    steps = to_mlx(torch.cat([ids[:, -1:], following], dim=1))
    return mx.concatenate([model.base(steps[:, i : i + 1], cache=cache) for i in range(steps.shape[1])], axis=1)


def training_mode(model: kvp_mlx.KVPModel, ids: torch.Tensor) -> mx.array:
    cache = kvp_mlx.predict_base_cache(model, to_mlx(ids))
    return model.base(to_mlx(ids), cache=[Fixed(layer) for layer in cache])


def assert_parity(out: Path, checkpoint: dict, layer_map: Sequence[int], ids: torch.Tensor, atol: float = ATOL) -> None:
    oracle = KVPrediction(checkpoint, layer_map)
    model = kvp_mlx.load(str(out))
    assert_same(model.base(to_mlx(ids)), oracle.base.run(ids)[0], atol)
    assert_same(model.auxiliary(to_mlx(ids)), oracle.auxiliary.run(ids)[0], atol)
    prompt, following = ids[:, :-3], ids[:, -3:]
    assert_same(prompt_mode(model, prompt, following), oracle.prompt_mode(prompt, following), atol)
    assert_same(training_mode(model, ids), oracle.training_mode(ids), atol)


@pytest.fixture(scope="module")
def checkpoint() -> dict[str, torch.Tensor]:
    return corenet.kv_prediction()


@pytest.fixture
def source(checkpoint: dict, tmp_path: Path) -> Path:
    return corenet.save(checkpoint, tmp_path / "checkpoint_average.pt")


@pytest.mark.parametrize("wrap", [None, "model_state_dict", "ema_model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_whole_path_at_tiny_size(wrap: str | None, prefix: str, checkpoint: dict, kvp: Kvp, tmp_path: Path) -> None:
    stored = {f"{prefix}{name}": tensor for name, tensor in checkpoint.items()}
    stored = stored if wrap is None else {"epoch": 3, "optim_state_dict": {"state": {}}, wrap: stored}
    source, out = corenet.save(stored, tmp_path / "c.pt"), tmp_path / "out"
    outcome = kvp("convert", "kvp", source, "--layer-map", MAP_OPTION, "--out", out, "--json")
    assert outcome.code == 0, outcome.err
    result = outcome.json()
    assert result["parameters"] == sum(tensor.numel() for tensor in checkpoint.values())
    assert result["bits_per_weight"] == 32
    assert_parity(out, checkpoint, corenet.LAYER_MAP, ids_of(13))


def test_one_token_prompt(source: Path, checkpoint: dict, kvp: Kvp, tmp_path: Path) -> None:
    kvp("convert", "kvp", source, "--layer-map", MAP_OPTION, "--out", tmp_path / "out")
    ids = ids_of(2)
    model = kvp_mlx.load(str(tmp_path / "out"))
    assert_same(
        prompt_mode(model, ids, ids[:, :1]), KVPrediction(checkpoint, corenet.LAYER_MAP).prompt_mode(ids, ids[:, :1])
    )


@pytest.mark.parametrize("prefix", ["", "module.", "transformer."])
def test_openelm(prefix: str, kvp: Kvp, tmp_path: Path) -> None:
    weights = corenet.openelm(corenet.BASE)
    source = corenet.save({f"{prefix}{name}": tensor for name, tensor in weights.items()}, tmp_path / "c.pt")
    outcome = kvp("convert", "openelm", source, "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    model, _ = load_model(tmp_path / "out")  # mlx-lm's own, without us
    assert_same(model(to_mlx(ids_of(11))), OpenELM(weights).run(ids_of(11))[0])


# Root mean square of the logits' difference, as a share of their standard deviation. Random maps and weights at
# this size have no redundancy, so that 4 bits cost far more than in a trained model.
BOUNDS = {"bfloat16": 0.03, "float16": 0.004, "8": 0.05, "4": 0.8}


@pytest.mark.parametrize("precision", BOUNDS)
def test_reduced_precision_stays_near(precision: str, source: Path, checkpoint: dict, kvp: Kvp, tmp_path: Path) -> None:
    options = ["--q-bits", precision, "--q-group-size", 32] if precision.isdigit() else ["--dtype", precision]
    out = tmp_path / "out"
    outcome = kvp("convert", "kvp", source, "--layer-map", MAP_OPTION, "--out", out, *options, "--json")
    assert outcome.code == 0, outcome.err
    model, oracle, ids = kvp_mlx.load(str(out)), KVPrediction(checkpoint, corenet.LAYER_MAP), ids_of(13)
    pairs = [
        (model.base(to_mlx(ids)), oracle.base.run(ids)[0]),
        (prompt_mode(model, ids[:, :-3], ids[:, -3:]), oracle.prompt_mode(ids[:, :-3], ids[:, -3:])),
        (training_mode(model, ids), oracle.training_mode(ids)),
    ]
    for found, expected in pairs:
        difference = torch.tensor(np.array(found.astype(mx.float32))) - expected
        assert 1e-6 < difference.square().mean().sqrt() / expected.std() < BOUNDS[precision]
    stored = sum(array.nbytes for path in out.rglob("*.safetensors") for array in mx.load(str(path)).values())
    numbers = sum(tensor.numel() for tensor in checkpoint.values())
    assert outcome.json()["bits_per_weight"] == pytest.approx(8 * stored / numbers, abs=1e-3)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights_are_within_half_a_step(bits: int, kvp: Kvp, tmp_path: Path) -> None:
    weights = corenet.openelm(corenet.BASE)
    source, out = corenet.save(weights, tmp_path / "c.pt"), tmp_path / "out"
    kvp("convert", "openelm", source, "--out", out, "--q-bits", bits, "--q-group-size", 32)
    stored = mx.load(str(out / "model.safetensors"))
    quantised = [name.removesuffix(".scales") for name in stored if name.endswith(".scales")]
    assert len(quantised) == 1 + 4 * len(corenet.BASE.layers)  # every matrix
    for name in quantised:
        scales = stored[f"{name}.scales"]
        weight = mx.dequantize(stored[f"{name}.weight"], scales, stored[f"{name}.biases"], group_size=32, bits=bits)
        original = weights[f"{name.removeprefix('transformer.')}.weight"].numpy()
        steps = np.repeat(np.abs(np.array(scales)), 32, axis=1)
        assert (np.abs(np.array(weight) - original) <= 1.01 * steps).all()  # mlx anchors zero: up to a step at the rim


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("scales", lambda x: x[:, :0]),
        ("scales", lambda x: x[:-1]),
        ("weight", lambda x: x[:, :-1]),
        ("weight", lambda x: x.astype(mx.float32)),
        ("biases", lambda x: x.astype(mx.int32)),
    ],
)
def test_damaged_quantised_maps(part: str, change: Callable, source: Path, kvp: Kvp, tmp_path: Path) -> None:
    out = tmp_path / "out"
    kvp("convert", "kvp", source, "--layer-map", MAP_OPTION, "--out", out, "--q-bits", 8, "--q-group-size", 32)
    path = str(out / "predictor.safetensors")
    arrays = dict(mx.load(path))
    arrays[f"maps.keys_0.{part}"] = change(arrays[f"maps.keys_0.{part}"])
    mx.eval(arrays)
    mx.save_safetensors(path, arrays)
    with pytest.raises(BundleError, match=r"predictor\.safetensors"):
        kvp_mlx.load(str(out))


@pytest.fixture
def scratch() -> Iterator[Path]:
    """Unlike tmp_path, gone after the test: it takes 6 GB."""
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory)


@pytest.mark.long
def test_true_shapes(kvp: Kvp, scratch: Path) -> None:
    """OpenELM-450M as the base of OpenELM-270M: both at their published shapes."""
    base, auxiliary = corenet.published("450m"), corenet.published("270m")
    layer_map = [0, 0, 1, 1, 2, 2, 3, 3, *range(4, 16)]
    checkpoint = corenet.kv_prediction(base, auxiliary, layer_map)
    assert sum(t.numel() for t in part_of(checkpoint, "base.").values()) == 457_375_744
    assert sum(t.numel() for t in part_of(checkpoint, "auxiliary.").values()) == 271_691_008
    source, out = corenet.save(checkpoint, scratch / "c.pt"), scratch / "out"
    outcome = kvp("convert", "kvp", source, "--layer-map", ",".join(map(str, layer_map)), "--out", out, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json()["model"] == "OpenELM-450M with auxiliary OpenELM-270M"
    assert_parity(out, checkpoint, layer_map, ids_of(20, batch=1, vocabulary=32000))
