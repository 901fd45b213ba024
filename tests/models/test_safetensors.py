import json
import struct
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


def write_raw(path: Path, header: object, data: bytes) -> Path:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(start: int, end: int, **changes: object) -> dict[str, object]:
    return {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end], **changes}


ODD: dict[str, tuple[object, str]] = {
    "overlapping": ({"a": entry(0, 8), "b": entry(4, 12)}, "b begins at byte"),
    "one in the other": ({"a": entry(0, 12), "b": entry(4, 8)}, "b begins at byte"),
    "twice the same": ({"a": entry(0, 12), "b": entry(0, 12)}, "b begins at byte"),
    "a gap": ({"a": entry(0, 4), "b": entry(8, 12)}, "b begins at byte"),
    "shifted": ({"a": entry(4, 12)}, "a begins at byte"),
    "bytes left over": ({"a": entry(0, 8)}, "4 bytes of no tensor"),
    "backwards": ({"a": entry(0, 12, data_offsets=[12, 0])}, "not a safetensors file"),
    "negative": ({"a": entry(0, 12, data_offsets=[-4, 8])}, "not a safetensors file"),
    "negative shape": ({"a": entry(0, 12, shape=[-3, -4])}, "not a safetensors file"),
    "a truth value": ({"a": entry(0, 1, shape=[True], data_offsets=[0, True])}, "not a safetensors file"),
    "a fraction": ({"a": entry(0, 12, shape=[12.0])}, "not a safetensors file"),
    "three offsets": ({"a": entry(0, 12, data_offsets=[0, 6, 12])}, "not a safetensors file"),
    "offsets beyond": ({"a": entry(0, 2**70)}, "cut short"),
    "no object": ({"a": [1]}, "not a safetensors file"),
    "a list": ([1], "not a safetensors file"),
    "metadata of numbers": ({"__metadata__": {"x": 5}, "a": entry(0, 12)}, "not a safetensors file"),
    "metadata a list": ({"__metadata__": [1], "a": entry(0, 12)}, "not a safetensors file"),
    "nested": (b"[" * 50_000, "not a safetensors file"),
    "lone surrogate": (b'{"\\ud800": 1}', "not a safetensors file"),
}


@pytest.mark.parametrize("name", ODD)
def test_tensors_that_do_not_fill_their_file_are_refused(name: str, tmp_path: Path) -> None:
    header, reason = ODD[name]
    path = write_raw(tmp_path / "x.safetensors", header, bytes(12))
    with pytest.raises(BundleError, match=reason) as refused:
        read_header(path)
    assert "\n" not in str(refused.value)


def test_tensors_in_any_order_fill_their_file(tmp_path: Path) -> None:
    header = {"b": entry(8, 12), "empty": entry(8, 8), "a": entry(0, 8), "__metadata__": {"format": "pt"}}
    assert set(read_header(write_raw(tmp_path / "x.safetensors", header, bytes(12)))) == {"a", "b", "empty"}
