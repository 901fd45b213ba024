"""The ``kvp`` command: its tree of subcommands, and the one place where errors become lines and exit codes."""

import os
import signal
import sys
import warnings
from typing import Annotated

import typer

from .. import __version__
from ..errors import KVPError
from . import bench, cache, chat, convert, evaluation, inference, models, training
from . import info as status

app = typer.Typer(
    name="kvp",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Answer long prompts sooner: a small auxiliary reads the prompt, the base model's KV cache is predicted.",
)
app.command("generate")(inference.generate)
app.command("chat")(chat.chat)
app.command("demo")(inference.demo)
app.command("fit")(training.fit)
app.command("train")(training.train)
app.command("push")(convert.push)
app.command("info")(status.info)
app.command("doctor")(status.doctor)
app.add_typer(convert.app, name="convert")
app.add_typer(evaluation.app, name="eval")
app.add_typer(bench.app, name="bench")
app.add_typer(cache.app, name="cache")
app.add_typer(models.app, name="models")


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
