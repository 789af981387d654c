"""Any text survives encoding; end-of-text is never text; training cuts words as tiktoken will; bad files say so."""

import base64
import json
import os
from pathlib import Path

import pytest
import regex

from minirlaif import tokenizer as T
from minirlaif.cli import UserError

TEXTS = [
    "\n\nHuman: how do I fix a bike?\n\nAssistant: to fix a bike, find the tool and fix the bike.",
    "\n\nHuman: how do I bake a cake?\n\nAssistant: to bake a cake, find the tin and bake the cake 123.",
] * 3
STRANGE = [
    "", " ", "\n", "  two  spaces ", "\ttab\r\nline\u2028sep\x85\x1c\x0b", "naïve ﬁ 中文 🙂\u200d🙂 e\u0301",
    "1234567 ½ ٣", "a_b-c's \x00\x7f", "<|endoftext|>", "()[]{}!?.,;:'\"`~ \u00a0\u3000x", "".join(map(chr, range(1, 0x500))),
]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    file = tmp_path_factory.mktemp("bpe") / "small.tiktoken"
    T.write_ranks(file, T.train_bpe(TEXTS, 290))
    return T.load_tokenizer(str(file))


def test_merges_by_hand():
    """Pairs in "aab" (4 times) and "ab" (3): ab 7, aa 4. Then a+ab 4, by the bytes it makes."""
    ranks = T.train_bpe(["aab\n"] * 4 + ["ab\n"] * 3, 260)
    assert [t for t, r in ranks.items() if r >= 256] == [b"ab", b"aab"]  # then no piece has two parts: nothing to merge


def test_ties_do_not_depend_on_the_order_of_texts():
    texts = ["xy\n", "ab\n", "xy\n", "ab\n"]
    assert T.train_bpe(texts, 258) == T.train_bpe(texts[::-1], 258)
    assert T.train_bpe(texts, 258)[b"ab"] == 256


def test_what_is_seen_once_is_not_merged():
    assert len(T.train_bpe(["abc"], 300)) == 256


@pytest.mark.parametrize("text", STRANGE)
def test_every_text_survives(small, text):
    assert small.decode(small.encode(text)) == text


@pytest.mark.parametrize("text", STRANGE)
def test_the_pattern_leaves_no_character_out(text):
    assert "".join(regex.findall(T.PATTERN, text)) == text


def test_end_of_text_is_the_last_id_and_never_text(small):
    assert small.n_vocab == 290 and small.eot == 289
    assert small.eot not in small.encode("<|endoftext|>")
    assert small.decode([*small.encode("hi"), small.eot, small.eot]) == "hi"


def test_the_lowest_rank_merges_first_then_the_leftmost():
    ranks = {b"a": 0, b"b": 1, b"c": 2, b"bc": 3, b"ab": 4, b"aa": 5}
    assert T._cut([b"a", b"b", b"c"], ranks) == [b"a", b"bc"]
    assert T._cut([b"a", b"a", b"a"], ranks) == [b"aa", b"a"]


def test_training_cuts_words_as_tiktoken_does(small):
    ranks = small.encoding._mergeable_ranks
    for piece in {p for text in TEXTS for p in regex.findall(T.PATTERN, text)}:
        cut = T._cut([bytes([b]) for b in piece.encode()], ranks)
        assert [ranks[token] for token in cut] == small.encode(piece)


def test_turns_start_at_a_token_boundary(small):
    """Encoding prompt and response separately gives what encoding the whole text gives: a turn does not move a boundary."""
    prompt, mark, response = TEXTS[0].partition("Assistant:")
    assert small.encode(prompt + mark) + small.encode(response) == small.encode(TEXTS[0])


def test_hash_is_of_the_vocabulary_not_of_the_name(small, tmp_path):
    again, other = tmp_path / "again.tiktoken", tmp_path / "other.tiktoken"
    T.write_ranks(again, T.train_bpe(TEXTS, 290))
    T.write_ranks(other, T.train_bpe(TEXTS, 289))
    assert T.load_tokenizer(str(again)).hash == small.hash != T.load_tokenizer(str(other)).hash


def encoded(*tokens):
    return b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens))


@pytest.mark.parametrize("content, message", [
    (None, "no such tokenizer"), (b"hello world\n", "not a .tiktoken file"), (b"\xff\n", "not a .tiktoken file"),
    (b"", "not complete"), (encoded(b"a", b"b"), "not complete"),
    (encoded(*(bytes([b]) for b in range(256))) + b"YWI= 300\n", "not complete"),
])
def test_bad_files(tmp_path, content, message):
    file = tmp_path / "x.tiktoken"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=f"{file}: .*{message}"):
        T.load_tokenizer(str(file))


def test_bad_gpt2_folders(tmp_path):
    with pytest.raises(UserError, match="no encoder.json"):
        T.load_tokenizer(f"gpt2:{tmp_path}")
    for content in ("{", "[1]", json.dumps({"日": 0})):
        (tmp_path / "vocab.json").write_text(content)
        with pytest.raises(UserError, match="not GPT-2's vocabulary"):
            T.load_tokenizer(f"gpt2:{tmp_path}")


def test_gpt2_from_its_files_is_tiktokens_gpt2():
    if "MINIRLAIF_DATA" not in os.environ:
        pytest.skip("MINIRLAIF_DATA is not set: no gpt2_bpe/encoder.json")
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    folder = Path(os.environ["MINIRLAIF_DATA"]) / "gpt2_bpe"
    gpt2 = T.load_tokenizer(f"gpt2:{folder}")
    reference = data_gym_to_mergeable_bpe_ranks(str(folder / "vocab.bpe"), str(folder / "encoder.json"))
    assert gpt2.encoding._mergeable_ranks == reference
    assert (gpt2.n_vocab, gpt2.eot) == (50257, 50256)
    assert gpt2.encode("Hello world") == [15496, 995]
    assert all(gpt2.decode(gpt2.encode(text)) == text for text in STRANGE)
