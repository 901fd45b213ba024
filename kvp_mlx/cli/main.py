"""The ``kvp`` command: its tree of subcommands, and the one place where errors become lines and exit codes."""

import os
import signal
import sys
import warnings
from importlib import import_module
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_group

from .. import __version__
from ..errors import KVPError


class Command(NamedTuple):
    """Where a command is: its module in this room, the function or typer app there, and its line of help."""

    module: str
    attribute: str
    help: str


COMMANDS = {
    "generate": Command("inference", "generate", "Answer one prompt."),
    "chat": Command("chat", "chat", "Hold a conversation."),
    "demo": Command("inference", "demo", "Show both paths side by side."),
    "fit": Command("training", "fit", "Make a bundle in closed form."),
    "train": Command("training", "train", "Train a bundle."),
    "push": Command("convert", "push", "Upload a bundle or model to the Hugging Face Hub."),
    "info": Command("info", "info", "Show what a bundle is."),
    "doctor": Command("doctor", "doctor", "Check this machine."),
    "convert": Command("convert", "app", "Make mlx-lm models and bundles of other projects' checkpoints."),
    "eval": Command("evaluation", "app", "Measure what a sooner first token costs."),
    "bench": Command("bench", "app", "Measure time to first token, decoding speed and memory."),
    "cache": Command("cache", "app", "Read a document or system prompt once, use it many times."),
    "models": Command("models", "app", "What is on this machine: bundles and bases."),
}


class LazyGroup(TyperGroup):
    """``kvp`` itself: a command's module is imported when the command is run, so that the help of all stays quick."""

    def __init__(self, **attributes: Any):
        super().__init__(**attributes)
        for name, command in COMMANDS.items():
            self.add_command(TyperCommand(name, help=command.help))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Put the command itself in the place of its line of help, then go on as typer does."""
        name = args[0]
        if name == "bench":
            import_module(".device", __package__).use_device_of(args)
        if name in COMMANDS:
            self.add_command(load_command(name))
        return super().resolve_command(ctx, args)


def load_command(name: str) -> Any:
    """Import a command and return it as typer runs it."""
    module, attribute, line = COMMANDS[name]
    found = getattr(import_module(f".{module}", __package__), attribute)
    holder = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)
    if isinstance(found, typer.Typer):
        holder.add_typer(found, name=name, help=line)
    else:
        holder.command(name)(found)
    return get_group(holder).commands[name]


app = typer.Typer(
    name="kvp",
    cls=LazyGroup,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Answer long prompts sooner: a small auxiliary reads the prompt, the base model's KV cache is predicted.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvp-mlx {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Take the global options; the help text is the app's."""


def main() -> None:
    """Run the command line; an error is one line on stderr, never a traceback (KVP_DEBUG=1 shows it)."""
    warnings.showwarning = lambda message, *_: print(f"kvp: warning: {message}", file=sys.stderr)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that half-written outputs are cleaned up
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], standalone_mode=False))
    except typer.TyperException as error:  # unknown option, bad value, ...
        context = getattr(error, "ctx", None)
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        _fail(f"{message} See '{context.command_path if context else 'kvp'} --help'.", 2)
    except KVPError as error:
        _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted.", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        _fail(f"{type(error).__name__}: {error} (KVP_DEBUG=1 shows where; please report it).", 1)


def _fail(message: str, code: int) -> None:
    if os.environ.get("KVP_DEBUG"):
        raise  # noqa: PLE0704 - called from an except block
    print(f"kvp: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
