"""A program in a pseudo-terminal, driven and watched from the test."""

import fcntl
import os
import pty
import re
import select
import shlex
import signal
import struct
import subprocess
import sys
import termios
import time

PROMPT = b"\x1b[?2004h"  # bracketed paste is switched on whenever a prompt begins
CURSOR_QUESTION, CURSOR_ANSWER = b"\x1b[6n", b"\x1b[1;1R"
ESCAPES = re.compile(rb"\x1b(\[[0-9;?]*[A-Za-z]|[()][A-Z0-9]|[=>])")


class Terminal:
    """``python -m kvp_mlx ARGUMENTS`` in a pseudo-terminal of 100 x 30."""

    def __init__(self, *arguments, environment=None):
        self.master, slave = pty.openpty()
        self.resize(100, 30)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kvp_mlx", *map(str, arguments)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=os.environ | {"TERM": "xterm-256color"} | (environment or {}),
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509
        )
        os.close(slave)
        self.output = b""
        self.prompts = 0

    def resize(self, columns, rows):
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        if hasattr(self, "process"):
            os.killpg(self.process.pid, signal.SIGWINCH)

    def send(self, data):
        os.write(self.master, data.encode() if isinstance(data, str) else data)

    def paste(self, text):
        self.send(f"\x1b[200~{text}\x1b[201~")

    def read(self, seconds):
        """Take in what comes within some seconds, answering where the cursor is."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if not select.select([self.master], [], [], left)[0]:
                return
            try:
                data = os.read(self.master, 65536)
            except OSError:  # the other side is closed
                return
            self.output += data
            for _ in range(data.count(CURSOR_QUESTION)):
                self.send(CURSOR_ANSWER)
            if PROMPT in data:
                return

    def pause(self, seconds):
        """Let some seconds pass, taking in what comes."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.read(left)

    def settle(self, seconds=2):
        """Return when no prompt has begun for some seconds: none of an earlier step is still on its way."""
        self.prompts = -1
        while self.output.count(PROMPT) > self.prompts:
            self.prompts = self.output.count(PROMPT)
            self.pause(seconds)

    def wait_for_prompt(self, seconds=30):
        """Return when one more prompt has begun than at the last call."""
        self.wait_until(lambda: self.output.count(PROMPT) > self.prompts, seconds)
        self.prompts = self.output.count(PROMPT)

    def wait_for(self, text, seconds=30):
        self.wait_until(lambda: text in self.text, seconds)

    def wait_until(self, condition, seconds):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end and self.process.poll() is None, self.text[-2000:]
            self.read(0.2)

    def enter(self, line):
        """Send a line and wait for the next prompt."""
        self.prompts = self.output.count(PROMPT)
        self.send(f"{line}\r")
        self.wait_for_prompt()

    @property
    def text(self):
        """Everything shown so far, without escape sequences."""
        return ESCAPES.sub(b"", self.output).decode("utf-8", "replace")

    def resident_bytes(self):
        with open(f"/proc/{self.process.pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def wait(self, seconds=20):
        """Return the exit code."""
        end = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < end:
            self.read(0.1)
        return self.process.poll()

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)


class Tmux:
    """The same in a tmux of its own; what is seen is tmux's screen."""

    def __init__(self, *arguments, environment=None):
        self.socket = f"kvp-test-{os.getpid()}-{time.monotonic_ns()}"
        variables = [f"{name}={value}" for name, value in (environment or {}).items()]
        command = ["env", *variables, sys.executable, "-m", "kvp_mlx", *map(str, arguments)]
        # tmux's own word on how a program ended does not always come, so the shell says it
        script = f"trap : INT; {shlex.join(command)}; echo exit code $?; sleep 600"
        self._tmux("-f", "/dev/null", "new-session", "-d", "-x", "100", "-y", "30", script)
        self._tmux("set-option", "-g", "history-limit", "20000")

    def _tmux(self, *arguments, text=None):
        command = ["tmux", "-L", self.socket, *arguments]
        return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout

    def resize(self, columns, rows):
        self._tmux("resize-window", "-x", str(columns), "-y", str(rows))

    def send(self, data):
        names = {"\r": "Enter", "\x03": "C-c", "\x04": "C-d"}
        self._tmux("send-keys", *([names[data]] if data in names else ["-l", data]))

    def paste(self, text):
        self._tmux("load-buffer", "-", text=text)
        self._tmux("paste-buffer", "-p")

    def pause(self, seconds):
        time.sleep(seconds)

    @property
    def text(self):
        return self._tmux("capture-pane", "-p", "-S", "-")

    def wait_for(self, text, seconds=60):
        end = time.monotonic() + seconds
        while text not in self.text:
            assert time.monotonic() < end, self.text[-3000:]
            time.sleep(0.1)

    def wait(self, seconds=20):
        """Return the exit code, None where it has not come in time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := re.search(r"^exit code (\d+)$", self.text, re.MULTILINE):
                return int(found[1])
            time.sleep(0.1)
        return None

    def close(self):
        self._tmux("kill-server")
