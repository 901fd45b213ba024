"""The tasks, one a file: to add one, write its file, with its record as ``TASK``, and name it here."""

from importlib import import_module

from ..task import Task

MODULES = (
    *("squad", "needle", "mcq", "chat_agreement", "triviaqa", "quote", "gsm8k", "humaneval", "perplexity"),
    *("document", "completion"),
)
"""In the order of the commands, the suite and the page."""


def all_tasks() -> dict[str, Task]:
    """Return the tasks by name."""
    tasks = (import_module(f"{__name__}.{name}").TASK for name in MODULES)
    return {task.name: task for task in tasks}
