"""The journal of answers: what was received is there again, once, whatever moment the process died at."""

from dataclasses import dataclass

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


@dataclass
class Reply:
    said: str
    cost: float = 0.0


def test_what_is_not_here_is_asked_and_written_as_it_comes(tmp_path):
    """Of what got no reply nothing is kept but what was paid for it; it is asked again, and no other."""
    asked, told = [], []

    def ask(on_answer, given):
        asked.append({**given})
        for i in {0, 1, 2, 3} - {*given}:
            if i != 2 or len(asked) > 1:
                on_answer(i, Reply(f"reply {i}", 1.0))
                assert lines(tmp_path / "j")[-1].startswith(b'{"key": "k%d"' % i)
        return [given.get(i) or Reply("none" if i == 2 and len(asked) == 1 else f"reply {i}", 0.5) for i in range(4)]

    keys = ["k0", "k1", "k2", "k3"]
    with Journal(tmp_path / "j") as j:
        j.add({"k1": {"said": "before", "cost": 1.0}})
        found = j.fill(keys, ask, Reply, on_answer=told.append)
        assert [r.said for r in found] == ["reply 0", "before", "none", "reply 3"] and "k2" not in j
        assert [r.said for r in told] == ["reply 0", "reply 3"] and j.cost == 3.5
        assert asked == [{1: Reply("before", 1.0)}]
    with Journal(tmp_path / "j") as j:
        assert [r.said for r in j.fill(keys, ask, Reply)] == ["reply 0", "before", "reply 2", "reply 3"]
        assert sorted(asked[1]) == [0, 1, 3] and j.cost == 4.5


def test_one_process_holds_it_at_a_time(tmp_path):
    with Journal(tmp_path / "j") as j:
        j.add({"a": {"p": 0.1}})
        with pytest.raises(UserError, match="j: another process is writing it; wait for that, or give another --out"):
            Journal(tmp_path / "j")
    with Journal(tmp_path / "j") as j:
        assert "a" in j


def test_its_name_is_on_the_disk_when_it_is_new(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(journal, "sync", synced.append)
    for _ in range(2):
        with Journal(tmp_path / "j"):
            pass
    assert synced == [tmp_path]


def test_what_need_not_be_durable_is_written_at_once_all_the_same(tmp_path, monkeypatch):
    with Journal(tmp_path / "j") as j:
        monkeypatch.setattr(journal.os, "fsync", lambda handle: pytest.fail("waits for the disk"))
        j.add({"a": {"p": 0.1}}, durable=False)
        assert len(lines(tmp_path / "j")) == 1
        j.clear()
        assert lines(tmp_path / "j") == [] and "a" not in j


@pytest.mark.parametrize("bad", [b"nonsense", b"[1]", b'{"key": "a"}', b"3", b"\xff", b'{"key": "b", "record": 3}'])
def test_a_line_that_is_none_is_named(tmp_path, bad):
    (tmp_path / "j").write_bytes(b'{"key": "a", "record": {}}\n' + bad + b"\n")
    with pytest.raises(UserError, match=r"j:2: not a line of a journal; give another --out"):
        Journal(tmp_path / "j")


def test_a_record_of_something_else_is_one_line(tmp_path):
    with Journal(tmp_path / "j") as j:
        j.add({"a": {"p": 0.1}})
        assert j.cost == 0
        with pytest.raises(UserError, match="j: a record is no Reply; give another --out"):
            j.fill(["a"], lambda on_answer, given: [], Reply)


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
