"""The options that several commands share, each declared once: types for typer, and what reads their values."""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import mlx.core as mx
import typer
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from transformers import PreTrainedTokenizerBase

from ..arms.kinds import forms
from ..bundle.loading import KVPModel, load
from ..bundle.named import ALIAS
from ..device.hosts import joined
from ..engine.dial import BESIDE_QUALITY, QUALITIES, Dial
from ..engine.dial import Path as PrefillPath
from ..engine.prompt import check_text
from ..engine.speculative import Draft, Drafting
from ..errors import InputError
from ..files import parse_json
from ..models.families import is_listed, kinds_of, kv_shapes
from ..models.kinds.attention import Attention
from .output import progress_bar, say

DEFAULT_MODEL = ALIAS
DEFAULT_EXACT_TAIL = QUALITIES["balanced"].exact_tail  # a question, and the chat template around it
DEMO_DOCUMENT = Path(__file__).parents[1] / "data" / "demo.md"
TEXT_HELP = "Text (.txt, .md, .jsonl, also .gz): file, folder, pattern, hub:NAME; repeatable."


class Dtype(StrEnum):
    """The values of ``--dtype``."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


READING, GENERATING = "How the prompt is read", "What is generated"
"""Headings of the help."""
LARGEST_SEED = 2**63 - 1

# What is run

Model = Annotated[str, typer.Option("--model", "-m", help="Bundle directory, Hub id or name ('kvp models ls').")]
AnyModel = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="Bundle, or any model that mlx-lm runs: directory, Hub id or name ('kvp models ls')."
    ),
]
ModelArgument = Annotated[str, typer.Argument(help="Bundle directory, Hub id or name ('kvp models ls').")]
AllowMismatch = Annotated[
    bool, typer.Option("--allow-base-mismatch", help="Run on a base that the bundle was not made for.")
]
OtherBase = Annotated[
    str | None,
    typer.Option("--base", help="A copy of the bundle's base, in 4 bits say, to run on: directory or Hub id."),
]
DtypeOption = Annotated[
    Dtype | None, typer.Option("--dtype", help="Type of the weights that are not quantised; default: as they are.")
]
QBits = Annotated[int | None, typer.Option("--q-bits", help="Quantise to 4 or 8 bits.")]
Arms = Annotated[
    str,
    typer.Option("--arms", help=f"Arms, comma-separated: {forms()}; mlx-lm and llama.cpp are timed only."),
]

# How a prompt is read

System = Annotated[str | None, typer.Option("--system", help="System prompt.")]
TemplateArguments = Annotated[
    str | None,
    typer.Option("--chat-template-args", help="JSON object for the chat template: '{\"enable_thinking\": false}'."),
]
Quality = Annotated[
    Literal["fast", "balanced", "exact"],
    typer.Option(
        "--quality",
        help="Sets the next five, as measured with the bundle if they were; what is given beside it wins.",
        rich_help_panel=READING,
    ),
]
PrefillOption = Annotated[
    PrefillPath | None,
    typer.Option(
        "--prefill",
        help="kvp: predict; full: the base reads all; auto: predict if long.",
        rich_help_panel=READING,
    ),
]
ExactHead = Annotated[
    int | None,
    typer.Option(
        "--exact-head", min=0, help="First prompt tokens that the base reads itself.", rich_help_panel=READING
    ),
]
ExactTail = Annotated[
    int | None,
    typer.Option(
        "--exact-tail",
        min=0,
        help="Prompt tokens before the last that the base reads itself.",
        rich_help_panel=READING,
    ),
]
Recompute = Annotated[
    float | None,
    typer.Option(
        "--recompute",
        min=0.0,
        max=1.0,
        help="Share of the prompt's tokens that the base reads itself, on average over layers, where it matters most "
        "(default: the bundle's).",
        rich_help_panel=READING,
    ),
]
RefineTokens = Annotated[
    int | None,
    typer.Option(
        "--refine-tokens",
        min=0,
        help="Predicted tokens that the base reads itself beside each one that it writes (by default 32, with "
        "--prefill kvp none); not with --kv-bits, --draft.",
        rich_help_panel=READING,
    ),
]
Cache = Annotated[
    str | None,
    typer.Option("--cache", help="Begin with a saved cache ('kvp cache build').", rich_help_panel=READING),
]
StepSize = Annotated[
    int | None, typer.Option("--prefill-step-size", min=1, max=2**31 - 1, help="Prompt tokens per chunk, every arm.")
]

# What is generated

MaxTokens = Annotated[
    int, typer.Option("--max-tokens", min=1, help="Tokens to generate at most.", rich_help_panel=GENERATING)
]
Temperature = Annotated[
    float,
    typer.Option("--temperature", "--temp", min=0.0, help="0 is greedy.", rich_help_panel=GENERATING),
]
TopP = Annotated[
    float,
    typer.Option("--top-p", min=0.0, max=1.0, help="Nucleus sampling; 1 is off.", rich_help_panel=GENERATING),
]
TopK = Annotated[
    int, typer.Option("--top-k", min=0, help="Sample from the K likeliest; 0 is off.", rich_help_panel=GENERATING)
]
MinP = Annotated[
    float,
    typer.Option(
        "--min-p",
        min=0.0,
        max=1.0,
        help="Leave out what is less likely than this share of the likeliest; 0 is off.",
        rich_help_panel=GENERATING,
    ),
]
RepetitionPenalty = Annotated[
    float,
    typer.Option(
        "--repetition-penalty",
        help="Divide the logits of the last 20 tokens by this; 1 is off.",
        rich_help_panel=GENERATING,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", min=0, max=LARGEST_SEED, help="Makes sampling repeatable.", rich_help_panel=GENERATING),
]
Stop = Annotated[
    list[str] | None,
    typer.Option("--stop", help="End the answer before this text; repeatable.", rich_help_panel=GENERATING),
]
KVBits = Annotated[
    int | None,
    typer.Option(
        "--kv-bits",
        help="Quantise the cache to 4 or 8 bits when the prompt has been read.",
        rich_help_panel=GENERATING,
    ),
]
DraftOption = Annotated[
    Draft,
    typer.Option(
        "--draft",
        help="Let the auxiliary (kinds model and pruned) propose tokens that the base reads at once; auto: as long as "
        "it is faster.",
        rich_help_panel=GENERATING,
    ),
]
DraftTokens = Annotated[
    int, typer.Option("--draft-tokens", min=1, help="Tokens it proposes at a time.", rich_help_panel=GENERATING)
]
AllowCode = Annotated[
    bool,
    typer.Option("--allow-code-execution", help="Run what the model writes, fenced in; nothing of it runs without."),
]

# The data, and how much of it

TextData = Annotated[list[str], typer.Option("--data", help=TEXT_HELP)]
TextOrSample = Annotated[list[str] | None, typer.Option("--data", help=f"{TEXT_HELP}  [default: a sample]")]
ItemData = Annotated[
    list[str], typer.Option("--data", help="JSONL (also .gz): file, folder, pattern, hub:NAME; repeatable.")
]
Limit = Annotated[
    int | None, typer.Option("--limit", min=1, help="Items at most; a larger limit extends a smaller one.")
]
Documents = Annotated[int, typer.Option("--limit", min=2, help="Documents at most.")]
DataSeed = Annotated[
    int,
    typer.Option("--seed", min=0, max=LARGEST_SEED, help="Orders the data, and draws what is drawn from it."),
]
PromptTokens = Annotated[int, typer.Option("--prompt-tokens", min=2, help="Prompt length.")]
ContinuationTokens = Annotated[int, typer.Option("--continuation-tokens", min=1, help="Tokens scored after it.")]
PromptLengths = Annotated[str, typer.Option("--prompt-tokens", help="Prompt lengths, comma-separated.")]
Rounds = Annotated[int, typer.Option("--rounds", min=1, help="Measured rounds; one more is discarded.")]

# Where the outcome goes

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else there.")]
OutDirectory = Annotated[Path, typer.Option("--out", help="Directory to write.")]
OutFile = Annotated[
    Path | None, typer.Option("--out", help="Also write the result here: JSON (of a bench by its name .csv or .md).")
]
Plot = Annotated[Path | None, typer.Option("--plot", help="Draw the result here (.png, .svg, .pdf).")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]


@dataclass
class Sampling:
    """How tokens are chosen.

    Attributes:
        seed: for the next sampler that is made; None leaves MLX's generator as it is.

    Raises:
        InputError: values that the command line's ranges let through (nan, a penalty of 0, an empty stop string).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            if not math.isfinite(value := getattr(self, name)) or value < 0:
                raise InputError(f"--{name.replace('_', '-')} is a number from 0 up, not {value}.")
        if self.repetition_penalty == 0:
            raise InputError("--repetition-penalty divides logits, so it cannot be 0; 1 is off.")
        if not all(self.stop):
            raise InputError("--stop is empty, which would end every answer at once; give it some text.")
        for text in self.stop:
            check_text(text)

    def options(self, vocabulary: int) -> dict[str, Any]:
        """Return what ``reply`` takes of this, by mlx-lm's samplers; seeds MLX's generator once.

        Args:
            vocabulary: how many tokens there are; ``top_k`` of all or more is off.
        """
        if self.seed is not None:
            mx.random.seed(self.seed)
            self.seed = None
        top_k = 1 if self.top_p == 0 else self.top_k if self.top_k < vocabulary else 0  # 0: the narrowest nucleus
        penalty = self.repetition_penalty
        processors: list[Callable[[mx.array, mx.array], mx.array]] = []
        if penalty != 1:
            processors = make_logits_processors(repetition_penalty=penalty)
        sampler = make_sampler(temp=self.temperature, top_p=self.top_p, min_p=self.min_p, top_k=top_k)
        return {"sampler": sampler, "logits_processors": processors, "stop": self.stop}


def parse_template_arguments(text: str | None) -> dict[str, Any]:
    """Return what ``--chat-template-args`` says.

    Raises:
        InputError: no JSON object, or one that would change what is rendered and not how.
    """
    try:
        arguments = {} if text is None else parse_json(text, "--chat-template-args")
    except InputError as error:
        raise InputError(f"--chat-template-args is a JSON object ('{{\"a\": false}}'): {error}") from error
    if not isinstance(arguments, dict):
        raise InputError(f"--chat-template-args is a JSON object ('{{\"a\": false}}'), not '{text}'.")
    ours = {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters, "messages"}
    if taken := sorted(ours & arguments.keys()):
        raise InputError(f"--chat-template-args cannot set {taken[0]}; leave it out.")
    return arguments


def open_model(name: str, load: Callable[..., KVPModel] = load, **options: Any) -> KVPModel:
    """Load a model, or this host's part of it, telling how far it is.

    Args:
        name: see ``bundle.loading.load``.
        load: that, or ``load_any``.
        options: of the call.
    """
    hosts = joined()
    with progress_bar(f"loading {name}, MB") as progress:
        if hosts is None:
            return load(name, progress=progress, **options)
        return hosts.together(lambda: load(name, progress=progress, hosts=hosts, **options))


def check_predictor(model: KVPModel, name: str, dial: Dial) -> None:
    """Refuse what has nothing to do on a model without a predictor.

    Raises:
        InputError: prediction is asked for, or exact tokens beside it.
    """
    if model.config.has_predictor:
        return
    given = {f"--{name.replace('_', '-')}": name in dial.given and getattr(dial, name) for name in BESIDE_QUALITY}
    given = {"--prefill kvp": dial.path == "kvp"} | given
    if idle := [option for option, value in given.items() if value]:
        raise InputError(
            f"{name} has no predictor, which {idle[0]} needs; leave it out, or {how_to_predict(model, name)}."
        )


def say_reading(model: KVPModel, name: str) -> None:
    """Say of a model without a predictor that it reads everything, and how it gets one."""
    if not model.config.has_predictor:
        remedy = how_to_predict(model, name)
        say(f"{name} has no predictor, so it reads every prompt in full; to change that, {remedy}.")


def how_to_predict(model: KVPModel, name: str) -> str:
    """Return what to do for a bundle of a model."""
    if not is_listed(model.base):
        return f"take a model of another architecture than {model.base_config['model_type']}"
    return f"run 'kvp train {name} --layers K --data TEXT --out DIR'"


def quantised_cache(model: KVPModel, bits: int | None) -> dict[str, Any]:
    """Return what ``reply`` takes of ``--kv-bits``.

    Raises:
        InputError: bits that nothing is quantised to, or a model whose heads do not come in groups of 32 or 64.
    """
    if bits is None:
        return {}
    if bits not in (4, 8):
        raise InputError(f"--kv-bits is 4 or 8, not {bits}.")
    if not is_listed(model.base):
        raise InputError("--kv-bits needs a model of a supported family; leave it out.")
    if others := sorted({kind.title for kind in kinds_of(model.base)} - {Attention.title}):
        raise InputError(f"--kv-bits is for {Attention.title} alone, not for {' and '.join(others)}; leave it out.")
    widths = {shape.head_dim for shape in kv_shapes(model.base)}
    sizes = [size for size in (64, 32) if not any(width % size for width in widths)]
    if not sizes:
        raise InputError(f"--kv-bits needs heads of a multiple of 32 features, not {max(widths)}; leave it out.")
    return {"kv_bits": bits, "kv_group_size": sizes[0], "quantized_kv_start": 0}


def drafting(model: KVPModel, draft: Draft, draft_tokens: int, kv_bits: int | None) -> dict[str, Any]:
    """Return what ``reply`` takes of ``--draft`` and ``--draft-tokens``.

    Raises:
        InputError: an auxiliary that cannot draft.
    """
    settled = Drafting(draft, draft_tokens).settled(model, is_quantised=kv_bits is not None)
    return {"draft": settled.who, "draft_tokens": settled.tokens}


def parse_numbers(text: str, option: str) -> list[int]:
    """Parse what an option says, whole numbers and commas.

    Raises:
        InputError: anything else, or a number below 0.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise InputError(f"{option} takes whole numbers and commas (128,512), not '{text}'.")
    return [int(part) for part in parts]
