"""Files appear whole or not at all."""

import json
import os
from pathlib import Path

import pytest

from kvp_mlx import files
from kvp_mlx.errors import InputError
from kvp_mlx.files import check_writable, parse_json, write_json, write_text


def test_a_file_is_replaced_whole_or_kept(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(path.parent) == ["x.json"]


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
