"""Processes of one ring on this machine, as ``mlx.launch`` starts them."""

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

WAIT_SECONDS = 60


class Ring:
    """Hosts that run one command; use it as a context, at whose end none of them is left."""

    def __init__(self, place: Path, *command: object, hosts: int = 2):
        place.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(hosts)]
            ports = [each.getsockname()[1] for each in sockets]
        (place / "hosts.json").write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
        own = {"MLX_HOSTFILE": str(place / "hosts.json"), "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": "tests"}
        self.processes = [
            subprocess.Popen(
                [sys.executable, *map(str, command)],
                env=os.environ | own | {"MLX_RANK": str(rank), "KVP_CACHE_DIR": str(place / f"cache-{rank}")},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=Path(__file__).parents[2],
            )
            for rank in range(hosts)
        ]

    def __enter__(self) -> "Ring":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                stream.close()

    def outcome(self, rank: int = 0, text: str | None = None) -> tuple[int, str, str]:
        """Wait for a host's end; return its exit code, stdout and stderr without lines on how far it is."""
        out, err = self.processes[rank].communicate(text, timeout=WAIT_SECONDS)
        foreign = ("loading ", "fitting: ", "[ring] ")  # mlx's own may come in the midst of ours
        lines = [line for line in err.splitlines() if "kvp: " in line or not line.startswith(foreign)]
        return self.processes[rank].returncode, out, "\n".join(lines)

    def wait_for(self, text: str, rank: int = 0) -> None:
        """Read a host's stdout up to a text."""
        end, read = time.monotonic() + WAIT_SECONDS, ""
        while text not in read and time.monotonic() < end:
            read += self.processes[rank].stdout.read(1)
        assert text in read
