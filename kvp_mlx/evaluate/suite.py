"""All tasks on one bundle, in order, beside token pruning at equal TTFT.

Resumable, and for any number of processes at once: a process takes the first task whose lock is free, so that two on
one folder share the work between them; a killed process's locks are free again. Rows are kept under our
version, the weights, the share that is recomputed and the machine: others begin anew.
"""

import contextlib
import fcntl
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import __version__
from ..arms.arm import Arm, parse_arm, parse_arms
from ..arms.work import arm_work
from ..bundle.loading import KVPModel
from ..engine.prefill import Progress
from ..errors import InputError
from ..files import write_json
from . import runs
from .match import match, match_by_work
from .measures import encode_item
from .runs import Run, carry_out, items_of, setting
from .tasks import GENERATIONS, Item

ARMS = "full,kvp,kvp-64,auxiliary"
TARGETS = ("kvp", "kvp-64")
MATCH_ROUNDS = 5
NO_GAIN = 0.9
"""A target's share of full prefill's work above which nothing is pruned to match it: its prompts are too short."""
TIMED_ITEMS = 3
LENGTHS, DEPTHS = [256, 512, 1024], [0.0, 0.25, 0.5, 0.75, 1.0]


@dataclass(frozen=True)
class Entry:
    """One task of the suite.

    Attributes:
        name: of its files.
        run: the task on its data.
        is_matched: whether token pruning is measured beside it.
        dials: further arms of the bundle, for the picture of ``kvp eval pareto``.
    """

    name: str
    run: Run
    is_matched: bool = True
    dials: tuple[str, ...] = ()


def plan(data: Path, limit: int | None = None, names: Sequence[str] | None = None) -> list[Entry]:
    """Return the tasks in the order of what they tell, on the data files of the README's names.

    Small bases get nothing right, or almost, in the last ones. There, and where answers are long, only the bundle's own
    arms are measured.

    Args:
        data: folder of the files.
        limit: items of each at most, where that is fewer than its own.
        names: only these (default: all).

    Raises:
        InputError: a file is missing, or no task has such a name.
    """

    def file(name: str) -> list[str]:
        return [str(data / name)]

    entries: dict[str, Callable[[], Entry]] = {
        "squad": lambda: Entry(
            "squad", runs.squad(file("squad_dev_half.jsonl.gz"), None, 500, 0), dials=("kvp-0-0", "kvp-0-0.5")
        ),
        "needle": lambda: Entry("needle", runs.needle(None, LENGTHS, DEPTHS, 60, 0)),
        "chat": lambda: Entry("chat", runs.chat(file("mt_bench_questions.jsonl.gz"), 80, 0)),
        "arc_easy": lambda: Entry("arc_easy", runs.mcq(file("arc_easy.jsonl.gz"), "continuation", 500, 0)),
        "piqa": lambda: Entry("piqa", runs.mcq(file("piqa.jsonl.gz"), "continuation", 500, 0)),
        "triviaqa": lambda: Entry("triviaqa", runs.triviaqa(file("triviaqa_validation.jsonl.gz"), 1, None, 500, 0)),
        "humaneval": lambda: Entry(
            "humaneval", runs.humaneval(file("humaneval.jsonl.gz"), 1, 0.0, 164, 0), is_matched=False
        ),
        "perplexity": lambda: Entry("perplexity", runs.perplexity(file("wikitext2_test_raw.txt.gz"), 384, 128, 60, 0)),
        "quote": lambda: Entry("quote", runs.quote(None, LENGTHS, DEPTHS, 30, 0), is_matched=False),
        "gsm8k": lambda: Entry("gsm8k", runs.gsm8k(file("gsm8k_test.jsonl.gz"), 1, None, 500, 0), is_matched=False),
    }
    if unknown := set(names or ()) - set(entries):
        raise InputError(f"no task '{min(unknown)}'; tasks are {', '.join(entries)}.")
    chosen = [make() for name, make in entries.items() if names is None or name in names]
    if limit is None:
        return chosen
    return [replace(entry, run=replace(entry.run, limit=min(limit, entry.run.limit or limit))) for entry in chosen]


def run_suite(
    entries: Sequence[Entry],
    model: KVPModel,
    name: str,
    results: Path,
    records: Path,
    *,
    progress: Progress = lambda done, total: None,
    say: Callable[[str], None] = lambda text: None,
) -> list[str]:
    """Carry out every entry that no other process is at, writing ``results/NAME.json`` as each is done.

    Args:
        entries: see ``plan``.
        model: the bundle.
        name: how it was named when it was loaded.
        results: folder of the documents, whole or absent.
        records: folder of the rows and of the matched arms, gone on with.
        progress: called with (rows done, rows in all) of the entry at hand.
        say: told what begins and ends.

    Returns:
        The names of the entries that were carried out.
    """
    folder, done = records_of(model, name, records), []
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be made ({error.strerror}); choose another --records.") from error
    for entry in entries:
        with claimed(folder / f"{entry.name}.lock") as is_free:
            if not is_free:
                say(f"{entry.name}: another process is at it")
                continue
            say(f"{entry.name}: begins")
            matched = matched_arms(entry, model, folder)
            arms = arms_of(entry, model, matched)
            log = folder / f"{entry.name}.jsonl"
            document = carry_out(entry.run, model, name, arms, log=log, progress=progress)
            document |= {"matched": matched, "dials": [arm.name for arm in arms if arm.name in entry.dials]}
            write_unless_known(results / f"{entry.name}.json", document)
            say(f"{entry.name}: {document['n']} items, {results / f'{entry.name}.json'}")
            done.append(entry.name)
    return done


def write_unless_known(path: Path, document: dict[str, Any]) -> None:
    """Write a task's document, unless it is there already: then it keeps the machine and commit that measured it."""
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(path.read_text(encoding="utf-8"))
        if known | {"machine": None} == document | {"machine": None}:
            return
    write_json(path, document)


def records_of(model: KVPModel, name: str, records: Path) -> Path:
    """Return the folder of a bundle's rows, named by what they depend on: version, weights, machine (``setting``)."""
    digest = hashlib.sha256(json.dumps(setting(model, name)).encode()).hexdigest()[:12]
    return records / f"{__version__}-{digest}-{model.recompute:g}"


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Hold a lock that ends with the process; yields False where another process holds it."""
    with open(path, "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def matched_arms(entry: Entry, model: KVPModel, folder: Path) -> list[dict[str, Any]]:
    """Return the entry's token pruning at equal TTFT (see ``match``), measured once and kept."""
    path = folder / f"{entry.name}.arms.json"
    if not path.exists():
        prompts = typical_prompts(entry, model)
        targets = gaining_targets(entry, model, prompts)
        write_json(path, [row for target in targets for row in match(model, target, prompts)])
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return found


def gaining_targets(entry: Entry, model: KVPModel, prompts: Sequence[list[int]]) -> list[Arm]:
    """Return the arms that something is to be as fast as: of matched entries, those that save work at all."""
    tokens = len(prompts[0])
    full = arm_work(model, parse_arm("full"), tokens).flops
    targets = [parse_arm(name) for name in TARGETS] if entry.is_matched else []
    return [target for target in targets if arm_work(model, target, tokens).flops < NO_GAIN * full]


def arms_of(entry: Entry, model: KVPModel, matched: Sequence[dict[str, Any]]) -> list[Arm]:
    """Return the bundle's own arms, those matched to them, and the entry's dials if the bundle can recompute."""
    dials = () if model.config.predictor.recompute is None else entry.dials
    return parse_arms(",".join([ARMS, *(row["arm"] for row in matched if row["arm"]), *dials]))


def typical_prompts(entry: Entry, model: KVPModel) -> list[list[int]]:
    """Return the token ids of the prompts nearest to the entry's median length, that one first."""
    items = items_of(entry.run, model)
    prompts = [prompt_ids(entry, model, item) for item in items]
    middle = statistics.median(map(len, prompts))
    return sorted(prompts, key=lambda ids: abs(len(ids) - middle))[:MATCH_ROUNDS]


def prompt_ids(entry: Entry, model: KVPModel, item: Item) -> list[int]:
    """Return what a task's arms read of an item."""
    if "prompt" in item.extra and not item.prompt:
        ids: list[int] = item.extra["prompt"]  # a window of text
        return ids
    form = GENERATIONS.get(entry.run.task)
    return encode_item(model, item.prompt, chat=entry.run.task == "chat" or (form is not None and form.chat))


def estimate(entries: Sequence[Entry], model: KVPModel, name: str, records: Path) -> Iterator[dict[str, Any]]:
    """Time a few items of every entry and yield what it will take: name, n, seconds by arm and item, hours.

    Arms that were not matched yet are guessed by arithmetic; nothing is written.
    """
    folder = records_of(model, name, records)
    for entry in entries:
        items = items_of(entry.run, model)
        prompts = typical_prompts(entry, model)
        if (folder / f"{entry.name}.arms.json").exists():
            matched = matched_arms(entry, model, folder)
        else:
            targets = gaining_targets(entry, model, prompts)
            matched = [row for target in targets for row in match_by_work(model, target, len(prompts[0]))]
        spread = items[:: max(1, len(items) // TIMED_ITEMS)][:TIMED_ITEMS]
        seconds = {
            arm.name: timed(entry.run, model, arm, spread) / len(spread) for arm in arms_of(entry, model, matched)
        }
        yield {
            "name": entry.name,
            "n": len(items),
            "prompt_tokens": len(prompts[0]),
            "seconds_per_item": seconds,
            "hours": len(items) * sum(seconds.values()) / 3600,
        }


def timed(run: Run, model: KVPModel, arm: Arm, items: Sequence[Item]) -> float:
    """Return the seconds that an arm takes for items; full batches take less."""
    start = time.perf_counter()
    list(run.measure(model, [(arm, item) for item in items]))
    return time.perf_counter() - start
