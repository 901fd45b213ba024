"""Answers that follow a JSON schema: llguidance says which tokens may come next, and the others are ruled out."""

import contextlib
import functools
import threading
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import InputError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

KEPT_SCHEMAS = 8
REMEDY = "install it with 'pip install kvp-mlx[serve]'"


class Grammars:
    """Compiles schemas for a model's tokeniser; may be used from any thread."""

    def __init__(self, tokenizer: TokenizerWrapper):
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._compiled = functools.lru_cache(KEPT_SCHEMAS)(self._compile)  # never advanced, only copied

    def compile(self, schema: str) -> "Grammar":
        """Return what holds one answer to a schema; the last few schemas are compiled once.

        Raises:
            InputError: a schema that cannot be followed, a tokeniser that llguidance cannot use, or no llguidance.
        """
        return Grammar(self._compiled(schema).deep_copy())

    def _compile(self, schema: str) -> "LLMatcher":
        try:
            from llguidance import LLMatcher
        except ImportError as error:
            raise InputError(f"JSON schemas need the package llguidance; {REMEDY}.") from error
        tokenizer = self._prepared()
        try:
            grammar = LLMatcher.grammar_from_json_schema(schema, {"whitespace_flexible": False})
        except ValueError as error:
            raise InputError(f"the JSON schema cannot be read: {_line(error)}.") from error
        matcher = LLMatcher(tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise InputError(f"the JSON schema cannot be followed: {_line(matcher.get_error())}.")
        return matcher

    def prepare(self) -> None:
        """Do what the first schema would wait for, where schemas can be followed; the whole process stands still.

        llguidance takes 0.3 s for 49,152 tokens and 0.9 s for 151,936 (AMD EPYC), and holds Python's lock all the time.
        """
        with contextlib.suppress(ImportError, InputError):
            self._prepared()

    def _prepared(self) -> "LLTokenizer":
        with self._lock:
            return self._llguidance

    @functools.cached_property
    def _llguidance(self) -> "LLTokenizer":
        from llguidance.hf import from_tokenizer

        try:
            return from_tokenizer(self._tokenizer._tokenizer, eos_token=sorted(self._tokenizer.eos_token_ids))
        except (ValueError, RuntimeError) as error:
            raise InputError(f"this model's tokeniser cannot follow a schema: {_line(error)}.") from error


class Grammar:
    """A logits processor that lets through what one answer may go on with."""

    def __init__(self, matcher: "LLMatcher"):
        self._matcher = matcher
        self._seen: int | None = None  # tokens of prompt and answer that it has heard of

    @property
    def is_complete(self) -> bool:
        """Whether nothing may follow."""
        return self._matcher.is_stopped()

    @property
    def error(self) -> str | None:
        """What made it give up (a schema too complex to follow any further); every token passes then."""
        return _line(self._matcher.get_error()) if self._matcher.is_error() else None

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Rule out the tokens that may not follow ``tokens`` (T,); the first call is for the prompt."""
        if self._seen is not None and not self.is_complete:
            new: Any = tokens[self._seen :].tolist()
            self._matcher.consume_tokens(new)
        self._seen = len(tokens)
        if self._matcher.is_error():
            return logits
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
        allowed = np.zeros(logits.shape[-1], bool)  # embeddings may be padded beyond the tokeniser's words
        count = min(len(bits), len(allowed))
        allowed[:count] = bits[:count]
        return mx.where(mx.array(allowed), logits, -mx.inf)


def _line(error: object) -> str:
    return " ".join(str(error).split())[:300].rstrip(".")
