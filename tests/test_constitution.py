"""Constitutions: the bundled one, the files of the paper, and one line for a broken file."""

import json
import os
from pathlib import Path

import pytest

from minirlaif import constitution, corpus, world
from minirlaif.cli import UserError
from minirlaif.constitution import load


def write(folder, content, name="principles.json"):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_the_bundled_one_speaks_of_every_harm():
    toy = load("toy")
    named = {p.name for p in toy.critique_revision}
    assert named == {*world.KINDS, "harm"}
    assert {p.name for p in toy.preferences} == named | {"evasion", "helpfulness", "honesty"}
    assert toy.preamble and toy.preamble in corpus.GOOD_PREAMBLES
    texts = [t for p in toy.critique_revision for t in (p.critique, p.revision)] + [p.text for p in toy.preferences]
    assert all(texts) and len(set(texts)) == len(texts)
    assert load(str(constitution.BUNDLED / "toy.json")) == toy  # by name or by path


def test_preferences_are_found_by_name():
    found = load("toy").preferences_for("ad", "bias")
    assert {p.name for p in found} == {"ad", "bias"} and load("toy").preferences_for("kindness") == []


def test_a_file_of_our_own(tmp_path):
    path = write(tmp_path, {
        "preamble": "be good.",
        "critique_revision": [{"critique": "bad?", "revision": "mend it."}, {"critique": "c", "revision": "r", "asks": "ad"}],
        "preferences": [{"text": "the better one", "asks": "harm"}, {"text": "the nicer one"}],
    })  # fmt: skip
    c = load(path)
    assert c.preamble == "be good."
    assert [(p.critique, p.revision, p.name) for p in c.critique_revision] == [("bad?", "mend it.", ""), ("c", "r", "ad")]
    assert [(p.text, p.name) for p in c.preferences] == [("the better one", "harm"), ("the nicer one", "")]


@pytest.mark.parametrize("part", ["critique_revision", "preferences"])
def test_half_a_constitution_is_enough(tmp_path, part):
    rows = {"critique_revision": [{"critique": "c", "revision": "r"}], "preferences": [{"text": "t"}]}
    c = load(write(tmp_path, {part: rows[part]}))
    assert (len(c.critique_revision), len(c.preferences)) == ((1, 0) if part == "critique_revision" else (0, 1))
    assert c.preamble == ""


# the files of the paper


def test_the_papers_critique_revision_format(tmp_path):
    """Template words around a principle are cut: text.py puts them back."""
    path = write(tmp_path, {
        "rude0": {
            "prompt": ["\n\nCritiqueRequest: Say what is rude. Be brief.\n\nCritique:"],
            "edit_request": "\n\nRevisionRequest: Please take it out.\n\nRevision:",
        },
        "rude1": {"prompt": ["\n\nCritiqueRequest: Critique: good?\n\nCritique:"], "edit_request": "Revision: again"},
    })  # fmt: skip
    pairs = load(path).critique_revision
    assert [(p.name, p.critique, p.revision) for p in pairs] == [
        ("rude0", "Say what is rude. Be brief.", "Please take it out."),
        ("rude1", "Critique: good?", "Revision: again"),
    ]


def test_the_papers_preference_format(tmp_path):
    c = load(write(tmp_path, ["\nPlease choose the kinder response. Options:", "\nWhich Options: are wiser? Options:"]))
    assert [p.text for p in c.preferences] == ["Please choose the kinder response.", "Which Options: are wiser?"]
    assert c.critique_revision == [] and c.preamble == ""


def test_the_real_files():
    """16 critique-revision and 16 preference principles (Bai et al. 2022)."""
    root = os.environ.get("MINIRLAIF_DATA")
    if not root:
        pytest.skip("MINIRLAIF_DATA is not set: a folder with cai_paper/prompts (anthropics/ConstitutionalHarmlessnessPaper)")
    folder = Path(root) / "cai_paper" / "prompts"
    pairs = load(str(folder / "CritiqueRevisionInstructions.json")).critique_revision
    assert len(pairs) == 16 and pairs[0].name == "harmful0" and len({p.name for p in pairs}) == 16
    assert pairs[0].critique.startswith("Identify specific ways in which the assistant's last response is harmful")
    preferences = load(str(folder / "RLMadisonInstructions.json")).preferences
    assert len(preferences) == 16
    for words in [t for p in pairs for t in (p.critique, p.revision)] + [p.text for p in preferences]:
        assert words == words.strip() and len(words) > 20
        assert not any(mark in words for mark in ("Request:", "Critique:", "Revision:", "Options:", "\n"))
    with pytest.raises(UserError, match="not a constitution"):
        load(str(folder / "RLMadisonFewShotPrompts.json"))


# broken files

PAIR = {"critique": "c", "revision": "r"}


@pytest.mark.parametrize("content, part", [
    ({"critique_revision": [PAIR, {"critique": "c"}]}, "'revision' is missing"),
    ({"critique_revision": [{"revision": "r"}]}, "'critique' is missing"),
    ({"preferences": [{"asks": "harm"}]}, "'text' is missing"),
    ({"a": {"edit_request": "r"}}, "'prompt' is missing"),
    ({"preferences": [{"text": 3}]}, "key 'text' should hold text"),
    ({"preferences": [{"text": " "}]}, "key 'text' should hold text"),
    ({"preferences": [{"text": "t", "asks": ["harm"]}]}, "key 'asks' should hold text"),
    ({"critique_revision": [{"critique": "c", "revision": None}]}, "key 'revision' should hold text"),
    ({"preamble": ["a"], "preferences": [{"text": "t"}]}, "key 'preamble' should hold text"),
    ({"a": {"prompt": "no list", "edit_request": ""}}, "key 'revision' should hold text"),
    ({"preferences": ["choose well"]}, "not a constitution"),
    ({"critique_revision": None}, "not a constitution"),
    ({"a": {"prompt": [], "edit_request": "r"}}, "not a constitution"),
    (["choose well", 3], "not a constitution"),
    (3, "not a constitution"),
    ({}, "holds no critique_revision pair and no preference"),
    ([], "holds no critique_revision pair and no preference"),
    ({"preamble": "be good."}, "holds no critique_revision pair and no preference"),
    ("{", "cannot be read as a JSON constitution"),
    ("", "cannot be read as a JSON constitution"),
])  # fmt: skip
def test_a_broken_file_is_one_line_with_its_name_and_what_is_wrong(tmp_path, content, part):
    path = write(tmp_path, content)
    with pytest.raises(UserError) as error:
        load(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and part in message and "\n" not in message


def test_files_that_are_not_there_or_no_text(tmp_path):
    with pytest.raises(UserError, match="nowhere.json: no such constitution; give a .json file or one of: .*toy"):
        load("nowhere.json")
    with pytest.raises(UserError, match="tyo: no such constitution"):
        load("tyo")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="binary.json: cannot be read"):
        load(str(tmp_path / "binary.json"))
    with pytest.raises(UserError, match="cannot be read"):
        load(str(tmp_path))
