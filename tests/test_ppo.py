"""PPO's pure functions against hand values and exact enumeration, and the update against its own invariances."""

import copy
import itertools
import math

import pytest
import torch

from minirlaif import ppo
from minirlaif.heads import ValueModel
from minirlaif.losses import distill_kl
from minirlaif.model import GPT, GPTConfig, response_mask, token_logprobs


def ragged(B=5, T=9, seed=0):
    """Random [B, T] rewards and values in float64, and a mask of unequal runs (one of a single token)."""
    g = torch.Generator().manual_seed(seed)
    start, end = torch.tensor([1, 3, 4, 2, 1])[:B], torch.tensor([9, 7, 5, 9, 4])[:B]
    return (*torch.randn(2, B, T, generator=g, dtype=torch.float64), response_mask(start, end, T))


# rewards


def test_score_lands_on_the_last_response_token():
    """Three cases: stopped early, stopped at the last slot, cut at the length limit; and a longer pad."""
    prompt_len, length = torch.tensor([2, 2, 1, 3]), torch.tensor([4, 6, 6, 5])
    mask = response_mask(prompt_len, length, 6)
    logprobs = torch.where(mask, -1.0, 0.0)
    ref_logprobs = torch.where(mask, -3.0, 0.0)
    rewards = ppo.shape_rewards(torch.tensor([10.0, 20.0, 30.0, 40.0]), logprobs, ref_logprobs, mask, kl_coef=0.5)
    # log pi - log ref = 2 nats a token, at 0.5 a nat: -1 a token
    expected = [[0, 0, -1, 9, 0, 0], [0, 0, -1, -1, -1, 19], [0, -1, -1, -1, -1, 29], [0, 0, 0, -1, 39, 0]]
    assert rewards.tolist() == expected


def test_kl_reward_is_signed_never_clamped():
    mask = torch.tensor([[False, True, True]])
    rewards = ppo.shape_rewards(torch.zeros(1), torch.tensor([[0.0, -3.0, -1.0]]), torch.tensor([[0.0, -1.0, -3.0]]), mask, 1.0)
    assert rewards.tolist() == [[0, 2, -2]]


def test_a_row_without_a_response_is_an_error():
    with pytest.raises(ValueError, match="no response token"):
        ppo.shape_rewards(torch.ones(1), *torch.zeros(2, 1, 3), torch.zeros(1, 3, dtype=torch.bool), 0.1)


def test_missing_eos_caps_the_score_and_never_raises_it():
    scores, stopped = torch.tensor([2.0, 2.0, -3.0]), torch.tensor([True, False, False])
    assert ppo.penalise_missing_eos(scores, stopped, -1.0).tolist() == [2, -1, -3]
    assert ppo.penalise_missing_eos(scores, stopped, None) is scores


# advantages


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (1.0, 0.0)])
def test_gae_is_the_quadratic_sum(gamma, lam):
    rewards, values, mask = ragged()
    advantages, returns = ppo.gae(rewards, values, mask, gamma, lam)
    for b in range(len(mask)):
        (t,) = mask[b].nonzero(as_tuple=True)
        r, v = rewards[b, t].tolist(), values[b, t].tolist() + [0.0]  # V after the last token is 0
        for i in range(len(t)):
            deltas = [r[k] + gamma * v[k + 1] - v[k] for k in range(i, len(t))]
            hand = sum((gamma * lam) ** n * delta for n, delta in enumerate(deltas))
            assert advantages[b, t[i]].item() == pytest.approx(hand, abs=1e-12)
            assert returns[b, t[i]].item() == pytest.approx(hand + v[i], abs=1e-12)
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()


def test_values_at_pads_never_reach_a_real_token():
    rewards, values, mask = ragged()
    clean = ppo.gae(rewards, values, mask)
    dirty = ppo.gae(rewards.masked_fill(~mask, 99.0), values.masked_fill(~mask, float("nan")), mask)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)


def test_whitening_is_masked_and_keeps_the_mean_of_rewards():
    x, _, mask = ragged()
    x = 3 * x + 5
    shifted = ppo.masked_whiten(x.masked_fill(~mask, 1e6), mask, shift_mean=True)
    kept = ppo.masked_whiten(x, mask, shift_mean=False)
    assert shifted[mask].mean().abs() < 1e-9 and shifted[mask].std(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert kept[mask].mean().item() == pytest.approx(x[mask].mean().item())
    assert kept[mask].std(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert (shifted[~mask] == 0).all() and (kept[~mask] == 0).all()


def test_whitening_one_token_gives_no_nan():
    one = torch.tensor([[False, True]])
    assert ppo.masked_whiten(torch.tensor([[1.0, 7.0]]), one, shift_mean=True).tolist() == [[0, 0]]
    assert ppo.masked_whiten(torch.tensor([[1.0, 7.0]]), one, shift_mean=False).tolist() == [[0, 7]]


# losses


def one_token(*values):
    return (torch.tensor([[0.0, v]], requires_grad=i == 0) for i, v in enumerate(values))


MASK1 = torch.tensor([[False, True]])


@pytest.mark.parametrize(
    "ratio, advantage, loss, moves",
    [
        (1.1, 1.0, -1.1, True),
        (1.5, 1.0, -1.2, False),  # already likelier than the clip allows: no more gain
        (0.5, 1.0, -0.5, True),  # the pessimistic side is not clipped
        (1.5, -1.0, 1.5, True),
        (0.5, -1.0, 0.8, False),
    ],
)
def test_policy_loss_is_the_pessimistic_of_clipped_and_unclipped(ratio, advantage, loss, moves):
    logprobs, old = one_token(math.log(ratio) - 2, -2.0)
    value, stats = ppo.policy_loss(logprobs, old, torch.tensor([[0.0, advantage]]), MASK1, cliprange=0.2)
    value.backward()
    assert value.item() == pytest.approx(loss, rel=1e-5) and (logprobs.grad[0, 1] != 0).item() == moves
    assert stats["policy/clipfrac"].item() == (not moves) and stats["policy/ratio"].item() == pytest.approx(ratio, rel=1e-5)
    assert stats["policy/approx_kl"].item() == pytest.approx(ratio - 1 - math.log(ratio), rel=1e-4)


@pytest.mark.parametrize(
    "value, loss, moves",
    [(0.1, 0.405, True), (0.5, 0.32, False), (-0.5, 1.125, True), (1.5, 0.32, False), (3.0, 2.0, True)],
)
def test_value_loss_has_its_half_and_clips_around_the_rollout(value, loss, moves):
    """Old value 0, return 1, clip 0.2: moving more than 0.2 towards the return gains nothing."""
    values, old, returns = one_token(value, 0.0, 1.0)
    got, stats = ppo.value_loss(values, old, returns, MASK1, cliprange_value=0.2)
    got.backward()
    assert got.item() == pytest.approx(loss, rel=1e-5) and (values.grad[0, 1] != 0).item() == moves
    assert stats["val/clipfrac"].item() == (not moves)


def test_parts_with_the_count_of_the_whole_add_up_to_the_whole():
    """Micro-batches of unequal length: their losses, gradients and stats sum to those of one batch."""
    old, advantages, mask = ragged()
    new = (old + 0.3 * advantages.flip(0)).requires_grad_()
    for loss in (ppo.policy_loss, ppo.value_loss):
        whole, stats = loss(new, old, advantages, mask, 0.2)
        (gradient,) = torch.autograd.grad(whole, new)
        total, summed = 0, torch.zeros_like(gradient)
        totals = dict.fromkeys(stats, 0)
        for rows in ([0], [1, 2, 3, 4]):
            part, part_stats = loss(new[rows], old[rows], advantages[rows], mask[rows], 0.2, count=mask.sum())
            summed += torch.autograd.grad(part, new)[0]
            total += part.detach()
            totals = {k: totals[k] + part_stats[k] for k in totals}
        torch.testing.assert_close(total, whole.detach())
        torch.testing.assert_close(summed, gradient)
        assert all(totals[k].item() == pytest.approx(stats[k].item()) for k in stats)


def test_losses_ignore_what_stands_at_pads():
    old, advantages, mask = ragged()
    new = old + 0.1
    for loss in (ppo.policy_loss, ppo.value_loss):
        clean, _ = loss(new, old, advantages, mask, 0.2)
        dirty, _ = loss(new.masked_fill(~mask, float("nan")), old, advantages, mask, 0.2)
        assert torch.equal(clean, dirty)


def test_explained_variance():
    _, returns, mask = ragged()
    assert ppo.explained_variance(returns, returns, mask).item() == 1
    assert ppo.explained_variance(torch.zeros_like(returns), returns, mask).item() == pytest.approx(0, abs=1e-12)
    assert ppo.explained_variance(-returns, returns, mask).item() == pytest.approx(-3)


def test_adaptive_kl_follows_the_hand_computed_trace():
    """target 6, horizon 100, 10 samples: errors clip at 0.2, then (6.6/6 - 1) = 0.1, then clip at -0.2."""
    controller = ppo.AdaptiveKL(kl_coef=0.15, target=6.0, horizon=100)
    trace = [controller.update(kl, n=10) for kl in (60.0, 6.6, 0.0, 6.0)]
    assert trace == pytest.approx([0.15 * 1.02, 0.15 * 1.02 * 1.01, 0.15 * 1.02 * 1.01 * 0.98, 0.15 * 1.02 * 1.01 * 0.98])
    assert ppo.AdaptiveKL(kl_coef=0.1).update(1e6, n=100) == 0.1


# KL, by enumeration of everything that can be said


def test_estimators_of_kl_on_one_step():
    """k1 and k3 average to the KL exactly, k2 does not; k2 and k3 are never negative and k1 is."""
    pi, ref = torch.randn(2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log_softmax(-1)
    d, kl = pi - ref, (pi.exp() * (pi - ref)).sum()
    torch.testing.assert_close((pi.exp() * ppo.k1(d)).sum(), kl)
    torch.testing.assert_close((pi.exp() * ppo.k3(d)).sum(), kl)
    assert (pi.exp() * ppo.k2(d)).sum() != pytest.approx(kl.item(), rel=0.01)
    assert (ppo.k1(d) < 0).any() and (ppo.k2(d) >= 0).all() and (ppo.k3(d) >= 0).all()


def test_gradients_of_the_estimators_as_a_loss_on_one_step():
    logits, ref = torch.randn(2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits.requires_grad_()
    ref = ref.log_softmax(-1)

    def gradient(f):
        pi = logits.log_softmax(-1)
        return torch.autograd.grad(f(pi, pi.detach().exp()), logits)[0]  # samples of pi, weighted but not differentiated

    reverse = gradient(lambda pi, p: (pi.exp() * (pi - ref)).sum())
    forward = gradient(lambda pi, p: (ref.exp() * (ref - pi)).sum())
    torch.testing.assert_close(gradient(lambda pi, p: (p * ppo.k1(pi - ref)).sum()), torch.zeros(6).double())
    torch.testing.assert_close(gradient(lambda pi, p: (p * ppo.k2(pi - ref)).sum()), reverse)
    torch.testing.assert_close(gradient(lambda pi, p: (p * ppo.k3(pi - ref)).sum()), forward)


class TwoSteps:
    """All 9 sequences of 2 tokens out of 3; a table policy, a table reference, and grids as train_ppo has them."""

    def __init__(self, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.table = torch.randn(4, 3, generator=g, dtype=torch.float64).requires_grad_()  # contexts: (), 0, 1, 2
        self.ref_table = torch.randn(4, 3, generator=g, dtype=torch.float64)
        self.y = torch.tensor(list(itertools.product(range(3), repeat=2)))
        self.mask = torch.tensor([[False, True, True]]).expand(9, 3)

    def logprobs(self, table):
        logp = table.log_softmax(-1)
        first, second = logp[0, self.y[:, 0]], logp[1 + self.y[:, 0], self.y[:, 1]]
        return torch.stack([torch.zeros_like(first), first, second], 1)

    def full(self):
        """Per-token exact KL of the next-token distributions, on the grid."""
        p, q = self.table.log_softmax(-1), self.ref_table.log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1)
        return torch.stack([torch.zeros(9).double(), kl[0].expand(9), kl[1 + self.y[:, 0]]], 1)

    def gradient(self, loss):
        return torch.autograd.grad(loss, self.table)[0].flatten()


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a, b, dim=0).item()


def test_in_the_reward_only_k1_descends_the_kl():
    """Expected policy gradient of -estimator as the reward, over all sequences, against the gradient of KL(pi||ref)."""
    w = TwoSteps()
    logp, ref = w.logprobs(w.table), w.logprobs(w.ref_table)
    p = logp.sum(1).exp()
    true = w.gradient((p * (logp - ref).sum(1)).sum())

    def descent(rewards):  # the step that REINFORCE takes, on the returns-to-go of our gae
        advantages, _ = ppo.gae(rewards, torch.zeros_like(rewards), w.mask, gamma=1.0, lam=1.0)
        return -w.gradient((p.detach() * (advantages * w.logprobs(w.table)).sum(1)).sum())

    d = (logp - ref).detach()
    k1 = descent(ppo.shape_rewards(torch.zeros(9).double(), logp.detach(), ref, w.mask, kl_coef=1.0))
    torch.testing.assert_close(k1, true)
    wrong = {"k2": ppo.k2(d), "k3": ppo.k3(d), "full": w.full().detach()}
    cosines = {name: cosine(descent(-x), true) for name, x in wrong.items()}
    assert max(cosines.values()) < 0.5, cosines


def test_as_a_loss_k2_and_the_full_kl_omit_only_the_future():
    """Over two steps they point nearly the right way; k3 points where the forward KL does, k1 nowhere."""
    w = TwoSteps()
    logp, ref = w.logprobs(w.table), w.logprobs(w.ref_table)
    p = logp.sum(1).exp()
    true = w.gradient((p * (logp - ref).sum(1)).sum())

    def as_loss(per_token):
        return w.gradient((p.detach() * per_token.sum(1)).sum())

    d = w.logprobs(w.table) - ref
    k2, full = as_loss(ppo.k2(d)), as_loss(w.full())
    torch.testing.assert_close(k2, full)
    assert 0.8 < cosine(full, true) < 0.9999
    assert as_loss(ppo.k1(w.logprobs(w.table) - ref)).abs().max() < 1e-12


def test_full_kl_is_the_sum_over_the_vocabulary():
    policy, ref, tokens, mask = tiny(0)[0], tiny(1)[0], *tiny(0)[2:4]
    logp, logq = (model(tokens).log_softmax(-1)[:, :-1][mask[:, 1:]] for model in (policy, ref))
    kl = ppo.full_kl(policy, ref, tokens, mask, chunk=3)
    assert kl.shape == (int(mask.sum()),)
    torch.testing.assert_close(kl.mean(), distill_kl(logp, logq, torch.ones(len(kl), dtype=torch.bool), "forward"))
    assert ppo.full_kl(policy, policy, tokens, mask).abs().max() == 0
    p, q = (model(tokens[:, :-1])[mask[:, 1:]] / 0.5 for model in (policy, ref))
    cool = torch.distributions.kl_divergence(*(torch.distributions.Categorical(logits=x) for x in (p, q)))
    torch.testing.assert_close(ppo.full_kl(policy, ref, tokens, mask, temperature=0.5), cool, atol=1e-6, rtol=1e-4)


# the update


def tiny(seed=0):
    """A two-layer GPT over 11 tokens, its value model, and 10 ragged samples."""
    g = torch.Generator().manual_seed(seed)
    policy = GPT(GPTConfig(block_size=48, vocab_size=11, n_layer=2, n_head=2, n_embd=16)).init_weights(g).eval()
    prompt_len = torch.randint(1, 9, (10,), generator=g)
    length = prompt_len + torch.randint(1, 32, (10,), generator=g)
    T = ppo.padded_length(length, 48)
    tokens = torch.randint(0, 11, (10, T), generator=g)
    return policy, ValueModel(policy).eval(), tokens, response_mask(prompt_len, length, T), length


def rollout_of(policy, value_model, tokens, mask, length, parts, seed=0):
    """Log-probs and values by the forwards of `parts`; advantages and returns are noise."""
    g = torch.Generator().manual_seed(seed)
    logprobs, values = torch.zeros(2, *tokens.shape)
    noise = ppo.Rollout(tokens, mask, length, logprobs, values, *torch.randn(2, *tokens.shape, generator=g))
    for rows in parts:
        part = noise.select(rows)
        with torch.no_grad():
            width = part.tokens.shape[1]
            logprobs[rows, :width] = token_logprobs(policy, part.tokens, part.mask)[0]
            values[rows, :width] = value_model(part.tokens, part.mask)
    return noise


class CountingSGD(torch.optim.SGD):
    steps = 0

    def step(self, *args):
        self.steps += 1
        return super().step(*args)


def run_update(tokens_per_forward=10**9, lr=0.1, epochs=1, minibatch_size=4, seed=0, **options):
    policy, value_model, tokens, mask, length = tiny(seed)
    g = torch.Generator().manual_seed(seed)
    plan = [ppo.split_rows(length, minibatch_size, tokens_per_forward, g) for _ in range(epochs)]
    rollout = rollout_of(policy, value_model, tokens, mask, length, [rows for parts in plan[0] for rows in parts])
    optimizers = [CountingSGD(model.parameters(), lr=lr) for model in (policy, value_model)]
    stats = ppo.update(policy, value_model, *optimizers, rollout, plan, **options)
    return policy, value_model, optimizers, stats


def test_split_rows_covers_each_row_once_in_sorted_narrow_parts():
    length = torch.tensor([40, 3, 17, 5, 33, 16, 9, 48, 20, 1])
    minibatches = ppo.split_rows(length, 4, tokens_per_forward=64, generator=torch.Generator().manual_seed(0))
    assert [sum(map(len, parts)) for parts in minibatches] == [4, 4, 2]
    assert sorted(i for parts in minibatches for rows in parts for i in rows.tolist()) == list(range(10))
    for parts in minibatches:
        lengths = length[torch.cat(parts)]
        assert lengths.tolist() == sorted(lengths.tolist())
        assert all(len(rows) * ppo.padded_length(length[rows], 48) <= 64 for rows in parts)
    other = ppo.split_rows(length, 4, 64, torch.Generator().manual_seed(1))
    assert sorted(torch.cat(minibatches[0]).tolist()) != sorted(torch.cat(other[0]).tolist())


def test_select_drops_only_pads():
    _, _, tokens, mask, length = tiny()
    rollout = ppo.Rollout(tokens, mask, length, *torch.zeros(4, *tokens.shape))
    rows = length.argsort()[:3]
    part = rollout.select(rows)
    assert part.tokens.shape[1] == -(-int(length[rows].max()) // 16) * 16 and part.length.tolist() == length[rows].tolist()
    assert part.mask.sum() == mask[rows].sum() and torch.equal(part.tokens, tokens[rows, : part.tokens.shape[1]])


def test_every_epoch_and_minibatch_is_one_step_of_both_optimizers():
    _, _, optimizers, _ = run_update(epochs=3, minibatch_size=4, tokens_per_forward=100)
    assert [o.steps for o in optimizers] == [9, 9]  # 3 epochs x ceil(10 / 4)


def test_the_first_minibatch_has_ratio_one_exactly_and_lr_zero_keeps_it():
    _, _, _, stats = run_update(lr=0.0, epochs=1, tokens_per_forward=100)
    assert stats["policy/ratio"] == pytest.approx(1, abs=1e-7)  # the mean of exact ones, summed in fp32
    assert stats["policy/approx_kl"] == 0 and stats["policy/clipfrac"] == 0 and stats["val/clipfrac"] == 0


def test_the_update_is_the_textbook_loop():
    """Minibatch after minibatch, with fresh gradients each time: the same weights as PPO written down naively."""
    policy, value_model, tokens, mask, length = tiny()
    plan = [ppo.split_rows(length, 4, 10**9, torch.Generator().manual_seed(0))]
    rollout = rollout_of(policy, value_model, tokens, mask, length, [rows for (rows,) in plan[0]])
    params = [p.requires_grad_() for model in (policy, value_model) for p in model.parameters()]
    for (rows,) in plan[0]:
        m, advantages = mask[rows], rollout.advantages[rows]
        logp = policy(tokens[rows]).log_softmax(-1)[:, :-1].gather(-1, tokens[rows, 1:, None]).squeeze(-1)
        ratio = (logp - rollout.logprobs[rows][:, 1:]).exp()[m[:, 1:]]
        surrogate = torch.min(ratio * advantages[m], ratio.clamp(0.8, 1.2) * advantages[m]).mean()
        v, old, target = value_model(tokens[rows], m)[m], rollout.values[rows][m], rollout.returns[rows][m]
        error = torch.max((v - target) ** 2, (old + (v - old).clamp(-0.2, 0.2) - target) ** 2).mean() / 2
        for p, g in zip(params, torch.autograd.grad(error - surrogate, params, materialize_grads=True), strict=True):
            p.data -= 0.1 * g
    ours = run_update(max_grad_norm=1e9)
    for a, b in zip((policy, value_model), ours[:2], strict=True):
        for x, y in zip(a.parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(x, y, atol=2e-6, rtol=1e-5)


def test_gradient_accumulation_changes_nothing():
    """All rows in one forward, or in parts of unequal length: the same weights after the same steps."""
    whole, parts = run_update(), run_update(tokens_per_forward=50)
    for a, b in zip(whole[:2], parts[:2], strict=True):
        for x, y in zip(a.parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(x, y, atol=2e-6, rtol=1e-5)
    for name in whole[3]:
        assert whole[3][name] == pytest.approx(parts[3][name], rel=1e-4, abs=1e-6), name


def test_gradients_are_clipped_after_backward():
    """A step of SGD at lr 1 moves the weights by the clipped norm; the stats show the norm before clipping."""
    before = tiny()[0]
    policy, _, _, stats = run_update(lr=1.0, minibatch_size=10, max_grad_norm=1e-3)
    moved = sum((a - b).pow(2).sum() for a, b in zip(policy.parameters(), before.parameters(), strict=True)).sqrt().item()
    assert moved == pytest.approx(1e-3, rel=0.02) and stats["policy/grad_norm"] > 1e-2


@pytest.mark.parametrize("field, name", [("advantages", "policy"), ("returns", "value")])
def test_nan_stops_before_the_weights_are_spoiled(field, name):
    policy, value_model, tokens, mask, length = tiny()
    models = {"policy": policy, "value": value_model}
    before = copy.deepcopy(models[name].state_dict())
    plan = [ppo.split_rows(length, 4, 10**9, torch.Generator().manual_seed(0))]
    rollout = rollout_of(policy, value_model, tokens, mask, length, plan[0][0])
    rollout = rollout._replace(**{field: rollout.mask * float("nan")})
    with pytest.raises(FloatingPointError, match=f"loss of the {name} model is nan"):
        ppo.update(policy, value_model, *(CountingSGD(m.parameters(), lr=0.1) for m in models.values()), rollout, plan)
    assert all(torch.equal(x, before[key]) for key, x in models[name].state_dict().items())


def test_policy_and_value_share_no_weight():
    policy, value_model, *_ = tiny()
    owned = {p.data_ptr() for p in policy.parameters()}
    assert not owned & {p.data_ptr() for p in value_model.parameters()}
