"""Saved caches: what is loaded is what was saved, or nothing, and never somebody else's."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import QuantizedKVCache, load_prompt_cache
from support.tiny import chat_tokenizer, entries_of, llama, openelm, paired, prefixed, small_llama

import kvp_mlx
from kvp_mlx.engine import saved_caches as store
from kvp_mlx.engine import transcripts
from kvp_mlx.engine.context import Context
from kvp_mlx.engine.conversation import Conversation
from kvp_mlx.engine.dial import Dial
from kvp_mlx.engine.refining import refine
from kvp_mlx.errors import BundleError, InputError

KINDS = {
    "model": lambda: paired(llama(), small_llama(), ((0,), (0,), (1,), (2,)), tokenizer=chat_tokenizer())[0],
    "prefix": lambda: prefixed(llama(), 1, tokenizer=chat_tokenizer())[0],
    "openelm prefix": lambda: prefixed(openelm(), 2, tokenizer=chat_tokenizer())[0],
}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("KVP_CACHE_DIR", str(tmp_path / "kvp"))
    return tmp_path / "kvp" / "prompts"


def read(model, ids, path="full"):
    context = Context(model)
    context.read([*ids, 0], Dial(path, 0, 0))
    return context


@pytest.mark.parametrize("path", ["full", "kvp"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_loaded_is_what_was_saved_and_can_be_gone_on_from(kind, path):
    model, ids = KINDS[kind](), list(range(5, 45))
    context = read(model, ids, path)
    store.save_cache(context, "a", "document", "text")
    saved, loaded = store.load_cache(model, "a")
    assert (saved.is_exact, saved.text, loaded.tokens) == (path == "full", "text", ids)
    assert loaded.exact_tokens == context.exact_tokens
    for mine, theirs in zip(entries_of(loaded.cache), entries_of(context.cache), strict=True):
        np.testing.assert_array_equal(mine.keys, theirs.keys)
        np.testing.assert_array_equal(mine.values, theirs.values)
    more = [*ids, *range(50, 70), 0]
    for one in (context, loaded):
        one.read(more, Dial("kvp", 0, 0))
        refine(one)
    for mine, theirs in zip(entries_of(loaded.cache), entries_of(context.cache), strict=True):
        np.testing.assert_allclose(mine.keys, theirs.keys, atol=1e-5)


def test_mlx_lm_reads_the_file(place):
    model, ids = KINDS["prefix"](), list(range(5, 30))
    store.save_cache(read(model, ids), "a", "head")
    cache = load_prompt_cache(str(place / "a" / "cache.safetensors"))
    rest = mx.array([9, 8])
    continued = [t for t, _ in generate_step(rest, model.base, prompt_cache=cache, max_tokens=5)]
    assert continued == [t for t, _ in generate_step(mx.array([*ids, 9, 8]), model.base, max_tokens=5)]


def test_a_predicted_cache_never_answers_for_an_exact_one():
    model = KINDS["prefix"]()
    store.save_cache(read(model, range(5, 30), "kvp"), "a", "document", "text")
    with pytest.raises(InputError, match="was predicted"):
        store.load_cache(model, "a", exact=True)
    head = Context(model)
    store.save_head(read(model, list(range(5, 30)), "kvp"), list(range(5, 20)))
    assert not store.load_head(head, list(range(5, 20)))
    store.save_head(read(model, list(range(5, 30))), list(range(5, 20)))
    assert store.load_head(head, list(range(5, 20)))
    assert (head.tokens, head.exact_tokens) == (list(range(5, 20)), 15)


def test_another_models_cache_is_refused():
    model, other = KINDS["prefix"](), prefixed(llama(seed=4), 1)[0]
    store.save_cache(read(model, range(5, 30)), "exact", "document", "text")
    store.save_cache(read(model, range(5, 30), "kvp"), "predicted", "document", "text")
    with pytest.raises(InputError, match="another model"):
        store.load_cache(other, "exact")
    retrained = KINDS["prefix"]()
    for linear in retrained.predictor.maps.values():
        linear.bias = linear.bias + 0.01
    store.load_cache(retrained, "exact")
    with pytest.raises(InputError, match="another bundle"):
        store.load_cache(retrained, "predicted")


@pytest.mark.parametrize("file", ["cache.safetensors", "cache.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone"])
def test_a_damaged_cache_is_named(file, damage, place):
    model = KINDS["prefix"]()
    store.save_cache(read(model, range(5, 30)), "mine", "document", "text")
    path = place / "mine" / file
    content = path.read_bytes()
    flipped = content[:-40] + bytes([content[-40] ^ 1]) + content[-39:]
    path.write_bytes({"flip": flipped, "cut": content[: len(content) // 2]}.get(damage, b""))
    if damage == "gone":
        path.unlink()
    with pytest.raises(InputError, match=r"mine.*(damaged|another model)"):
        store.load_cache(model, "mine")


@pytest.mark.parametrize("field", ["tokens", "exact_tokens", "text"])
def test_a_changed_field_of_cache_json_is_noticed(field, place):
    model = KINDS["prefix"]()
    store.save_cache(read(model, range(5, 30)), "mine", "document", "text")
    path = place / "mine" / "cache.json"
    data = json.loads(path.read_text())
    data[field] = {"tokens": [6, *data["tokens"][1:]], "exact_tokens": 3, "text": "test"}[field]
    path.write_text(json.dumps(data))
    with pytest.raises(BundleError, match="is damaged"):
        store.load_cache(model, "mine")
    del data["mark"]  # as older versions wrote it
    path.write_text(json.dumps(data))
    store.load_cache(model, "mine")


def test_a_damaged_head_is_named_skipped_and_made_again(place):
    model = KINDS["prefix"]()
    conversation = Conversation(model, " ".join(["w7"] * 12))
    conversation.keep_heads = True
    options = {"dial": Dial("kvp", 10, 0), "max_tokens": 3}

    def first_turn():
        conversation.context = Context(model)
        conversation.clear()
        return list(conversation.reply("w1 w2 w3", **options))[-1].cached_tokens

    assert [first_turn(), first_turn()] == [0, 10]
    (head,) = place.iterdir()
    with open(head / "cache.safetensors", "r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"damaged!")
    with pytest.warns(UserWarning, match=head.name):
        assert first_turn() == 0
    assert first_turn() == 10


def test_the_least_recently_used_make_room(place):
    model = KINDS["prefix"]()
    context = read(model, range(5, 30))
    store.save_cache(context, "a", "document", "text")
    limit = int(3.5 * store.directory_bytes(place / "a"))
    for age, name in ((200, "a"), (100, "b"), (50, "c")):
        store.save_cache(context, name, "document", "text", limit_bytes=limit)
        os.utime(place / name / "cache.json", (time.time() - age,) * 2)
    store.load_cache(model, "a")
    assert store.save_cache(context, "d", "document", "text", limit_bytes=limit) == ["b"]
    assert sorted(path.name for path in place.iterdir()) == ["a", "c", "d"]
    with pytest.raises(InputError, match="KVP_CACHE_LIMIT_GB"):
        store.save_cache(context, "e", "document", "text", limit_bytes=1000)
    assert not (place / "e").exists()


@pytest.mark.parametrize("name", ["", "../x", ".x", "a/b", "x" * 65, "a b"])
def test_bad_names(name):
    with pytest.raises(InputError, match="no name"):
        store.cache_place(name)
    with pytest.raises(InputError, match="no name"):
        transcripts.save_conversation(name, [], 0)


@pytest.mark.parametrize("text", ["much", "0", "-1", "nan"])
def test_bad_limit(text, monkeypatch):
    monkeypatch.setenv("KVP_CACHE_LIMIT_GB", text)
    with pytest.raises(InputError, match="KVP_CACHE_LIMIT_GB"):
        store.limit_from_environment()


def test_conversations_are_whole_or_named(tmp_path):
    messages = [{"role": "user", "content": "Grüße\n\N{SLIGHTLY SMILING FACE}"}]
    transcripts.save_conversation("a", messages, 0)
    assert transcripts.load_conversation("a") == (messages, 0)
    path = tmp_path / "kvp" / "conversations" / "a.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(BundleError, match=r"a\.json is damaged"):
        transcripts.load_conversation("a")
    with pytest.raises(InputError, match="saved: a"):
        transcripts.load_conversation("b")


KILLED = """
import sys, kvp_mlx
from kvp_mlx.engine.context import Context
from kvp_mlx.engine.dial import Dial
from kvp_mlx.engine.saved_caches import save_cache
from kvp_mlx.engine.transcripts import save_conversation
model = kvp_mlx.load(sys.argv[1])
context = Context(model)
context.read(list(range(5, 205)), Dial("full", 0, 0))
print("ready", flush=True)
for number in range(100_000):
    save_cache(context, "a", "document", "text")
    save_conversation("a", [{"role": "user", "content": str(number) * 5000}], 0)
    print(number, flush=True)
"""


def test_a_kill_at_any_moment_leaves_things_readable_or_absent(bundle):
    model = kvp_mlx.load(str(bundle))
    states = []
    for delay in (0.0, 0.007, 0.02):
        process = subprocess.Popen([sys.executable, "-c", KILLED, bundle], stdout=subprocess.PIPE)
        process.stdout.readline()
        if delay > 0.01:
            process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if store.cache_place("a").is_dir():
            _, context = store.load_cache(model, "a")
            assert len(context.tokens) == 199
            states.append("cache")
        if "a" in transcripts.conversation_names():
            messages, _ = transcripts.load_conversation("a")
            content = messages[0]["content"]
            assert content == content[: len(content) // 5000] * 5000 != ""
            states.append("conversation")
    assert {"cache", "conversation"} <= set(states)


def test_a_quantised_head_is_not_kept(place):
    """It could not be taken up again."""
    context = read(KINDS["prefix"](), range(5, 30))
    context.cache = [QuantizedKVCache(32, 8) for _ in context.cache]
    store.save_head(context, list(range(5, 20)))
    assert not place.exists()


def test_what_is_saved_is_the_users_alone(place):
    model = KINDS["prefix"]()
    before = os.umask(0o022)
    try:
        store.save_cache(read(model, range(5, 30)), "a", "document", "text")
        transcripts.save_conversation("a", [{"role": "user", "content": "a secret"}], 0)
    finally:
        os.umask(before)
    for path in [place, *place.rglob("*"), *(place.parent / "conversations").glob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path


def test_a_cache_that_may_only_be_read_can_be_used(monkeypatch):
    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    model = KINDS["prefix"]()
    store.save_cache(read(model, range(5, 30)), "a", "document", "text")
    monkeypatch.setattr(os, "utime", refused)
    _, loaded = store.load_cache(model, "a")
    assert loaded.tokens == list(range(5, 30))


def test_a_cache_that_a_kill_left_aside_comes_back(place):
    model = KINDS["prefix"]()
    store.save_cache(read(model, range(5, 30)), "a", "document", "text")
    (place / "a").rename(place / ".a.0123abcd.old")
    assert store.load_cache(model, "a")[1].tokens == list(range(5, 30))


@pytest.mark.parametrize("does", ["replaces", "removes"])
def test_a_cache_that_another_process_changes_meanwhile_is_not_called_damaged(does, monkeypatch):
    model, fingerprint = KINDS["prefix"](), store.base_fingerprint
    store.save_cache(read(model, range(5, 30)), "a", "document", "text")

    def other_process(loaded):
        monkeypatch.setattr(store, "base_fingerprint", fingerprint)
        store.remove_cache("a")
        if does == "replaces":
            store.save_cache(read(model, range(5, 40)), "a", "document", "text")
        return fingerprint(loaded)

    monkeypatch.setattr(store, "base_fingerprint", other_process)
    if does == "replaces":
        assert store.load_cache(model, "a")[1].tokens == list(range(5, 40))
    else:
        with pytest.raises(InputError, match="there is no saved cache 'a'"):
            store.load_cache(model, "a")


NO_TRANSCRIPTS = [
    "[]",
    '"x"',
    "[" * 99_999,
    '{"format_version": 1, "messages": [{"role": 1, "content": "x"}], "first": 0}',
]
NO_TRANSCRIPTS += [
    json.dumps({"format_version": 1, "messages": [{"role": "user", "content": content}], "first": first})
    for content, first in ((None, 0), ({"a": 1}, 0), ("x", -1), ("x", 5), ("x", "0"), ("\ud800", 0))
]


@pytest.mark.parametrize("text", NO_TRANSCRIPTS, ids=range(len(NO_TRANSCRIPTS)))
def test_transcripts_of_other_shapes_are_named(text, tmp_path):
    transcripts.save_conversation("a", [], 0)
    (tmp_path / "kvp" / "conversations" / "a.json").write_text(text)
    with pytest.raises(BundleError, match=r"a\.json is damaged"):
        transcripts.load_conversation("a")


def test_what_is_no_cache_is_neither_listed_nor_removed(place, tmp_path):
    context = read(KINDS["prefix"](), range(5, 30))
    store.save_cache(context, "a", "document", "text")
    (place / "mine").mkdir()
    (place / "mine" / "thesis.tex").write_text("years of work")
    elsewhere = shutil.move(place / "a", tmp_path / "elsewhere")
    (place / "linked").symlink_to(elsewhere)
    store.save_cache(context, "b", "document", "text", limit_bytes=store.directory_bytes(elsewhere))
    assert [path.name for path in store.saved_places()] == ["b"]
    assert sorted(path.name for path in place.iterdir()) == ["b", "linked", "mine"]
    for name in ("mine", "linked"):
        with pytest.raises(InputError, match="is no saved cache"):
            store.remove_cache(name)
    assert (place / "mine" / "thesis.tex").exists() and (elsewhere / "cache.json").exists()


def test_a_newer_format_is_refused(place):
    model = KINDS["prefix"]()
    store.save_cache(read(model, range(5, 30)), "a", "document", "text")
    path = place / "a" / "cache.json"
    path.write_text(path.read_text().replace('"format_version":1', '"format_version":2'))
    with pytest.raises(BundleError, match="of another version"):
        store.load_cache(model, "a")


@pytest.mark.parametrize("text", ["[" * 99_999, "[]", '{"tokens": "abc"}'])
def test_cache_json_of_other_shapes_is_named(text, place):
    model = KINDS["prefix"]()
    store.save_cache(read(model, range(5, 30)), "a", "document", "text")
    (place / "a" / "cache.json").write_text(text)
    with pytest.raises(BundleError, match="is damaged"):
        store.load_cache(model, "a")
