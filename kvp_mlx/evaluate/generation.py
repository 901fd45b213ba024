"""Tasks whose items get one greedy answer: how it is generated, and how that is measured."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..bundle.loading import KVPModel
from ..engine.prompt import encode
from .answer import Question, generate
from .task import Asked, Item, Measure, Row, Scores, row_of


@dataclass(frozen=True)
class Generation:
    """How answers of a task are generated and scored.

    Attributes:
        score: returns an answer's scores, the task's own first.
        stop: strings that end an answer.
        max_tokens: of an answer, at most.
        chat: whether the prompt goes through the chat template, as a user's message.
    """

    score: Callable[[Item, str], Scores]
    stop: tuple[str, ...]
    max_tokens: int
    chat: bool = False

    def encode(self, model: KVPModel, item: Item) -> list[int]:
        """Return the token ids of an item's prompt."""
        return encode(model, item.prompt, raw=not self.chat)


def measure_generation(form: Generation, max_tokens: int | None = None) -> Measure:
    """Return how a task with one greedy answer is measured."""

    def measure(model: KVPModel, asked: Sequence[Asked]) -> Iterator[Row]:
        questions = [Question(arm, form.encode(model, item)) for arm, item in asked]
        answers = generate(model, questions, stop=form.stop, max_tokens=max_tokens or form.max_tokens)
        for question, (_, item), (answer,) in zip(questions, asked, answers, strict=True):
            metrics = form.score(item, answer.text)
            score = next(iter(metrics.values()))
            yield row_of(score, metrics, answer.ttft_ms, len(question.ids), text=answer.text)

    return measure
