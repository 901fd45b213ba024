"""``kvp models``: what is listed, fetched and removed; above all, what is not."""

import json
import shutil
from pathlib import Path

import pytest


@pytest.fixture
def hub(tmp_path, monkeypatch, bundle):
    """A Hub cache that holds the bundle and a model that is not ours."""
    cache = tmp_path / "hub"
    for name, files in (("models--us--bundle", bundle), ("models--them--other", None)):
        snapshot = cache / name / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
        (cache / name / "refs").mkdir(parents=True)
        (cache / name / "refs" / "main").write_text(snapshot.name)
        if files:
            shutil.copytree(files, snapshot)
        else:
            snapshot.mkdir(parents=True)
            (snapshot / "config.json").write_text('{"model_type": "mamba"}')
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.utils._cache_manager.HF_HUB_CACHE", str(cache), raising=False)
    return cache


def listed(kvp, *folders):
    return {entry["name"]: entry for entry in kvp("models", "ls", *folders, "--json").json()["models"]}


def test_bundles_and_bases_are_listed_with_sizes_and_quality(kvp, bundle, hub):
    config = json.loads((bundle / "kvp.json").read_text())
    config["measured"] = {"books": {"recovery": 0.912, "separation": 0.834}}
    (bundle / "kvp.json").write_text(json.dumps(config))
    models = listed(kvp, bundle.parent)
    assert models["smollm2-135m"]["where"] == "shipped"
    assert models["us/bundle"]["where"] == "hub"
    assert "them/other" not in models
    mine = models[str(bundle)]
    assert mine["kind"] == "bundle (prefix, 2 layers)"
    assert mine["size_bytes"] == sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file())
    assert "books: recovery 0.91, separation 0.83" in kvp("models", "ls", bundle).out
    assert listed(kvp, bundle / "base")[str(bundle / "base")]["kind"] == "base (llama)"


def test_a_damaged_model_is_named_and_the_rest_listed(kvp, bundle, hub):
    (bundle / "kvp.json").write_text("{")
    outcome = kvp("models", "ls", bundle.parent)
    assert outcome.code == 0
    assert str(bundle) in outcome.err
    assert "us/bundle" in outcome.out


def test_what_is_removed(kvp, bundle, hub):
    refused = kvp("models", "rm", bundle)
    assert (refused.code, bundle.is_dir()) == (2, True)
    assert "--yes" in refused.err
    assert kvp("models", "rm", bundle, "--yes").code == 0
    assert not bundle.exists()
    assert kvp("models", "rm", "us/bundle", "--yes").code == 0
    assert "us/bundle" not in listed(kvp, hub)


def test_what_is_not_removed(kvp, bundle, hub, tmp_path, monkeypatch):
    monkeypatch.setenv("KVP_CACHE_DIR", str(tmp_path / "empty"))
    (tmp_path / "papers").mkdir()
    (tmp_path / "link").symlink_to(bundle)
    (bundle / "thesis.docx").write_text("years of work")
    for name, reason in [
        (tmp_path / "papers", "neither a bundle"),
        (tmp_path / "link", "a link"),
        (bundle, "thesis.docx"),
        ("no/such", "not on this machine"),
        ("smollm2-135m", "ships with the package"),
    ]:
        outcome = kvp("models", "rm", name, "--yes")
        assert outcome.code == 2
        assert reason in outcome.err
    assert (bundle / "kvp.json").exists()


def test_pull_prints_where_bundle_and_base_are(kvp, bundle):
    places = kvp("models", "pull", bundle).out.split()
    assert [Path(place).resolve() for place in places] == [bundle.resolve(), (bundle / "base").resolve()]
    assert kvp("models", "pull", "nothing").code == 2


def test_the_folder_that_one_is_in_and_links_are_not_removed(kvp, bundle, hub, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(bundle)
    monkeypatch.chdir(bundle)
    for name, reason in [(".", "folder that you are in"), (bundle, "folder that you are in"), ("../link", "a link")]:
        outcome = kvp("models", "rm", name, "--yes")
        assert outcome.code == 2
        assert reason in outcome.err
    assert (bundle / "kvp.json").exists()


def test_a_project_with_a_config_is_not_removed_or_replaced(kvp, base_dir, text_file, tmp_path):
    project = tmp_path / "project"
    (project / ".git").mkdir(parents=True)
    for name, text in {"thesis.tex": "years", "config.json": "{}", "kvp.json": "{}"}.items():
        (project / name).write_text(text)
    fit = ("fit", base_dir, "--layers", 2, "--data", text_file, "--tokens", 64, "--out", project, "--force")
    for command in (
        ("models", "rm", project, "--yes"),
        fit,
        ("convert", "hf", base_dir, "--out", project, "--force"),
    ):
        outcome = kvp(*command)
        assert outcome.code == 2
        assert ".git/" in outcome.err
    assert (project / "thesis.tex").read_text() == "years"
