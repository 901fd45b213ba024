"""Tokenisers inside GGUF files: byte-level BPE by a table of splitting rules, and Llama's SentencePiece."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ..errors import InputError
from ..files import write_json
from .gguf_config import token_ids
from .gguf_file import GGUFFile, shown
from .tokenizer import Pieces, sentencepiece_tokenizer

UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 2, 3, 4, 5, 6  # tokenizer.ggml.token_type

STRICT = ("<unk>", "<s>", "<|endoftext|>")
"""Of the special tokens of Phi-3's SentencePiece tokeniser, those that leave the white space behind them alone."""

# Published splitting rules, as in the models' own tokenizer.json
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN_2 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_3 = QWEN_2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
GPT_4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]*[{LOWER}]+{CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]+[{LOWER}]*{CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Splitting:
    """How text is cut before pairs are merged.

    Attributes:
        rules: regular expressions; each cuts what the ones before it left. None: digits alone, then GPT-2's.
        nfc: text is composed first.
        ignore_merges: a piece that is a token is not merged.
        adds_bos: unless the file says otherwise.
    """

    rules: tuple[str, ...] | None
    nfc: bool = False
    ignore_merges: bool = False
    adds_bos: bool = False


SPLITTINGS = {
    "smollm": Splitting(None),
    "gpt-2": Splitting((GPT_2,)),
    "default": Splitting((r"[\p{P}\$\+<=>\^~\|]+", GPT_2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "qwen2": Splitting((QWEN_2,), nfc=True),
    "llama-bpe": Splitting((LLAMA_3,), ignore_merges=True, adds_bos=True),
    "gpt-4o": Splitting((GPT_4O,)),
}
"""By ``tokenizer.ggml.pre``; of ``default``, llama.cpp's own rules."""


def build_tokenizer(file: GGUFFile, context_length: int) -> tuple[Tokenizer, dict[str, Any]]:
    """Return a GGUF file's tokeniser and its tokenizer_config.json.

    Raises:
        InputError: another kind of vocabulary or pre-tokeniser, whose rules are not known here, or a damaged one.
    """
    model = file.text("tokenizer.ggml.model")
    tokens, kinds = file.items("tokenizer.ggml.tokens", str), file.items("tokenizer.ggml.token_type", int)
    if len(kinds) != len(tokens) or len(set(tokens)) != len(tokens):
        what = "lists one twice" if len(kinds) == len(tokens) else f"has kinds of {len(kinds)}"
        raise InputError(f"{file.path}: the tokeniser has {len(tokens)} tokens and {what}; download it again.")
    try:
        if model == "gpt2":
            tokenizer, adds_bos = _byte_level(file, tokens, kinds)
        elif model == "llama":
            tokenizer, adds_bos = _sentencepiece(file, tokens, kinds), True
        else:
            raise InputError(
                f"{file.path}: the GGUF tokeniser {shown(model)[1:-1]} is not known here (gpt2 and llama are); pass "
                "--tokenizer."
            )
    except InputError:
        raise
    except Exception as error:  # tokenizers raises plain Exception
        raise InputError(f"{file.path}: the tokeniser cannot be built ({error}); download it again.") from error
    return tokenizer, _finish(file, tokenizer, tokens, adds_bos, context_length)


def write_tokenizer(parts: tuple[Tokenizer, dict[str, Any]], out: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    tokenizer, config = parts
    tokenizer.save(str(out / "tokenizer.json"))
    write_json(out / "tokenizer_config.json", config)


def _byte_level(file: GGUFFile, tokens: list[str], kinds: list[int]) -> tuple[Tokenizer, bool]:
    name = file.text("tokenizer.ggml.pre")
    if name not in SPLITTINGS:
        raise InputError(
            f"{file.path}: the GGUF tokeniser gpt2/{shown(name)[1:-1]} is not known here ({', '.join(SPLITTINGS)} "
            "are); pass --tokenizer."
        )
    splitting = SPLITTINGS[name]
    merges = [tuple(merge.split(" ")) for merge in file.items("tokenizer.ggml.merges", str)]
    if any(len(merge) != 2 for merge in merges):
        raise InputError(f"{file.path}: tokenizer.ggml.merges holds what is no pair of tokens; download it again.")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    bpe = models.BPE(vocabulary, merges)
    if splitting.ignore_merges:
        bpe.ignore_merges = True
    tokenizer = Tokenizer(bpe)
    if splitting.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(splitting)
    tokenizer.decoder = decoders.ByteLevel()
    _add_tokens(tokenizer, tokens, kinds)
    return tokenizer, splitting.adds_bos


def _pre_tokenizer(splitting: Splitting) -> Any:
    if splitting.rules is None:
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    cuts = [pre_tokenizers.Split(Regex(rule), "isolated") for rule in splitting.rules]
    return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _sentencepiece(file: GGUFFile, tokens: list[str], kinds: list[int]) -> Tokenizer:
    scores = file.items("tokenizer.ggml.scores", float)
    if len(scores) != len(tokens):
        raise InputError(f"{file.path}: the tokeniser has {len(tokens)} tokens and {len(scores)} scores.")
    unknown = token_ids(file, len(tokens), "unknown") or [i for i, kind in enumerate(kinds) if kind == UNKNOWN]
    if not unknown:
        raise InputError(f"{file.path}: the SentencePiece tokeniser names no unknown token; pass --tokenizer.")
    special = {i for i, kind in enumerate(kinds) if kind in (UNKNOWN, CONTROL)}
    pieces = Pieces(
        texts=tokens,
        scores=scores,
        unknown=unknown[0],
        special=special,
        whole=special | {i for i, kind in enumerate(kinds) if kind in (UNUSED, BYTE, USER_DEFINED)},
    )
    tokenizer = sentencepiece_tokenizer(pieces, prefix=file.flag("tokenizer.ggml.add_space_prefix", True))
    _add_tokens(tokenizer, tokens, kinds, takes_spaces=file.text("general.architecture") == "phi3")
    return tokenizer


def _add_tokens(tokenizer: Tokenizer, tokens: list[str], kinds: list[int], *, takes_spaces: bool = False) -> None:
    """Let control tokens and user-defined ones be found in text before it is cut.

    With ``takes_spaces`` they take the white space behind them, as Phi-3's do, for which GGUF has no field.
    """
    for kind in (CONTROL, USER_DEFINED):
        added = [
            AddedToken(token, normalized=False, special=kind == CONTROL, rstrip=takes_spaces and token not in STRICT)
            for token, own in zip(tokens, kinds, strict=True)
            if own == kind
        ]
        (tokenizer.add_special_tokens if kind == CONTROL else tokenizer.add_tokens)(added)


def _finish(
    file: GGUFFile, tokenizer: Tokenizer, tokens: list[str], adds_bos: bool, context_length: int
) -> dict[str, Any]:
    """Let encoding add what the file says, and return tokenizer_config.json; what the file leaves out is left out."""

    def token_of(role: str) -> str | None:
        found = token_ids(file, len(tokens), role)
        return tokens[found[0]] if found else None

    bos, eos = token_of("bos"), token_of("eos")
    if eos is None:
        raise InputError(f"{file.path} lacks the metadata key tokenizer.ggml.eos_token_id; pass --tokenizer.")
    before = [bos] if file.flag("tokenizer.ggml.add_bos_token", adds_bos) else []
    after = [eos] if file.flag("tokenizer.ggml.add_eos_token", False) else []
    if before == [None]:
        raise InputError(f"{file.path} lacks the metadata key tokenizer.ggml.bos_token_id; pass --tokenizer.")
    around = [token for token in (*before, *after) if token is not None]
    if around:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after], special_tokens=[(token, tokens.index(token)) for token in set(around)]
        )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bool(before),
        "add_eos_token": True if after else None,
        "bos_token": bos,
        "eos_token": eos,
        "unk_token": token_of("unknown"),
        "pad_token": token_of("padding"),
        "chat_template": file.text("tokenizer.chat_template", "") or None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
    }
    return {key: value for key, value in config.items() if value is not None}
