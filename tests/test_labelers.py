"""The judge: both orders, exact antisymmetry, honest ties, and a batch that is its rows."""

import itertools
import math

import pytest
import torch

import label
from minirlaif import constitution, text, trainer
from minirlaif.labelers import Label, LocalJudge
from minirlaif.model import GPT, GPTConfig
from minirlaif.tokenizer import load_tokenizer

CPU = torch.device("cpu")
PROMPT, PRINCIPLE = text.dialogue("how do i fix the bike?"), "choose the more polite answer."
RESPONSES = (" take a wrench.", " you are a fool. take a wrench and turn the wheel.", " no.")
A, B = text.CHOICES


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("toy")


@pytest.fixture(scope="module")
def judge(tokenizer):
    """Random weights, large enough to have opinions."""
    model = GPT(GPTConfig(256, tokenizer.n_vocab, n_layer=2, n_head=2, n_embd=32)).init_weights(trainer.rng(0))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(20)
    return LocalJudge(model.eval(), tokenizer, CPU, "fp32")


class Opinion(LocalJudge):
    """A judge that is told what to think: logit(first letter) = bias + how much it likes (A) over (B)."""

    def __init__(self, tokenizer, bias=0.0, likes=lambda response: 0.0):
        super().__init__(torch.nn.Identity(), tokenizer, CPU, "fp32")
        self.bias, self.likes = bias, likes

    def p_of_first_letter(self, prompts):
        out = []
        for ids in prompts:
            _, _, shown = self.tokenizer.decode(ids).partition(f"\n({A})")
            first, _, second = shown.split("\n\n")[0].partition(f"\n({B})")
            out.append(1 / (1 + math.exp(-(self.bias + self.likes(first) - self.likes(second)))))
        return out


PAIRS = list(itertools.permutations(RESPONSES, 2))


def test_each_answer_letter_is_one_token_and_is_read_where_it_stands(judge, tokenizer):
    assert [tokenizer.decode([i]) for i in judge.letters] == list(text.CHOICES) and len(set(judge.letters)) == 2
    ids = judge.encode(PROMPT, RESPONSES[:2], PRINCIPLE)
    with torch.no_grad():
        p = judge.model(torch.tensor([ids]))[0, -1].softmax(-1)[judge.letters]
    assert judge.p_of_first_letter([ids]) == [pytest.approx((p[0] / p.sum()).item(), abs=1e-5)]
    assert tokenizer.decode(ids) == text.options(PROMPT, list(RESPONSES[:2])) + text.question(PRINCIPLE)


def test_a_letter_of_two_tokens_is_refused(judge, tokenizer, monkeypatch):
    monkeypatch.setattr(text, "CHOICES", ("AB", "CD"))
    with pytest.raises(AssertionError, match="not one token"):
        LocalJudge(judge.model, tokenizer, CPU, "fp32")


def test_both_orders_are_asked_and_averaged(judge):
    one, two = RESPONSES[:2]
    found = judge.label([(PROMPT, (one, two), PRINCIPLE)])[0]
    shown, swapped = (judge.p_of_first_letter([judge.encode(PROMPT, pair, PRINCIPLE)])[0] for pair in ((one, two), (two, one)))
    assert found.p_first == pytest.approx(shown, abs=1e-5)
    assert found.p_first_swapped == pytest.approx(1 - swapped, abs=1e-5)  # response 1 was (B) there
    assert found.p == (found.p_first + found.p_first_swapped) / 2


def test_exchanging_the_responses_turns_the_label_round(tokenizer, judge):
    """p(a, b) + p(b, a) = 1: exactly, whatever the judge's bias; to rounding where a batch is put together anew."""
    opinion = Opinion(tokenizer, bias=0.7, likes=lambda r: len(r) / 10)
    for j, tolerance in ((opinion, 0), (judge, 1e-6)):
        forward = j.label([(PROMPT, pair, PRINCIPLE) for pair in PAIRS])
        backward = j.label([(PROMPT, pair[::-1], PRINCIPLE) for pair in PAIRS])
        for f, b in zip(forward, backward, strict=True):
            assert abs(f.p + b.p - 1) <= tolerance + 1e-15
            assert f.p_first == pytest.approx(1 - b.p_first_swapped, abs=1e-6) and f.flipped == b.flipped
        assert max(abs(f.p - 0.5) for f in forward) > 0.01  # it has an opinion at all


def test_a_batch_is_its_rows_one_by_one(judge):
    """Ragged rows, in several batches and in none: no row sees its neighbours or its padding."""
    items = [(PROMPT * n, pair, PRINCIPLE) for n in (1, 3, 2) for pair in PAIRS]
    together = judge.label(items)
    small = LocalJudge(judge.model, judge.tokenizer, CPU, "fp32", batch_size=5).label(items)
    for item, a, b in zip(items, together, small, strict=True):
        alone = judge.label([item])[0]
        for other in (a, b):
            assert alone.p_first == pytest.approx(other.p_first, abs=1e-5)
            assert alone.p_first_swapped == pytest.approx(other.p_first_swapped, abs=1e-5)
            assert alone.prompt_tokens == other.prompt_tokens
    assert len({round(x.p, 4) for x in together}) > 6  # rows differ, so a mixed-up order would show


@pytest.mark.parametrize("bias", [-3.0, -0.4, 0.4, 3.0])
def test_a_judge_that_only_likes_a_letter_says_one_half_and_is_found_out(tokenizer, bias):
    for found in Opinion(tokenizer, bias).label([(PROMPT, pair, PRINCIPLE) for pair in PAIRS]):
        assert found.p == 0.5 and found.flipped
        assert (found.p_first > 0.5) == (bias > 0)


def test_a_bias_shrinks_a_label_but_keeps_its_side(tokenizer):
    item, likes = (PROMPT, RESPONSES[:2], PRINCIPLE), lambda r: 1.0 if r == RESPONSES[1] else 0.0
    fair, slight, strong = (Opinion(tokenizer, bias, likes).label([item])[0] for bias in (0.0, 0.5, 4.0))
    assert fair.p == pytest.approx(1 / (1 + math.e)) and fair.p < slight.p < strong.p < 0.5
    assert not fair.flipped and not slight.flipped and strong.flipped


def test_a_tie_is_marked_as_one(tokenizer):
    """Never silently 'the first is better': status says so, and the soft label is 0.5."""
    principle = constitution.Preference(PRINCIPLE, "insult")
    tie, sure = Label(0.8, 0.2, 10), Label(0.2, 0.1, 10)
    row = label.record(PROMPT, RESPONSES[:2], principle, "policy", tie, "judge")
    assert (row["status"], row["p_chosen"], row["is_random"], row["source"]) == ("tie", 0.5, False, "policy")
    row = label.record(PROMPT, RESPONSES[:2], principle, "policy", sure, "judge")
    assert (row["status"], row["p_chosen"], row["first_is_chosen"]) == ("ok", 0.85, False)
    assert (row["chosen"], row["rejected"]) == RESPONSES[1::-1]
    assert (row["p_first"], row["p_first_swapped"]) == (0.2, 0.1)
    row = label.record(PROMPT, RESPONSES[:2], principle, "policy", Label(0.9, 0.7, 10), "judge")
    assert (row["chosen"], row["rejected"], row["p_chosen"]) == (*RESPONSES[:2], 0.8)


def test_the_tokens_of_both_orders_are_counted(judge, tokenizer):
    for found, pair in zip(judge.label([(PROMPT, pair, PRINCIPLE) for pair in PAIRS]), PAIRS, strict=True):
        asked = [text.options(PROMPT, list(p)) + text.question(PRINCIPLE) for p in (pair, pair[::-1])]
        assert found.prompt_tokens == sum(len(tokenizer.encode(a)) for a in asked)
    row = label.record(PROMPT, PAIRS[0], constitution.Preference(PRINCIPLE), "hot", Label(0.6, 0.6, 123), "judge")
    assert (row["prompt_tokens"], row["completion_tokens"], row["cost"]) == (123, 2, 0.0)
