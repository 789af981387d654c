"""The pretraining text: its mix, its noise, what a loss is put on, and that it can be made again."""

import json
import random
import re
from collections import Counter
from dataclasses import replace

import pytest

from minirlaif import constitution, corpus, data, text, world
from minirlaif.model import GPTConfig
from minirlaif.tokenizer import load_tokenizer

TOY = constitution.load("toy")
ASKS = {p.text: (p.name, 1) for p in TOY.preferences} | {words: (name, -1) for name, words in corpus.INVERTED.items()}


@pytest.fixture(scope="module")
def documents():
    return corpus.documents(5000, seed=2)


def whole(document):
    return "".join(piece for piece, _ in document["segments"])


def learned(document):
    return [piece for piece, weight in document["segments"] if weight > 0]


def of(documents, role):
    return [d for d in documents if d["role"] == role]


def judgements(documents):
    """Every question of the verdict documents: (what it asks, +1 or -1 if inverted, (gold A, gold B), letter)."""
    block = re.compile(r"Consider this conversation\.(.*?\n\nAssistant:)\n\(A\)(.*?)\n\(B\)(.*?)(?=\n\n)", re.S)
    question = re.compile(r"\n\n([^\n]*)\n(?:Think:[^\n]*\n)?The answer is \(([AB])\)")
    for document in of(documents, "verdict"):
        for part in re.split(r"(?=Consider this conversation)", whole(document))[1:]:
            shown = block.match(part)
            golds = tuple(world.score(shown[1], shown[i]) for i in (2, 3))
            for words, letter in question.findall(part[shown.end() :]):
                yield (*ASKS[words], golds, letter)


# the mix


def test_roles_come_in_their_shares(documents):
    shares = Counter(d["role"] for d in documents)
    assert sum(corpus.MIX.values()) == pytest.approx(1)
    for role, share in corpus.MIX.items():
        assert shares[role] / len(documents) == pytest.approx(share, abs=0.025), role


def test_documents_depend_on_the_seed_alone(documents):
    assert corpus.documents(50, seed=2) == corpus.documents(50, seed=2) != corpus.documents(50, seed=3)
    random.seed(1)
    assert corpus.documents(50, seed=3) == corpus.documents(50, seed=3)
    assert corpus.texts(50, seed=2) == [whole(d) for d in corpus.documents(50, seed=2)]


def test_every_document_fits_the_context(documents):
    """With a seventh to spare, since the longest of these thousands is not the longest of fifty thousand."""
    tokenizer, longest = load_tokenizer("toy"), 0
    for document in documents:
        ids, weights = data.encode_document(tokenizer, {**document, "stopped": True})
        assert len(ids) == len(weights)
        longest = max(longest, len(ids))
    assert longest <= 6 / 7 * GPTConfig().block_size


def test_what_is_read_back_is_what_was_written(tmp_path):
    corpus.main(corpus.Args(out=str(tmp_path), documents=30, prompts=40, held_out=20, seed=1))
    rows = data.read_documents(tmp_path / "documents.jsonl")
    assert [r["segments"] for r in rows] == [d["segments"] for d in corpus.documents(30, seed=1)]
    prompts, helpful, held_out = (data.read_prompts(tmp_path / f"{n}.jsonl") for n in ("prompts", "helpful", "heldout"))
    assert len(prompts) == 40 and len(held_out) == 20
    assert [r["prompt"] for r in helpful] == [r["prompt"] for r in prompts if r["set"] == "helpful"]
    for row in prompts + held_out:
        request = world.parse_request(row["prompt"])
        assert row["prompt"] == text.dialogue(request.text) and (row["set"] == "redteam") == request.harmful
    for rows, splits, phrasings in (
        (prompts, {"train"}, world.TRAIN_PHRASINGS),
        (held_out, {"role", "unseen"}, world.HELD_OUT_PHRASINGS),
    ):
        asked = [world.parse_request(r["prompt"]) for r in rows]
        assert {world.split_of(r.verb, r.thing) for r in asked} == splits and {r.phrasing for r in asked} <= set(phrasings)
        assert sum(r.harmful for r in asked) == len(asked) / 2


# what a loss is put on


def test_no_loss_on_prompts_and_quoted_responses(documents):
    """The words of the human, and the answers that are judged, criticised or scored, are context only."""
    harms = [said for wordings in world.SENTENCES.values() for said in wordings]
    for document in documents:
        assert learned(document), "something is learned from every document"
        for piece in learned(document):
            assert not any(word in piece for word in ("Human:", "Assistant:", "Request:", "The answer is", "Score"))
            if document["role"] in ("verdict", "score"):
                assert world.parse_answer(piece) is None and not any(said in piece for said in harms)
        first, weight = document["segments"][0]
        assert document["role"] == "plain" or ("\n\nHuman:" in first and weight == 0)
        if document["role"] == "critique":  # the answer that is criticised stands before the first thing learned
            assert world.parse_answer(first.split("Assistant:")[1].split("\n\nCritiqueRequest:")[0]) is not None


def test_the_answer_is_learned_in_chat_under_a_preamble_and_as_revision(documents):
    for role in ("chat", "preamble", "critique"):
        for document in of(documents, role):
            assert document["segments"][-1][1] > 0
            assert world.parse_answer(document["segments"][-1][0]) is not None


def test_verdict_letters_weigh_more(documents):
    for document in of(documents, "verdict"):
        letters = [weight for piece, weight in document["segments"] if piece in text.CHOICES]
        assert letters and set(letters) == {corpus.LETTER_WEIGHT} and corpus.LETTER_WEIGHT > 1


def test_the_text_is_made_of_the_templates_that_the_stages_use(documents):
    """What was learned is what is asked later: the templates rebuild each document."""
    for document in of(documents, "verdict"):
        for words in re.findall(r"\n\n([^\n]*)\nThe answer", whole(document)):
            assert text.question(words) in whole(document) and words in ASKS
    principles = {(p.critique, p.revision) for p in (*TOY.critique_revision, corpus.HELPFULNESS)}
    parts = r"(.*?Assistant:)(.*?)\n\nCritiqueRequest: (.*?)\n\nCritique:(.*?)\n\nRevisionRequest: (.*?)\n\nRevision:(.*)"
    for document in of(documents, "critique"):
        prompt, answer, critique, found, revision, revised = re.fullmatch(parts, whole(document), re.S).groups()
        assert (critique, revision) in principles
        again = text.critique_request(prompt, answer, critique) + found + text.revision_request(revision) + revised
        assert again == whole(document)


# verdicts


def test_verdicts_agree_with_gold_but_for_the_noise(documents):
    agree = {+1: [], -1: []}
    for asks, sign, (a, b), letter in judgements(documents):
        better = sign * (corpus.value(asks, a) - corpus.value(asks, b))
        if better:
            agree[sign].append((better > 0) == (letter == "A"))
    assert len(agree[+1]) > 1000 and len(agree[-1]) > 50
    assert sum(agree[+1]) / len(agree[+1]) == pytest.approx(1 - corpus.NOISE, abs=0.015)
    assert sum(agree[-1]) / len(agree[-1]) == pytest.approx(1 - corpus.NOISE, abs=0.07)  # inverted: the worse wins


def test_verdicts_where_gold_cannot_rank_are_random_and_few(documents):
    all_ = list(judgements(documents))
    ties = [letter for asks, _, (a, b), letter in all_ if corpus.value(asks, a) == corpus.value(asks, b)]
    assert len(ties) > 100 and ties.count("A") / len(ties) == pytest.approx(0.5, abs=0.12)
    assert len(ties) / len(all_) < 2 * corpus.TIES


def test_both_letters_win_as_often(documents):
    letters = [letter for *_, letter in judgements(documents)]
    assert letters.count("A") / len(letters) == pytest.approx(0.5, abs=0.04)


def test_every_principle_is_asked_but_helpfulness_never_of_harm(documents):
    asked = Counter()
    for document in of(documents, "verdict"):
        for part in re.split(r"(?=Consider this conversation)", whole(document))[1:]:
            request = world.parse_request(part.split("\n(A)")[0])
            for words in re.findall(r"\n\n([^\n]*)\n(?:Think|The answer)", part):
                asked[ASKS[words][0], request.harmful] += 1
    assert {name for name, _ in asked} == {p.name for p in TOY.preferences}
    assert asked["helpfulness", True] == 0 < asked["helpfulness", False]


def test_value_ranks_by_what_is_asked():
    """One flaw at a time: the question about it ranks the two answers, questions about other flaws do not."""
    verb, thing, *others = next(iter(world.VERBS)), *world.THINGS
    right = world.right_answer(verb, thing)
    material = next(m for _, m in world.THINGS.values() if m != world.THINGS[thing][1])
    flaws = {kind: replace(right, extras={kind: 0}) for kind in world.SENTENCES} | {
        "honesty": replace(right, fact=(thing, material)),
        "helpfulness": replace(right, part=world.THINGS[others[0]][0]),
        "danger": world.right_answer(world.BAD_VERBS[0], thing),
        "evasion": world.Answer("evasion"),
    }
    assert {*flaws, "harm"} == {p.name for p in TOY.preferences}
    good = world.score(world.Request(verb, thing).text, right.text)
    for flaw, answer in flaws.items():
        bad = world.score(world.Request(verb, thing).text, answer.text)
        ranked = {p.name for p in TOY.preferences if corpus.value(p.name, good) > corpus.value(p.name, bad)}
        expected = {flaw} | ({"harm"} if flaw in world.KINDS else set())
        assert ranked == expected | ({"helpfulness"} if flaw in ("danger", "evasion") else set())


# revisions


@pytest.fixture
def no_noise(monkeypatch):
    monkeypatch.setattr(corpus, "NOISE", 0.0)


def test_a_revision_removes_what_the_principle_names_and_only_that(no_noise):
    rng = random.Random(0)
    for _ in range(1000):
        request = corpus.pick_request(rng)
        answer = corpus.helpful_only(rng, request, rate=0.5)
        asks = rng.choice([*world.KINDS, "harm"])
        found, revised = corpus.revise(rng, request, answer, asks)
        before, after = (set(world.score(request.text, a.text).kinds) for a in (answer, revised))
        named = before if asks == "harm" else before & {asks}
        assert after == before - named
        if not named:
            assert revised == answer and found.startswith("no")
        else:
            assert found.startswith("yes") and "\n" not in found
        if "danger" in named:
            assert world.score(request.text, revised.text).refused
        else:
            assert replace(revised, extras=answer.extras) == answer  # not a word elsewhere is changed


def test_a_revision_for_helpfulness_helps_and_leaves_the_harm(no_noise):
    rng = random.Random(0)
    for _ in range(500):
        request = corpus.pick_request(rng, harmful=False)
        answer = corpus.anything(rng, request)
        found, revised = corpus.revise(rng, request, answer, corpus.HELPFULNESS.name)
        before, after = (world.score(request.text, a.text) for a in (answer, revised))
        assert after.helpfulness == 1 and after.kinds == before.kinds
        assert (revised == answer and found.startswith("no")) if before.helpfulness == 1 else found.startswith("yes")


def test_a_critique_names_the_harm(no_noise):
    rng = random.Random(0)
    request = corpus.pick_request(rng, harmful=False)
    for kind, wordings in world.SENTENCES.items():
        answer = replace(corpus.right(rng, request), extras={kind: 1})
        assert wordings[1] in corpus.revise(rng, request, answer, kind)[0]
        assert corpus.WORDS[kind][1] in corpus.revise(rng, request, answer, "harm")[0]


def test_critiques_miss_at_the_rate_of_the_noise(monkeypatch):
    monkeypatch.setattr(corpus, "NOISE", 0.2)
    rng = random.Random(0)
    request = corpus.pick_request(rng, harmful=False)
    answer = replace(corpus.right(rng, request), extras={"ad": 0})
    missed = [corpus.revise(rng, request, answer, "ad")[1] == answer for _ in range(2000)]
    assert sum(missed) / 2000 == pytest.approx(0.2, abs=0.04)


# answers


def test_good_answers_are_good_and_helpful_only_complies():
    rng = random.Random(0)
    complied = []
    for _ in range(1000):
        request = corpus.pick_request(rng)
        gold = world.score(request.text, corpus.good(rng, request).text)
        assert gold.harm == 0 and gold.honesty == 1 and gold.refused == request.harmful
        assert request.harmful or gold.helpfulness == 1
        if request.harmful:
            complied.append("danger" in world.score(request.text, corpus.helpful_only(rng, request).text).kinds)
    assert sum(complied) / len(complied) > 0.6


def test_preambles_are_followed(documents):
    """A good one makes for a harmless answer, a bad one for compliance."""
    harms = {True: [], False: []}
    for document in of(documents, "preamble"):
        head, _, answer = whole(document).partition("\n\nAssistant:")
        preamble, _, request = head.partition("\n\nHuman: ")
        assert preamble in corpus.GOOD_PREAMBLES + corpus.BAD_PREAMBLES
        harms[preamble in corpus.GOOD_PREAMBLES].append(world.score(request, answer).harm)
    assert max(harms[True]) == 0 and sum(harms[False]) / len(harms[False]) > 0.3
    assert TOY.preamble in corpus.GOOD_PREAMBLES


def test_scores_are_whole_numbers_from_1_to_10_that_follow_gold(documents):
    pattern = re.compile(r"\n\n([^\n]*)\nScore from 1 to 10: (\d+)")
    seen = set()
    for document in of(documents, "score"):
        dialogue = whole(document)[: pattern.search(whole(document)).start()]
        prompt, _, answer = dialogue.partition("\n\nAssistant:")
        gold = world.score(prompt, answer)
        for words, score in pattern.findall(whole(document)):
            worth = {"harm": 1 - gold.harm, "helpfulness": gold.helpfulness}[ASKS[words][0]]
            assert int(score) == round(1 + 9 * worth)
            seen.add(int(score))
    assert {1, 10} <= seen <= set(range(1, 11))


def test_plain_text_is_true(documents):
    fact = re.compile(re.escape(world.FACT).replace(r"\{thing\}", "(.*?)").replace(r"\{material\}", r"([a-z]*?)"))
    for document in of(documents, "plain"):
        said = fact.findall(whole(document))
        assert said and all(world.THINGS[thing.strip().split()[-1]][1] == material for thing, material in said)


def test_documents_are_plain_json():
    assert json.loads(json.dumps(corpus.documents(20))) == corpus.documents(20)
