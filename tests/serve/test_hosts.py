"""``kvp serve`` over several processes of mlx's ring: one process's answers, and the end of all."""

import json
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import httpx
import pytest
from support.chat_models import write_tool_model
from support.directories import prose
from support.ring import Ring
from support.serving import serving
from support.waiting import wait_until

from kvp_mlx.device.hosts import gone
from kvp_mlx.serve.scheduler import Scheduler
from kvp_mlx.train.fit import FitOptions, fit_bundle

GONE_SECONDS = 10
LONG = {"prompt": "Hi", "max_tokens": 90_000, "stream": True}
SCHEMA = {"type": "object", "properties": {"n": {"enum": [1, 2, 3]}}, "required": ["n"], "additionalProperties": False}
PROMPTS = [prose(90, seed) for seed in range(4)]
REQUESTS = [
    {"prompt": PROMPTS[0], "kvp": {"path": "kvp"}},
    {"prompt": PROMPTS[0] + PROMPTS[1], "kvp": {"path": "kvp"}},  # goes on from what the first one left
    {"prompt": PROMPTS[1], "kvp": {"path": "kvp", "exact_head": 5, "exact_tail": 4, "recompute": 0.2}},
    {"prompt": PROMPTS[2], "kvp": {"quality": "exact"}, "max_tokens": 1},
    {"prompt": [7], "max_tokens": 3},
    {"prompt": PROMPTS[2], "temperature": 1, "seed": 3, "top_p": 0.9, "frequency_penalty": 0.5, "n": 3},
    {"prompt": PROMPTS[2], "logit_bias": {"40": 9}, "stop": ["HH"]},
    {"prompt": PROMPTS[3], "cache_prompt": False, "repetition_penalty": 1.3},
    {"prompt": PROMPTS, "kvp": {"path": "kvp"}, "max_tokens": 30},
    {"prompt": [prompt[:60] for prompt in PROMPTS], "kvp": {"quality": "exact"}},
]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bundles of a base that does not come to an end by itself."""
    folder = tmp_path_factory.mktemp("served")
    base = write_tool_model(folder / "base", max_position_embeddings=100_000)
    (folder / "text.txt").write_text(prose(2500, 9))
    for name, kind in {"prefix": {"layers": 1}, "pruned": {"prune": 0.5}}.items():
        options = FitOptions(tokens=256, window=64, **kind)
        fit_bundle(str(base), [str(folder / "text.txt")], folder / name, options)
    return {name: folder / name for name in ("base", "prefix", "pruned")}


@contextmanager
def served(place: Path, model: Path, *options: object, hosts: int = 2) -> Iterator[tuple[Ring, str]]:
    """Serve a model on several hosts; yields them, and the URL."""
    with Ring(place, "-m", "kvp_mlx", "serve", "--model", model, "--port", 0, *options, hosts=hosts) as ring:
        line = ring.processes[0].stdout.readline()
        assert line.startswith("serving "), ring.outcome()
        yield ring, line.split()[-1]


def ask(url: str, **body: object) -> dict:
    """Return what is answered, but for names and times."""
    answer = httpx.post(f"{url}/v1/completions", json={"max_tokens": 12, **body}, timeout=60).raise_for_status().json()
    usage = answer["usage"]
    measured = {name: value for name, value in usage.pop("kvp").items() if not name.endswith("_ms")}
    return {"choices": answer["choices"], "usage": usage, "kvp": measured}


def statistics(url: str) -> dict[str, float]:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return {line.split()[0]: float(line.split()[1]) for line in lines if not line.startswith("#")}


def takes_requests(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").is_success
    except httpx.TransportError:  # refused, or reset where it had been taken just before
        return False


@contextmanager
def streaming(url: str) -> Iterator[Iterator[str]]:
    """Ask for a long answer; yields its lines when the first has come."""
    with httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        yield lines


@pytest.mark.parametrize("name", ["prefix", "pruned"])
def test_two_hosts_answer_as_one_does(
    name: str, bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Scheduler, "_idle_work", lambda _: (pause for pause in ()))  # hosts do not refine
    with serving(bundles[name]) as (url, _):
        alone = [ask(url, **request) for request in REQUESTS]
    with served(tmp_path, bundles[name], "--max-batch", 4) as (ring, url):
        for request, expected in zip(REQUESTS, alone, strict=True):
            assert ask(url, **request) == expected
        ring.processes[0].send_signal(signal.SIGTERM)
        code, _, err = ring.outcome()
        assert (code, "2 hosts answer: without drafts" in err) == (0, True)
        assert ring.outcome(1) == (0, "", "")


def test_a_schema_is_followed_and_many_ask_at_once(bundles: dict[str, Path], tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "Which number?"}], "max_tokens": 20}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
    with served(tmp_path, bundles["prefix"], "--max-batch", 3, "--prefill-slice-ms", 1) as (ring, url):
        alone = [ask(url, prompt=prompt, cache_prompt=False) for prompt in PROMPTS]
        with ThreadPoolExecutor(8) as clients:
            schema = clients.submit(
                lambda: httpx.post(
                    f"{url}/v1/chat/completions", json=chat | {"response_format": form, "temperature": 1}, timeout=60
                ).json()
            )
            together = list(clients.map(lambda prompt: ask(url, prompt=prompt, cache_prompt=False), PROMPTS * 3))
        assert [answer["choices"] for answer in together] == [answer["choices"] for answer in alone] * 3
        assert json.loads(schema.result()["choices"][0]["message"]["content"])["n"] in (1, 2, 3)
        assert [process.poll() for process in ring.processes] == [None, None]


def test_a_client_that_goes_away_stops_the_work(bundles: dict[str, Path], tmp_path: Path) -> None:
    with served(tmp_path, bundles["prefix"], "--max-batch", 1) as (_, url):
        expected = ask(url, prompt=PROMPTS[0])
        with streaming(url) as lines:
            next(lines)
            assert statistics(url)["kvp_running"] == 1
        wait_until(lambda: statistics(url)["kvp_cancelled"] == 1)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/completions", json={"prompt": prose(9000, 1)}, timeout=0.5)  # while it is read
        wait_until(lambda: statistics(url)["kvp_cancelled"] == 2)
        assert ask(url, prompt=PROMPTS[0])["choices"] == expected["choices"]


@pytest.mark.parametrize("end", ["first", "second", "both", "launcher"])
def test_all_end_together(end: str, bundles: dict[str, Path], tmp_path: Path) -> None:
    with served(tmp_path, bundles["prefix"]) as (ring, url), streaming(url) as lines:
        first, second = ring.processes
        if end == "launcher":
            first.stdin.close()
        for process in {"first": [first], "second": [second], "both": [second, first]}.get(end, []):
            process.send_signal(signal.SIGTERM)
        wait_until(lambda: not takes_requests(url), 5)
        next(lines)  # what runs may go on for a while
        first.send_signal(signal.SIGTERM)
        for _ in lines:
            pass
        assert [process.wait(GONE_SECONDS) for process in ring.processes] == [0, 0]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("is_busy", [True, False])
def test_a_host_that_is_killed_ends_the_other(
    rank: int, is_busy: bool, bundles: dict[str, Path], tmp_path: Path
) -> None:
    with served(tmp_path, bundles["prefix"]) as (ring, url), ExitStack() as stack:
        lines = stack.enter_context(streaming(url)) if is_busy else iter(())
        ring.processes[rank].kill()
        start = time.monotonic()
        with pytest.raises(httpx.RemoteProtocolError) if is_busy else nullcontext():
            for _ in lines:
                pass
        code, _, err = ring.outcome(1 - rank)
    assert time.monotonic() - start < GONE_SECONDS
    assert code == 1
    assert f"kvp: {gone(f'host {rank}')}" in err


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--cache-dir", "caches"), "--cache-dir keeps whole caches"),
        (("--draft", "auxiliary"), "the base is spread over several hosts"),
        (("--host", "0.0.0.0"), "set a key"),
    ],
)
def test_what_hosts_do_not_do_is_refused(options: tuple, named: str, bundles: dict[str, Path], tmp_path: Path) -> None:
    with Ring(tmp_path, "-m", "kvp_mlx", "serve", "--model", bundles["pruned"], "--port", 0, *options) as ring:
        code, out, err = ring.outcome()
        assert (code, out, named in err) == (2, "", True), err
        assert ring.outcome(1)[1:] == ("", "")
    assert not (tmp_path / "caches").exists()
