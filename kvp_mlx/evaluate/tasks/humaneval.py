"""HumanEval: programs that pass their tests."""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from keyword import iskeyword

import mlx.core as mx
from mlx_lm.sample_utils import apply_top_p

from ...bundle.loading import KVPModel
from ...engine.clock import Chooser
from ...engine.prompt import encode
from ...errors import InputError
from ..answer import Question, generate
from ..records import TEXT, Kind, hash_of, hashes, read_records
from ..rows import BATCH
from ..sandbox import Judged, passes
from ..task import Asked, Item, Measure, Place, Row, Run, Task, row_of

TESTS: Kind = ("source text that defines check", lambda value: isinstance(value, str) and "def check(" in value)
NAME: Kind = (
    "a function's name",
    lambda value: isinstance(value, str) and value.isidentifier() and not iskeyword(value),
)
STOP = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\nassert ")
MAX_TOKENS = 256
TOP_P = 0.95
REQUEST = """Complete this Python function. Answer with the whole function, and whatever it needs, in one code block.

```python
{prompt}```"""
BLOCK, BLOCK_END = "```python\n", "\n```"
CHAT_MAX_TOKENS = 512
"""Of an answer that repeats the function's head and docstring."""


def items(places: Sequence[str]) -> list[Item]:
    """Return the problems, in their own order.

    Raises:
        InputError: records of other tasks, or a prompt that does not begin the function that is to be tested.
    """
    fields = {"task_id": TEXT, "prompt": TEXT, "test": TESTS, "entry_point": NAME}
    records = read_records(places, fields)
    for record in records:
        if f"def {record['entry_point']}(" not in record["prompt"]:
            raise InputError(f"{record['task_id'][:80]}: its prompt begins no function {record['entry_point'][:80]}.")
    return [
        Item(record["task_id"], record["prompt"], extra={name: record[name] for name in fields}) for record in records
    ]


def prompt_ids(model: KVPModel, item: Item, *, chat: bool = False) -> list[int]:
    """Return the token ids of a problem: as it stands, or asked in a chat whose answer has begun with a code block."""
    if not chat:
        return encode(model, item.prompt, raw=True)
    begun = model.text_tokenizer.encode(BLOCK, add_special_tokens=False)  # no second BOS
    return encode(model, [*encode(model, REQUEST.format(prompt=item.prompt)), *begun])


def program(item: Item, completion: str, *, chat: bool = False) -> Judged:
    """Return the program that fails unless the completion is right.

    The tests may use what the problem defines before the function that is asked for; so may an answer in a chat, which
    repeats the function's head.
    """
    entry_point = item.extra["entry_point"]
    given = item.prompt[: max(0, item.prompt.rfind(f"def {entry_point}("))]
    return Judged((given if chat else item.prompt) + completion, entry_point, given, item.extra["test"])


def measure_completions(samples: int, temperature: float, seed: int, *, chat: bool = False) -> Measure:
    """Return how completions are measured: generated, and run in ``sandbox``.

    Args:
        samples: completions per problem; one is greedy, more are drawn with top-p ``TOP_P``.
        temperature: of the drawing; 0 is greedy.
        seed: of the drawing, which every problem, arm and sample has its own of.
        chat: whether problems are asked through the chat template.
    """
    stop, max_tokens = ((BLOCK_END,), CHAT_MAX_TOKENS) if chat else (STOP, MAX_TOKENS)

    def measure(model: KVPModel, asked: Sequence[Asked]) -> Iterator[Row]:
        for start in range(0, len(asked), step := max(1, BATCH // samples)):
            batch = asked[start : start + step]
            questions = [Question(arm, prompt_ids(model, item, chat=chat), samplers_of(item)) for arm, item in batch]
            found = generate(model, questions, stop=stop, max_tokens=max_tokens)
            for question, (_, item), answers in zip(questions, batch, found, strict=True):
                texts = [answer.text for answer in answers]
                passed = [passes(program(item, text, chat=chat)) for text in texts]
                metrics = {f"pass@{k}": pass_at_k(samples, sum(passed), k) for k in (1, 10, 100) if k <= samples}
                prompt_tokens, ttft_ms = len(question.ids), answers[0].ttft_ms
                yield row_of(metrics["pass@1"], metrics, ttft_ms, prompt_tokens, passed=passed, texts=texts)

    def samplers_of(item: Item) -> tuple[Chooser | None, ...]:
        if samples == 1 or temperature == 0:
            return (None,) * samples
        seeds = [hash_of(f"{seed} {item.id} {number}") for number in range(samples)]
        return tuple(seeded_sampler(temperature, each) for each in seeds)

    return measure


def seeded_sampler(temperature: float, seed: int) -> Chooser:
    """Return a sampler with top-p 0.95 and random numbers of its own, so that it draws alike in any batch."""
    keys = [mx.random.key(seed)]

    def sample(logprobs: mx.array) -> mx.array:
        keys[0], key = mx.random.split(keys[0])
        return mx.random.categorical(apply_top_p(logprobs, TOP_P) / temperature, key=key)

    return sample


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Return the unbiased estimate of the chance that one of k samples passes (arXiv 2107.03374, section 2.1)."""
    return 1.0 - math.comb(samples - passed, k) / math.comb(samples, k)


def run(
    data: list[str],
    samples: int = 1,
    temperature: float = 0.6,
    chat: bool = False,
    limit: int | None = None,
    seed: int = 0,
) -> Run:
    """HumanEval: programs that pass their tests, pass@1 and pass@10.

    They run fenced in, apart from their tests, with limits on time, memory, processes, files and network.
    """
    options = {"data": hashes(data), "samples": samples, "temperature": temperature} | ({"chat": True} if chat else {})
    measure, ids = measure_completions(samples, temperature, seed, chat=chat), partial(prompt_ids, chat=chat)
    return Run("humaneval", lambda _: items(data), measure, ids, limit, seed, options)


PLACE = Place(
    "humaneval", {"data": "humaneval.jsonl.gz"}, {"samples": 1, "temperature": 0.0, "chat": True, "limit": 164}
)
TASK = Task("humaneval", "pass@1", run, places=(PLACE,), runs_code=True)
