"""lm-evaluation-harness under any arm (extra ``eval``): an adapter on mlx-lm's own, and our task files."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..arms.arm import Arm
from ..arms.kinds import parse_arm, with_dial
from ..bundle.loading import KVPModel
from ..errors import InputError
from ..files.directories import scratch_directory
from ..models.families import Cache
from .answer import Question, generate
from .likelihood import Scoring, all_predicted, check_continuations, predicted_losses, prefix_token, split_choices
from .records import read_records

try:
    from jinja2 import TemplateError
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager
    from mlx_lm.evaluate import MLXLM
except ImportError as error:
    raise InputError(f"lm-evaluation-harness is missing ({error}); pip install 'kvp-mlx[eval]'.") from error

TASKS = Path(__file__).parent / "lm_eval_tasks"
MAX_TOKENS = 256


class KVPLM(MLXLM):
    """A bundle for lm-evaluation-harness.

    Args:
        model: the bundle.
        arm: how prompts are read (``kvp_mlx.arms``).
        scoring: log-likelihoods of continuations: ``continuation`` (the arm reads the context, the base goes on) or
            ``predicted`` (arm kvp: the paper's, all keys and values are predicted).
    """

    def __init__(self, model: KVPModel, arm: Arm | str = "kvp", scoring: str = Scoring.continuation):
        LM.__init__(self)  # MLXLM's own would load a model
        arm = parse_arm(arm) if isinstance(arm, str) else arm
        self.arm = with_dial(arm, all_predicted([arm])) if scoring == Scoring.predicted else arm
        self.model = model
        self.scoring = scoring
        self.tokenizer = model.text_tokenizer
        self.use_chat_template = False
        self._model = self.arm.networks(model)[-1]
        self._max_tokens = model.context_length
        self._batch_size = 1
        self._prefix: tuple[int, ...] = ()

    def _process_prompt(self, prompt: Sequence[int], step_size: int = 0) -> tuple[mx.array, Cache]:
        """Return log-probabilities (1, vocabulary) of the token after a prompt, and the arm's cache of it."""
        ids = mx.array([list(prompt)])
        network, cache = self.arm.read(self.model, ids)
        logits = network(ids[:, -1:], cache=cache)[:, -1]
        return nn.log_softmax(logits.astype(mx.float32)), cache

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Return each continuation's log-likelihood, and whether it is the greedy one.

        Raises:
            InputError: a continuation of no tokens, or one that does not fit the context window after its context.
        """
        split = [split_choices(self.model, context, [rest]) for context, rest in (one.args for one in requests)]
        for prompt, continuations in split:
            check_continuations(self.model, prompt, continuations)
        if self.scoring == Scoring.predicted and self.arm.kind.predicts:
            found = [predicted_losses(self.model, prompt, rest) for prompt, (rest,) in split]
            return [(-float(losses.sum()), is_greedy) for losses, is_greedy in found]
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for is_empty in (False, True):
            numbers = [n for n, one in enumerate(requests) if is_empty == (not self.tokenizer.encode(one.args[0]))]
            self._prefix = (prefix_token(self.model),) if is_empty and numbers else ()
            for number, result in zip(numbers, super().loglikelihood([requests[n] for n in numbers]), strict=True):
                results[number] = result
        self._prefix = ()
        return results

    def _tokenize(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Return token ids of texts, after the token that stands for an empty context where there is one."""
        return [(*self._prefix, *ids) for ids in super()._tokenize(texts)]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Return each text's log-likelihood, of the arms that are models of their own.

        Raises:
            InputError: the arm differs from the full model in how it reads a prompt, and here is none.
        """
        if self.arm.kind.predicts or self.arm.kind.prunes:
            raise InputError(f"{self.arm.name} reads prompts, and these texts have none; take 'kvp eval perplexity'.")
        likelihoods: list[float] = super().loglikelihood_rolling(requests)
        return likelihoods

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return each prompt's greedy answer up to the first stop string."""
        answers = []
        for request in requests:
            prompt, options = request.args
            until = options.get("until") or []
            ids = self.tokenizer.encode(prompt) or [prefix_token(self.model)]
            ((answer,),) = generate(
                self.model,
                [Question(self.arm, ids)],
                stop=[until] if isinstance(until, str) else until,
                max_tokens=options.get("max_gen_toks") or MAX_TOKENS,
            )
            answers.append(answer.text)
        return answers


def run_harness(
    lm: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    shots: int | None = None,
    data: Sequence[str] = (),
    allow_code_execution: bool = False,
) -> dict[str, Any]:
    """Return lm-evaluation-harness's results of some tasks, with the samples.

    Args:
        lm: the adapter.
        tasks: names of its own tasks, or of ours (``kvp_triviaqa``, ``kvp_humaneval``).
        limit: documents per task at most.
        shots: solved examples (default: the task's).
        data: JSONL files in place of the tasks' own data.
        allow_code_execution: let tasks run what the model wrote.

    Raises:
        InputError: an unknown task, or data that cannot be had.
    """
    manager = task_manager(with_its_own=not set(tasks) <= {path.stem for path in TASKS.glob("*.yaml")})
    if unknown := [name for name in tasks if name not in manager.all_tasks]:
        raise InputError(f"lm-evaluation-harness knows no task '{unknown[0]}'; ours are kvp_triviaqa, kvp_humaneval.")
    with scratch_directory() as folder:
        files = [copied(data, folder)] if data else []
        chosen = [with_local_data(manager, name, files, folder) if files else name for name in tasks]
        try:
            return simple_evaluate(
                lm,
                tasks=chosen,
                task_manager=manager,
                limit=limit,
                num_fewshot=shots,
                confirm_run_unsafe_code=allow_code_execution,
                bootstrap_iters=0,
                verbosity="ERROR",
            )
        except (OSError, ConnectionError, ValueError, AssertionError, KeyError, TemplateError) as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise InputError(f"lm-evaluation-harness cannot run {', '.join(tasks)} ({reason}); try --data.") from error


def copied(data: Sequence[str], folder: Path) -> str:
    """Write the records of JSONL files to one that any reader takes (no byte order mark); returns its place."""
    path = folder / "data.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for record in read_records(data, {}):
            file.write(json.dumps(record) + "\n")
    return str(path)


@functools.cache
def task_manager(with_its_own: bool) -> TaskManager:
    """Return the index of our tasks, and of the harness's thousands if need be (seconds)."""
    return TaskManager(include_path=str(TASKS), include_defaults=with_its_own)


def with_local_data(manager: TaskManager, task: str, files: list[str], folder: Path) -> str:
    """Write a task file that takes in a task and puts local JSONL files in place of its data; returns its place."""
    changes = {
        "include": str(manager.task_index[task].yaml_path),
        "task": task,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": files}},
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
        "fewshot_split": "test",
    }
    path = folder / f"{task}.yaml"
    path.write_text(json.dumps(changes), encoding="utf-8")  # JSON is YAML
    return str(path)
