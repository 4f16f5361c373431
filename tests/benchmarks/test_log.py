"""The log of an evaluation: what a kill leaves, other settings, other files, two writers."""

import random

import pytest

from mnemic.benchmarks import log
from mnemic.benchmarks.log import Log
from mnemic.core.errors import FileFormatError, InputError

IDENTITY = {"tasks": ("qa1",), "samples": 4}


def _written(path, lines=5):
    with Log(path, IDENTITY) as opened:
        for i in range(lines):
            opened.append({"batch": i, "said": "naïve\u2028text\n"})
    return path.read_bytes()


def test_lines_come_back_in_order(tmp_path):
    _written(tmp_path / "log")
    with Log(tmp_path / "log", {"samples": 4, "tasks": ["qa1"]}) as opened:
        assert [line["batch"] for line in opened.lines] == [0, 1, 2, 3, 4]
    assert [line["batch"] for line in log.batches(tmp_path / "log")] == [0, 1, 2, 3, 4]


def test_every_cut_loses_the_last_line_at_most(tmp_path):
    path = tmp_path / "log"
    whole = _written(path)
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        complete = sum(end <= cut for end in ends)
        with Log(path, IDENTITY) as opened:
            assert len(opened.lines) == max(complete - 1, 0)
            for i in range(len(opened.lines), 5):
                opened.append({"batch": i, "said": "naïve\u2028text\n"})
        assert path.read_bytes() == whole


def test_damage_before_the_last_line_is_told(tmp_path):
    path, rng = tmp_path / "log", random.Random(0)
    whole = _written(path)
    last = whole.rindex(b"\n", 0, -1) + 1
    for _ in range(50):
        at = rng.randrange(last - 1)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(FileFormatError, match=r"damaged|no log"):
            Log(path, IDENTITY)
        assert len(path.read_bytes()) == len(whole)


def test_a_damaged_last_line_is_dropped(tmp_path):
    path = tmp_path / "log"
    whole = _written(path)
    path.write_bytes(whole[:-5] + b"?" + whole[-4:])
    with Log(path, IDENTITY) as opened:
        assert len(opened.lines) == 4


@pytest.mark.parametrize("content", [b"a poem\nof two lines\n", b"a poem", b"{}\n", b"abc\n"])
def test_other_files_are_left_alone(content, tmp_path):
    path = tmp_path / "poem"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match="no log"):
        Log(path, IDENTITY)
    assert path.read_bytes() == content


def test_other_settings_are_refused(tmp_path):
    path = tmp_path / "log"
    whole = _written(path)
    with pytest.raises(InputError, match="samples was 4 and is 5"):
        Log(path, {**IDENTITY, "samples": 5})
    assert path.read_bytes() == whole


def test_a_newer_format_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(log, "FORMAT_VERSION", 2)
        _written(tmp_path / "log")
    with pytest.raises(FileFormatError, match="format version 2"):
        Log(tmp_path / "log", IDENTITY)


def test_one_writer_at_a_time(tmp_path):
    with Log(tmp_path / "log", IDENTITY), pytest.raises(InputError, match="Another process"):
        Log(tmp_path / "log", IDENTITY)
    Log(tmp_path / "log", IDENTITY).close()


def test_a_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(InputError, match="Cannot write"):
        Log(tmp_path / "missing" / "log", IDENTITY)
