"""A chat at the terminal or in a pipe: what is typed, sent and shown."""

import os
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import mlx.core as mx

from ..engine.cache_format import DOCUMENT_END
from ..engine.context import Context
from ..engine.conversation import Conversation
from ..engine.dial import QUALITIES, Dial
from ..engine.prompt import Message
from ..engine.refining import idle_work
from ..engine.reply import Piece
from ..engine.saved_caches import cache_place, load_cache, save_cache
from ..engine.transcripts import load_conversation, save_conversation
from ..engine.worker import Emit, StoppedError, Worker
from ..errors import InputError, KVPError
from ..files import cache_dir
from .options import Sampling
from .output import plural, read_text, say, say_outcome, say_rows, summary
from .terminal import Editor, MarkdownReply, PlainReply, is_interactive, read_line

LAST = "last"
COMMANDS = {
    "/help": "these lines",
    "/file PATH [QUESTION]": "send a file's text, with a question; without one it goes before your next message",
    "/file": "list what goes before your next message, and take it back",
    "/stats": "what every turn took, and what the context holds",
    "/quality [fast|balanced|exact]": "show or change how prompts are read; exact reads predicted context again",
    "/refine [on|off]": "recompute predicted context while the model writes, and while you read and type",
    "/save NAME": "keep the conversation and its cache",
    "/load NAME": "go on with a saved one; 'last' is the one before the latest turn ended",
    "/clear": "begin anew (the system prompt stays)",
    "/regenerate [TEMPERATURE]": "answer the last message once more",
    "/edit [TEXT]": "change the last message and answer it",
    "/quit": "leave (so does Ctrl-D)",
}
KEPT_BY_QUALITY = ("recompute", "refine_tokens")
"""What was given beside a quality and goes on beside the next one."""
HINT = "/help lists the commands, Alt-Enter begins a new line, Ctrl-C stops a reply, Ctrl-D leaves."


class Session:
    """What one chat has: a conversation on the worker's thread, settings, and what was measured.

    The conversation is touched on the worker's thread only; the status line reads two of its counts.
    """

    conversation: Conversation
    worker: Worker

    def __init__(self, dial: Dial, refine: bool, max_tokens: int, sampling: Sampling):
        self.dial, self.refine, self.max_tokens, self.sampling = dial, refine, max_tokens, sampling
        self.interactive = is_interactive()
        self.turns: list[Piece] = []  # the last piece of each
        self.attached: dict[str, str] = {}  # name to text, of what goes before the next message
        self.unread_tokens = 0  # of the conversation, which the next turn reads again
        self.generation: dict[str, Any] = {}  # what reply takes besides
        self.next_text = ""  # what the editor begins with
        self.keep_heads = False
        self.stopped = False
        self._warned = False
        self._keeps_last = True

    def open(self, conversation: Conversation, cache: str | None) -> None:
        """Take a conversation, and the saved cache if one is named."""
        if cache is not None:
            saved, context = load_cache(conversation.model, cache, exact=self.dial.path == "full")
            *before, message = saved.messages_with("")
            conversation.restore(before)
            conversation.context = context
            if document := message["content"].removesuffix(DOCUMENT_END):
                self.attached[cache] = document
        conversation.keep_heads = self.keep_heads
        self.conversation = conversation

    @contextmanager
    def handling_ctrl_c(self) -> Iterator[None]:
        """Let Ctrl-C stop a reply, without an exception that could strike anywhere; in a pipe it else leaves."""

        def handle(*_: Any) -> None:
            if self.worker.stop():
                self.stopped = True
            elif not self.interactive:
                raise KeyboardInterrupt

        before = signal.signal(signal.SIGINT, handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def run(self, name: str) -> None:
        """Read messages and commands until the input ends."""
        editor = None
        if self.interactive:
            editor = Editor(cache_dir() / "chat-history", self.status, self.worker.note_key)
            say(f"{name} is ready. {HINT}")
        while True:
            try:
                text = self._entered(editor) if editor else read_line()
            except EOFError:
                return
            try:
                if not self.take(text):
                    return
            except KVPError as error:
                say(str(error), "red")
            except StoppedError:
                say("[stopped]")
            except Exception as error:  # a turn may fail, memory may run out: the conversation stays
                if self._cannot_go_on(error):
                    raise
                say(f"{type(error).__name__}: {error} (the conversation is kept; please report it)", "red")

    def _entered(self, editor: Editor) -> str:
        """Return what was entered; Ctrl-C empties the line."""
        text, self.next_text = self.next_text, ""
        try:
            return editor.read(text)
        except KeyboardInterrupt:
            return ""

    def _cannot_go_on(self, error: Exception) -> bool:
        """Return whether the other hosts cannot, or nobody reads the answers any more."""
        is_alone = self.conversation.model.hosts is None
        is_unread = isinstance(error, OSError) and not self.interactive
        return bool(os.environ.get("KVP_DEBUG")) or not is_alone or is_unread

    def take(self, text: str) -> bool:
        """Do what was entered; returns whether to go on."""
        command, _, rest = text.strip().partition(" ")
        if not text.startswith("/"):
            if text.strip():
                self.send(text)
            return True
        handlers = {
            "/help": self.show_help,
            "/file": self.attach,
            "/stats": self.show_stats,
            "/quality": self.set_quality,
            "/refine": self.set_refine,
            "/save": self.save,
            "/load": self.load,
            "/clear": self.clear,
            "/regenerate": self.regenerate,
            "/edit": self.edit,
        }
        if command == "/quit":
            return False
        if command not in handlers:
            raise InputError(f"there is no command {command}; /help lists them, and a space in front sends it as text.")
        handlers[command](rest.strip())
        return True

    def idle_work(self) -> Iterator[None]:
        """Return what the worker does between jobs."""
        has_conversation = hasattr(self, "conversation")
        return idle_work(self.conversation.context) if self.refine and has_conversation else iter(())

    def status(self) -> str:
        """Return the status line."""
        context = self.conversation.context
        held, exact = len(context.tokens), min(context.exact_tokens, len(context.tokens))
        share = 100 * exact // held if held else 100
        window = self.conversation.model.context_length
        refining = "refining" if exact < held else "refined"
        parts = [
            f"context {held:,}{f' of {window:,}' if window else ''} tokens, {share}% exact"
            f"{f', {refining}' if self.refine and held else ''}"
        ]
        if self.unread_tokens:
            parts.append(f"{self.unread_tokens:,} more to read again")
        parts.append(self.quality_name())
        if self.attached:
            parts.append(f"{plural(len(self.attached), 'file')} attached")
        return " " + " | ".join(parts)

    def quality_name(self) -> str:
        """Return the dial's name, or what it says."""
        if not self.conversation.model.config.has_predictor:
            return "full prefill"
        recompute = self.dial.recompute
        named = (name for name, dial in QUALITIES.items() if dial == replace(self.dial, recompute=None))
        own = f"{self.dial.path}, exact head {self.dial.exact_head}, exact tail {self.dial.exact_tail}"
        is_told = recompute is not None and self.dial.path != "full"
        return next(named, own) + (f", recompute {recompute:g}" if is_told else "")

    # Turns

    def send(self, text: str) -> None:
        """Answer a message, with the attached file in front of it."""
        if self.answer("reply", self.with_attached(text)):
            self.attached = {}

    def with_attached(self, text: str) -> str:
        """Return a message with the attached files in front of it."""
        return DOCUMENT_END.join([*self.attached.values(), text])

    def regenerate(self, rest: str) -> None:
        """Answer the last message once more."""
        try:
            sampling = replace(self.sampling, temperature=float(rest)) if rest else self.sampling
        except (ValueError, InputError) as error:
            raise InputError(f"a temperature is a number from 0 up, not '{rest}'.") from error
        self.answer("regenerate", sampling=sampling)
        self.sampling.seed = None

    def edit(self, rest: str) -> None:
        """Answer a changed last message; without a text, the editor begins with the old one."""
        if rest:
            self.answer("edit", rest)
        elif self.interactive:
            self.next_text = f"/edit {self.conversation.last_message()}"
        else:
            raise InputError("/edit takes the new text.")

    def answer(self, kind: str, *text: str, sampling: Sampling | None = None) -> bool:
        """Take one turn and show it; returns whether the conversation has it now."""
        shown = MarkdownReply() if self.interactive else PlainReply()
        sampling = sampling or self.sampling
        last: Piece | None = None
        self.stopped, before = False, self.conversation.messages
        try:
            with closing(self.worker.run(lambda emit: self._turn(emit, kind, text, sampling))) as steps:
                for step in steps:
                    if isinstance(step, tuple):
                        shown.progress(*step)
                    else:
                        last = step
                        shown.feed(step.text)
        except Exception:
            if not self.stopped:  # Ctrl-C also reaches the compiler that mlx runs on CPUs, which fails then
                raise
        finally:
            shown.close()
        is_taken = self.conversation.messages is not before  # also where Ctrl-C came before the first piece was shown
        if self.stopped:
            say("[stopped]" if is_taken else "[stopped before the reply began; the message was not taken]")
        if not is_taken:
            return False
        self.unread_tokens = 0
        if dropped := self.conversation.dropped_turns:
            say(f"the context window was full: the oldest {plural(dropped, 'turn')} left it.", "yellow")
        if last is not None:
            self.turns.append(last)
            say_outcome(last, self.max_tokens)
        self._after_turn()
        return True

    def _turn(self, emit: Emit, kind: str, text: tuple[str, ...], sampling: Sampling) -> None:
        """Take a turn on the worker's thread."""
        options = sampling.options(len(self.conversation.model.text_tokenizer)) | self.generation
        dial = self.dial if self.refine else self.dial.without_refinement()
        options |= {"dial": dial, "max_tokens": self.max_tokens}
        reply = getattr(self.conversation, kind)(*text, progress=lambda done, total: emit((done, total)), **options)
        with closing(reply):
            for piece in reply:
                emit(piece)

    def _after_turn(self) -> None:
        """Keep the transcript where ``/load last`` finds it; say what failed in the background."""
        if self.interactive and self._keeps_last:
            try:
                save_conversation(LAST, self.conversation.messages, self.conversation.first)
            except KVPError as error:
                self._keeps_last = False
                say(f"'/load last' will not find this conversation: {error}", "yellow")
        if self.worker.idle_error and not self._warned:
            self._warned = True
            say(f"refinement failed ({self.worker.idle_error}); /refine off stops it.", "red")

    # Commands

    def show_help(self, _: str) -> None:
        """List the commands."""
        say_rows(COMMANDS.items(), 32)

    def attach(self, rest: str) -> None:
        """Take a file's text; the path may be quoted, a question may follow."""
        path, question = _path_and_rest(rest)
        if not path:
            self.detach()
            return
        text = read_text(path, "check the path")
        if question:
            self.answer("reply", f"{text}{DOCUMENT_END}{question}")
            return
        message = self.with_attached(f"{text}{DOCUMENT_END}")
        tokens = self.worker.call(lambda: self.conversation.tokens_of(message, path))
        self.attached[path] = text
        say(f"{path} goes before your next message, which then has {plural(tokens, 'token')}.")

    def detach(self) -> None:
        """List the attached files, and take them back."""
        if not self.attached:
            raise InputError("no file is attached; /file PATH attaches one, perhaps with a question after it.")
        for name, text in self.attached.items():
            say(f"{name}: {plural(len(text), 'character')}, no longer attached.")
        self.attached = {}

    def show_stats(self, _: str) -> None:
        """Print a line per turn, and what the context holds."""
        for number, last in enumerate(self.turns, 1):
            say(f"{number:4}  {summary(last)}", "default")
        say(f"{self.status().strip()}; peak memory {mx.get_peak_memory() / 1e9:.2f} GB", "default")

    def set_quality(self, rest: str) -> None:
        """Show or change the dial."""
        if rest:
            if rest not in QUALITIES:
                raise InputError(f"quality is one of {', '.join(QUALITIES)}, not '{rest}'.")
            kept = {name: getattr(self.dial, name) for name in self.dial.given if name in KEPT_BY_QUALITY}
            self.dial = replace(QUALITIES[rest], **kept, given=tuple(kept))
            if rest == "exact":  # nothing predicted may answer for exact context
                self.worker.call(lambda: self.conversation.context.keep(self.conversation.context.exact_tokens))
            self.unread_tokens = self.worker.call(self.conversation.unread_tokens)
        say(f"quality: {self.quality_name()}")

    def set_refine(self, rest: str) -> None:
        """Show, set or switch refinement."""
        if rest not in ("", "on", "off"):
            raise InputError(f"/refine takes on or off, not '{rest}'.")
        if self.conversation.model.hosts is not None:
            raise InputError("several hosts do not refine; /quality exact reads what was predicted again.")
        self.refine = rest != "off" if rest else not self.refine
        self.worker.call(lambda: None)  # idle work begins anew after every job
        say(f"refine: {'on' if self.refine else 'off'}")

    def save(self, name: str) -> None:
        """Keep transcript and cache."""
        conversation = self.conversation
        save_conversation(name, conversation.messages, conversation.first)
        removed: list[str] = []
        if conversation.context.tokens and conversation.context.can_be_saved:
            removed = self.worker.call(lambda: save_cache(conversation.context, f"chat-{name}"[:64], "conversation"))
        say(f"saved as '{name}'" + (f"; to make room, {', '.join(removed)} went" if removed else ""))

    def load(self, name: str) -> None:
        """Go on with a saved conversation; its cache is taken along if it is there and fits the model."""
        messages, first = load_conversation(name)
        cache, context = f"chat-{name}"[:64], None
        if cache_place(cache).is_dir():
            try:
                _, context = self.worker.call(lambda: load_cache(self.conversation.model, cache))
            except InputError as error:
                say(f"{error} The context is read again.", "yellow")
        self.worker.call(lambda: self._take_over(messages, first, context))
        self.attached = {}
        self.unread_tokens = self.worker.call(self.conversation.unread_tokens)
        say(f"'{name}': {plural(sum(message['role'] == 'user' for message in messages), 'turn')}")

    def _take_over(self, messages: list[Message], first: int, context: Context | None) -> None:
        self.conversation.restore(messages, first)
        if context is not None:
            self.conversation.context = context
            if self.dial.path == "full":
                context.keep(context.exact_tokens)

    def clear(self, _: str) -> None:
        """Begin anew."""
        self.worker.call(self.conversation.clear)
        self.attached, self.turns, self.unread_tokens = {}, [], 0
        say("cleared")


def _path_and_rest(text: str) -> tuple[str, str]:
    """Split a command's argument into a path, quoted or without spaces, and what follows."""
    if text[:1] in ("'", '"') and text.find(text[0], 1) > 0:
        end = text.index(text[0], 1)
        return text[1:end], text[end + 1 :].strip()
    path, _, rest = text.partition(" ")
    return path, rest.strip()
