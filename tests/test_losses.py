"""The preference and distillation losses against hand values, limits and enumeration."""

import math

import pytest
import torch

from minirlaif.losses import distill_kl, kwise_loss, preference_loss, token_kl, topk_rest, topk_rest_kl


def logprobs(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).log_softmax(-1)


def test_preference_loss_is_bradley_terry_at_a_hard_label():
    chosen, rejected = torch.tensor([2.0, 0.5]), torch.tensor([1.0, 3.0])
    hand = sum(math.log(1 + math.exp(-d)) for d in (1.0, -2.5)) / 2
    assert preference_loss(chosen, rejected, torch.ones(2)).item() == pytest.approx(hand, rel=1e-6)


def test_soft_label_mixes_both_orders_and_a_tie_is_symmetric():
    a, b, p = torch.tensor([0.3]), torch.tensor([-1.1]), torch.tensor([0.8])
    hard = preference_loss(a, b, torch.ones(1)), preference_loss(b, a, torch.ones(1))
    torch.testing.assert_close(preference_loss(a, b, p), 0.8 * hard[0] + 0.2 * hard[1])
    torch.testing.assert_close(preference_loss(a, b, p), preference_loss(b, a, 1 - p))


@pytest.mark.parametrize("p", [0.5, 0.6, 0.9])
def test_the_optimal_margin_is_the_logit_of_the_label(p):
    """A label clamped to 0.6 asks for a margin of 0.405 and no more."""
    margin = torch.tensor([math.log(p / (1 - p))], requires_grad=True)
    preference_loss(margin, torch.zeros(1), torch.tensor([p])).backward()
    assert abs(margin.grad.item()) < 1e-7


def test_preference_loss_survives_huge_margins():
    chosen = torch.tensor([-1e4], requires_grad=True)
    loss = preference_loss(chosen, torch.tensor([1e4]), torch.ones(1))
    loss.backward()
    assert loss.item() == 2e4 and chosen.grad.item() == -1


def test_kwise_loss_is_the_mean_of_all_pairs():
    scores = torch.tensor([[1.0, -0.5, 0.2, 2.0]])
    p = torch.full((1, 4, 4), float("nan"))
    pairs = [(0, 1, 0.9), (0, 2, 0.7), (0, 3, 0.2), (1, 2, 0.5), (1, 3, 0.1), (2, 3, 1.0)]
    for i, j, label in pairs:
        p[0, i, j] = label
    one_by_one = [preference_loss(scores[0, i : i + 1], scores[0, j : j + 1], torch.tensor(x)) for i, j, x in pairs]
    torch.testing.assert_close(kwise_loss(scores, p), sum(one_by_one) / 6)


def test_kwise_loss_of_two_is_the_preference_loss():
    scores, label = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 0.9, 0.5, 0.6, 0.7])
    p = torch.stack([torch.stack([label, label], 1), torch.stack([1 - label, label], 1)], 1)
    p[:, 0, 1] = label
    torch.testing.assert_close(kwise_loss(scores, p), preference_loss(scores[:, 0], scores[:, 1], label))


def test_kwise_loss_leaves_out_pairs_without_a_label():
    """A group of 2 padded to 3 weighs as much as a group of 3, and its pad gets no gradient."""
    scores = torch.tensor([[0.3, -0.2, 9.0], [0.1, 0.4, 0.8]], requires_grad=True)
    p = torch.full((2, 3, 3), float("nan"))
    p[0, 0, 1], p[1] = 0.7, 0.6
    loss = kwise_loss(scores, p)
    loss.backward()
    with torch.no_grad():
        two = preference_loss(scores[0, :1], scores[0, 1:2], torch.tensor([0.7]))
        torch.testing.assert_close(loss, (two + kwise_loss(scores[1:], p[1:])) / 2)
    assert scores.grad[0, 2] == 0 and scores.grad.isfinite().all()


def test_distill_kl_matches_enumeration_in_both_directions():
    p, q = logprobs(2, 3, 5), logprobs(2, 3, 5, seed=1)
    mask = torch.tensor([[True, True, False], [False, True, True]])

    def kl(a, b):
        rows = [sum(math.exp(x) * (x - y) for x, y in zip(a[i, j], b[i, j], strict=True)) for i, j in mask.nonzero().tolist()]
        return sum(rows) / 4

    torch.testing.assert_close(distill_kl(p, q, mask, "forward").item(), float(kl(p, q)))
    torch.testing.assert_close(distill_kl(p, q, mask, "reverse").item(), float(kl(q, p)))
    assert distill_kl(p, p, mask, "forward").item() == 0
    with pytest.raises(ValueError, match="sideways"):
        distill_kl(p, q, mask, "sideways")


def test_distill_kl_reads_only_the_mask_and_allows_impossible_tokens():
    p, q = torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]]).log(), torch.tensor([[0.25, 0.5, 0.25], [0.5, 0.5, 0.0]]).log()
    mask = torch.tensor([True, False])
    assert distill_kl(p, q, mask, "forward").item() == pytest.approx(0.5 * math.log(2))
    q = q.masked_fill(~mask[:, None], float("nan"))
    assert distill_kl(p, q, mask, "forward").item() == pytest.approx(0.5 * math.log(2))
    for broken in ((p * float("nan"), q), (p, q * float("nan"))):  # a teacher that is lost is not one that agrees
        assert distill_kl(*broken, mask, "forward").isnan() and distill_kl(*broken, mask, "reverse").isnan()


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("k", [1, 2, 4, 6])
def test_topk_with_a_bucket_for_the_rest_never_exceeds_the_full_kl(k, direction):
    p, q = logprobs(200, 6), logprobs(200, 6, seed=1)
    ids = p.topk(k).indices
    cut, full = token_kl(topk_rest(p, ids), topk_rest(q, ids), direction), token_kl(p, q, direction)
    assert (cut >= 0).all() and (cut <= full + 1e-12).all()
    if k == 6:
        torch.testing.assert_close(cut, full)
    mask = torch.arange(200) % 3 == 0
    torch.testing.assert_close(topk_rest_kl(topk_rest(p, ids), ids, q, mask, direction), cut[mask].mean())


def test_the_bucket_holds_what_the_best_tokens_leave():
    p = torch.tensor([[0.1, 0.5, 0.15, 0.2, 0.05]]).log()
    found = topk_rest(p, torch.tensor([[1, 3]])).exp()
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.2, 0.3]]))


def test_topk_loss_keeps_the_tail_that_dropping_the_bucket_loses():
    """Target .5 .2 on two of five tokens: with the bucket the fit keeps .3 for the rest; without it, 0."""
    ids = torch.tensor([[0, 1]])
    for teacher, expected in (([0.5, 0.2, 0.3], [0.5, 0.2, 0.1, 0.1, 0.1]), ([0.5, 0.2], [0.714, 0.286, 0, 0, 0])):
        student = torch.zeros(1, 5, requires_grad=True)
        optimizer = torch.optim.Adam([student], lr=0.1)
        for _ in range(300):
            optimizer.zero_grad()
            outcomes = topk_rest(student.log_softmax(-1), ids)[:, : len(teacher)]
            token_kl(torch.tensor([teacher]).log(), outcomes).mean().backward()
            optimizer.step()
        torch.testing.assert_close(student.softmax(-1)[0], torch.tensor(expected), atol=2e-3, rtol=0)


def test_forward_covers_both_modes_of_the_teacher_and_reverse_seeks_one():
    """The student can only be one bump over nine tokens; the teacher has two, at 1 and 7, the first a little higher."""
    x, teacher = torch.arange(9.0), torch.full((9,), 0.002)
    teacher[[1, 7]] = torch.tensor([0.55, 0.436])

    def fit(direction):
        shape = torch.tensor([2.0, 0.0], requires_grad=True)  # where it is, and the log of its width
        optimizer = torch.optim.Adam([shape], lr=0.05)
        for _ in range(400):
            optimizer.zero_grad()
            student = (-0.5 * ((x - shape[0]) / shape[1].exp()) ** 2).log_softmax(-1)
            token_kl(teacher.log(), student, direction).backward()
            optimizer.step()
        return student.detach().exp()

    covers, seeks = fit("forward"), fit("reverse")
    assert covers[1] > 0.08 and covers[7] > 0.08 and covers[2:7].sum() > 0.4
    assert seeks[1] > 0.9 and seeks[7] < 1e-3
