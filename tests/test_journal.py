"""The journal of answers: what was received is there again, once, whatever moment the process died at."""

import pytest

from minirlaif import journal
from minirlaif.cli import UserError
from minirlaif.journal import Journal


def lines(path):
    return path.read_bytes().splitlines()


def test_what_was_added_is_read_back(tmp_path):
    with Journal(tmp_path / "j") as first:
        first.add({"a": {"p": 0.5, "text": "é\u2028\n"}})
        first.add({"b": {"p": None}})
        assert "a" in first and first["b"] == {"p": None} and "c" not in first
    with Journal(tmp_path / "j") as second:
        assert second.records == {"a": {"p": 0.5, "text": "é\u2028\n"}, "b": {"p": None}}


def test_every_end_of_the_file_leaves_the_lines_that_are_whole(tmp_path):
    with Journal(tmp_path / "whole") as whole:
        whole.add({"a": {"p": 0.25}, "b": {"p": 0.75}})
    content = (tmp_path / "whole").read_bytes()
    for size in range(len(content)):
        (tmp_path / "cut").write_bytes(content[:size])
        with Journal(tmp_path / "cut") as cut:
            assert list(cut.records) == ["a", "b"][: content[:size].count(b"\n")]
            cut.add({"a": {"p": 0.25}, "b": {"p": 0.75}})
        assert (tmp_path / "cut").read_bytes() == content  # no trace of the half line


def test_a_key_is_written_once_and_keeps_its_first_record(tmp_path):
    with Journal(tmp_path / "j") as j:
        j.add({"a": {"p": 0.1}})
        j.add({"a": {"p": 0.9}, "b": {"p": 0.2}})
        j.add({"b": {"p": 0.3}})
        assert j.records == {"a": {"p": 0.1}, "b": {"p": 0.2}}
    assert len(lines(tmp_path / "j")) == 2


def test_an_answer_is_on_the_disk_before_anything_else_happens(tmp_path, monkeypatch):
    """fsync comes after the whole line, and before the record is known."""
    j, seen = Journal(tmp_path / "j"), []
    monkeypatch.setattr(journal.os, "fsync", lambda handle: seen.append((len(lines(tmp_path / "j")), "a" in j)))
    j.add({"a": {"p": 0.1}})
    assert seen == [(1, False)] and "a" in j


@pytest.mark.parametrize("bad", [b"nonsense", b"[1]", b'{"key": "a"}', b"3", b"\xff"])
def test_a_line_that_is_none_is_named(tmp_path, bad):
    (tmp_path / "j").write_bytes(b'{"key": "a", "record": {}}\n' + bad + b"\n")
    with pytest.raises(UserError, match=r"j:2: not a line of a journal; give another --out"):
        Journal(tmp_path / "j")


def test_a_full_disk_is_one_line_that_says_what_is_safe(tmp_path, monkeypatch):
    j = Journal(tmp_path / "j")
    j.add({"a": {"p": 0.1}})

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(journal.os, "fsync", full)
    with pytest.raises(UserError, match="j: cannot write: No space left on device; what was there before is safe"):
        j.add({"b": {"p": 0.1}})
    assert "b" not in j


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="none/j: cannot write: No such file"):
        Journal(tmp_path / "none" / "j")
