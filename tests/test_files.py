"""Files appear whole or not at all."""

import errno
import json
import os
from pathlib import Path

import pytest
from conftest import Kvp

from kvp_mlx import files
from kvp_mlx.errors import InputError
from kvp_mlx.files import check_writable, claim, parse_json, write_json, write_text


def test_a_file_is_replaced_whole_or_kept(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    with pytest.raises(InputError, match="is no text"):
        write_text(path, "\ud800")
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(path.parent) == ["x.json"]


def test_a_name_that_is_no_utf8_is_said_to_be_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"caf\\udce9.* rename"):
        write_json(tmp_path / "x.json", {"data": [os.fsdecode(b"caf\xe9.txt")]})
    assert not list(tmp_path.iterdir())


def test_links_and_devices_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "text"
    write_text(Path("/dev/null"), "text")
    assert not Path("/dev/null").is_file()


def test_what_cannot_be_written(tmp_path: Path) -> None:
    check_writable(None, tmp_path / "x.json")
    (tmp_path / "file").write_text("")
    for place in (tmp_path, tmp_path / "none" / "x.json"):
        with pytest.raises(InputError, match="name a file"):
            check_writable(place)
    for place in (tmp_path, tmp_path / "file" / "x.json"):
        with pytest.raises(InputError, match="choose another place"):
            write_text(place, "text")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[" * 100_000, "nested"),
        ("[" * 500 + "]" * 500, "nested"),
        ('{"a":' * 200 + "1" + "}" * 200, "nested"),
        ('{"a": "\\ud800"}', "half a character"),
        ('{"\\udfff": 1}', "half a character"),
        ("1" * 5000, "is not JSON"),
        (b"\xff\xfe{}", "not UTF-8"),
    ],
)
def test_json_that_is_none(text: str | bytes, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as refused:
        parse_json(text, "x.json")
    assert str(refused.value).startswith("x.json")
    assert "\n" not in str(refused.value)


def test_json_as_everyone_writes_it() -> None:
    assert parse_json('\ufeff{"a": "\\ud83d\\ude42"}', "x") == {"a": "\N{SLIGHTLY SMILING FACE}"}
    assert parse_json(b"\xef\xbb\xbf[1]", "x") == [1]
    assert parse_json(json.dumps([[{"a": []}]] * 1000), "x") == [[{"a": []}]] * 1000
    assert files.MAX_NESTING >= 64


def test_a_lock_is_one_processs_and_everybodys_where_there_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(tmp_path / "lock", "w") as first, open(tmp_path / "lock", "w") as second:
        assert [claim(first), claim(second)] == [True, False]

        def no_locks(*_: object) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr("fcntl.flock", no_locks)
        assert claim(second)


@pytest.mark.parametrize("command", [("info", "~nobody-here/x"), ("eval", "needle", "--data", "~nobody-here/x.txt")])
def test_a_home_that_nobody_has_is_a_name_like_others(command: tuple[str, ...], kvp: Kvp) -> None:
    outcome = kvp(*command)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "~nobody-here/x" in outcome.err


@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
def test_numbers_of_the_command_line_are_finite(value: str, kvp: Kvp) -> None:
    outcome = kvp("serve", f"--cache-gib={value}", "--port", "1")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "--cache-gib" in outcome.err
