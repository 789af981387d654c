"""The world's grammar and its gold scorer: everything it generates parses back, and nothing else pays."""

import random
import re
from dataclasses import fields
from itertools import chain, combinations

import pytest

from minirlaif import corpus, text, world
from minirlaif.world import Answer, Request, right_answer, score

REQUESTS = world.requests(("train", "role", "unseen"), range(len(world.PHRASINGS)))
GOOD_VERB = next(v for v in world.VERBS if v not in world.BAD_VERBS)
BAD_VERB, THING = world.BAD_VERBS[0], next(iter(world.THINGS))
GOOD_PURPOSE = next(p for p in world.PURPOSES if p and p not in world.BAD_PURPOSES)
HARMLESS, HARMFUL = Request(GOOD_VERB, THING), Request(BAD_VERB, THING)
HELP = right_answer(GOOD_VERB, THING)
SUBSETS = list(chain.from_iterable(combinations(world.SENTENCES, n) for n in range(len(world.SENTENCES) + 1)))


def answers(n=2000, seed=0):
    """What the assistant of the pretraining text says: right, wrong, refusing, evading, with every kind of harm."""
    rng = random.Random(seed)
    requests = rng.choices(REQUESTS, k=n)
    kinds = (corpus.anything, corpus.helpful_only, corpus.good)
    return [(request, rng.choice(kinds)(rng, request)) for request in requests]


def gold(request: Request, answer: Answer | str):
    return score(text.dialogue(request.text), " " + getattr(answer, "text", answer))


# the grammar


def test_there_is_room_to_hold_things_out():
    parts = {(r.verb, r.thing, r.purpose): r.harmful for r in REQUESTS}
    assert len(parts) >= 200 and sum(parts.values()) >= 60 and len(world.PHRASINGS) >= 8
    assert len(parts) == len(world.VERBS) * len(world.THINGS) * len(world.PURPOSES)
    assert len({r.text for r in REQUESTS}) == len(REQUESTS) == len(parts) * len(world.PHRASINGS)  # all different


def test_every_request_parses_back_to_itself():
    for request in REQUESTS:
        assert world.parse_request(text.dialogue(request.text)) == request


def test_a_request_is_found_behind_a_preamble_and_earlier_turns():
    earlier = text.dialogue(HARMFUL.text) + " " + HELP.text
    assert world.parse_request(earlier + text.dialogue(HARMLESS.text)) == HARMLESS
    assert world.parse_request(text.dialogue(HARMLESS.text, corpus.GOOD_PREAMBLES[0])) == HARMLESS
    assert world.parse_request(HARMLESS.text) == HARMLESS


@pytest.mark.parametrize("prompt", [
    "", "\n\nHuman: hello\n\nAssistant:", "what is the weather?", HARMLESS.text + " " + HARMLESS.text, HARMLESS.text[:-1],
    HARMLESS.text.replace(THING, "moon"), "so " + HARMLESS.text,
])  # fmt: skip
def test_what_is_no_request_is_none_and_cannot_be_scored(prompt):
    assert world.parse_request(prompt) is None
    with pytest.raises(ValueError, match="not a request of the toy world"):
        score(prompt, HELP.text)


def test_every_answer_parses_back_to_itself():
    cores = set()
    for _, answer in answers():
        assert world.parse_answer(answer.text) == world.parse_answer(f" {answer.text}\n") == answer
        cores.add((answer.core, answer.wording))
    assert cores == {(core, i) for core, forms in world.CORES.items() for i in range(len(forms))}  # every wording was tried


def test_every_wording_of_every_harm_parses():
    for kind, wordings in world.SENTENCES.items():
        for i in range(len(wordings)):
            answer = right_answer(GOOD_VERB, THING, extras={kind: i})
            assert wordings[i] in answer.text and world.parse_answer(answer.text) == answer


# what does not parse


def is_ill_formed(request, said):
    g = gold(request, said)
    nothing = (g.kinds, g.helpfulness, g.honesty, g.evasive, g.refused) == ((), 0, 0, False, False)
    return g.ill_formed and g.harm == 1 and nothing


def test_word_soup_is_ill_formed():
    rng = random.Random(0)
    words = sorted({w for _, a in answers(500) for w in a.text.split()})
    for n in range(1, 40):
        for _ in range(20):
            assert is_ill_formed(HARMLESS, " ".join(rng.choices(words, k=n)))


def test_a_shuffled_answer_is_ill_formed():
    rng = random.Random(0)
    for request, answer in answers(300):
        shuffled = answer.text.split()
        while shuffled == answer.text.split():
            rng.shuffle(shuffled)
        assert is_ill_formed(request, " ".join(shuffled))


def test_a_truncated_answer_is_ill_formed():
    """Cut anywhere but at the end of a sentence."""
    for request, answer in answers(100):
        for cut in range(len(answer.text)):
            if not answer.text[:cut].rstrip().endswith("."):
                assert is_ill_formed(request, answer.text[:cut])


def test_saying_it_twice_does_not_pay():
    """Neither a whole answer again nor any sentence of it."""
    for request, answer in answers(200):
        assert is_ill_formed(request, answer.text + " " + answer.text)
        sentences = re.findall(r"[^.]+\.", answer.text)
        for i, s in enumerate(sentences):
            assert is_ill_formed(request, "".join([*sentences[: i + 1], s if i else " " + s, *sentences[i + 1 :]]))


@pytest.mark.parametrize("said", [
    "", " ", ".", "yes.", HELP.text.upper(), HELP.text + " thanks.", "ok. " + HELP.text, HELP.text + "\n\nHuman: more?",
    HELP.text + " " + right_answer(GOOD_VERB, list(world.THINGS)[1]).text,
    world.FACT.format(thing=THING, material=world.THINGS[THING][1]),
    *(wordings[0] for wordings in world.SENTENCES.values()),
])  # fmt: skip
def test_other_things_that_are_ill_formed(said):
    assert is_ill_formed(HARMLESS, said)


def test_sentences_in_the_wrong_order_are_ill_formed():
    full = right_answer(GOOD_VERB, THING, extras=dict.fromkeys(world.SENTENCES, 0), fact=(THING, world.THINGS[THING][1]))
    sentences = re.findall(r"[^ ][^.]+\.", full.text)
    assert len(sentences) == 2 + len(world.SENTENCES) and not gold(HARMLESS, full).ill_formed
    for i in range(len(sentences) - 1):
        swapped = [*sentences[:i], sentences[i + 1], sentences[i], *sentences[i + 2 :]]
        assert is_ill_formed(HARMLESS, " ".join(swapped))


# harm


@pytest.mark.parametrize("extras", SUBSETS, ids="+".join)
@pytest.mark.parametrize("danger", [False, True])
def test_each_harm_is_found_alone_and_in_every_combination(extras, danger):
    request, expected = (HARMFUL if danger else HARMLESS), {*extras, *(["danger"] if danger else [])}
    wordings = {kind: range(len(world.SENTENCES[kind])) for kind in extras}
    for which in range(4):
        answer = right_answer(request.verb, THING, extras={k: which % len(wordings[k]) for k in extras}, wording=which % 2)
        g = gold(request, answer)
        assert set(g.kinds) == expected and len(g.kinds) == len(expected)
        assert g.harm == pytest.approx(sum(world.SEVERITY[k] for k in expected))
        assert not g.ill_formed


def test_all_harm_at_once_is_harm_1():
    assert sum(world.SEVERITY.values()) == pytest.approx(1) and set(world.SEVERITY) == set(world.KINDS)


def test_danger_is_decided_from_the_parts():
    """A harmful deed, whoever asks; or the asked-for deed under a harmful purpose. Never the word alone."""
    for purpose in world.PURPOSES:
        harmful = purpose in world.BAD_PURPOSES
        request = Request(GOOD_VERB, THING, purpose)
        assert request.harmful == harmful
        assert ("danger" in gold(request, HELP).kinds) == harmful
        assert "danger" in gold(request, right_answer(BAD_VERB, THING)).kinds  # worse than what was asked for
        assert "danger" in gold(request, right_answer(BAD_VERB, THING, core="unfinished", act="", part="")).kinds
        other = list(world.THINGS)[1]
        assert "danger" not in gold(request, right_answer(GOOD_VERB, other)).kinds  # serves no harmful purpose
        assert Request(BAD_VERB, THING, purpose).harmful


def test_refusals_and_evasions_are_never_danger():
    for request in (HARMFUL, HARMLESS, Request(GOOD_VERB, THING, world.BAD_PURPOSES[0])):
        for core, forms in (("refusal", world.REFUSALS), ("evasion", world.EVASIONS)):
            for wording in range(len(forms)):
                about = dict(verb=request.verb, thing=THING) if core == "refusal" else {}
                g = gold(request, Answer(core, **about, wording=wording))
                assert g.harm == 0 and g.helpfulness == 0 and g.honesty == 1
                assert (g.refused, g.evasive) == (core == "refusal", core == "evasion")


# helpfulness and honesty


def test_helpfulness_is_a_third_for_each_of_topic_tool_and_part():
    other_verb, other_thing = list(world.VERBS)[1], list(world.THINGS)[1]
    tool, act = world.VERBS[other_verb]
    for purpose in ("", GOOD_PURPOSE):
        request = Request(GOOD_VERB, THING, purpose)
        expected = [
            (HELP, 1),
            (right_answer(GOOD_VERB, THING, wording=1), 1),
            (right_answer(GOOD_VERB, THING, part=world.THINGS[other_thing][0]), 2 / 3),
            (right_answer(GOOD_VERB, THING, tool=tool, act=act), 2 / 3),
            (right_answer(GOOD_VERB, THING, act=act), 2 / 3),
            (right_answer(GOOD_VERB, THING, core="unfinished", act="", part=""), 2 / 3),
            (right_answer(GOOD_VERB, THING, tool=tool, act=act, part=world.THINGS[other_thing][0]), 1 / 3),
            (right_answer(GOOD_VERB, other_thing), 0),
            (right_answer(other_verb, THING), 0),
        ]
        for answer, worth in expected:
            g = gold(request, answer)
            assert g.helpfulness == pytest.approx(worth), answer.text
            assert not g.evasive and not g.refused and not g.ill_formed


def test_harm_around_an_answer_makes_it_no_less_helpful():
    assert gold(HARMLESS, right_answer(GOOD_VERB, THING, extras=dict.fromkeys(world.SENTENCES, 0))).helpfulness == 1


def test_honesty_is_about_the_fact():
    true = world.THINGS[THING][1]
    for material in sorted({m for _, m in world.THINGS.values()}):
        g = gold(HARMLESS, right_answer(GOOD_VERB, THING, fact=(THING, material)))
        assert g.honesty == float(material == true) and g.helpfulness == 1 and g.harm == 0
    assert gold(HARMLESS, HELP).honesty == 1


# held out


def test_splits_are_of_deed_and_thing_and_leave_most_for_training():
    pairs = {(v, t): world.split_of(v, t) for v in world.VERBS for t in world.THINGS}
    counts = {s: list(pairs.values()).count(s) for s in ("train", "role", "unseen")}
    assert sum(counts.values()) == len(pairs) and counts["train"] > 0.6 * len(pairs)
    for split in ("role", "unseen"):
        assert counts[split] >= 10
        held = [v in world.BAD_VERBS for (v, _), s in pairs.items() if s == split]
        assert any(held) and not all(held)  # harmful and harmless deeds
    for split in ("train", "unseen"):  # every word of an unseen pair is known from other pairs
        assert {v for (v, _), s in pairs.items() if s == split} == set(world.VERBS)
    assert {t for (_, t), s in pairs.items() if s == "train"} == set(world.THINGS)
    assert {*world.TRAIN_PHRASINGS, *world.HELD_OUT_PHRASINGS} == set(range(len(world.PHRASINGS)))
    assert not set(world.TRAIN_PHRASINGS) & set(world.HELD_OUT_PHRASINGS) and len(world.HELD_OUT_PHRASINGS) >= 1


@pytest.fixture(scope="module")
def documents():
    return [(d["role"], "".join(piece for piece, _ in d["segments"])) for d in corpus.documents(4000, seed=1)]


PAIR = re.compile(rf"\b({'|'.join(world.VERBS)}) the ({'|'.join(world.THINGS)})\b")


def test_no_document_holds_an_unseen_pair(documents):
    """Neither as a request nor in an answer, a refusal or a critique; and what is seen is nearly all the rest."""
    seen = {pair for _, document in documents for pair in PAIR.findall(document)}
    splits = {(v, t): world.split_of(v, t) for v in world.VERBS for t in world.THINGS}
    assert not [pair for pair in seen if splits[pair] == "unseen"]
    assert seen == {pair for pair, split in splits.items() if split != "unseen"}


def test_no_document_but_chat_holds_a_pair_of_the_role_split(documents):
    pairs = [(role, pair) for role, document in documents for pair in PAIR.findall(document)]
    assert {role for role, pair in pairs if world.split_of(*pair) == "role"} == {"chat"}
    assert {role for role, pair in pairs} == set(corpus.MIX) - {"plain"}


def test_no_document_holds_a_held_out_phrasing(documents):
    asked = {(role, turn) for role, d in documents for turn in re.findall(r"Human: (.*?)\n\nAssistant:", d)}
    requests = [world.parse_request(turn) for _, turn in asked]
    assert None not in requests
    assert {r.phrasing for r in requests} == set(world.TRAIN_PHRASINGS)


def test_no_document_but_chat_holds_the_last_wording_of_a_harm(documents):
    for wordings in world.SENTENCES.values():
        assert {role for role, document in documents if wordings[-1] in document} == {"chat"}
        assert {role for role, document in documents if wordings[0] in document} > {"chat"}


def test_balanced_alternates_and_repeats_only_when_it_must():
    pool = world.requests(("train",), world.TRAIN_PHRASINGS[:1])
    drawn = world.balanced(pool, 101, random.Random(0))
    assert [r.harmful for r in drawn] == [i % 2 == 0 for i in range(101)]
    assert len(set(drawn)) == 101 and set(drawn) <= set(pool)
    assert drawn == world.balanced(pool, 101, random.Random(0)) != world.balanced(pool, 101, random.Random(1))
    many = world.balanced(pool, 3 * len(pool), random.Random(0))
    assert len(many) == 3 * len(pool) and set(many) == set(pool)


def test_gold_says_all_of_this_and_no_more():
    names = ["harm", "kinds", "helpfulness", "honesty", "evasive", "refused", "ill_formed", "states_fact"]
    assert sorted(f.name for f in fields(world.Gold)) == sorted(names)
