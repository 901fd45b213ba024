"""The ``kvp`` command: its tree of subcommands, and the one place where errors become lines and exit codes."""

import contextlib
import errno
import math
import os
import signal
import sys
import warnings
from importlib import import_module
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption
from typer.main import get_group

from .. import __version__
from ..errors import InputError, KVPError
from .screen import LEFT_BY_CTRL_C, leaving_on_ctrl_c, prepare_streams, show, starting


class Command(NamedTuple):
    """Where a command is: its module in this room, the function or typer app there; its heading and line of help."""

    module: str
    attribute: str
    section: str
    help: str


ANSWER, MAKE, MEASURE, KEEP = "Answer", "Make a bundle", "Measure", "This machine"
COMMANDS = {
    "generate": Command("inference", "generate", ANSWER, "Answer one prompt."),
    "chat": Command("chat", "chat", ANSWER, "Hold a conversation."),
    "serve": Command("serve", "serve", ANSWER, "Serve the OpenAI and Anthropic APIs."),
    "demo": Command("inference", "demo", ANSWER, "Show both paths side by side."),
    "cache": Command("cache", "app", ANSWER, "Read a document or system prompt once, use it many times."),
    "train": Command("training", "train", MAKE, "Train a bundle."),
    "fit": Command("training", "fit", MAKE, "Make a bundle in closed form."),
    "convert": Command("convert", "app", MAKE, "Make mlx-lm models and bundles of other projects' checkpoints."),
    "push": Command("convert", "push", MAKE, "Upload a bundle or model to the Hugging Face Hub."),
    "eval": Command("evaluation", "app", MEASURE, "Measure what a sooner first token costs."),
    "bench": Command("bench", "app", MEASURE, "Measure time to first token, decoding speed and memory."),
    "info": Command("info", "info", KEEP, "Show what a bundle is."),
    "models": Command("models", "app", KEEP, "What is on this machine: bundles and bases."),
    "doctor": Command("doctor", "doctor", KEEP, "Check this machine."),
}
EXAMPLES = {
    "": 'kvp generate "Who wrote it, and when?" --prompt-file notes.md',
    "generate": 'git diff | kvp generate "Review this change." --max-tokens 400',
    "chat": 'kvp chat --model mine --system "Answer in one sentence."',
    "serve": "kvp serve --model mine --port 8080 --quality fast",
    "demo": "kvp demo",
    "cache": "kvp cache build handbook.md --name handbook && kvp chat --cache handbook",
    "cache build": "kvp cache build handbook.md --name handbook",
    "cache ls": "kvp cache ls",
    "cache rm": "kvp cache rm handbook",
    "train": "kvp train OWNER/NAME --layers 12 --data notes/ --minutes 20 --out mine",
    "fit": "kvp fit OWNER/NAME --layers 12 --data notes/ --out mine",
    "convert": "kvp convert hf OWNER/NAME --q-bits 4 --out model",
    "convert openelm": "kvp convert openelm checkpoint.pt --tokenizer tokenizer.model --out model",
    "convert kvp": "kvp convert kvp kv_prediction.pt --preset openelm-1_1b-kvp-c-450m --out bundle",
    "convert hf": "kvp convert hf OWNER/NAME --q-bits 4 --out model",
    "convert gguf": "kvp convert gguf model.Q8_0.gguf --out model",
    "convert verify": "kvp convert verify model checkpoint.pt",
    "push": "kvp push mine OWNER/NAME --private",
    "eval": "kvp eval context mine --data held-out/ --limit 20",
    "eval context": "kvp eval context mine --data held-out/ --limit 20",
    "eval dial": "kvp eval dial mine --data held-out/ --prompt-tokens 256,1024 --recompute 0,0.1 --write",
    "eval document": "kvp eval document mine --data squad.jsonl --prompt-tokens 2000,4000",
    "eval completion": "kvp eval completion mine --data src/ --prompt-tokens 1000,3000 --limit 50",
    "eval humaneval": "kvp eval humaneval mine --data humaneval.jsonl --chat --allow-code-execution",
    "eval lm-eval": "kvp eval lm-eval mine --tasks kvp_triviaqa --data triviaqa.jsonl --limit 20",
    "eval turns": "kvp eval turns mine --data dialogues.jsonl --limit 6",
    "eval diagnose": "kvp eval diagnose mine --data held-out/",
    "eval suite": "kvp eval suite tasks/ --model mine --results results/",
    "eval pareto": "kvp eval pareto squad.json --plot squad.png",
    "eval report": "kvp eval report results/ --out results.md",
    "bench": "kvp bench ttft --prompt-tokens 512,2048 --out result.json",
    "bench ttft": "kvp bench ttft --prompt-tokens 512,2048 --out result.json",
    "bench decode": "kvp bench decode --prompt-tokens 512 --new-tokens 64",
    "bench memory": "kvp bench memory --prompt-tokens 512,2048",
    "bench serve": "kvp bench serve --prompt-tokens 128,1024 --clients 1,4,8 --out serve.json",
    "bench flops": "kvp bench flops --prompt-tokens 1024",
    "bench calibrate": "kvp bench calibrate --model mine",
    "bench compare": "kvp bench compare before.json after.json --fail-above 1.1",
    "bench plot": "kvp bench plot result.json --out result.png",
    "info": "kvp info mine",
    "models": "kvp models ls",
    "models ls": "kvp models ls ~/models",
    "models pull": "kvp models pull OWNER/NAME",
    "models rm": "kvp models rm OWNER/NAME",
    "doctor": "kvp doctor",
}
NEEDS_TORCH = ("convert", "eval")
NO_NAME = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EILSEQ)
"""Errors of names that can be none, and no fault of the machine's."""
OWN_CTRL_C = (["chat"], ["serve"])
"""Commands that go on after Ctrl-C, or end in their own way."""
TASK = "kvp eval {} mine --data FILE --arms full,kvp --limit 20"
"""The example of a task that has none of its own above."""
LAUNCHED = "MLX_RANK"
"""What ``mlx.launch`` sets; ``device.hosts`` takes longer to import."""
HELP = {"help_option_names": ["-h", "--help"]}


class StrictCommand(TyperCommand):
    """A command that refuses options given twice and numbers that are none, and shows options under their headings."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse, after a look at which options come more often than they may (typer takes the last in silence)."""
        if not ctx.resilient_parsing:
            _, _, given = self.make_parser(ctx).parse_args(list(args))
            options = [option for option in given if isinstance(option, TyperOption) and not option.multiple]
            if twice := [option for option in options if options.count(option) > 1]:
                name = max(twice[0].opts, key=len)
                raise InputError(f"{name} is given twice; give it once.")
        rest: list[str] = super().parse_args(ctx, args)
        for parameter in self.params:  # the ranges that typer checks let nan through, and mostly infinity
            if isinstance(value := ctx.params.get(parameter.name), float) and not math.isfinite(value):
                raise InputError(f"{max(parameter.opts, key=len)} is a finite number, not {value}.")
        return rest

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write a section for the arguments, one for each heading of options, and one for the others."""
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(ctx):
            heading = "Arguments" if parameter.param_type_name == "argument" else "Options"
            if record := parameter.get_help_record(ctx):
                sections.setdefault(getattr(parameter, "rich_help_panel", None) or heading, []).append(record)
        for heading, records in sections.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


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
        if LAUNCHED in os.environ:
            import_module(".hosts", __package__).join(args)
        if name not in NEEDS_TORCH and "transformers" not in sys.modules:
            sys.modules.setdefault("torch", None)  # type: ignore[arg-type] # would be imported, for nothing, for seconds
        if name in COMMANDS:
            with starting(f"kvp {name}"):
                self.add_command(load_command(name))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the commands under their headings."""
        for section in dict.fromkeys(command.section for command in COMMANDS.values()):
            rows = [(name, command.help) for name, command in COMMANDS.items() if command.section == section]
            with formatter.section(section):
                formatter.write_dl(rows)


def load_command(name: str) -> Any:
    """Import a command and return it as typer runs it, strict and with its example."""
    module, attribute, _, line = COMMANDS[name]
    found = getattr(import_module(f".{module}", __package__), attribute)
    holder = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)
    if isinstance(found, typer.Typer):
        for command in found.registered_commands:
            command.cls = StrictCommand
        holder.add_typer(found, name=name, help=line)
    else:
        holder.command(name, cls=StrictCommand)(found)
    loaded: Any = get_group(holder).commands[name]
    finish_help(loaded, name)
    return loaded


def finish_help(command: Any, path: str) -> None:
    """Give a command, and those below it, ``-h`` and an example."""
    command.context_settings = {**command.context_settings, **HELP}
    group, _, task = path.partition(" ")
    example = EXAMPLES.get(path) or (TASK.format(task) if group == "eval" else None)
    command.epilog = example and f"Example: {example}"
    for name, child in getattr(command, "commands", {}).items():
        finish_help(child, f"{path} {name}")


app = typer.Typer(
    name="kvp",
    cls=LazyGroup,
    context_settings=HELP,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Answer long prompts sooner: a small auxiliary reads the prompt, the base model's KV cache is predicted.",
    epilog=f"Example: {EXAMPLES['']}",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        show(f"kvp-mlx {__version__}")
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
    try:
        run()
    finally:
        if LAUNCHED in os.environ:
            import_module(".hosts", __package__).leave(sys.exc_info()[1])


def clean_up_when_ended() -> None:
    """Let whatever ends a command leave nothing half-written; under ``nohup`` a closed terminal ends nothing."""
    for end in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(end) is not signal.SIG_IGN:
            signal.signal(end, lambda number, _: sys.exit(128 + number))


def run() -> None:
    """Run the command line as ``main`` does, as one of several hosts where it is one."""
    prepare_streams()
    warnings.showwarning = lambda message, *_: show(f"kvp: warning: {_one_line(str(message))}", sys.stderr)
    clean_up_when_ended()
    try:
        with contextlib.nullcontext() if sys.argv[1:2] in OWN_CTRL_C else leaving_on_ctrl_c():
            code = app(sys.argv[1:] or ["--help"], standalone_mode=False, prog_name="kvp")
        if code == LEFT_BY_CTRL_C:  # what typer makes of a KeyboardInterrupt
            raise KeyboardInterrupt
        sys.stdout.flush()  # here, where what goes wrong with it becomes a line
        sys.exit(code)
    except typer.TyperException as error:  # unknown option, bad value, ...
        context = getattr(error, "ctx", None)
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        _fail(f"{message.rstrip('.')}. See '{context.command_path if context else 'kvp'} --help'.", 2)
    except KVPError as error:
        _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted.", LEFT_BY_CTRL_C)
    except BrokenPipeError:
        _drop_output()
        sys.exit(1)
    except MemoryError:
        _fail("this needs more memory than there is; take a shorter prompt or a smaller model.", 1)
    except OSError as error:
        if error.errno in NO_NAME:
            _fail(f"{str(error.filename)[:80]}: {error.strerror}; check that name.", 2)
        # a full disk, too many open files, ...: the machine's, not ours
        _drop_output()
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}; make room or check the permissions, then try again.", 1)
    except Exception as error:
        _fail(f"{type(error).__name__}: {error} (KVP_DEBUG=1 shows where; please report it).", 1)


def program() -> None:
    """Run the command line as a process of its own: Ctrl-C ends it now, and not when what was begun is computed."""
    try:
        main()
    except SystemExit as end:
        if end.code == LEFT_BY_CTRL_C:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
            os._exit(LEFT_BY_CTRL_C)
        raise


def _drop_output() -> None:
    """Send what is left of stdout nowhere, so that closing it at the end cannot fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, code: int) -> None:
    if os.environ.get("KVP_DEBUG"):
        raise  # noqa: PLE0704 - called from an except block
    if LAUNCHED in os.environ:
        message = import_module(".hosts", __package__).line_of(message, sys.exc_info()[1], code)
    if message is not None:
        show(f"kvp: {_one_line(message)}", sys.stderr if os.environ.get(LAUNCHED, "0") == "0" else sys.__stderr__)
    sys.exit(code)


def _one_line(message: str) -> str:
    return " ".join(message.split())
