"""Tokenisers for converted models: copied where they are already in a form that mlx-lm loads, else built.

Llama's ``tokenizer.model`` (SentencePiece BPE with byte fallback) becomes an equivalent ``tokenizer.json``.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from ..errors import InputError
from ..files import expanded, read_json, write_json
from ..models.loading import load_tokenizer, model_directory

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
SPACE = "\u2581"
PROBE = "  Two spaces, then\n\ttabs; numbers 1234 5, don't  stop: été, 你好, 🙂 "


def write_tokenizer(source: str, directory: Path) -> None:
    """Give a model directory a tokeniser.

    Args:
        source: a Llama ``tokenizer.model``, or a directory or Hub id with a tokeniser.
        directory: the model directory; its config tells how many tokens the model knows.

    Raises:
        InputError: no tokeniser there, one that cannot be read, or one with more tokens than the model.
    """
    path = expanded(source)
    if path.is_file():
        _write_sentencepiece(path, directory)
    else:
        found = model_directory(source)
        if not any((found / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            raise InputError(f"{source} holds no tokeniser (tokenizer.json or tokenizer.model); name another.")
        if (found / "tokenizer.json").exists() or not (found / "tokenizer.model").exists():
            copy_tokenizer(found, directory)
        else:
            _write_sentencepiece(found / "tokenizer.model", directory)


def copy_tokenizer(source: Path, directory: Path) -> None:
    """Copy a tokeniser's files, as many as there are."""
    for name in FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, directory / name)


def check_tokenizer(directory: Path) -> None:
    """Load a model directory's tokeniser, if it has one, as mlx-lm will.

    Raises:
        InputError: it cannot be loaded, or knows more tokens than the model.
    """
    vocab_size = read_json(directory / "config.json").get("vocab_size")
    if type(vocab_size) is not int:
        raise InputError(f"config.json's vocab_size is {str(vocab_size)[:40]}, no number; get the model again.")
    tokenizer = load_tokenizer(directory, {})
    if tokenizer is not None and len(tokenizer) > vocab_size:
        raise InputError(f"the tokeniser has {len(tokenizer)} tokens, the model only {vocab_size}; choose its own.")


def _write_sentencepiece(path: Path, directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json for a SentencePiece model."""
    from sentencepiece import SentencePieceProcessor

    try:
        original = SentencePieceProcessor(model_proto=path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).") from error
    except Exception as error:  # sentencepiece raises RuntimeError and others
        raise InputError(f"{path} is not a SentencePiece model; name Llama's tokenizer.model.") from error
    tokenizer = _llama_tokenizer(original)
    if tokenizer.encode(PROBE, add_special_tokens=False).ids != original.encode(PROBE):
        raise InputError(f"{path} splits text by other rules than Llama's; pass a directory with a tokenizer.json.")
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": original.id_to_piece(original.bos_id()),
        "eos_token": original.id_to_piece(original.eos_id()),
        "unk_token": original.id_to_piece(original.unk_id()),
        "clean_up_tokenization_spaces": False,
    }
    write_json(directory / "tokenizer_config.json", config)


@dataclass(frozen=True)
class Pieces:
    """A SentencePiece BPE vocabulary, wherever it was read.

    Attributes:
        texts: of all pieces, by id.
        scores: of all pieces; the higher, the earlier two pieces are joined into this one.
        unknown: id of the piece for what nothing else fits.
        special: ids that text never becomes, the unknown piece's among them.
        whole: ids that no two pieces are joined into: special ones, bytes, unused and user-defined ones.
    """

    texts: list[str]
    scores: list[float]
    unknown: int
    special: set[int]
    whole: set[int]


def _pieces(original: Any) -> Pieces:
    """Return what a SentencePieceProcessor knows."""
    ids = range(len(original))
    special = {i for i in ids if original.is_control(i) or original.is_unknown(i)}
    return Pieces(
        texts=[original.id_to_piece(i) for i in ids],
        scores=[original.get_score(i) for i in ids],
        unknown=original.unk_id(),
        special=special,
        whole=special | {i for i in ids if original.is_byte(i) or original.is_unused(i)},
    )


def _llama_tokenizer(original: Any) -> Any:
    """Build Llama's: a space before the text, BOS before everything."""
    bos = original.id_to_piece(original.bos_id())
    tokenizer = sentencepiece_tokenizer(_pieces(original))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, original.bos_id())]
    )
    return tokenizer


def sentencepiece_tokenizer(pieces: Pieces, *, prefix: bool = True) -> Any:
    """Build a tokeniser: spaces as pieces, BPE, unknown characters as bytes; ``prefix``: a space before the text."""
    vocabulary = {piece: i for i, piece in enumerate(pieces.texts)}
    unknown = pieces.texts[pieces.unknown]
    tokenizer = Tokenizer(models.BPE(vocabulary, _merges(pieces), unk_token=unknown, fuse_unk=True, byte_fallback=True))
    before = [normalizers.Prepend(SPACE)] if prefix else []
    after = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )
    special = [AddedToken(pieces.texts[i], normalized=False, special=True) for i in sorted(pieces.special)]
    tokenizer.add_special_tokens(special)
    return tokenizer


def _merges(pieces: Pieces) -> list[tuple[str, str]]:
    """Return every way to join two pieces into a third, the best-scored results first."""
    ordinary = {piece: i for i, piece in enumerate(pieces.texts) if i not in pieces.whole}
    found = [
        (-pieces.scores[i], ordinary[left], ordinary[right], left, right)
        for piece, i in ordinary.items()
        for left, right in ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        if left in ordinary and right in ordinary
    ]
    return [(left, right) for *_, left, right in sorted(found)]
