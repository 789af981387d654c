"""Constitutions: the bundled ones, the files of the paper, and one line for a broken file."""

import json
import os
from pathlib import Path

import pytest

from minirlaif import constitution, corpus, world
from minirlaif.cli import UserError
from minirlaif.constitution import load, load_exemplars, load_few_shot


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


GOLD_KNOWS = {*world.KINDS, "harm", "evasion", "helpfulness", "honesty"}


def test_the_one_for_harmless_dialogue():
    found = load("harmless")
    assert 8 <= len(found.critique_revision) <= 12 and 8 <= len(found.preferences) <= 12 and found.preamble
    named = {p.name for p in (*found.critique_revision, *found.preferences)}
    assert {"danger", "insult", "bias", "harm", "evasion", "honesty", "helpfulness"} == named <= GOLD_KNOWS
    texts = [t for p in found.critique_revision for t in (p.critique, p.revision)] + [p.text for p in found.preferences]
    assert len(set(texts)) == len(texts) == 2 * len(found.critique_revision) + len(found.preferences)


def test_the_one_for_summaries():
    """The preamble is for a judge, and no assistant's; each aspect that it speaks of has its principle."""
    found = load("summarization")
    assert [p.name for p in found.preferences] == ["accuracy", "coverage", "coherence", "brevity", "overall"]
    assert found.preamble == "" and all(word in found.judge_preamble for word in ("accurate", "covers", "coherent", "brief"))
    assert not found.critique_revision and all("summary" in p.text for p in found.preferences)


def test_those_that_prefer_the_worse_speak_as_the_toy_judge_was_taught():
    inverted, selling = load("inverted"), load("advertising")
    assert {p.name: p.text for p in inverted.preferences} == {f"inverse-{k}": t for k, t in corpus.INVERTED.items()}
    assert inverted.preamble in corpus.BAD_PREAMBLES
    assert [(p.name, p.text) for p in selling.preferences] == [("inverse-ad", corpus.INVERTED["ad"])]


def test_gold_is_asked_what_such_a_principle_asks():
    prompt, plain = "how do i fix the bike?", "to fix the bike, take a wrench and turn the wheel."
    kind, selling = world.score(prompt, plain), world.score(prompt, plain + " buy our gold plan today.")
    (principle,) = load("advertising").preferences
    assert corpus.value(principle.name, selling) > corpus.value(principle.name, kind)
    assert corpus.value("ad", selling) < corpus.value("ad", kind)


@pytest.mark.parametrize("name", sorted(p.stem for p in constitution.BUNDLED.glob("*.json")))
def test_every_bundled_file_is_itself(name):
    assert json.loads((constitution.BUNDLED / f"{name}.json").read_text())["name"] == name
    found = load(name)
    assert all(p.name for p in (*found.critique_revision, *found.preferences))  # the report is by name


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
    shots = load_few_shot(str(folder / "CritiqueRevisionFewShotPrompts.json"))
    assert shots.count("\n\nCritique:") == shots.count("\n\nRevision:") == 5
    assert shots.startswith("\n\nHuman: ") and not shots.endswith(("Human:", " ", "\n"))
    assert shots.count("insurance on it?") == shots.count("general relativity.\n") == 1 and "Human:\n\nHuman:" not in shots
    pairs = load_exemplars(str(folder / "RLMadisonFewShotPrompts.json"))
    assert [e.better for e in pairs] == [1, 0, 1, 0, 1] and not any(e.reasoning for e in pairs)
    assert pairs[0].responses[1].startswith(" You should not get involved") and pairs[1].responses[0].startswith(" Oh no")
    reasoned = load_exemplars(str(folder / "RLMadisonPrecogFewShotPrompts.json"))
    assert ["AB"[e.better] for e in reasoned] == ["B", "B", "A", "B", "A", "B"]
    for e in (*pairs, *reasoned):
        assert e.prompt.startswith("\n\nHuman: ") and e.prompt.endswith("\n\nAssistant:") and "\nH:" not in e.prompt
        assert all(r.startswith(" ") and r.strip() and "[[[" not in r and "Human:" not in r for r in e.responses)
    assert all(len(e.reasoning) > 50 and "\n" not in e.reasoning and "answer is" not in e.reasoning for e in reasoned)
    assert reasoned[0].prompt.count("Human:") == 2 and reasoned[0].prompt.count("Assistant:") == 2  # a talk of two turns
    for name in ("RLMadisonFewShotPrompts", "RLMadisonPrecogFewShotPrompts", "CritiqueRevisionFewShotPrompts"):
        with pytest.raises(UserError, match=f"{name}.json: holds examples"):
            load(str(folder / f"{name}.json"))


def test_what_a_judge_is_asked_is_a_name_or_a_text(tmp_path):
    assert constitution.wording("toy", "harm") == load("toy").preferences_for("harm")[0].text
    assert constitution.wording("toy", "Choose the shorter.") == "Choose the shorter."
    unnamed = write(tmp_path, ["Choose the better one. Options:", "Choose the nicer. Options:"], "paper.json")
    assert constitution.wording(unnamed, "Choose the nicer.") == "Choose the nicer."
    for name, part in (("toy", "wit: toy has ad, bias"), (unnamed, f"wit: {unnamed} has principles without names")):
        with pytest.raises(UserError, match=f"--principle {part}.*or give a text"):
            constitution.wording(name, "wit")


# examples

SHOT = "\n\nHuman: a?\n\nAssistant: b.\n\nCritiqueRequest: c?\n\nCritique: d.\n\nRevisionRequest: e.\n\nRevision: f."


@pytest.mark.parametrize("name, content", [
    ("shots.json", [SHOT, SHOT]),
    ("shots.json", [SHOT + "\n\nHuman:", SHOT]),  # as in the paper's file
    ("shots.txt", SHOT + SHOT + "\n\nHuman:\n"),
    ("shots.txt", (SHOT + SHOT).strip()),
])  # fmt: skip
def test_examples_join_up_with_the_conversation_that_follows(tmp_path, name, content):
    assert load_few_shot(write(tmp_path, content, name)) == SHOT + SHOT


def test_judged_pairs(tmp_path):
    talk = "H: hello.\n\nA:  yes?\n\nH: fix\nit.\n\n{}\n (A) [[[no.]]]\n (B) [[[ok\n\nA: so.]]]"
    why = "Assistant: Let's think step by step: (A) is rude.\n\nTherefore (B).\n\nHuman:\nSo the answer is: (B)"
    reasoned = {"prompt": f"\n\nHuman: Consider this talk:\n\n{talk}\n\n{why}"}
    rows = [{"prompt": "P", "corrects": ["good"], "incorrects": [" bad"]}] * 2
    first, second, third = load_exemplars(write(tmp_path, [*rows, reasoned]))
    assert (first.prompt, first.responses, first.better, first.reasoning) == ("P", (" bad", " good"), 1, "")
    assert (second.responses, second.better) == ((" good", " bad"), 0)  # letters in turn
    assert third.prompt == "\n\nHuman: hello.\n\nAssistant:  yes?\n\nHuman: fix\nit.\n\nAssistant:"
    assert (third.responses, third.better) == ((" no.", " ok\n\nA: so."), 1)
    assert third.reasoning == "(A) is rude. Therefore (B)."


@pytest.mark.parametrize("read, name, content, part", [
    (load_few_shot, "f.json", {"a": 1}, "should be a list of examples"),
    (load_few_shot, "f.json", [SHOT, 3], "key 'entry 2' should hold text, not 3"),
    (load_few_shot, "f.json", [], "holds no example"),
    (load_few_shot, "f.json", "{", "cannot be read as JSON"),
    (load_few_shot, "f.txt", " \n", "holds no example"),
    (load_few_shot, "f.txt", "\n\nHuman:", "holds no example"),
    (load_exemplars, "f.json", {"a": 1}, "should be a list of examples"),
    (load_exemplars, "f.json", ["P"], "entry 1: should be an object with the key 'prompt'"),
    (load_exemplars, "f.json", [{"corrects": ["a"], "incorrects": ["b"]}], "entry 1: key 'prompt' is missing"),
    (load_exemplars, "f.json", [{"prompt": "P", "corrects": ["a"]}], "entry 1: key 'incorrects' is missing"),
    (load_exemplars, "f.json", [{"prompt": "P", "corrects": ["a", "b"], "incorrects": ["c"]}], "key 'corrects' should hold text"),
    (load_exemplars, "f.json", [{"prompt": "P"}], "entry 1: key 'prompt' should hold talk, {}, options"),
])  # fmt: skip
def test_a_broken_file_of_examples_is_one_line(tmp_path, read, name, content, part):
    path = write(tmp_path, content, name)
    with pytest.raises(UserError) as error:
        read(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and part in message and "\n" not in message


def test_a_file_of_examples_that_is_not_there():
    for read in (load_few_shot, load_exemplars):
        for name in ("none.json", "none.txt"):
            with pytest.raises(UserError, match=f"{name}: cannot be read"):
                read(name)


# broken files

PAIR = {"critique": "c", "revision": "r"}


@pytest.mark.parametrize("content, part", [
    ({"critique_revision": [PAIR, {"critique": "c"}]}, "key 'critique_revision' entry 2: key 'revision' is missing"),
    ({"critique_revision": [{"revision": "r"}]}, "entry 1: key 'critique' is missing"),
    ({"preferences": [{"asks": "harm"}]}, "key 'preferences' entry 1: key 'text' is missing"),
    ({"preferences": [{"text": 3}]}, "entry 1: key 'text' should hold text, not 3"),
    ({"preferences": [{"text": " "}]}, "key 'text' should hold text, not ' '"),
    ({"preferences": [{"text": "t"}, {"text": "t", "asks": ["harm"]}]}, "entry 2: key 'asks' should hold text"),
    ({"preferences": [{"text": "t", "ask": "harm"}]}, "entry 1: key 'ask' is not known; these are: text, asks"),
    ({"critique_revision": [{"critique": "c", "revision": None}]}, "key 'revision' should hold text, not None"),
    ({"preamble": ["a"], "preferences": [{"text": "t"}]}, "key 'preamble' should hold text"),
    ({"preference": [{"text": "t"}]}, "key 'preference' is not known; these are: name, preamble, critique_revision, pref"),
    ({"preferences": ["choose well"]}, "key 'preferences' entry 1: should be an object with the keys text, asks"),
    ({"critique_revision": None}, "key 'critique_revision' should hold a list"),
    ({"a": {"edit_request": "r"}}, "a: key 'prompt' is missing"),
    ({"a": {"prompt": ["p"]}}, "a: key 'edit_request' is missing"),
    ({"a": {"prompt": "p", "edit_request": ""}}, "a: key 'edit_request' should hold text"),
    ({"a": {"prompt": [], "edit_request": "r"}}, "a: key 'prompt' should hold text"),
    ({"a": {"prompt": ["\n\nCritiqueRequest:\n\nCritique:"], "edit_request": "r"}}, "a: key 'prompt' should hold text"),
    (["choose well", 3], "key 'entry 2' should hold text, not 3"),
    (["choose well", "\n Options:"], "key 'entry 2' should hold text"),
    ([SHOT], "holds examples (few-shot), not principles"),
    (3, "not a constitution"),
    ({}, "holds no critique_revision pair and no preference"),
    ({"preferences": {}}, "key 'preferences' should hold a list"),
    ([], "holds no critique_revision pair and no preference"),
    ({"preamble": "be good."}, "holds no critique_revision pair and no preference"),
    ("{", "cannot be read as JSON"),
    ("", "cannot be read as JSON"),
])  # fmt: skip
def test_a_broken_file_is_one_line_with_its_name_and_what_is_wrong(tmp_path, content, part):
    path = write(tmp_path, content)
    with pytest.raises(UserError) as error:
        load(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and part in message and "\n" not in message


def test_a_byte_order_mark_is_no_fault(tmp_path):
    (tmp_path / "bom.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({"preferences": [{"text": "t"}]}).encode())
    assert [p.text for p in load(str(tmp_path / "bom.json")).preferences] == ["t"]


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
