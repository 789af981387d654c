"""Files in, batches out: what a good file gives, what every kind of bad line says, and the invariances of the batches."""

import gzip
import json
import os
from pathlib import Path

import pytest
import torch

from minirlaif import data
from minirlaif.cli import UserError


class Letters:
    """A tokenizer for tests: one id a character."""

    eot = 0

    def encode(self, text):
        return [ord(c) for c in text]


def write(path, *lines):
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return path


GOOD = {"prompt": "\n\nHuman: hi\n\nAssistant:", "chosen": " hello", "rejected": " go away"}
DIALOGUES = {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: good",
             "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: bad"}


# good files


def test_rows_are_verbatim_and_know_their_line(tmp_path):
    file = write(tmp_path / "a.jsonl", GOOD, b"", b"   ", {**GOOD, "prompt": " \u2028é ", "extra": [1]})
    first, second = data.read_preferences(file)
    assert first == {**GOOD, "p_chosen": 1.0} and first.where == f"{file}:1"
    assert (second["prompt"], second["extra"], second.where) == (" \u2028é ", [1], f"{file}:4")


def test_written_rows_are_read_back(tmp_path):
    rows = [{"prompt": "a\u2028\n\"é", "n": 1}, {"prompt": "\ud800 alone"}]
    data.write_jsonl(tmp_path / "new" / "a.jsonl", rows)
    assert data.read_prompts(tmp_path / "new" / "a.jsonl") == rows
    assert os.listdir(tmp_path / "new") == ["a.jsonl"]


def test_gzip_and_byte_order_mark(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + json.dumps(GOOD).encode()))
    assert data.read_prompts(tmp_path / "a.jsonl.gz") == [GOOD]


def test_whole_dialogues_are_split_before_the_last_answer(tmp_path):
    file = write(tmp_path / "hh.jsonl", DIALOGUES)
    prompt = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    assert data.read_preferences(file) == [{"prompt": prompt, "chosen": " good", "rejected": " bad", "p_chosen": 1.0}]
    assert data.read_prompts(file)[0]["prompt"] == prompt
    assert data.read_documents(file)[0]["segments"] == [[DIALOGUES["chosen"], 1.0]]
    candidates = data.read_candidates(file)[0]
    assert (candidates["prompt"], candidates["responses"], candidates["ranks"]) == (prompt, [" good", " bad"], [0, 1])


def test_summaries_are_candidates(tmp_path):
    file = write(tmp_path / "a.jsonl", {"prompt": "p", "summary_1": "x", "summary_2": "y"})
    row = data.read_candidates(file)[0]
    assert row["responses"] == ["x", "y"] and "ranks" not in row


def test_labels_of_an_ai_are_no_ranks_of_a_human(tmp_path):
    file = write(tmp_path / "a.jsonl", {**GOOD, "p_chosen": 0.5}, {**GOOD, "p_chosen": None, "status": "failed"}, GOOD)
    assert [row.get("ranks") for row in data.read_candidates(file)] == [None, None, [0, 1]]


def test_documents_of_every_form(tmp_path):
    file = write(tmp_path / "a.jsonl", {"text": "ab"}, {"segments": [["a", 0], ["b", 2.5]]},
                 {"prompt": "p", "completion": "cd", "stopped": False})
    encoded = [data.encode_document(Letters(), row) for row in data.read_documents(file)]
    a, b, c, d, p = map(ord, "abcdp")
    assert encoded == [([a, b, 0], [1, 1, 1]), ([a, b, 0], [0, 2.5, 2.5]), ([p, c, d], [0, 1, 1])]
    (tmp_path / "plain.txt").write_text("line\nline\n")
    assert data.read_documents(tmp_path / "plain.txt")[0]["segments"] == [["line\nline\n", 1.0]]


def test_pairs_without_a_label_are_left_out(tmp_path, capsys):
    file = write(tmp_path / "a.jsonl", GOOD, {**GOOD, "p_chosen": None}, {**GOOD, "p_chosen": 0.5})
    assert [row["p_chosen"] for row in data.read_preferences(file)] == [1.0, 0.5]
    assert capsys.readouterr().err == f"{file}: 1 of 3 pairs have no label\n"


# bad lines: (what is on line 2, what the message says after "path:2: ")

BAD = [
    (b'{"prompt": ', "not JSON"),
    (b"\xff\xfe", "not UTF-8"),
    (b"[" * 100_000, "not JSON"),
    ([1], "not a JSON object but a list"),
    ({"chosen": " a", "prompt": "p"}, "no key 'rejected'"),
    ({"completion": " a"}, "no key 'prompt'"),
    ({**GOOD, "prompt": 3}, "'prompt' should be a string, not an integer"),
    ({**GOOD, "prompt": " \n"}, "empty prompt"),
    ({**GOOD, "rejected": None}, "'rejected' should be a string, not null"),
    ({**GOOD, "rejected": GOOD["chosen"]}, "chosen and rejected are the same"),
    ({**GOOD, "p_chosen": 0.4}, "p_chosen is not in [0.5, 1] but 0.4"),
    ({**GOOD, "p_chosen": True}, "'p_chosen' should be a number, not true or false"),
    ({**DIALOGUES, "rejected": "\n\nHuman: z\n\nAssistant: bad"}, "chosen and rejected do not share a prompt"),
    ({"chosen": "a", "rejected": "b"}, "chosen and rejected do not share a prompt"),
]


@pytest.mark.parametrize("bad, message", BAD)
def test_a_bad_line_is_named(tmp_path, monkeypatch, bad, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", GOOD, bad)
    with pytest.raises(UserError) as e:
        data.read_preferences("./a.jsonl")  # shown as it was typed
    assert str(e.value).startswith(f"./a.jsonl:2: {message}")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("bad, message", [
    ({"prompt": "p", "responses": ["a"]}, "'responses' should be two or more strings"),
    ({"prompt": "p", "responses": ["a", 1]}, "'responses' should be two or more strings"),
    ({"prompt": "p", "responses": ["a", "b"], "ranks": [1]}, "'ranks' should be one finite number a response"),
    ({"prompt": "p", "responses": ["a", "b"], "ranks": [float("nan"), 1]}, "'ranks' should be one finite number a response"),
    ({"prompt": "p", "responses": ["a", "b"], "stopped": [True]}, "'stopped' should be one true or false a response"),
    ({"prompt": "p", "responses": ["a", "b"], "stopped": 1}, "'stopped' should be one true or false a response"),
    ({"prompt": "p", "responses": ["a", "b"], "sources": ["x", {}]}, "'sources' should be one string a response"),
    ({"prompt": "p", "responses": ["a", "b"], "ranks": 1}, "'ranks' should be one finite number a response"),
    ({"prompt": "p", "summary_1": "a"}, "no key 'summary_2'"),
    ({"prompt": "p"}, "no key 'responses'"),
])
def test_bad_candidates(tmp_path, bad, message):
    with pytest.raises(UserError, match=f":1: {message}"):
        data.read_candidates(write(tmp_path / "a.jsonl", bad))


@pytest.mark.parametrize("bad, message", [
    ({"text": ""}, "empty text"),
    ({"segments": [["a"]]}, "a segment should be"),
    ({"segments": []}, "empty text"),
    ({"story": "a"}, "no text to train on: a row needs 'text'"),
    ({"segments": [["a", float("nan")]]}, "the weight of a segment should be 0 or more"),
    ({"segments": [["a", -1]]}, "the weight of a segment should be 0 or more"),
    ({"text": "a", "stopped": 1}, "'stopped' should be true or false"),
])
def test_bad_documents(tmp_path, bad, message):
    with pytest.raises(UserError, match=f":1: {message}"):
        data.read_documents(write(tmp_path / "a.jsonl", bad))


def test_skips_are_counted_by_reason_and_said_once(tmp_path, capsys):
    same = {**GOOD, "rejected": GOOD["chosen"]}
    file = write(tmp_path / "a.jsonl", GOOD, b"{", same, b"nope", {**GOOD, "chosen": " hey"})
    assert [row.where for row in data.read_preferences(file, "skip")] == [f"{file}:1", f"{file}:5"]
    assert capsys.readouterr().err == (
        f"{file}: skipped 3 of 5 rows: 2 not JSON, 1 chosen and rejected are the same\n"
    )


@pytest.mark.parametrize("content, message", [
    (None, "No such file"), (b"", "the file is empty"), (b"\n \n", "the file is empty"), (b"{", "no usable rows"),
])
def test_files_without_rows(tmp_path, content, message):
    if content is not None:
        (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=f"a.jsonl: {message}"):
        data.read_prompts(tmp_path / "a.jsonl", "skip")


def test_a_folder_and_a_broken_gzip(tmp_path):
    with pytest.raises(UserError, match="directory"):
        data.read_prompts(tmp_path)
    whole = gzip.compress(json.dumps(GOOD).encode() * 50)
    for content, message in ((whole[: len(whole) // 2], "not a complete gzip file"), (b"plain text", "not a gzip file")):
        (tmp_path / "a.jsonl.gz").write_bytes(content)
        with pytest.raises(UserError, match=f"a.jsonl.gz: {message}"):
            data.read_prompts(tmp_path / "a.jsonl.gz")


def test_too_long_names_the_line_and_the_lengths(tmp_path, capsys):
    rows = data.read_completions(write(tmp_path / "a.jsonl", {"prompt": "abc", "completion": "d"},
                                       {"prompt": "abc", "completion": "def"}))

    def encode(row):
        ids, prompt_len = data.encode_pair(Letters(), row["prompt"], row["completion"])
        data.check_length(prompt_len, len(ids) - prompt_len, block_size=6)
        return ids

    with pytest.raises(UserError, match=r"a.jsonl:2: .* 3 prompt \+ 4 response tokens, block_size 6"):
        data.convert(rows, encode)
    assert len(data.convert(rows, encode, "skip")) == 1
    assert "skipped 1 of 2 rows: 1 longer than the model's context" in capsys.readouterr().err


# tokens


def test_encode_pair_keeps_the_boundary_and_ends_what_stopped():
    assert data.encode_pair(Letters(), "ab", " c") == ([97, 98, 32, 99, 0], 2)
    assert data.encode_pair(Letters(), "ab", " c", stopped=False) == ([97, 98, 32, 99], 2)
    assert data.encode_pair(Letters(), "ab", "") == ([97, 98, 0], 2)


def test_pad():
    tokens, length = data.pad([[1, 2, 3], [4]], pad_id=9)
    assert tokens.tolist() == [[1, 2, 3], [4, 9, 9]] and length.tolist() == [3, 1]
    assert tokens.dtype == torch.long
    assert data.pad([[1] * 17], 9, multiple=16)[0].shape == (1, 32)
    assert data.pad([[1] * 16], 9, multiple=16)[0].shape == (1, 16)
    assert data.pad([[1] * 17], 9, multiple=16, limit=20)[0].shape == (1, 20)  # a block_size that is no multiple


def test_batches_by_tokens():
    def batches(seed):
        return data.batches_by_tokens(lengths, 256, torch.Generator().manual_seed(seed))

    lengths = [1 + (i * 37) % 90 for i in range(200)] + [500]
    cut = batches(0)
    assert sorted(i for batch in cut for i in batch) == list(range(201))  # each row once
    padded = [len(batch) * data.pad([[0] * lengths[i] for i in batch], 0, 16)[0].shape[1] for batch in cut]
    assert all(n <= 256 for n, batch in zip(padded, cut, strict=True) if 200 not in batch)
    assert [200] in cut  # too long for the budget: alone, not lost
    assert sum(padded) < 1.35 * sum(lengths)  # bucketing leaves few pads (any order would give 1.9)
    assert batches(0) == cut and batches(1) != cut
    widths = [max(lengths[i] + 15 for i in batch) // 16 for batch in cut]
    assert widths != sorted(widths)  # batches come in random order


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(b"old")
    with pytest.raises(UserError, match="a: cannot write: No space left"), data.atomic_write(file) as f:
        f.write(b"new")
        raise OSError(28, "No space left on device")
    assert file.read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]
    with pytest.raises(UserError, match="cannot write: No such file"), data.atomic_write(tmp_path / "none" / "a"):
        pass


def test_the_public_harmlessness_file():
    folder = os.environ.get("MINIRLAIF_DATA")
    if not folder:
        pytest.skip("MINIRLAIF_DATA is not set: no hh_rlhf/harmless-base.jsonl")
    rows = data.read_preferences(Path(folder) / "hh_rlhf" / "harmless-base.jsonl")
    assert len(rows) > 1000
    assert all(r["prompt"].startswith("\n\nHuman:") and r["prompt"].endswith("\n\nAssistant:") for r in rows)
    assert not any("\n\nHuman:" in r["chosen"] + r["rejected"] for r in rows)


@pytest.mark.parametrize(
    "rejected, reason", [("", "empty response"), (" no.\n\nHuman: why?", "a dialogue that ends in a human turn")]
)
def test_dialogues_without_a_last_answer_are_bad_rows(tmp_path, capsys, rejected, reason):
    prompt = "\n\nHuman: may i?\n\nAssistant:"
    rows = [{"chosen": prompt + " yes.", "rejected": prompt + said} for said in (" no.", rejected)]
    path = str(tmp_path / "hh.jsonl")
    data.write_jsonl(path, rows)
    with pytest.raises(UserError, match=f"hh.jsonl:2: {reason}"):
        data.read_preferences(path)
    assert len(data.read_preferences(path, "skip")) == 1
    assert f"skipped 1 of 2 rows: 1 {reason}" in capsys.readouterr().err


def test_a_name_says_what_is_one_plain_text():
    assert [data.is_text(name) for name in ("book.txt", "BOOK.TXT", "book.txt.gz", "rows.jsonl")] == [True, True, False, False]
