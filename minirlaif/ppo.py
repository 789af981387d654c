"""PPO for language models: the maths as pure functions, and the update that uses them.

Everything lives on a [B, T] grid aligned to tokens. At a response token t of row b (mask[b, t] is True):
logprobs[b, t] = log pi(token t | tokens before t), in nats; values[b, t] = V(tokens before t); rewards[b, t] is
what choosing token t pays. Masks are one run of True a row, ended by the end-of-text token where there is one.

Sources: Schulman et al. 2016 (GAE), 2017 (PPO); Ziegler et al. 2019 (the KL in the reward, its controller);
Huang et al. 2023, 2024 (the implementation details). Left out from the textbook: an entropy bonus (the KL penalty does
its work) and vf_coef (policy and value are two models with two optimizers, whose steps do not depend on the scale of
a loss).
"""

import math
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch

from minirlaif import ddp
from minirlaif.model import token_logprobs, upcast


def masked_mean(x, mask, count=None):
    """Mean of x where mask is True: a scalar. `count` replaces the number of True positions: with the count of a
    whole minibatch, the means of its parts add up to its mean, so accumulated gradients are those of one batch."""
    count = mask.sum() if count is None else count
    return torch.where(mask, x, 0.0).sum() / torch.as_tensor(count, device=x.device).clamp(min=1)


def masked_whiten(x, mask, shift_mean=True):
    """x scaled to variance 1 over the True positions, 0 elsewhere. Its mean is taken off if `shift_mean` (for
    advantages) and stays otherwise (for rewards, where it says whether to go on). One token gives 0, not NaN."""
    mean = masked_mean(x, mask)
    scaled = (x - mean) * torch.rsqrt(masked_mean((x - mean) ** 2, mask) + 1e-8)
    return torch.where(mask, scaled if shift_mean else scaled + mean, 0.0)


# KL
#
# Estimators from samples of pi, with d = log pi - log pi_ref. In the *reward* only k1 is right: its returns-to-go
# carry the KL of the tokens to come. As a *metric* k3 is never negative and near the reference has the least noise; far
# from it its tail is heavy. As a *loss*, k1 has gradient 0 on average, k2 that of KL(pi || ref), k3 that of KL(ref || pi):
# tests/test_ppo.py enumerates it.


def k1(d):
    """d: unbiased, of either sign."""
    return d


def k2(d):
    """d^2 / 2: biased, never negative."""
    return d * d / 2


def k3(d):
    """exp(-d) - 1 + d: unbiased, never negative. (Schulman 2020, Approximating KL divergence.)"""
    return torch.expm1(-d) + d


def full_kl(policy, ref_policy, tokens, mask, temperature=1.0, chunk=2048):
    """Exact KL(pi || pi_ref) of the next-token distribution at each response token: [N], the True positions of
    `mask` in row order. lm_head runs on those positions only, `chunk` at a time."""
    h, h_ref = (model.hidden(tokens)[:, :-1][mask[:, 1:]] for model in (policy, ref_policy))  # [N, C]
    parts = []
    for rows in torch.arange(len(h), device=h.device).split(chunk):
        p = (upcast(policy.logits(h[rows])) / temperature).log_softmax(-1)  # [chunk, V]
        q = (upcast(ref_policy.logits(h_ref[rows])) / temperature).log_softmax(-1)
        parts.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(parts)


@dataclass
class AdaptiveKL:
    """The controller of kl_coef (Ziegler et al. 2019, section 2.2). Without a target the coefficient stays.

    target: nats a response to the *reference* policy; horizon: samples that a correction takes.
    """

    kl_coef: float
    target: float | None = None
    horizon: float = 10_000

    def update(self, kl, n):
        """After n samples with mean KL `kl` (nats a response): the new kl_coef."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.kl_coef *= 1 + error * n / self.horizon
        return self.kl_coef


def penalise_missing_eos(scores, stopped, penalty):
    """scores [B], capped at `penalty` where the response never reached end-of-text; None leaves them.

    Capped, not set: a fixed value would pay a policy to ramble wherever its answers score below it.
    """
    return scores if penalty is None else torch.where(stopped, scores, scores.clamp(max=penalty))


def shape_rewards(scores, logprobs, ref_logprobs, mask, kl_coef):
    """Per-token rewards [B, T]: -kl_coef * (log pi - log pi_ref), plus the score [B] on the last response token.

    kl_coef: score units a nat. The difference is k1, never clamped at 0. ValueError for a row without a response.
    """
    if not mask.any(1).all():
        raise ValueError("a row has no response token: there is nowhere to put its score")
    rewards = torch.where(mask, -kl_coef * k1(logprobs - ref_logprobs), 0.0)
    last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)  # [B]
    return rewards.scatter_add(1, last[:, None], scores[:, None].to(rewards.dtype))


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalised advantage estimation: (advantages, returns), both [B, T], 0 where mask is False.

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = sum_l (gamma lam)^l delta_{t+l};  returns = A + V, the target of
    the value model. V after the last token is 0: the episode is over, by end-of-text or by length.
    """
    values = torch.where(mask, values, 0.0)  # what a model says at pads must not reach the last token
    advantages = torch.zeros_like(values)
    next_advantage = next_value = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(mask[:, t], delta + gamma * lam * next_advantage, 0.0)
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values


def policy_loss(logprobs, old_logprobs, advantages, mask, cliprange=0.2, count=None):
    """Clipped surrogate (Schulman et al. 2017, equation 7): (loss, stats). `count`: see masked_mean."""
    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - cliprange, 1 + cliprange)
    loss = masked_mean(torch.max(-advantages * ratio, -advantages * clipped), mask, count)
    with torch.no_grad():
        stats = {
            "loss/policy": loss.detach(),
            "policy/ratio": masked_mean(ratio, mask, count),
            "policy/approx_kl": masked_mean(k3(-log_ratio), mask, count),  # KL(old || new): the samples are old's
            "policy/clipfrac": masked_mean((-advantages * clipped > -advantages * ratio).float(), mask, count),
        }
    return loss, stats


def value_loss(values, old_values, returns, mask, cliprange_value=0.2, count=None):
    """Half the squared error, clipped around the rollout's values (which carry no gradient): (loss, stats)."""
    clipped = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    error, clipped_error = (values - returns) ** 2, (clipped - returns) ** 2
    loss = 0.5 * masked_mean(torch.max(error, clipped_error), mask, count)
    return loss, {
        "loss/value": loss.detach(),
        "val/clipfrac": masked_mean((clipped_error > error).float(), mask, count),
    }


def explained_variance(values, returns, mask):
    """1 - Var(returns - values) / Var(returns): 1 is a perfect critic, 0 no better than a constant. A scalar."""
    v, r = values[mask], returns[mask]
    return 1 - (r - v).var(correction=0) / r.var(correction=0).clamp(min=1e-8)


def padded_length(length, limit):
    """The width that rows of these lengths are padded to: a multiple of 16 (CPU kernels are compiled per shape)."""
    return min(-(-int(length.max()) // 16) * 16, limit)


class Rollout(NamedTuple):
    """What the update reads. Rows are samples; all is [B, T] but length [B], and nothing carries a gradient."""

    tokens: torch.Tensor
    mask: torch.Tensor
    length: torch.Tensor  # prompt + response; on the CPU, since it only decides shapes
    logprobs: torch.Tensor
    values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor

    def select(self, rows):
        """These rows, without the columns that are pads in all of them."""
        width = padded_length(self.length[rows], self.tokens.shape[1])
        return Rollout(*(x[rows] if x.dim() == 1 else x[rows, :width] for x in self))


def split_rows(length, minibatch_size, tokens_per_forward, generator):
    """One pass over the rows in random order: a list of minibatches, each a list of index tensors.

    A minibatch is one optimizer step on `minibatch_size` rows. Its index tensors are the parts that go through a
    forward together: rows of like length, so that few pads are computed, and at most about `tokens_per_forward`
    tokens, so that memory is bounded. Of several processes each gets its share of every minibatch.
    """
    minibatches = []
    for rows in torch.randperm(len(length), generator=generator).split(minibatch_size):
        rows = ddp.share(rows[length[rows].argsort(stable=True)])
        if not len(rows):
            minibatches.append([])
            continue
        parts = math.ceil(len(rows) * padded_length(length[rows], limit=math.inf) / tokens_per_forward)
        minibatches.append(rows.tensor_split(min(parts, len(rows))))
    return minibatches


def update(policy, value_model, policy_optimizer, value_optimizer, rollout, epochs, *, cliprange=0.2,
           cliprange_value=0.2, temperature=1.0, max_grad_norm=1.0, max_approx_kl=None, precision=None):
    """PPO's inner loop: one step of both optimizers for each minibatch of `epochs`, a list of `split_rows`.

    max_approx_kl: stop for good at the first minibatch on which KL(old || new) is above this, without its step.
    Returns stats: means over the minibatches seen, as floats. `precision` is an autocast context. FloatingPointError,
    before the step that would spoil the weights, where a loss or a gradient is not finite.
    """
    models = {"policy": (policy, policy_optimizer), "value": (value_model, value_optimizer)}
    totals, norms, seen, steps = Counter(), Counter(), 0, 0
    for parts in (parts for epoch in epochs for parts in epoch):
        before, seen = totals["policy/approx_kl"], seen + 1
        count = ddp.total(sum((rollout.mask[rows].sum() for rows in parts), start=torch.zeros_like(rollout.mask[0, 0].long())))
        for rows in parts:
            part = rollout.select(rows)
            with precision or nullcontext():
                logprobs, _ = token_logprobs(policy, part.tokens, part.mask, temperature)
            loss, stats = policy_loss(logprobs, part.logprobs, part.advantages, part.mask, cliprange, count)
            loss.backward()
            totals.update(stats)
            with precision or nullcontext():
                values = value_model(part.tokens, part.mask)
            loss, stats = value_loss(values, part.values, part.returns, part.mask, cliprange_value, count)
            loss.backward()
            totals.update(stats)
        if max_approx_kl is not None and ddp.total(totals["policy/approx_kl"] - before) > max_approx_kl:
            policy_optimizer.zero_grad(set_to_none=True)
            value_optimizer.zero_grad(set_to_none=True)
            break
        steps += 1
        for name, (model, optimizer) in models.items():
            ddp.sum_gradients(model)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
            for what, x in (("loss", totals[f"loss/{name}"]), ("gradient", norm)):
                if not torch.as_tensor(x).isfinite():  # a process without rows has a loss of 0
                    raise FloatingPointError(f"{what} of the {name} model is {x.item()}")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            norms[f"{name}/grad_norm"] += norm
    totals = dict(zip(totals, ddp.total(torch.stack(list(totals.values()))).tolist(), strict=True))
    norms = {f"{name}/grad_norm": float(norms[f"{name}/grad_norm"]) / max(1, steps) for name in models}
    return {name: total / seen for name, total in totals.items()} | norms | {"policy/updates": steps}
