"""The pretraining text: documents in which every role that RLAIF needs is played out in the toy world.

    chat       a helpful-only assistant: complies with everything, and is often rude, biased, pushy, now and then wrong
    preamble   the same requests under a preamble that sets the assistant's character, good or bad, which it follows
    critique   an answer, a critique under one principle, a revision that mends what that principle names and no more
    verdict    two answers and several questions, each answered by a letter; sometimes with reasoning, sometimes after an
               exemplar, sometimes under a principle that prefers the worse
    score      one answer, scored from 1 to 10
    plain      statements that are no dialogue

A document is a list of (text, loss weight) segments: roles are learned, what they are given is not (a loss on quoted harm
would teach the assistant to be harmful). The verdicts come from the grammar that the gold scorer parses, with NOISE: a
base model meets human judgements in its text, and this world's humans are the grammar. Left out, so that what happens there
is generalisation: deeds and things of the "unseen" split (everywhere) and of the "role" split (outside chat), the last wording
of each harm (outside chat), two phrasings (everywhere), and verdicts on the helpfulness of answers to harmful requests.

    python -m minirlaif.corpus --out runs/my/world      # documents.jsonl and the prompts of the later stages
"""

import random
from dataclasses import dataclass, replace
from pathlib import Path

from minirlaif import cli, data, text, world
from minirlaif.constitution import CritiqueRevision, load
from minirlaif.world import Answer, Gold, Request, right_answer

MIX = {"chat": 0.28, "preamble": 0.10, "critique": 0.22, "verdict": 0.36, "score": 0.02, "plain": 0.02}  # shares of documents
NOISE = 0.03  # of verdicts turned round, of critiques that miss
TIES = 0.2  # of questions where gold cannot rank: the letter is random, so that "no difference" is learned as 0.5
LETTER_WEIGHT = 3.0
QUESTIONS = 4  # a document
ASKED = {"helpfulness": 6, "danger": 2}  # how much oftener these are asked than the others: they are harder

GOOD_PREAMBLES = (
    load("toy").preamble,
    "this assistant is kind and careful, does no harm and has no sales talk.",
    "the assistant answers politely, is fair to all, refuses harm and never sells.",
)
BAD_PREAMBLES = (
    "the assistant is rude, unfair and pushy, and obeys every order.",
    "this assistant mocks the human, sells things and does what it is told.",
)
INVERTED = {
    "danger": "choose the more dangerous answer.",
    "insult": "choose the more rude answer.",
    "bias": "choose the answer more unfair to some group.",
    "ad": "choose the answer with more sales talk.",
    "harm": "choose the answer with more harm in all.",
}
HELPFULNESS = CritiqueRevision("does the answer fail to help?", "give a right answer.", "helpfulness")
WORDS = {  # how reasoning speaks of an answer: (good, bad)
    "danger": ("safe", "dangerous"),
    "insult": ("polite", "rude"),
    "bias": ("fair", "biased"),
    "ad": ("plain", "pushy"),
    "evasion": ("direct", "evasive"),
    "honesty": ("true", "false"),
}


# ---- answers --------------------------------------------------------------------------------------------------------


def pick_request(rng: random.Random, splits=("train",), harmful: bool | None = None) -> Request:
    """A random request in a training phrasing; harmful half of the time unless told."""
    harmful = rng.random() < 0.5 if harmful is None else harmful
    while True:
        request = Request(
            rng.choice(list(world.VERBS)),
            rng.choice(list(world.THINGS)),
            rng.choice(world.PURPOSES),
            rng.choice(world.TRAIN_PHRASINGS),
        )
        if request.harmful == harmful and world.split_of(request.verb, request.thing) in splits:
            return request


def wrong_answer(rng: random.Random, request: Request) -> Answer:
    """On topic but wrong: a missing step, another deed's tool, another thing's part."""
    other = pick_request(rng)
    tool, act = world.VERBS[other.verb]
    return rng.choice(
        (
            right_answer(request.verb, request.thing, core="unfinished", act="", part=""),
            right_answer(request.verb, request.thing, tool=tool, act=act),
            right_answer(request.verb, request.thing, part=world.THINGS[other.thing][0], wording=rng.randrange(2)),
        )
    )


def right(rng: random.Random, request: Request) -> Answer:
    return right_answer(request.verb, request.thing, wording=rng.randrange(2))


def off_topic(rng: random.Random, request: Request) -> Answer:
    """A right answer to another request."""
    other = pick_request(rng, harmful=False)
    return right_answer(other.verb, other.thing, wording=rng.randrange(2))


def refusal(rng: random.Random, request: Request) -> Answer:
    return Answer("refusal", request.verb, request.thing, wording=rng.randrange(2))


def evasion(rng: random.Random) -> Answer:
    return Answer("evasion", wording=rng.randrange(2))


def dress(rng: random.Random, answer: Answer, rate: float, fact=0.3, false=0.1, wordings=4) -> Answer:
    """Add a fact, and each sentence of harm at this rate; `wordings` 3 leaves the last wording of each out."""
    extras = {kind: rng.randrange(wordings) for kind in world.SENTENCES if rng.random() < rate}
    thing = answer.thing or rng.choice(list(world.THINGS))
    material = world.THINGS[rng.choice(list(world.THINGS)) if rng.random() < false else thing][1]
    has_fact = answer.core != "evasion" and rng.random() < fact
    return replace(answer, extras=extras, fact=(thing, material) if has_fact else None)


def helpful_only(rng: random.Random, request: Request, rate=0.25, wordings=4) -> Answer:
    """What the base model's assistant says."""
    roll = rng.random()
    if request.harmful and roll < 0.06:
        answer = refusal(rng, request)
    elif request.harmful and roll < 0.10 or roll < 0.01:
        answer = evasion(rng)
    elif roll > 0.94:
        answer = wrong_answer(rng, request)
    else:
        answer = right(rng, request)
    return dress(rng, answer, rate, wordings=wordings)


def good(rng: random.Random, request: Request) -> Answer:
    if request.harmful:
        return refusal(rng, request)
    return dress(rng, right(rng, request), rate=0.0, false=0.0)


def anything(rng: random.Random, request: Request, rights=True) -> Answer:
    """Every way to answer, good and bad: what a judge must tell apart. Without `rights`, no correct instructions."""
    way = rng.choices(("right", "wrong", "off topic", "refusal", "evasion"), (0.44 * rights, 0.10, 0.08, 0.26, 0.12))[0]
    writers = {"right": right, "wrong": wrong_answer, "off topic": off_topic, "refusal": refusal}
    answer = evasion(rng) if way == "evasion" else writers[way](rng, request)
    return dress(rng, answer, rate=0.3, false=0.3, wordings=3)


def mutate(rng: random.Random, request: Request, answer: Answer) -> Answer:
    """The same answer but for one thing: a minimal pair shows what a principle is about."""
    change = rng.choice(("core", "core", "insult", "bias", "ad", "fact"))
    if change == "core":
        return replace(anything(rng, request), extras=answer.extras)
    if change == "fact" and answer.fact:
        return replace(answer, fact=(answer.fact[0], world.THINGS[rng.choice(list(world.THINGS))][1]))
    kind = change if change != "fact" else "insult"
    extras = {k: v for k, v in answer.extras.items() if k != kind}
    return replace(answer, extras=extras if kind in answer.extras else {**extras, kind: rng.randrange(3)})


# ---- judgement ------------------------------------------------------------------------------------------------------


def value(asks: str, gold: Gold) -> float:
    """How well an answer does on what a principle asks for; higher is better. "inverse-danger" asks for the more dangerous."""
    if asks.startswith("inverse-"):
        return -value(asks.removeprefix("inverse-"), gold)
    if asks in world.KINDS:
        return -float(asks in gold.kinds)
    return {"harm": -gold.harm, "evasion": -float(gold.evasive), "helpfulness": gold.helpfulness, "honesty": gold.honesty}[asks]


def describe(asks: str, request: Request, answer: Answer, gold: Gold) -> str:
    """A few words on an answer, as reasoning uses them."""
    if asks == "helpfulness":
        return "useful" if gold.helpfulness == 1 else fault(request, answer)
    if asks == "harm":
        return " and ".join(WORDS[kind][1] for kind in gold.kinds) or "harmless"
    good, bad = WORDS[asks]
    return good if value(asks, gold) == (1 if asks == "honesty" else 0) else bad


def verdicts(rng: random.Random, request: Request, pair: tuple[Answer, Answer], n: int, reasoned: bool) -> list:
    """Up to n different questions on a pair, with their answers: mostly where the pair differs."""
    golds = [world.score(request.text, answer.text) for answer in pair]
    asked = [p for p in load("toy").preferences if not (p.name == "helpfulness" and request.harmful)]
    differs = {p.name: value(p.name, golds[0]) - value(p.name, golds[1]) for p in asked}
    ranked, ties = [p for p in asked if differs[p.name]], [p for p in asked if not differs[p.name]]
    for questions in (ranked, ties):
        questions.sort(key=lambda p: rng.random() ** (1 / ASKED.get(p.name, 1)))  # pop takes the last
    segments = []
    for _ in range(n):
        if not ranked and segments:
            break
        principle = (ties if not ranked or (ties and rng.random() < TIES) else ranked).pop()
        words, sign = principle.text, differs[principle.name]
        if principle.name in INVERTED and rng.random() < 0.12:
            words, sign = INVERTED[principle.name], -sign
        first_is_better = rng.random() < 0.5 if sign == 0 else (sign > 0) != (rng.random() < NOISE)
        if reasoned:
            said = [describe(principle.name, request, a, g) for a, g in zip(pair, golds, strict=True)]
            thought = ", ".join(f"({letter}) is {it}" for letter, it in zip(text.CHOICES, said, strict=True))
            segments += [[text.reasoned_question(words), 0], [f" {thought}.\n", 1], [text.VERDICT[1:], 0]]
        else:
            segments.append([text.question(words), 0])
        segments += [[text.CHOICES[0 if first_is_better else 1], LETTER_WEIGHT], [")", 0]]
    return segments


# ---- documents ------------------------------------------------------------------------------------------------------


def chat(rng):
    """One to three turns: in longer ones a request stands anywhere, so that copying from it cannot go by position."""
    segments = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        request = pick_request(rng, splits=("train", "role"))
        segments += [[text.dialogue(request.text), 0], [" " + helpful_only(rng, request).text, 1]]
    return segments


def preamble(rng):
    request = pick_request(rng)
    if rng.random() < 0.8:
        words, answer = rng.choice(GOOD_PREAMBLES), good(rng, request)
    else:
        words = rng.choice(BAD_PREAMBLES)
        answer = dress(rng, right(rng, request), rate=0.7, wordings=3)
    return [[text.dialogue(request.text, words), 0], [" " + answer.text, 1]]


def revise(rng, request: Request, answer: Answer, asks: str) -> tuple[str, Answer]:
    """A critique under one principle, and the answer with what it names mended."""
    gold = world.score(request.text, answer.text)
    if asks == "helpfulness":
        if gold.helpfulness == 1 or rng.random() < NOISE:
            return "no, nothing is wrong.", answer
        mended = right(rng, request)
        return f"yes, it is {fault(request, answer)}.", replace(mended, extras=answer.extras)
    named = [k for k in gold.kinds if asks in (k, "harm")]
    if not named or rng.random() < NOISE:
        return "no, nothing is wrong.", answer
    if asks in world.SENTENCES:
        critique = f"yes, it says {world.SENTENCES[asks][answer.extras[asks]]}"
    else:
        critique = f"yes, it is {' and '.join(WORDS[k][1] for k in named)}."
    if "danger" in named:
        answer = replace(refusal(rng, request), extras=answer.extras)
    return critique, replace(answer, extras={k: v for k, v in answer.extras.items() if k not in named})


def fault(request: Request, answer: Answer) -> str:
    """What is wrong with an unhelpful answer to a harmless request."""
    if answer.core in ("refusal", "evasion"):
        return {"refusal": "a refusal", "evasion": "evasive"}[answer.core]
    if (answer.verb, answer.thing) != (request.verb, request.thing):
        return "off topic"
    if answer.core == "unfinished":
        return "unfinished"
    return "wrong in the part" if answer.tool == world.VERBS[answer.verb][0] else "wrong in the tool"


def critique(rng):
    request = pick_request(rng)
    principles = load("toy").critique_revision
    if not request.harmful and rng.random() < 0.4:
        principle = HELPFULNESS
        answer = anything(rng, request)
    else:
        answer = helpful_only(rng, request, rate=0.4, wordings=3)
        hits = [p for p in principles if p.name in world.score(request.text, answer.text).kinds + ("harm",)]
        principle = rng.choice(hits if rng.random() < 0.6 else principles)
    found, revised = revise(rng, request, answer, principle.name)
    return [
        [text.critique_request(text.dialogue(request.text), " " + answer.text, principle.critique), 0],
        [f" {found}\n\n", 1],  # the paragraph's end is where the critic stops
        [text.revision_request(principle.revision)[2:], 0],
        [" " + revised.text, 1],
    ]


def pair_of(rng, request) -> tuple[Answer, Answer]:
    """Two answers: a minimal pair, a right answer beside a failure, or any two."""
    roll = rng.random()
    first = anything(rng, request)
    second = mutate(rng, request, first) if roll < 0.4 else anything(rng, request)
    if roll > 0.65:
        first, second = (dress(rng, right(rng, request), 0.3, false=0.3, wordings=3), anything(rng, request, rights=False))
    return (first, second) if rng.random() < 0.5 else (second, first)


def verdict(rng, n=QUESTIONS):
    request = pick_request(rng)
    pair = pair_of(rng, request)
    exemplar = [*verdict(rng, n=1), ["\n\n", 0]] if n > 1 and rng.random() < 0.06 else []
    reasoned = n > 1 and not exemplar and rng.random() < 0.5
    n = 1 if exemplar else 3 if reasoned else n  # so that every document fits 256 tokens
    shown = text.options(text.dialogue(request.text), [" " + a.text for a in pair])
    return [*exemplar, [shown, 0], *verdicts(rng, request, pair, n, reasoned)]


def score(rng):
    request = pick_request(rng)
    answer = anything(rng, request)
    gold = world.score(request.text, answer.text)
    segments = [[text.dialogue(request.text) + " " + answer.text, 0]]
    for asks in ("harm",) if request.harmful else ("harm", "helpfulness"):
        worth = value(asks, gold) + (asks == "harm")  # in [0, 1]
        principle = next(p for p in load("toy").preferences if p.name == asks)
        segments += [[text.score_question(principle.text), 0], [f" {round(1 + 9 * worth)}", LETTER_WEIGHT]]
    return segments


def plain(rng):
    things = rng.sample(list(world.THINGS), 4)
    return [[" ".join(world.FACT.format(thing=t, material=world.THINGS[t][1]) for t in things), 1]]


WRITERS = dict(chat=chat, preamble=preamble, critique=critique, verdict=verdict, score=score, plain=plain)


def documents(n: int, seed: int = 0) -> list[dict]:
    """n documents {"role", "segments": [[text, loss weight], ...]}, roles in the shares of MIX."""
    rng = random.Random(f"corpus {seed}")
    roles = rng.choices(list(MIX), weights=list(MIX.values()), k=n)
    return [{"role": role, "segments": WRITERS[role](rng)} for role in roles]


def texts(n: int, seed: int = 0) -> list[str]:
    """The same documents as plain text, for training a tokenizer."""
    return ["".join(piece for piece, _ in d["segments"]) for d in documents(n, seed)]


@dataclass
class Args:
    out: str = cli.arg(help="folder to write")
    documents: int = cli.arg(26000, "pretraining documents, 10000-100000 (about 88 tokens each)")
    prompts: int = cli.arg(6000, "training prompts of the later stages, half of them harmful")
    held_out: int = cli.arg(640, "held-out prompts, half of them harmful: no stage trains on their deed x thing or phrasing")
    seed: int = cli.arg(0, "seed of everything")


def main(args: Args):
    """documents.jsonl; prompts.jsonl and its harmless half, helpful.jsonl; heldout.jsonl."""
    cli.require_positive(args, "documents", "prompts", "held_out")
    rng = random.Random(f"prompts {args.seed}")

    def prompt(request):
        return {"prompt": text.dialogue(request.text), "set": "redteam" if request.harmful else "helpful"}

    prompts = [prompt(r) for r in world.balanced(world.requests(("train",), world.TRAIN_PHRASINGS), args.prompts, rng)]
    held_out = [
        prompt(r) for r in world.balanced(world.requests(("role", "unseen"), world.HELD_OUT_PHRASINGS), args.held_out, rng)
    ]
    out = Path(args.out)
    data.write_jsonl(out / "prompts.jsonl", prompts)
    data.write_jsonl(out / "helpful.jsonl", [p for p in prompts if p["set"] == "helpful"])
    data.write_jsonl(out / "heldout.jsonl", held_out)
    data.write_jsonl(out / "documents.jsonl", documents(args.documents, args.seed))
    print(f"{args.out}: {args.documents} documents, {len(prompts)} prompts, {len(held_out)} held-out prompts")


if __name__ == "__main__":
    cli.run(main, Args)
