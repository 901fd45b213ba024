"""All tasks on one bundle, in order, beside token pruning at equal TTFT.

Resumable, and for any number of processes at once: a process takes the first task whose lock is free, so that two on
one folder share the work between them; a killed process's locks are free again. Rows are kept under our
version, the weights, the share that is recomputed and the machine: others begin anew.
"""

import contextlib
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import __version__
from ..arms.arm import Arm
from ..arms.kinds import parse_arm, parse_arms, with_dial
from ..bundle.loading import KVPModel
from ..engine.dial import PREDICT
from ..engine.prefill import Progress
from ..errors import InputError
from ..files import claim, read_json, write_json
from .equal_ttft import match, match_by_work
from .runs import carry_out, items_of, qualities, setting
from .task import Item, Place, Run, Task
from .tasks import all_tasks

ARMS = "full,kvp,kvp-64,auxiliary"
MATCH_ROUNDS = 5
NO_GAIN = 0.9
"""A target's share of full prefill's work above which nothing is pruned to match it: its prompts are too short."""
TIMED_ITEMS = 3


@dataclass(frozen=True)
class Entry:
    """One place of a task in the suite, with the task on its data."""

    task: Task
    place: Place
    run: Run

    @property
    def name(self) -> str:
        """Of its files."""
        return self.place.name


def plan(data: Path, limit: int | None = None, names: Sequence[str] | None = None) -> list[Entry]:
    """Return the places of all tasks, in the order of ``tasks.MODULES``.

    Args:
        data: folder of the files, under the names that the places give.
        limit: items of each at most, where that is fewer than its own.
        names: only these (default: all that are not only for who names them).

    Raises:
        InputError: a file is missing, or no task has such a name.
    """
    places = {place.name: (task, place) for task in all_tasks().values() for place in task.places}
    if unknown := set(names or ()) - set(places):
        raise InputError(f"no task '{min(unknown)}'; tasks are {', '.join(places)}.")
    chosen = [pair for name, pair in places.items() if (pair[1].is_default if names is None else name in names)]
    entries = [Entry(task, place, run_at(task, place, data)) for task, place in chosen]
    if limit is None:
        return entries
    return [replace(entry, run=replace(entry.run, limit=min(limit, entry.run.limit or limit))) for entry in entries]


def run_at(task: Task, place: Place, data: Path) -> Run:
    """Return a task with a place's options, on its files in a folder."""
    files = {option: [str(data / name)] for option, name in place.files.items()}
    return task.run(**files, **place.options)


def run_suite(
    entries: Sequence[Entry],
    model: KVPModel,
    name: str,
    results: Path,
    records: Path,
    *,
    arms: Sequence[Arm],
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
        arms: to measure; beside those that predict, token pruning at equal TTFT.
        progress: called with (rows done, rows in all) of the entry at hand.
        say: called with what begins and ends.

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
            matched = matched_arms(entry, model, arms, folder)
            measured = arms_of(entry, model, arms, matched)
            log = folder / f"{entry.name}.jsonl"
            document = carry_out(entry.run, model, name, measured, log=log, progress=progress)
            own = {arm.name for arm in arms}
            dials = [arm.name for arm in measured if arm.name in entry.place.dials and arm.name not in own]
            document |= {"matched": matched, "dials": dials}
            write_unless_known(results / f"{entry.name}.json", document)
            say(f"{entry.name}: {document['n']} items, {results / f'{entry.name}.json'}")
            done.append(entry.name)
    return done


def write_unless_known(path: Path, document: dict[str, Any]) -> None:
    """Write a task's document, unless it is there already: then it keeps the machine and commit that measured it."""
    with contextlib.suppress(OSError, InputError):
        known = read_json(path)
        if isinstance(known, dict) and known | {"machine": None} == document | {"machine": None}:
            return
    write_json(path, document)


def records_of(model: KVPModel, name: str, records: Path) -> Path:
    """Return the folder of a bundle's rows, named by what they depend on: version, weights, machine (``setting``)."""
    depends = setting(model, name, PREDICT) | qualities(model)
    digest = hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:12]
    return records / f"{__version__}-{digest}-{PREDICT.share(model.config):g}"


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Hold a lock that ends with the process; yields False where another process holds it."""
    with open(path, "w", encoding="utf-8") as file:
        yield claim(file)


def matched_arms(entry: Entry, model: KVPModel, arms: Sequence[Arm], folder: Path) -> list[dict[str, Any]]:
    """Return the entry's token pruning at equal TTFT (see ``match``), measured once for each target and kept."""
    path = folder / f"{entry.name}.arms.json"
    found = read_json(path) if path.exists() else []
    if not isinstance(found, list) or not all(isinstance(row, dict) and _names_arm(row.get("arm")) for row in found):
        raise InputError(f"{path} is damaged; remove it, and the arms are matched anew.")
    prompts = typical_prompts(entry, model)
    targets = gaining_targets(entry, model, arms, prompts)
    if new := [target for target in targets if target.name not in {row.get("target") for row in found}]:
        found += [row for target in new for row in match(model, target, prompts)]
        write_json(path, found)
    wanted = {target.name for target in targets}
    return [row for row in found if row.get("target") in wanted]


def _names_arm(name: Any) -> bool:
    """Return whether a matched row has an arm's name, or says that none is as fast."""
    return name is None or (isinstance(name, str) and bool(parse_arm(name)))


def gaining_targets(entry: Entry, model: KVPModel, arms: Sequence[Arm], prompts: Sequence[list[int]]) -> list[Arm]:
    """Return the arms that something is to be as fast as: those that predict and, in matched entries, save work."""
    tokens = len(prompts[0])
    full = parse_arm("full").work(model, tokens).flops
    targets = [arm for arm in arms if arm.kind.predicts] if entry.place.is_matched else []
    return [target for target in targets if target.work(model, tokens).flops < NO_GAIN * full]


def arms_of(entry: Entry, model: KVPModel, arms: Sequence[Arm], matched: Sequence[dict[str, Any]]) -> list[Arm]:
    """Return the arms, those matched to them, and the entry's dials if the bundle can recompute."""
    dials = () if model.config.recompute is None else entry.place.dials
    names = [*(arm.name for arm in arms), *(row["arm"] for row in matched if row["arm"]), *dials]
    return parse_arms(",".join(dict.fromkeys(names)))


def typical_prompts(entry: Entry, model: KVPModel) -> list[list[int]]:
    """Return the token ids of the prompts nearest to the entry's median length, that one first."""
    items = items_of(entry.run, model)
    prompts = [entry.run.encode(model, item) for item in items]
    middle = statistics.median(map(len, prompts))
    return sorted(prompts, key=lambda ids: abs(len(ids) - middle))[:MATCH_ROUNDS]


def estimate(
    entries: Sequence[Entry], model: KVPModel, name: str, records: Path, arms: Sequence[Arm]
) -> Iterator[dict[str, Any]]:
    """Time a few items of every entry and yield what it will take: name, n, seconds by arm and item, hours.

    Arms that were not matched yet are guessed by arithmetic; nothing is written.
    """
    folder = records_of(model, name, records)
    for entry in entries:
        items = items_of(entry.run, model)
        prompts = typical_prompts(entry, model)
        if (folder / f"{entry.name}.arms.json").exists():
            matched = matched_arms(entry, model, arms, folder)
        else:
            targets = gaining_targets(entry, model, arms, prompts)
            matched = [row for target in targets for row in match_by_work(model, target, len(prompts[0]))]
        few = items[:: max(1, len(items) // TIMED_ITEMS)][:TIMED_ITEMS]
        seconds = {
            arm.name: timed(entry.run, model, arm, few) / len(few) for arm in arms_of(entry, model, arms, matched)
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
    list(run.measure(model, [(with_dial(arm, run.dial([arm])), item) for item in items]))
    return time.perf_counter() - start
