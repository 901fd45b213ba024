"""Hostile and broken checkpoints: one line, exit code 2 (1 for the machine's faults), nothing half-written."""

import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Kvp, Outcome
from support import corenet

Tensors = dict[str, torch.Tensor]

MAP = ",".join(map(str, corenet.LAYER_MAP))
QKV = "base.layers.1.attn.qkv_proj.weight"
KEY_MAP = "predicter.auxkv_to_basekv.key_transforms.2.weight"
VALUE_BIAS = "predicter.auxkv_to_basekv.value_transforms.4.bias"


def on(name: str, change: Callable[[torch.Tensor], object]) -> Callable[[Tensors], object]:
    return lambda tensors: tensors | {name: change(tensors[name])}


def without(*names: str) -> Callable[[Tensors], object]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def renamed(old: str, new: str) -> Callable[[Tensors], object]:
    return lambda tensors: {new if name == old else name: tensor for name, tensor in tensors.items()}


def poisoned(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def poison(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return poison


class Code:
    """A pickle of this runs a command when it is loaded."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


# What torch.save is given in place of the tensors, and what the error has to name.
CONTENTS: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "missing base tensor": (without(QKV), "layers.1.attn.qkv_proj.weight"),
    "missing norm": (without("base.norm.weight"), "norm.weight"),
    "missing embedding": (without("auxiliary.token_embeddings.weight"), "token_embeddings.weight"),
    "missing whole layer": (
        lambda t: {name: x for name, x in t.items() if not name.startswith("base.layers.2.")},
        "layers.2.attn",
    ),
    "missing map": (without(KEY_MAP), "key_transforms.2.weight"),
    "missing bias": (without(VALUE_BIAS), "value_transforms.4.bias"),
    "no maps": (lambda t: {name: x for name, x in t.items() if "predicter" not in name}, "key_transforms.0"),
    "no auxiliary": (lambda t: {name: x for name, x in t.items() if "auxiliary" not in name}, "auxiliary.*"),
    "no base": (lambda t: {name: x for name, x in t.items() if not name.startswith("base.")}, "base.*"),
    "extra tensor": (lambda t: t | {"base.layers.0.attn.sinks": torch.zeros(4)}, "layers.0.attn.sinks"),
    "extra part": (lambda t: t | {"teacher.norm.weight": torch.zeros(4)}, "teacher.norm.weight"),
    "extra map": (
        lambda t: t | {"predicter.auxkv_to_basekv.key_transforms.9.bias": torch.zeros(4)},
        "key_transforms.9.bias",
    ),
    "extra predictor part": (lambda t: t | {"predicter.gate.weight": torch.zeros(4)}, "predicter.gate.weight"),
    "layer far away": (lambda t: t | {"base.layers.99999.attn_norm.weight": torch.zeros(96)}, "layers."),
    "layer with a zero before": (renamed(QKV, "base.layers.01.attn.qkv_proj.weight"), "layers.01"),
    "negative layer": (lambda t: t | {"base.layers.-1.attn_norm.weight": torch.zeros(96)}, "layers.-1"),
    "two leftovers": (lambda t: t | {"base.a": t[QKV], "base.b": t[QKV]}, "it has no place for a, b."),
    "renamed tensor": (renamed(QKV, "base.layers.1.attn.qvk_proj.weight"), "qvk_proj"),
    "spelled right": (
        lambda t: {name.replace("predicter", "predictor"): x for name, x in t.items()},
        "predictor.auxkv_to_basekv",
    ),
    "name of another framework": (renamed("base.norm.weight", "base.norm.gamma"), "norm.gamma"),
    "twice, with and without module.": (lambda t: t | {f"module.{QKV}": t[QKV]}, "twice"),
    "transposed projection": (on(QKV, lambda x: x.t().contiguous()), "qkv_proj"),
    "transposed FFN": (on("base.layers.3.ffn.proj_2.weight", lambda x: x.t().contiguous()), "layers.3.ffn.proj_2"),
    "transposed output": (on("base.layers.0.attn.out_proj.weight", lambda x: x.t().contiguous()), "out_proj"),
    "transposed map": (on(KEY_MAP, lambda x: x.t().contiguous()), "key_transforms.2.weight"),
    "one row short": (on("auxiliary.layers.0.ffn.proj_1.weight", lambda x: x[:-1].clone()), "layers.0.ffn.proj_1"),
    "flattened": (on(QKV, lambda x: x.flatten()), "qkv_proj"),
    "one dimension more": (on("base.norm.weight", lambda x: x[None]), "norm.weight"),
    "scalar": (on("base.layers.0.attn.q_norm.weight", lambda x: torch.tensor(1.0)), "q_norm"),
    "empty": (on(KEY_MAP, lambda x: torch.zeros(0, 4)), "key_transforms.2.weight"),
    "head_dim of one layer": (on("base.layers.1.attn.k_norm.weight", lambda x: x[:32].clone()), "layers.1.attn.k_norm"),
    "integers": (on(QKV, lambda x: x.to(torch.int32)), "int32"),
    "float64": (on(QKV, lambda x: x.double()), "float64"),
    "booleans": (on(KEY_MAP, lambda x: x > 0), "bool"),
    "8-bit floats": (on(QKV, lambda x: x.to(torch.float8_e4m3fn)), "float8"),
    "complex": (on(QKV, lambda x: x.to(torch.complex64)), "complex64"),
    "sparse": (on(QKV, lambda x: x.to_sparse()), "not a plain tensor"),
    "NaN in the base": (on(QKV, poisoned(float("nan"))), "base.layers.1.attn.qkv_proj.weight holds NaN"),
    "infinity in the auxiliary": (on("auxiliary.norm.weight", poisoned(float("-inf"))), "auxiliary.norm.weight holds"),
    "NaN in a map": (on(KEY_MAP, poisoned(float("nan"))), "key_transforms.2.weight holds NaN"),
    "two vocabularies": (on("auxiliary.token_embeddings.weight", lambda x: x[:-1].clone()), "131 tokens"),
    "numbers that the file does not hold": (on(QKV, lambda x: torch.zeros(1).expand(2**20, 2**20)), "does not hold"),
    "not a dictionary": (lambda t: list(t.values()), "no state dict"),
    "a single tensor": (lambda t: t[QKV], "no state dict"),
    "an empty dictionary": (lambda t: {}, "no state dict"),
    "an empty wrapper": (lambda t: {"model_state_dict": {}}, "no state dict"),
    "another wrapper": (lambda t: {"weights": t}, "weights is a dict"),
    "numbers for names": (lambda t: dict(enumerate(t.values())), "no part of"),
    "a string among the tensors": (lambda t: t | {"base.note": "hello"}, "base.note is a str"),
}


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return corenet.kv_prediction()


@pytest.fixture
def good(tensors: Tensors, tmp_path: Path) -> Path:
    return corenet.save(tensors, tmp_path / "good.pt")


def assert_refused(outcome: Outcome, out: Path, named: str, code: int = 2) -> None:
    assert (outcome.code, outcome.out) == (code, ""), outcome.err
    assert outcome.err.startswith("kvp: ")
    assert outcome.err.count("\n") == 1
    assert named in outcome.err
    assert "report it" not in outcome.err
    assert not out.exists()
    assert not list(out.parent.glob(f".{out.name}.*"))


@pytest.mark.parametrize("name", CONTENTS)
def test_broken_contents(name: str, tensors: Tensors, kvp: Kvp, tmp_path: Path) -> None:
    change, named = CONTENTS[name]
    source, out = corenet.save(change(tensors), tmp_path / "c.pt"), tmp_path / "out"
    assert_refused(kvp("convert", "kvp", source, "--layer-map", MAP, "--out", out, "--json"), out, named)


def cut(share: float) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def overwritten(where: float, what: bytes) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        data = bytearray(path.read_bytes())
        start = int(where * len(data))
        data[start : start + len(what)] = what
        path.write_bytes(data)

    return write


def rezipped(change: Callable[[str, bytes], bytes | None]) -> Callable[[Path], object]:
    """Return what changes members of the zip file (None: leaves one out)."""

    def rewrite(path: Path) -> None:
        with zipfile.ZipFile(path) as old:
            members = {name: change(name, old.read(name)) for name in old.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as new:
            for name, data in members.items():
                if data is not None:
                    new.writestr(name, data)

    return rewrite


def flipped(member: str) -> Callable[[Path], object]:
    def flip(path: Path) -> None:
        with zipfile.ZipFile(path) as archive:
            info = next(info for info in archive.infolist() if info.filename.endswith(member))
        data = bytearray(path.read_bytes())
        data[info.header_offset + 200] ^= 1
        path.write_bytes(data)

    return flip


def compressed(path: Path) -> None:
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in members.items():
            new.writestr(name, data)


# What is done to a good file, and what the error has to name.
FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no file": (lambda p: p.unlink(), "is not a file"),
    "empty file": (cut(0), "good.pt"),
    "first bytes only": (cut(0.0001), "good.pt"),
    "half of the zip": (cut(0.5), "not a whole PyTorch zip file"),
    "zip without its end": (cut(0.999), "not a whole PyTorch zip file"),
    "wrong magic": (overwritten(0, b"\x00\x00\x00\x00"), "good.pt"),
    "a text file": (lambda p: p.write_text("# not a checkpoint\n"), "good.pt"),
    "a PNG": (lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(64)), "good.pt"),
    "random bytes": (lambda p: p.write_bytes(random.Random(0).randbytes(4096)), "good.pt"),
    "a zip of something else": (rezipped(lambda name, data: None), "not a whole PyTorch checkpoint"),
    "garbled pickle": (rezipped(lambda n, d: d[:40] + bytes(40) + d[80:] if "data.pkl" in n else d), "good.pt"),
    "a storage missing": (rezipped(lambda n, d: None if n.endswith("data/3") else d), "not a whole PyTorch"),
    "a storage cut short": (rezipped(lambda n, d: d[:8] if n.endswith("data/3") else d), "good.pt"),
    "a flipped bit in the numbers": (flipped("data/3"), "checksum of"),
    "a compressed zip": (compressed, "compressed"),
    "an old-style file": (
        lambda p: torch.save({"a": torch.zeros(3)}, p, _use_new_zipfile_serialization=False),
        "before PyTorch 1.6",
    ),
    "a directory": (lambda p: (p.unlink(), p.mkdir()), "is not a file"),
    "a dangling link": (lambda p: (p.unlink(), p.symlink_to("/nowhere")), "is not a file"),
    "a link to itself": (lambda p: (p.unlink(), p.symlink_to(p)), "good.pt"),
    "a pipe": (lambda p: (p.unlink(), os.mkfifo(p)), "is not a file"),
}


@pytest.mark.parametrize("name", FILES)
def test_broken_files(name: str, good: Path, kvp: Kvp, tmp_path: Path) -> None:
    change, named = FILES[name]
    change(good)
    out = tmp_path / "out"
    assert_refused(kvp("convert", "kvp", good, "--layer-map", MAP, "--out", out, "--json"), out, named)


@pytest.mark.parametrize("place", ["top", "value", "wrapper"])
@pytest.mark.parametrize("old_style", [False, True], ids=["zip", "plain pickle"])
def test_code_in_a_pickle_does_not_run(place: str, old_style: bool, kvp: Kvp, tmp_path: Path) -> None:
    marker, source, out = tmp_path / "ran", tmp_path / "c.pt", tmp_path / "out"
    code = Code(marker)
    contents = {"top": code, "value": {"base.norm.weight": code}, "wrapper": {"epoch": code, "model_state_dict": {}}}[
        place
    ]
    if old_style:
        source.write_bytes(pickle.dumps(contents))
    else:
        torch.save(contents, source)
    outcome = kvp("convert", "kvp", source, "--layer-map", MAP, "--out", out)
    assert not marker.exists()
    assert_refused(outcome, out, "c.pt")
    if not old_style:
        assert "could run code" in outcome.err
    pickle.loads(pickle.dumps(code))  # the trap does snap where pickles are trusted
    assert marker.exists()


@pytest.mark.parametrize("seed", range(12))
def test_fuzzed_files(seed: int, good: Path, kvp: Kvp, tmp_path: Path) -> None:
    """Bytes flipped in the pickle: an error or, where they hit nothing that matters, a whole bundle."""
    rng = random.Random(seed)

    def flip(name: str, data: bytes) -> bytes:
        if "data.pkl" not in name:
            return data
        noisy = bytearray(data)
        for _ in range(8):
            noisy[rng.randrange(len(noisy))] = rng.randrange(256)
        return bytes(noisy)

    rezipped(flip)(good)
    out = tmp_path / "out"
    outcome = kvp("convert", "kvp", good, "--layer-map", MAP, "--out", out)
    if outcome.code:
        assert_refused(outcome, out, "")
    else:
        assert kvp("generate", "x", "--model", out).code == 2  # no tokeniser, but it loads that far


def test_the_other_command_is_named(good: Path, tmp_path: Path, kvp: Kvp) -> None:
    out, plain = tmp_path / "out", corenet.save(corenet.openelm(corenet.BASE), tmp_path / "plain.pt")
    assert_refused(kvp("convert", "openelm", good, "--out", out), out, "kvp convert kvp")
    assert_refused(kvp("convert", "kvp", plain, "--layer-map", MAP, "--out", out), out, "kvp convert openelm")


OPTIONS: dict[str, tuple[list[str], str]] = {
    "neither preset nor map": ([], "--preset"),
    "both": (["--preset", "openelm-1_1b-kvp-c-270m", "--layer-map", MAP], "exactly one"),
    "unknown preset": (["--preset", "openelm-7b"], "openelm-7b"),
    "preset of another model": (["--preset", "openelm-1_1b-kvp-c-270m"], "does not fit"),
    "map too short": (["--layer-map", "0,0,1,1"], "4 entries"),
    "map too long": (["--layer-map", f"{MAP},2"], "6 entries"),
    "map past the auxiliary": (["--layer-map", "0,0,1,1,3"], "layer 3; there are 0 to 2"),
    "map below zero": (["--layer-map", "0,0,1,1,-1"], "layer -1"),
    "map of words": (["--layer-map", "zero,one"], "zero,one"),
    "map that the widths contradict": (["--layer-map", "0,0,0,0,0"], "key_transforms.4.weight is 128x48, not 128x96"),
    "3 bits": (["--layer-map", MAP, "--q-bits", "3"], "4 or 8"),
    "group of 48": (["--layer-map", MAP, "--q-bits", "4", "--q-group-size", "48"], "32, 64 or 128"),
    "group without bits": (["--layer-map", MAP, "--q-group-size", "64"], "--q-bits"),
    "unknown dtype": (["--layer-map", MAP, "--dtype", "float8"], "float8"),
    "no tokeniser there": (["--layer-map", MAP, "--tokenizer", "/nowhere/tokenizer.model"], "/nowhere"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_unusable_options(name: str, good: Path, kvp: Kvp, tmp_path: Path) -> None:
    arguments, named = OPTIONS[name]
    out = tmp_path / "out"
    assert_refused(kvp("convert", "kvp", good, *arguments, "--out", out), out, named)
