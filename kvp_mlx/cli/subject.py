"""What ``kvp bench`` measures: a bundle or a published pair, and how long its prompts are."""

import random
from dataclasses import dataclass
from functools import partial

from ..arms.kinds import parse_arms
from ..bench.capacity import require_memory
from ..bench.precision import bundle_for_bench, preset_for_bench
from ..bench.ttft import Sweep
from ..bundle.loading import KVPModel
from ..device.hosts import is_launched
from ..device.streams import default_step_size
from ..errors import InputError
from .options import DEFAULT_MODEL, DEMO_DOCUMENT, Dtype, open_model, parse_numbers
from .output import progress_lines

RANDOM_PROMPT_TOKENS = 10_000


@dataclass(frozen=True)
class Subject:
    """What is measured: a bundle, or a published pair, and in which precision."""

    model: str
    preset: str | None
    dtype: Dtype | None
    q_bits: int | None
    base: str | None
    allow_base_mismatch: bool

    @property
    def name(self) -> str:
        """How the user called it."""
        return self.preset or self.model


def make_sweep(prompt_tokens: str, batch_size: int, arms: str, rounds: int, step_size: int | None) -> Sweep:
    """Return what the options of a measurement ask for.

    Raises:
        InputError: prompt lengths or arms that are none.
    """
    lengths = parse_lengths(prompt_tokens)
    return Sweep(lengths, batch_size, parse_arms(arms), rounds, step_size or default_step_size())


def parse_lengths(text: str) -> list[int]:
    """Parse prompt lengths such as ``128,512``.

    Raises:
        InputError: anything but whole numbers from 2 up and commas.
    """
    lengths = parse_numbers(text, "--prompt-tokens")
    if min(lengths) < 2:
        raise InputError(f"prompts have 2 tokens or more, not {min(lengths)}; change --prompt-tokens.")
    return lengths


def require_default_model(sweep: Sweep, subject: Subject) -> None:
    """Refuse to time an engine on the default model's file beside other models.

    Raises:
        InputError: that is asked for.
    """
    foreign = [arm.name for arm in sweep.arms if arm.kind.is_foreign]
    if foreign and subject.name != DEFAULT_MODEL:
        raise InputError(
            f"the arm {foreign[0]} reads the default model's file; leave out that arm, or take {DEFAULT_MODEL}."
        )


def load_subject(subject: Subject, sweep: Sweep) -> tuple[KVPModel, list[int]]:
    """Load or build what is measured, and the text of the prompts, unless the run would not fit into memory.

    Raises:
        InputError: too little memory, or ``--q-bits`` other than 4 or 8.
    """
    if subject.q_bits not in (None, 4, 8):
        raise InputError(f"--q-bits is 4 or 8, not {subject.q_bits}.")
    size = {"prompt_tokens": max(sweep.prompt_tokens), "batch": sweep.batch_size, "step_size": sweep.step_size}
    dtype, q_bits = None if subject.dtype is None else subject.dtype.value, subject.q_bits
    if subject.preset is not None:
        if subject.base is not None or subject.model != DEFAULT_MODEL:
            raise InputError("--preset builds a published pair with random weights; leave out --model and --base.")
        if is_launched():
            raise InputError("a published pair runs on one host; leave out --preset.")
        with progress_lines(f"building {subject.preset}"):
            loaded = preset_for_bench(subject.preset, dtype, q_bits, **size)
        return loaded, random.Random(0).choices(range(loaded.base.args.vocab_size), k=RANDOM_PROMPT_TOKENS)
    how = {"base_name": subject.base, "allow_base_mismatch": subject.allow_base_mismatch}
    loaded = open_model(subject.model, partial(bundle_for_bench, dtype=dtype, q_bits=q_bits), **how)
    require_memory(loaded, **size, loaded=True)
    return loaded, demo_ids(loaded)


def demo_ids(loaded: KVPModel) -> list[int]:
    """Return the shipped document as token ids."""
    return loaded.text_tokenizer.encode(DEMO_DOCUMENT.read_text(encoding="utf-8"))
