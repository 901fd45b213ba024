"""Bundles and bases by Hub id, and pushing them: huggingface_hub's own code against a hub on this machine."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Outcome
from support.directories import write_llama
from support.fake_hub import FakeHub, commit_of

Remote = Callable[..., Outcome]


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    server = FakeHub()
    yield server
    server.close()


@pytest.fixture
def remote(hub: FakeHub, tmp_path: Path) -> Remote:
    """Run kvp as a process that knows this hub only."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_TOKEN": "hf_test",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    environment.pop("HF_HUB_OFFLINE", None)

    def run(*arguments: object) -> Outcome:
        command = [sys.executable, "-m", "kvp_mlx", *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        return Outcome(result.returncode, result.stdout, result.stderr)

    return run


def test_push_then_load(bundle: Path, hub: FakeHub, remote: Remote) -> None:
    outcome = remote("push", bundle, "me/bundle", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json() == {"repository": "me/bundle", "url": f"{hub.url}/me/bundle"}
    stored = hub.repositories["me/bundle"]["main"]
    assert stored == {str(p.relative_to(bundle)): p.read_bytes() for p in bundle.rglob("*") if p.is_file()}
    answer = remote("generate", "The lamp", "--model", "me/bundle", "--max-tokens", 2, "--json")
    assert answer.code == 0, answer.err
    local = remote("generate", "The lamp", "--model", bundle, "--max-tokens", 2, "--json")
    assert answer.json()["tokens"] == local.json()["tokens"]


def test_a_revision_is_pinned(bundle: Path, hub: FakeHub, remote: Remote) -> None:
    hub.add("me/bundle", "v1", bundle)
    config = json.loads((bundle / "kvp.json").read_text())
    (bundle / "kvp.json").write_text(json.dumps(config | {"measured": {"edition": "second"}}))
    hub.add("me/bundle", "main", bundle)
    for name, edition in (
        ("me/bundle", {"edition": "second"}),
        ("me/bundle@v1", {}),
        (f"me/bundle@{commit_of('v1')}", {}),
    ):
        outcome = remote("info", name, "--json")
        assert outcome.code == 0, outcome.err
        assert outcome.json()["measured"] == edition
    unknown = remote("info", "me/bundle@v9")
    assert unknown.code == 2
    assert unknown.err.count("\n") == 1


def test_base_on_the_hub(bundle: Path, tmp_path: Path, hub: FakeHub, remote: Remote) -> None:
    """A bundle whose base is named by id and revision takes that revision, whatever main has become."""
    hub.add("me/base", "v1", bundle / "base")
    hub.add("me/base", "main", write_llama(tmp_path / "other", seed=5))
    config = json.loads((bundle / "kvp.json").read_text())
    for revision, code in ((commit_of("v1"), 0), ("main", 2)):
        config["base"] |= {"path": None, "hub_id": "me/base", "revision": revision}
        (bundle / "kvp.json").write_text(json.dumps(config))
        outcome = remote("generate", "The lamp", "--model", bundle, "--max-tokens", 2)
        assert outcome.code == code, outcome.err
    assert "not the model that this bundle was made for" in outcome.err


def test_convert_from_and_to_the_hub(base_dir: Path, tmp_path: Path, hub: FakeHub, remote: Remote) -> None:
    hub.add("me/base", "v1", base_dir)
    out = tmp_path / "out"
    outcome = remote("convert", "hf", "me/base@v1", "--out", out, "--q-bits", 4, "--upload", "you/base-4bit", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json()["upload"] == f"{hub.url}/you/base-4bit"
    assert outcome.json()["source"] == "me/base@v1"
    stored = hub.repositories["you/base-4bit"]["main"]
    assert stored["model.safetensors"] == (out / "model.safetensors").read_bytes()
    assert "me/base@v1" in stored["README.md"].decode()


def test_what_cannot_be_pushed(bundle: Path, tmp_path: Path, hub: FakeHub, remote: Remote) -> None:
    (tmp_path / "empty").mkdir()
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(bundle, elsewhere)
    config = json.loads((bundle / "kvp.json").read_text())
    config["base"]["path"] = str(bundle / config["base"]["path"])
    (elsewhere / "kvp.json").write_text(json.dumps(config))
    for arguments, code in (
        ((tmp_path / "empty", "me/bundle"), 2),
        ((tmp_path / "nowhere", "me/bundle"), 2),
        ((bundle, "no-owner"), 2),
        ((bundle, "a/b/c"), 2),
        ((bundle, "a b/c"), 2),
        ((bundle, "../x"), 2),
        ((elsewhere, "me/bundle"), 2),
    ):
        outcome = remote("push", *arguments)
        assert outcome.code == code
        assert outcome.err.count("\n") == 1
    assert hub.repositories == {}
    hub.close()
    outcome = remote("push", bundle, "me/bundle")
    assert outcome.code == 1
    assert outcome.err.count("\n") == 1
    assert "could not be pushed" in outcome.err
