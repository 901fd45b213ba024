from pathlib import Path

import mlx.core as mx
import pytest
from support.directories import write_llama

from kvp_mlx.errors import BundleError
from kvp_mlx.models.safetensors import fingerprint, read_header


def rewrite(model: Path, **changes: mx.array) -> None:
    path = str(model / "model.safetensors")
    arrays = dict(mx.load(path)) | changes
    mx.eval(arrays)
    mx.save_safetensors(path, arrays)


def test_header_tells_what_mlx_wrote(tmp_path: Path) -> None:
    arrays = {"a": mx.zeros((2, 3), mx.float16), "b": mx.arange(5)}
    mx.save_safetensors(str(tmp_path / "x.safetensors"), arrays, metadata={"format": "mlx"})
    header = read_header(tmp_path / "x.safetensors")
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in header.items()} == {
        "a": ("F16", (2, 3)),
        "b": ("I32", (5,)),
    }
    tensor = header["b"]
    data = (tmp_path / "x.safetensors").read_bytes()[tensor.start : tensor.end]
    assert list(memoryview(data).cast("i")) == [0, 1, 2, 3, 4]


def test_fingerprint_is_of_the_weights_not_of_files(tmp_path: Path) -> None:
    whole, sharded = write_llama(tmp_path / "whole"), tmp_path / "sharded"
    sharded.mkdir()
    arrays = dict(mx.load(str(whole / "model.safetensors")))
    names = sorted(arrays, reverse=True)
    for number, part in enumerate((names[:7], names[7:])):
        mx.save_safetensors(str(sharded / f"model-{number}.safetensors"), {name: arrays[name] for name in part})
    assert fingerprint(whole) == fingerprint(sharded)


def test_fingerprint_changes_with_any_tensor(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model")
    seen = {fingerprint(model)}
    arrays = mx.load(str(model / "model.safetensors"))
    mx.eval(arrays)
    for name, array in arrays.items():
        rewrite(model, **{name: array * 1.001})
        assert fingerprint(model) not in seen, name
        seen.add(fingerprint(model))


def test_fingerprint_changes_with_the_end_of_a_large_tensor(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model")
    before = fingerprint(model)
    embedding = mx.load(str(model / "model.safetensors"))["model.embed_tokens.weight"]
    embedding[-1, -1] += 1
    rewrite(model, **{"model.embed_tokens.weight": embedding})
    assert fingerprint(model) != before


def test_directory_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="not an mlx-lm model directory"):
        fingerprint(tmp_path)
