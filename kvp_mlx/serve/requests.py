"""What a route asks of the scheduler, and what comes back: the one interface between protocols and engine."""

from dataclasses import dataclass, field
from typing import Literal

from ..engine.dial import Dial


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; what the protocols share, in their conventions' units.

    Attributes:
        temperature: 0 is greedy.
        top_p: nucleus; 1 is all, 0 the likeliest token alone.
        top_k: 0 is all.
        min_p: share of the likeliest token's probability; 0 is all.
        seed: of this request alone; None draws one.
        repetition_penalty: as mlx-lm's; 1 is none.
        presence_penalty: as OpenAI's; 0 is none.
        frequency_penalty: as OpenAI's; 0 is none.
        logit_bias: added to the logits of token ids.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class GenerationRequest:
    """One answer to one prompt.

    Attributes:
        ids: the whole prompt.
        dial: how it is read.
        max_tokens: to generate at most; the context window may allow fewer.
        sampling: how tokens are chosen.
        stop: texts before the first of which the answer ends.
        top_logprobs: log-probabilities to report beside each token's own; None reports none at all.
        grammar: a JSON schema, as text, that the answer must follow (llguidance); None: free.
        stable_tokens: of ``ids``, how many of the first ones every turn of this conversation shares (system prompt
            and tools); they are read exactly and kept.
        reuse: whether to begin with what is held of the prompt, and to hold what is read; without, a request is
            answered on an empty cache of its own (the page's race).
        goes_on: whether the answer goes on from the prompt's text, so that a space at its beginning stays.
    """

    ids: list[int]
    dial: Dial
    max_tokens: int = 512
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    grammar: str | None = None
    stable_tokens: int = 0
    reuse: bool = True
    goes_on: bool = False


@dataclass(frozen=True)
class Progress:
    """How far a prompt is read: of ``total`` tokens ``processed`` are done, the ``cached`` ones included."""

    total: int
    cached: int
    processed: int
    time_ms: float


@dataclass(frozen=True)
class Token:
    """One generated token.

    Attributes:
        text: the next piece of text (may be empty; text that may begin a stop string waits).
        token: its id.
        logprob: its natural log-probability, where asked for.
        top: the likeliest token ids and their log-probabilities, best first, where asked for.
    """

    text: str
    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Usage:
    """What a request took; counts as ``engine.reply.Piece`` has them."""

    path: str
    prompt_tokens: int
    cached_tokens: int
    predicted_tokens: int
    recomputed_tokens: int
    exact_tokens: int
    completion_tokens: int
    queue_ms: float
    ttft_ms: float
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True)
class Finished:
    """The end of an answer: ``stop`` by an end token, a stop text (then named) or the grammar's end; or ``length``."""

    reason: Literal["stop", "length"]
    usage: Usage
    stop_text: str | None = None


Event = Progress | Token | Finished
