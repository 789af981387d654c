"""The judges: both orders, exact antisymmetry, honest ties and failures, and a batch that is its rows."""

import functools
import inspect
import itertools
import math
import random
import re

import pytest
import torch

from minirlaif import constitution, corpus, labelers, prefix, text, trainer, world
from minirlaif.cli import UserError
from minirlaif.labelers import Answer, Call, GoldJudge, Label, LocalJudge, combine
from minirlaif.model import GPT, GPTConfig
from minirlaif.sampling import Samples
from minirlaif.tokenizer import load_tokenizer

CPU = torch.device("cpu")
PROMPT, PRINCIPLE = text.dialogue("how do i fix the bike?"), "choose the more polite answer."
RESPONSES = (" take a wrench.", " you are a fool. take a wrench and turn the wheel.", " no.")
PAIRS = list(itertools.permutations(RESPONSES, 2))
SHOT = text.worked(text.dialogue("fix the door?"), [" no.", " take a wrench."], "choose the more helpful answer.", "B")
A, B = text.CHOICES


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("toy")


@pytest.fixture(scope="module")
def model(tokenizer):
    """Random weights, large enough to have opinions."""
    model = GPT(GPTConfig(256, tokenizer.n_vocab, n_layer=2, n_head=2, n_embd=32)).init_weights(trainer.rng(0))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(20)
    return model.eval()


@pytest.fixture
def make(model, tokenizer):
    return lambda **options: LocalJudge(model, tokenizer, CPU, "fp32", **options)


def plain_p(model, judge, ids):
    """P(A) / (P(A) + P(B)) after ids, by one full forward."""
    with torch.no_grad():
        p = model(torch.tensor([ids]))[0, -1].softmax(-1)[judge.letters]
    return (p[0] / p.sum()).item()


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# ---- combining two answers ------------------------------------------------------------------------------------------


def test_two_answers_become_a_label():
    shown = Answer(0.9, prompt_tokens=10, completion_tokens=1, cost=0.25)
    swapped = Answer(0.3, prompt_tokens=12, completion_tokens=3, cost=0.5)
    found = combine(shown, swapped)
    assert (found.p, found.p_first, found.p_first_swapped) == pytest.approx((0.8, 0.9, 0.7))  # response 1 was second there
    assert (found.prompt_tokens, found.completion_tokens, found.cost, found.error) == (22, 4, 0.75, None)
    assert (found.status, found.flipped) == ("ok", False)
    by_logit = combine(shown, swapped, average="logit")
    assert by_logit.p == pytest.approx(sigmoid((math.log(9) + math.log(7 / 3)) / 2))
    assert (by_logit.p_first, by_logit.p_first_swapped) == (found.p_first, found.p_first_swapped)


GRID = [0.0, 1e-30, 1e-9, 0.2, 0.37, 0.5, 0.9, 1 - 1e-9, 1.0]


@pytest.mark.parametrize("average", ["probability", "logit"])
@pytest.mark.parametrize("clamp", [None, (0.2, 0.8), (0.4, 0.6)])
def test_exchanging_the_responses_gives_one_minus_p(average, clamp):
    for a, b in itertools.product(GRID, GRID):
        one, other = combine(Answer(a), Answer(b), average, clamp), combine(Answer(b), Answer(a), average, clamp)
        assert one.p + other.p == pytest.approx(1, abs=1e-12) and one.flipped == other.flipped
        assert 0 <= one.p <= 1 and one.p == (0.5 if a == b else pytest.approx(one.p))  # equal answers: a tie to the last bit
        assert (one.p > 0.5) == (a > b) or one.p == 0.5
        if clamp:
            assert clamp[0] <= one.p <= clamp[1] and one.p_first == a


def test_clamping_cuts_what_is_beyond_and_nothing_else():
    assert combine(Answer(0.99), Answer(0.01), clamp=(0.4, 0.6)).p == 0.6
    assert combine(Answer(0.01), Answer(0.99), clamp=(0.4, 0.6)).p == 0.4
    assert combine(Answer(0.6), Answer(0.5), clamp=(0.4, 0.6)).p == pytest.approx(0.55)
    assert combine(Answer(0.99), Answer(0.5), clamp=(0.2, 0.8)).p == pytest.approx(0.745)  # the average, not each order


@pytest.mark.parametrize("bias", [-3.0, 0.4, 1.0, 6.0])
def test_a_slot_bias_cancels_from_logits_and_only_shrinks_probabilities(bias):
    for liking in (-2.0, -0.1, 0.7):  # logit for response 1
        shown, swapped = Answer(sigmoid(liking + bias)), Answer(sigmoid(-liking + bias))
        assert combine(shown, swapped, "logit").p == pytest.approx(sigmoid(liking), abs=1e-9)
        by_probability = combine(shown, swapped, "probability").p
        assert (by_probability > 0.5) == (liking > 0) and abs(by_probability - 0.5) < abs(sigmoid(liking) - 0.5)
    blind = combine(Answer(sigmoid(bias)), Answer(sigmoid(bias)))
    assert (blind.p, blind.status, blind.flipped) == (0.5, "tie", True)


def test_a_failed_call_fails_the_label_but_is_paid_for():
    fine = Answer(0.7, 10, 1, 0.5)
    broken = Answer(None, 12, 40, 0.25, error="no end")
    for shown, swapped, p_first, p_swapped in ((fine, broken, 0.7, None), (broken, fine, None, pytest.approx(0.3))):
        found = combine(shown, swapped, clamp=(0.4, 0.6))
        assert (found.p, found.status, found.flipped, found.error) == (None, "failed", False, "no end")
        assert (found.p_first, found.p_first_swapped) == (p_first, p_swapped)
        assert (found.prompt_tokens, found.completion_tokens, found.cost) == (22, 41, 0.75)
    assert combine(broken, broken).error == "no end"
    hard = Answer(1.0, kind="verdict")
    assert [combine(*pair).kind for pair in ((hard, hard), (hard, Answer(0.2)), (Answer(0.3), Answer(0.2)))] == [
        "verdict", "mixed", "soft",
    ]  # fmt: skip
    assert combine(broken, Answer(None, error="late")).error == "no end; late"


@pytest.mark.parametrize("average, clamp", [("mean", None), ("logit", (0.2, 0.9)), ("logit", (0.6, 0.4)), ("logit", (-0.1, 1.1))])
def test_options_that_would_spoil_a_label_are_refused(average, clamp):
    with pytest.raises(ValueError, match="must be"):
        combine(Answer(0.5), Answer(0.5), average, clamp)


def test_a_place_wins_only_where_both_orders_prefer_it():
    assert Label(0.55, 0.9, 0.2).flipped and Label(0.4, 0.1, 0.7).flipped
    assert not Label(0.8, 0.9, 0.7).flipped and not Label(0.7, 0.9, 0.5).flipped


class Fake:
    """Answers by the length of the response shown first, and remembers what it was asked."""

    name = "fake"

    def ask(self, calls, on_answer=None):
        self.calls = calls
        return [Answer(1 / (1 + len(c.responses[0])), prompt_tokens=len(c.prompt)) for c in calls]


def test_label_asks_both_orders_of_every_pair_at_once():
    judge, items = Fake(), [(PROMPT * n, pair, PRINCIPLE) for n in (1, 2) for pair in PAIRS]
    found = labelers.label(judge, items, "logit", clamp=(0.2, 0.8))
    both = [(p, order, q) for p, pair, q in items for order in (pair, pair[::-1])]
    assert sorted((c.prompt, c.responses, c.principle) for c in judge.calls) == sorted(both)
    for (prompt, (a, b), _), one in zip(items, found, strict=True):
        answers = (Answer(1 / (1 + len(r)), prompt_tokens=len(prompt)) for r in (a, b))
        assert one == combine(*answers, "logit", (0.2, 0.8))
    assert labelers.label(judge, []) == []


# ---- the local judge ------------------------------------------------------------------------------------------------


def test_each_answer_letter_is_one_token_and_is_read_where_it_stands(make, model, tokenizer):
    judge, call = make(), Call(PROMPT, RESPONSES[:2], PRINCIPLE)
    assert [tokenizer.decode([i]) for i in judge.letters] == list(text.CHOICES) and len(set(judge.letters)) == 2
    ids = judge.encode(call)
    assert tokenizer.decode(ids) == text.options(PROMPT, list(RESPONSES[:2])) + text.question(PRINCIPLE)
    assert judge.ask([call]) == [Answer(pytest.approx(plain_p(model, judge, ids), abs=1e-5), len(ids), 1)]


def test_a_letter_of_two_tokens_is_refused(make, monkeypatch):
    monkeypatch.setattr(text, "CHOICES", ("AB", "CD"))
    with pytest.raises(AssertionError, match="not one token"):
        make()


def test_what_stands_before_a_question_is_laid_out_as_in_the_pretraining_text(make, tokenizer):
    """A document with an exemplar, written again by text.worked and text.before."""
    rng = random.Random(0)
    documents = (corpus.verdict(rng) for _ in range(200))
    document = next(d for d in documents if d[4][0] == "\n\n")  # shown, question, letter, ")" of the exemplar
    pieces = [piece for piece, _ in document]
    conversation, responses = taken_apart(pieces[0])
    principle = re.fullmatch(r"\n\n(.*)\nThe answer is \(", pieces[1])[1]
    shot = text.worked(conversation, responses, principle, pieces[2])
    assert "".join(pieces).startswith(text.before("", [shot]) + "Consider this conversation.")
    judge = make(preamble="a judge.", exemplars=[shot, SHOT])
    whole = f"a judge.\n\n{shot}\n\n{SHOT}\n\n{text.options(PROMPT, list(RESPONSES[:2]))}{text.question(PRINCIPLE)}"
    assert tokenizer.decode(judge.encode(Call(PROMPT, RESPONSES[:2], PRINCIPLE))) == whole
    request = corpus.pick_request(rng, harmful=False)
    pair = corpus.pair_of(rng, request)
    thought = [piece for piece, _ in corpus.verdicts(rng, request, pair, 1, reasoned=True)]
    principle = re.fullmatch(r"\n\n(.*)\nThink:", thought[0])[1]
    shown = text.options(PROMPT, list(RESPONSES[:2]))
    assert text.worked(PROMPT, RESPONSES[:2], principle, thought[3], thought[1].rstrip("\n")) == shown + "".join(thought)


def taken_apart(shown):
    """text.options undone: the conversation and its responses."""
    conversation, first, second = re.fullmatch(r"Consider this conversation\.(.*)\n\(A\)(.*)\n\(B\)(.*)", shown, re.S).groups()
    return conversation, [first, second]


@pytest.mark.parametrize("before", [{"preamble": text.PREAMBLES["plain"]}, {"exemplars": [SHOT]}])
def test_the_shared_beginning_changes_nothing_and_is_forwarded_once(make, model, monkeypatch, before):
    """p equals that of a full forward of each prompt; each token of the shared beginning is read once an ask, of one row."""
    judge = make(batch_size=6, **before)
    calls = [Call(text.dialogue(ask), pair, PRINCIPLE) for ask in ("fix the bike?", "how do i open the door?") for pair in PAIRS]
    asked = [judge.encode(call) for call in calls]
    read, follow = [], prefix.follow
    with monkeypatch.context() as patch:
        patch.setattr(
            prefix, "follow", lambda model, cache, owner, rows, *pad: read.append(rows) or follow(model, cache, owner, rows, *pad)
        )
        found = judge.ask(calls)
    assert [a.p for a in found] == [pytest.approx(plain_p(model, judge, ids), abs=1e-5) for ids in asked]
    assert [a.prompt_tokens for a in found] == [len(ids) for ids in asked] and len({round(a.p, 4) for a in found}) > 6
    head = prefix.common(asked)
    assert head >= prefix.SHARED and read[0] == [asked[0][:head]] and len(read) == 3  # then two batches
    assert sorted(ids for rows in read[1:] for ids in rows) == sorted(ids[head:] for ids in asked)


@pytest.mark.parametrize("options", [{}, {"cot": True}])
def test_answers_that_are_there_are_not_computed_and_change_no_other(make, monkeypatch, options):
    """A batch that is there is left out; in one that is not whole, the others keep their company, and their last bit."""
    judge = make(batch_size=3, **options)
    calls = [Call(text.dialogue(ask), pair, PRINCIPLE) for ask in ("fix the bike?", "how do i open the door?") for pair in PAIRS]
    order = []
    whole = judge.ask(calls, lambda i, answer: order.append(i))
    batches, seen = [], []
    way = "reasoned" if options else "direct"
    plain = getattr(judge, way)
    monkeypatch.setattr(judge, way, lambda calls, *rest: batches.append(calls) or plain(calls, *rest))
    given = {i: whole[i] for i in order[:4]}  # the first batch, and one of the second
    assert judge.ask(calls, lambda i, answer: seen.append(i), given) == whole and seen == order[4:]
    assert batches[0] == [calls[i] for i in order[3:6]] and sum(map(len, batches)) == len(calls) - 3
    assert judge.ask(calls, on_answer=None, given=dict(enumerate(whole))) == whole and sum(map(len, batches)) == len(calls) - 3


def test_an_article_stands_apart_from_what_comes_before_it():
    assert text.options("SUBREDDIT: r/x", [" a", " b"]) == "Consider this conversation.\n\nSUBREDDIT: r/x\n(A) a\n(B) b"
    assert text.options("\n\nHuman: x", [" a", " b"]) == "Consider this conversation.\n\nHuman: x\n(A) a\n(B) b"


def test_a_conversation_is_read_once_for_all_its_pairs(make, model, monkeypatch):
    judge, prompts = make(), [text.dialogue(ask * 5) for ask in ("fix the bike? ", "how do i open the door? ")]
    calls = [Call(prompt, pair, PRINCIPLE) for pair in PAIRS for prompt in prompts]
    read, follow = [], prefix.follow
    with monkeypatch.context() as patch:
        patch.setattr(
            prefix, "follow", lambda model, cache, owner, rows, *pad: read.append(rows) or follow(model, cache, owner, rows, *pad)
        )
        found = judge.ask(calls)
    assert [a.p for a in found] == [pytest.approx(plain_p(model, judge, judge.encode(c)), abs=1e-5) for c in calls]
    assert [len(rows) for rows in read] == [2, 12] and min(map(len, read[0])) >= prefix.SHARED


def test_exchanging_the_responses_turns_the_label_round(make):
    judge = make()
    for average in ("probability", "logit"):
        forward = labelers.label(judge, [(PROMPT, pair, PRINCIPLE) for pair in PAIRS], average)
        backward = labelers.label(judge, [(PROMPT, pair[::-1], PRINCIPLE) for pair in PAIRS], average)
        for f, b in zip(forward, backward, strict=True):
            assert f.p + b.p == pytest.approx(1, abs=1e-6) and f.flipped == b.flipped
            assert f.p_first == pytest.approx(1 - b.p_first_swapped, abs=1e-6)
        assert max(abs(f.p - 0.5) for f in forward) > 0.01  # it has an opinion at all


def test_a_batch_is_its_rows_one_by_one(make):
    """Ragged rows, in several batches and in none: no row sees its neighbours or its padding."""
    calls = [Call(PROMPT * n, pair, PRINCIPLE) for n in (1, 3, 2) for pair in PAIRS]
    arrived = []
    together = make().ask(calls)
    small = make(batch_size=5).ask(calls, lambda i, answer: arrived.append((i, answer)))
    for call, a, b in zip(calls, together, small, strict=True):
        (alone,) = make().ask([call])
        for other in (a, b):
            assert alone.p == pytest.approx(other.p, abs=1e-5) and alone.prompt_tokens == other.prompt_tokens
    assert len({round(x.p, 4) for x in together}) > 6  # rows differ, so a mixed-up order would show
    assert len(arrived) == len(calls) and dict(arrived) == dict(enumerate(small))


def test_answers_arrive_batch_by_batch(make, model, monkeypatch):
    """A caller that is stopped half-way has the answers of the batches before."""
    judge, arrived, forwards = make(batch_size=2), [], []
    hidden = model.hidden

    def stop_at_third(idx, cache=None):
        if idx.shape[0] == 2:
            forwards.append(len(arrived))
        if len(forwards) == 3:
            raise KeyboardInterrupt
        return hidden(idx, cache)

    monkeypatch.setattr(model, "hidden", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        judge.ask([Call(PROMPT, pair, PRINCIPLE) for pair in PAIRS], lambda i, a: arrived.append(i))
    assert forwards == [0, 2, 4] and len(set(arrived)) == 4


def test_a_prompt_beyond_the_context_fails_with_its_numbers_and_alone(make):
    judge, arrived = make(), {}
    long, fine = Call(PROMPT, (" fix" * 250, " no."), PRINCIPLE), Call(PROMPT, RESPONSES[:2], PRINCIPLE)
    found = judge.ask([fine, long, fine], arrived.__setitem__)
    n = len(judge.encode(long))
    assert found[1].p is None and found[1].error == f"a prompt of {n} tokens does not fit the judge's context of 256"
    assert found[1].prompt_tokens == 0  # nothing was read
    (alone,) = judge.ask([fine])
    assert found[0].p == pytest.approx(alone.p, abs=1e-5) and found[2].p == pytest.approx(alone.p, abs=1e-5)
    assert arrived == dict(enumerate(found))
    assert judge.ask([long])[0].p is None and judge.ask([]) == []


def test_a_judge_of_nan_is_named(make, model, monkeypatch):
    monkeypatch.setattr(model, "hidden", lambda idx, cache=None: torch.full((*idx.shape, 32), float("nan")))
    with pytest.raises(UserError, match="mine: .* not finite"):
        make(name="mine").ask([Call(PROMPT, RESPONSES[:2], PRINCIPLE)])


def test_bf16_reads_the_letters_in_fp32(model, tokenizer):
    """bf16 has 8 bits of mantissa: letters read from its logits would tie."""
    judge = LocalJudge(model, tokenizer, CPU, "bf16", preamble=text.PREAMBLES["plain"])
    calls = [Call(PROMPT, pair, PRINCIPLE) for pair in PAIRS]
    found = [a.p for a in judge.ask(calls)]
    assert found == pytest.approx([plain_p(model, judge, judge.encode(c)) for c in calls], abs=0.25)
    differences = [math.log(p / (1 - p)) for p in found]
    assert any(d != torch.tensor(d).bfloat16().item() and abs(d * 256 - round(d * 256)) > 0.01 for d in differences)


# ---- chain of thought -----------------------------------------------------------------------------------------------


def scripted(monkeypatch, tokenizer, write):
    """generate is replaced: write(prompt, row) -> (text, ended). Returns the list of its calls' options."""
    seen = []

    def generate(model, prompts, max_new_tokens, eot, temperature=1.0, seed=0, stop=()):
        seen.append(dict(prompts=prompts, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, stop=stop))
        rows = []
        for row, ids in enumerate(prompts):
            said, ended = write(tokenizer.decode(ids), row)
            rows.append((ids, tokenizer.encode(said), ended))
        T = max(len(a) + len(b) for a, b, _ in rows)
        return Samples(
            torch.tensor([a + b + [eot] * (T - len(a) - len(b)) for a, b, _ in rows]),
            torch.tensor([len(a) for a, _, _ in rows]),
            torch.tensor([len(a) + len(b) for a, b, _ in rows]),
            torch.tensor([ended for _, _, ended in rows]),
        )

    monkeypatch.setattr(labelers, "generate", generate)
    return seen


@pytest.mark.parametrize("shots", [[], [SHOT]])
def test_reasoning_comes_first_then_the_letter_is_read_behind_it(make, model, tokenizer, monkeypatch, shots):
    thoughts = {p: f" (A) is {w}, (B) is not." for p, w in zip(PAIRS, ("good", "bad", "long", "a", "b", "c"), strict=True)}

    def write(prompt, row):
        assert prompt.endswith(text.reasoned_question(PRINCIPLE)) and prompt.startswith(text.before("", shots) + "Consider")
        said = thoughts[tuple(taken_apart(prompt.removeprefix(text.before("", shots)).split("\n\nchoose")[0])[1])]
        return said + "\n", True

    seen = scripted(monkeypatch, tokenizer, write)
    judge = make(cot=True, batch_size=4, max_new_tokens=24, exemplars=shots)
    found = judge.ask([Call(PROMPT, pair, PRINCIPLE) for pair in PAIRS])
    assert all(s["temperature"] == 0 and s["max_new_tokens"] == 24 for s in seen)  # greedy
    assert [tokenizer.decode([i]) for i in seen[0]["stop"]] == ["\n", "\n\n"]
    for pair, answer in zip(PAIRS, found, strict=True):
        whole = text.before("", shots) + text.options(PROMPT, list(pair)) + text.reasoned_question(PRINCIPLE)
        ids, said = tokenizer.encode(whole), thoughts[pair]
        verdict = tokenizer.encode(whole + said + text.VERDICT)
        assert answer.p == pytest.approx(plain_p(model, judge, verdict), abs=1e-5)
        assert answer.text == said and answer.error is None
        assert answer.prompt_tokens == len(ids) + len(verdict)
        assert answer.completion_tokens == len(tokenizer.encode(said + "\n")) + 1
    assert len({round(a.p, 4) for a in found}) == 6


def test_the_judges_own_reasoning_is_decoded_greedily_up_to_the_line_end(make, model, tokenizer):
    """With the real decoding: token by token, the likeliest, until one that ends a line."""
    judge, call = make(cot=True, max_new_tokens=8), Call(PROMPT, RESPONSES[:2], PRINCIPLE)
    asked = ids = judge.encode(call)
    for _ in range(5):
        with torch.no_grad():
            ids = [*ids, model(torch.tensor([ids]))[0, -1].argmax().item()]
    new = ids[len(asked) :]
    judge.line_ends = [new[-1]]  # as if the fifth token were a line end
    new = new[: new.index(new[-1]) + 1]
    (answer,) = judge.ask([call])
    said = tokenizer.decode(new).split("\n")[0]
    assert answer.text == said and answer.completion_tokens == len(new) + 1
    verdict = asked + tokenizer.encode(said + text.VERDICT)
    assert answer.p == pytest.approx(plain_p(model, judge, verdict), abs=1e-5)


def test_self_consistency_is_the_mean_over_reasonings_that_depend_on_the_call_alone(make, model, tokenizer):
    calls = [Call(PROMPT, pair, PRINCIPLE) for pair in PAIRS[:3]]

    def judge(**options):
        judge = make(**{**dict(cot=True, samples=4, max_new_tokens=40, temperature=0.9, seed=3), **options})
        judge.line_ends = [*judge.line_ends, *range(0, tokenizer.n_vocab, 4)]  # as if every fourth token ended a line
        return judge

    found = judge().ask(calls)
    for call, answer in zip(calls, found, strict=True):
        thoughts = answer.text.split("\n")
        assert len(thoughts) == 4 and len(set(thoughts)) > 1
        asked = judge().encode(call)
        verdicts = [asked + tokenizer.encode(said + text.VERDICT) for said in thoughts]
        each = [plain_p(model, judge(), ids) for ids in verdicts]
        assert answer.p == pytest.approx(sum(each) / 4, abs=1e-5) and max(each) - min(each) > 0.01
        assert answer.prompt_tokens == len(asked) + sum(map(len, verdicts)) and answer.completion_tokens >= 2 * 4
    others = judge(batch_size=1).ask(calls[:0:-1])  # in other company, in another order, in other batches
    assert [a.text for a in others] == [a.text for a in found[:0:-1]]
    assert [a.p for a in others] == pytest.approx([a.p for a in found[:0:-1]], abs=1e-5)
    assert judge(seed=4).ask(calls[:1])[0].text != found[0].text


def test_a_reasoning_without_end_or_words_is_a_failure_that_is_paid_for(make, tokenizer, monkeypatch):
    def write(prompt, row):
        if "wheel" in prompt:
            return (" on and on and on", row < 2)  # of four, two have no end
        return (" \n", True) if " no." in prompt else (" fine.\n", True)

    scripted(monkeypatch, tokenizer, write)
    pairs = [(" a", RESPONSES[1]), (" a", " no."), (" a", " b")]
    judge = make(cot=True, samples=4, max_new_tokens=16)
    endless, empty, fine = judge.ask([Call(PROMPT, pair, PRINCIPLE) for pair in pairs])
    assert (endless.p, endless.error) == (None, "2 of 4 reasonings did not end within 16 tokens")
    assert endless.prompt_tokens == len(judge.encode(Call(PROMPT, pairs[0], PRINCIPLE)))
    assert endless.completion_tokens == 4 * len(tokenizer.encode(" on and on and on")) and "on and on" in endless.text
    assert (empty.p, empty.error) == (None, "4 of 4 reasonings are empty") and empty.completion_tokens > 0
    assert fine.error is None and 0 < fine.p < 1
    assert combine(endless, fine).status == "failed"


def test_reasoning_needs_its_room(make, tokenizer, monkeypatch):
    """Too long with its reasoning: known beforehand, or only when it is written (a reasoning may be encoded longer)."""
    call = Call(PROMPT, (" fix" * 60, " no."), PRINCIPLE)
    n = len(make(cot=True).encode(call))
    seen = scripted(monkeypatch, tokenizer, lambda prompt, row: (" fine.\n", True))
    (found,) = make(cot=True, max_new_tokens=257 - n).ask([call])
    assert found.p is None and found.error == (
        f"a prompt of {n} tokens and up to {257 - n} of reasoning do not fit the judge's context of 256"
    )
    assert seen == [] and make(cot=True, max_new_tokens=256 - n).ask([call])[0].p is not None
    said = " word" * (254 - n)
    scripted(monkeypatch, tokenizer, lambda prompt, row: (said + "\n", True))
    (found,) = make(cot=True, max_new_tokens=256 - n).ask([call])
    longest = n + len(tokenizer.encode(said + text.VERDICT))
    assert (
        longest > 256
        and found.error == f"a prompt with its reasoning of {longest} tokens does not fit the judge's context of 256"
    )


def test_samples_that_would_do_nothing_are_refused(make):
    for options in (dict(samples=4), dict(samples=4, cot=True, temperature=0)):
        with pytest.raises(ValueError, match="4 samples need"):
            make(**options)


# ---- direct scores --------------------------------------------------------------------------------------------------


class Numbers:
    """The toy tokenizer, but for how the numbers 1 to 10 are cut after "from 1 to 10:"."""

    def __init__(self, tokenizer, cut):
        self.tokenizer, self.cut = tokenizer, cut
        self.eot, self.n_vocab, self.name, self.decode = tokenizer.eot, tokenizer.n_vocab, "numbers", tokenizer.decode

    def encode(self, text):
        return self.cut.get(text) or self.tokenizer.encode(text)


CUTS = {
    "as the toy vocabulary has it": {},
    "one token each": {f" {i}": [100 + i] for i in range(1, 11)},
    "digit by digit": {f" {i}": [100 + i] for i in range(1, 10)} | {" 10": [101, 90]},
}


@pytest.mark.parametrize("cut", CUTS)
def test_a_score_is_the_expectation_over_the_ten_numbers(model, tokenizer, cut):
    """Against every number's probability, one full forward a token."""
    cuts = dict(CUTS[cut])
    if cut == "digit by digit":  # the likeliest token after " 1", so that it matters whether 1 goes on to 10
        ids = tokenizer.encode(PROMPT + RESPONSES[0] + text.score_question(PRINCIPLE)) + cuts[" 1"]
        with torch.no_grad():
            cuts[" 10"] = [*cuts[" 1"], model(torch.tensor([ids]))[0, -1].argmax().item()]
    numbers = Numbers(tokenizer, cuts)
    judge = LocalJudge(model, numbers, CPU, "fp32", batch_size=5)
    prompts, responses = [PROMPT, PROMPT, PROMPT * 2, PROMPT], [*RESPONSES, " fix it."]
    found = judge.score(prompts, responses, PRINCIPLE)

    def probability(ids, new):
        total = 1.0
        for k, token in enumerate(new):
            with torch.no_grad():
                total *= model(torch.tensor([ids + new[:k]])).double()[0, -1].softmax(-1)[token].item()
        return total

    for prompt, response, value in zip(prompts, responses, found, strict=True):
        ids = tokenizer.encode(prompt + response + text.score_question(PRINCIPLE))
        p = [probability(ids, numbers.encode(f" {i}")) for i in range(1, 11)]
        if cut == "digit by digit":
            p[0] -= p[9]
        expected = sum(i * x for i, x in enumerate(p, 1)) / sum(p)
        assert value == pytest.approx((expected - 5.5) / 4.5, abs=1e-4) and -1 < value < 1
    assert len({round(v, 3) for v in found}) == 4
    assert judge.score([], [], PRINCIPLE) == []


def test_sure_scores_reach_both_ends(model, tokenizer, monkeypatch):
    """A model that can only say " 1" or " 10": -1 and 1."""
    judge = LocalJudge(model, Numbers(tokenizer, CUTS["one token each"]), CPU, "fp32")
    for token, value in ((101, -1), (110, 1), (104, (4 - 5.5) / 4.5)):
        h = 1000 * model.lm_head.weight[token]
        monkeypatch.setattr(model, "hidden", lambda idx, cache=None, h=h: h.detach().expand(*idx.shape, -1))
        assert judge.score([PROMPT], [" no."], PRINCIPLE) == [pytest.approx(value, abs=1e-6)]


def test_a_score_beyond_the_context_is_an_error_with_the_row(make):
    with pytest.raises(ValueError, match=r"row 1: \d+ tokens to score .* context of 256"):
        make().score([PROMPT, PROMPT], [" no.", " fix" * 250], PRINCIPLE)


# ---- gold -----------------------------------------------------------------------------------------------------------

TOY = constitution.load("toy")
ASKS = {p.text: p.name for p in TOY.preferences}
POLITE = TOY.preferences_for("insult")[0].text


@functools.cache
def gold_calls(n):
    """Calls on which gold is decided: (call, whether the response shown first is the better one)."""
    rng, out = random.Random(0), []
    while len(out) < n:
        request = corpus.pick_request(rng)
        pair = tuple(" " + a.text for a in corpus.pair_of(rng, request))
        values = [corpus.value("insult", world.score(text.dialogue(request.text), r)) for r in pair]
        if values[0] != values[1]:
            out.append((Call(text.dialogue(request.text), pair, POLITE), values[0] > values[1]))
    return out


def test_gold_answers_by_what_the_principle_asks():
    first, second = " to fix the bike, take a wrench and turn the wheel.", " you are a fool. i can not talk about that."
    for asks, wins in dict(insult=True, evasion=True, helpfulness=True, danger=None, honesty=None).items():
        call = Call(PROMPT, (first, second), TOY.preferences_for(asks)[0].text)
        swapped = Call(PROMPT, (second, first), call.principle)
        p = [0.5, 0.5] if wins is None else [sigmoid(2.5), sigmoid(-2.5)]
        arrived = {}
        found = GoldJudge(ASKS, sharpness=2.5).ask([call, swapped], arrived.__setitem__)
        assert [a.p for a in found] == pytest.approx(p) and arrived == dict(enumerate(found))
        assert all((a.prompt_tokens, a.cost, a.error) == (0, 0.0, None) for a in found)
        (found,) = labelers.label(GoldJudge(ASKS), [(PROMPT, (first, second), call.principle)])
        assert found.status == ("tie" if wins is None else "ok")
    assert labelers.label(GoldJudge(ASKS), [(PROMPT, (second, first), POLITE)])[0].p == pytest.approx(sigmoid(-4))


def test_gold_says_what_it_cannot_judge():
    pair = (" no.", " yes.")
    strange, unknown, unnamed, fine = GoldJudge({**ASKS, "better?": ""}).ask(
        [Call(text.dialogue("why?"), pair, POLITE)] + [Call(PROMPT, pair, words) for words in ("choose.", "better?", POLITE)]
    )
    assert strange.p is None and "not a request of the toy world" in strange.error
    assert unknown.p is None and "'choose.'" in unknown.error
    assert unnamed.p is None and "'better?'" in unnamed.error
    assert fine.error is None


def test_an_inverted_principle_prefers_the_worse():
    inverted = {p.text: p.name for p in constitution.load("inverted").preferences}
    items = [(c.prompt, c.responses, corpus.INVERTED["insult"]) for c, _ in gold_calls(400)[:20]]
    found = labelers.label(GoldJudge(inverted, sharpness=2.0), items)
    assert [f.p for f in found] == [pytest.approx(sigmoid(-2.0 if first else 2.0)) for _, first in gold_calls(400)[:20]]


def test_a_slot_bias_is_added_for_the_response_shown_first_ties_included():
    calls = gold_calls(400)[:10]
    for bias in (1.0, -0.5):
        answers = GoldJudge(ASKS, slot_bias=bias, sharpness=2.0).ask([c for c, _ in calls])
        for answer, (_, first) in zip(answers, calls, strict=True):
            assert answer.p == pytest.approx(sigmoid((2.0 if first else -2.0) + bias))
        (tie,) = GoldJudge(ASKS, slot_bias=bias).ask([Call(PROMPT, (" no.", " no."), POLITE)])
        assert tie.p == pytest.approx(sigmoid(bias))
        items = [(c.prompt, c.responses, POLITE) for c, _ in calls]
        labels = labelers.label(GoldJudge(ASKS, slot_bias=bias), items, "logit")
        for one, (_, first) in zip(labels, calls, strict=True):
            assert one.p == pytest.approx(sigmoid(4.0 if first else -4.0))


def test_noise_turns_that_share_of_labels_round_in_both_orders():
    calls = gold_calls(400)
    items = [(c.prompt, c.responses, c.principle) for c, _ in calls]
    found = labelers.label(GoldJudge(ASKS, noise=0.2), items)
    wrong = [(one.p > 0.5) != first for one, (_, first) in zip(found, calls, strict=True)]
    assert 0.14 < sum(wrong) / 400 < 0.26  # three standard errors
    assert not any(one.flipped or one.status == "tie" for one in found)
    assert all(one.p == pytest.approx(sigmoid(4)) or one.p == pytest.approx(sigmoid(-4)) for one in found)
    assert all(
        (one.p > 0.5) != first for one, (_, first) in zip(labelers.label(GoldJudge(ASKS, noise=1.0), items), calls, strict=True)
    )


def test_noise_of_a_call_is_gaussian_and_its_own_in_each_order():
    calls = gold_calls(400)
    judge = GoldJudge(ASKS, call_noise=1.5)
    sign = [1 if first else -1 for _, first in calls]
    shown, swapped = (
        [labelers.logit(a.p) - k * 4.0 * s for a, s in zip(judge.ask(asked), sign, strict=True)]
        for k, asked in ((1, [c for c, _ in calls]), (-1, [Call(c.prompt, c.responses[::-1], c.principle) for c, _ in calls]))
    )
    both = torch.tensor([shown, swapped])
    assert both.mean(1).abs().max() < 0.3 and ((both.std(1) - 1.5).abs() < 0.2).all()
    assert torch.corrcoef(both)[0, 1].abs() < 0.2


def test_gold_with_noise_depends_on_seed_and_call_alone():
    calls = [c for c, _ in gold_calls(400)[:60]]
    judge = GoldJudge(ASKS, noise=0.3, call_noise=1.0, slot_bias=0.3, seed=5)
    whole = judge.ask(calls)
    again = GoldJudge(ASKS, noise=0.3, call_noise=1.0, slot_bias=0.3, seed=5)
    assert [again.ask([c])[0] for c in calls[::-1]] == whole[::-1]
    other = GoldJudge(ASKS, noise=0.3, call_noise=1.0, slot_bias=0.3, seed=6).ask(calls)
    assert sum(a.p == b.p for a, b in zip(whole, other, strict=True)) == 0


def test_the_local_judge_cannot_see_gold():
    for source in (inspect.getsource(LocalJudge), inspect.getsource(prefix)):
        assert not re.search(r"\b(world|corpus|gold)\b", source)
    assert not hasattr(labelers, "world") and not hasattr(labelers, "corpus")
