"""GGUF files of the llama family, as ordinary mlx-lm model directories.

Format facts: the GGUF specification (ggml-org/ggml, docs/gguf.md). llama.cpp stores the query and key rows of
its llama architecture interleaved for its own RoPE; mlx-lm's half-split RoPE wants them back in order.
"""

import math
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from ..errors import InputError
from ..files import write_json
from .output import NO_PROGRESS, Precision, Progress, finish_model, output_directory, rewrite_model, write_weights
from .tokenizer import copy_tokenizer
from .tokenizer import write_tokenizer as write_any_tokenizer

Arrays = dict[str, mx.array]

# GGUF block tensor -> mlx-lm llama layer tensor; the suffix (weight, scales, biases) carries over.
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
CONTROL_TOKEN = 3  # tokenizer.ggml.token_type

# ggml's numbers for tensor types, and GGUF's for kinds of metadata (with struct's codes)
BLOCK = 32  # numbers; the types with the bytes that they take for it
KEPT_TYPES = {0: ("F32", 128), 1: ("F16", 64), 2: ("Q4_0", 18), 3: ("Q4_1", 20), 8: ("Q8_0", 34)}
OTHER_TYPES = {6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K"}
OTHER_TYPES |= {16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S"}
OTHER_TYPES |= {23: "IQ4_XS", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"}
SCALAR_VALUES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING_VALUE, ARRAY_VALUE = 8, 9
MAX_HEADER_STRING = 2**24


def convert_gguf_file(
    source: Path,
    out: Path,
    precision: Precision,
    *,
    tokenizer: str | None = None,
    force: bool = False,
    progress: Progress = NO_PROGRESS,
) -> dict[str, Any]:
    """Write a llama-family GGUF file as an mlx-lm model directory.

    Args:
        source: the ``.gguf`` file.
        out: directory to write.
        precision: dtype and quantisation of the output; default: as stored.
        tokenizer: Llama ``tokenizer.model``, directory or Hub id; default: the file's own.
        force: replace an existing model directory.
        progress: called with (tensors done, tensors to do), for each stage.

    Returns:
        What was written: ``out``, ``model``, source, parameters, ``bits_per_weight``, ``size_bytes``, ...

    Raises:
        InputError: an unusable source or output.
        KVPError: the output cannot be written.
    """
    check_tensors(source)
    with output_directory(out, force, [source], marker="config.json") as work:
        if tokenizer is not None:
            write_any_tokenizer(tokenizer, work)
        plain = work if precision == Precision() else work / ".plain"
        plain.mkdir(exist_ok=True)
        try:
            convert_gguf(source, plain, own_tokenizer=tokenizer is None, progress=progress)
        except (KeyError, ValueError, TypeError, AttributeError, IndexError, ArithmeticError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise InputError(f"{source} does not describe a llama model ({reason}); download it again.") from error
        if plain != work:
            rewrite_model(plain, work, precision, progress)
            copy_tokenizer(plain, work)
            shutil.rmtree(plain)
        return finish_model(work, out, "llama", source, str(source))


def check_tensors(source: Path) -> None:
    """Refuse quantisations that mlx does not keep as they are (it would quietly expand some to fp16).

    Raises:
        InputError: a tensor of another type, named; or no GGUF file that holds what it says.
    """
    try:
        size = source.stat().st_size
        with open(source, "rb") as file:
            tensors = _read_tensors(_Header(file))
    except OSError as error:
        raise InputError(f"{source} cannot be read ({error.strerror}).") from error
    except (struct.error, ValueError, MemoryError, OverflowError, RecursionError) as error:
        raise InputError(f"{source} is not a whole GGUF file; copy or download it again.") from error
    for name, (kind, numbers, offset) in tensors.items():
        if kind not in KEPT_TYPES:
            named = OTHER_TYPES.get(kind, f"type {kind}")
            kept = ", ".join(kept for kept, _ in KEPT_TYPES.values())
            raise InputError(f"{source}: {name} is {named}; only {kept} convert. Requantise it with llama.cpp.")
        if offset + numbers * KEPT_TYPES[kind][1] // BLOCK > size:
            raise InputError(f"{source} is cut short: it ends before {name}; copy or download it again.")


def _read_tensors(header: "_Header") -> dict[str, tuple[int, int, int]]:
    """Read a GGUF header (version 2 or 3); return each tensor's ggml type, how many numbers, and its offset."""
    if header.file.read(4) != b"GGUF" or header.number("I") not in (2, 3):
        raise ValueError("not GGUF 2 or 3")
    count, entries = header.number("Q"), header.number("Q")
    for _ in range(entries):
        header.text()
        header.skip_value(header.number("I"))
    tensors = {}
    for _ in range(count):
        name = header.text()
        numbers = math.prod(header.number("Q") for _ in range(header.number("I")))
        tensors[name] = (header.number("I"), numbers, header.number("Q"))
    return tensors


@dataclass(frozen=True)
class _Header:
    """GGUF's building blocks, little-endian."""

    file: BinaryIO

    def number(self, code: str) -> Any:
        (value,) = struct.unpack(f"<{code}", self.file.read(struct.calcsize(f"<{code}")))
        return value

    def text(self) -> str:
        length = self.number("Q")
        if length > MAX_HEADER_STRING:
            raise ValueError("a string that long cannot be right")
        return self.file.read(length).decode("utf-8", "replace")

    def skip_value(self, kind: int) -> None:
        if kind == STRING_VALUE:
            self.text()
        elif kind == ARRAY_VALUE:
            kind, length = self.number("I"), self.number("Q")
            for _ in range(length):
                self.skip_value(kind)
        elif kind in SCALAR_VALUES:
            self.number(SCALAR_VALUES[kind])
        else:
            raise ValueError(f"unknown kind of metadata {kind}")


def convert_gguf(source: Path, out: Path, *, own_tokenizer: bool = True, progress: Progress = NO_PROGRESS) -> None:
    """Write the mlx-lm model directory of a llama-family GGUF file into the existing directory ``out``.

    4-bit and 8-bit GGUF blocks are kept bit for bit: they are mlx's affine quantisation with group size 32.

    Args:
        source: the ``.gguf`` file.
        out: directory that receives config.json, ``model*.safetensors`` and the tokeniser's files.
        own_tokenizer: take the file's own tokeniser over.
        progress: called with (tensors done, tensors to do).

    Raises:
        InputError: not a GGUF file, not of the llama family, or with a tensor that has no place in llama.
    """
    arrays: Arrays
    metadata: dict[str, Any]
    try:
        arrays, metadata = mx.load(str(source), return_metadata=True)  # type: ignore[assignment]
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{source} cannot be read as GGUF ({error}); is the file complete?") from error
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise InputError(f"{source} holds a {architecture} model; only llama-family GGUF files convert.")
    config = model_config(metadata, arrays)
    weights = rename_tensors(arrays, config)
    if quantization := quantization_of(weights):
        config["quantization"] = config["quantization_config"] = quantization
        # fp32 norms between fp16 scales would make every activation fp32 on a GPU
        weights = {name: x.astype(mx.float16) if x.dtype == mx.float32 else x for name, x in weights.items()}
    sizes = {name: array.nbytes for name, array in weights.items()}
    write_weights(sizes, lambda names: ((name, weights.pop(name)) for name in names), out, progress)
    write_json(out / "config.json", config)
    if own_tokenizer:
        write_tokenizer(metadata, out)


def model_config(metadata: dict[str, Any], arrays: Arrays) -> dict[str, Any]:
    """Return mlx-lm's config.json for a llama-family GGUF file."""

    def number(name: str, default: Any = None) -> Any:
        if f"llama.{name}" in metadata:
            return metadata[f"llama.{name}"].item()
        if default is None:
            raise InputError(f"the GGUF file lacks the metadata key llama.{name}; it cannot be converted.")
        return default

    heads = number("attention.head_count")
    config: dict[str, Any] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": number("embedding_length"),
        "num_hidden_layers": number("block_count"),
        "intermediate_size": number("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "rms_norm_eps": decimal(number("attention.layer_norm_rms_epsilon")),
        "rope_theta": number("rope.freq_base", 10000.0),
        "max_position_embeddings": number("context_length"),
        "vocab_size": arrays["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in arrays,
    }
    for role in ("bos", "eos"):
        if f"tokenizer.ggml.{role}_token_id" in metadata:
            config[f"{role}_token_id"] = metadata[f"tokenizer.ggml.{role}_token_id"].item()
    return config


def quantization_of(weights: Arrays) -> dict[str, Any] | None:
    """Return mlx-lm's ``quantization`` entry: the commonest scheme, then every module that differs from it.

    mlx packs ``bits``-wide numbers into 32-bit words and keeps one scale for each ``group_size`` of them;
    GGUF blocks are 32 numbers long.
    """
    group_size = 32
    bits_of = {
        name.removesuffix(".scales"): 32
        * weights[name.replace(".scales", ".weight")].shape[1]
        // array.shape[1]
        // group_size
        for name, array in weights.items()
        if name.endswith(".scales")
    }
    if not bits_of:
        return None
    common = max(set(bits_of.values()), key=list(bits_of.values()).count)
    others = {module: {"group_size": group_size, "bits": bits} for module, bits in bits_of.items() if bits != common}
    return {"group_size": group_size, "bits": common, **others}


def decimal(value: float) -> float:
    """Undo what storing a short decimal as fp32 added (1e-05 was stored as 9.99999974737875e-06)."""
    return float(f"{value:.6g}")


def rename_tensors(arrays: Arrays, config: dict[str, Any]) -> Arrays:
    """Return the tensors under mlx-lm's names, query and key rows in half-split RoPE order."""
    weights = {}
    for name, array in arrays.items():
        stem, _, suffix = name.rpartition(".")
        block, _, inner = stem.removeprefix("blk.").partition(".")
        if stem in TOP_TENSORS:
            target = TOP_TENSORS[stem]
        elif inner in LAYER_TENSORS:
            target = f"model.layers.{block}.{LAYER_TENSORS[inner]}"
        else:
            raise InputError(f"tensor {name} has no place in a llama model; the GGUF file cannot be converted.")
        if inner in ("attn_q", "attn_k"):
            heads = config["num_attention_heads" if inner == "attn_q" else "num_key_value_heads"]
            weights[f"{target}.{suffix}"] = half_split_rows(array, heads)
        else:
            weights[f"{target}.{suffix}"] = array
    return weights


def half_split_rows(array: mx.array, heads: int) -> mx.array:
    """Reorder each head's rows from interleaved pairs (0, d/2, 1, d/2+1, ...) to halves.

    Works on weights and on their scales and biases alike, since only whole rows move.
    """
    rows, width = array.shape
    pairs = array.reshape(heads, rows // heads // 2, 2, width)  # (H, D/2, 2, W)
    return pairs.swapaxes(1, 2).reshape(rows, width)  # (H, 2, D/2, W) -> (H*D, W)


def write_tokenizer(metadata: dict[str, Any], out: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json for a byte-level BPE vocabulary.

    Raises:
        InputError: another kind of vocabulary or pre-tokeniser, whose splitting rules are not known here.
    """
    model, splitter = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if (model, splitter) != ("gpt2", "smollm"):
        raise InputError(
            f"the GGUF tokeniser {model}/{splitter} is not supported; only gpt2/smollm is; pass --tokenizer."
        )
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata["tokenizer.ggml.token_type"].tolist()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    tokenizer.save(str(out / "tokenizer.json"))

    def token_of(role: str) -> str:
        return tokens[metadata[f"tokenizer.ggml.{role}_token_id"].item()]

    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bool(metadata["tokenizer.ggml.add_bos_token"].item()),
        "bos_token": token_of("bos"),
        "eos_token": token_of("eos"),
        "unk_token": token_of("unknown"),
        "pad_token": token_of("padding"),
        "chat_template": metadata["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["llama.context_length"].item(),
    }
    write_json(out / "tokenizer_config.json", tokenizer_config)
