"""The strongest test: KL-regularised RL has a known optimum, and the update of train_ppo.py converges to it.

pi*(y) is proportional to pi_ref(y) exp(r(y) / beta) (Korbak et al. 2022, 2205.11275). All 81 sequences of 4 tokens out
of 3 are enumerated and the reward is a random table over them; each step samples from the policy and calls
`train_ppo.ppo_step`, the code of every real run. The distance is the total variation, computed exactly. Four ways of
breaking that code must be seen. MINIRLAIF_SLOW=1 adds a transformer (minutes) to the table policy (seconds).
"""

import itertools
import os
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import train_ppo
from minirlaif import ppo
from minirlaif.heads import ValueModel
from minirlaif.model import GPT, GPTConfig, token_logprobs
from minirlaif.sampling import Samples
from minirlaif.trainer import configure_optimizer

SEQUENCES = torch.tensor(list(itertools.product(range(3), repeat=4)))  # [81, 4]
TOKENS = torch.cat([torch.zeros(81, 1, dtype=torch.long), SEQUENCES], dim=1)  # behind a prompt of one token
MASK = torch.tensor([False, True, True, True, True]).expand(81, 5)
PLACES = torch.tensor([27, 9, 3, 1])
ROWS = 256


class Table(nn.Module):
    """A 'GPT' that is a table: its hidden state is the one-hot number of the prefix, of which there are 40."""

    config = SimpleNamespace(block_size=5, vocab_size=3, n_embd=40)

    def __init__(self, seed):
        super().__init__()
        self.weight = nn.Parameter(0.8 * torch.randn(40, 3, generator=torch.Generator().manual_seed(seed)))

    def hidden(self, tokens):
        number, columns = torch.zeros(len(tokens), dtype=torch.long), []
        for t, first in enumerate([0, 1, 4, 13]):  # 1, 3, 9 and 27 prefixes; no token follows the last column
            number = 3 * number + tokens[:, t] * (t > 0)
            columns.append(first + number)
        return nn.functional.one_hot(torch.stack([*columns, columns[0]], 1), 40).float()

    def logits(self, h):
        return h @ self.weight


def transformer(seed):
    gpt = GPT(GPTConfig(block_size=5, vocab_size=3, n_layer=1, n_head=2, n_embd=32))
    gpt.init_weights(torch.Generator().manual_seed(seed))
    with torch.no_grad():  # far enough from uniform
        gpt.wte.weight.mul_(4)
        gpt.wpe.weight.mul_(4)
    return gpt.eval()


class TableReward(nn.Module):
    """r(y), looked up."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, tokens, length):
        return self.table[(tokens[:, 1:] * PLACES).sum(1)]


@torch.no_grad()
def distribution(policy):
    return token_logprobs(policy, TOKENS, MASK)[0].sum(1).exp()  # [81]


def total_variation(p, q):
    return (p - q).abs().sum().item() / 2


def train(seed, beta, make=Table, steps=60, lr=0.03, value_lr=0.05):
    """Train with kl_coef = beta (in standard deviations of r): total variation to the optimum before and after."""
    g = torch.Generator().manual_seed(seed + 100)
    policy, ref_policy = make(seed), make(seed).requires_grad_(False)
    p_ref = distribution(ref_policy)
    reward = torch.randn(81, generator=g)
    reward = reward.sign() + 0.3 * reward  # two humps, so that the optimum is far from pi_ref at both betas
    reward = reward - (p_ref * reward).sum()
    reward = reward / (p_ref * reward**2).sum().sqrt()
    optimum = p_ref * (reward / beta).exp()
    optimum = optimum / optimum.sum()

    value_model = ValueModel(make(seed + 1)).eval()
    optimizers = [configure_optimizer(m, rate, eps=1e-5) for m, rate in ((policy, lr), (value_model, value_lr))]
    models = train_ppo.Models(policy, ref_policy, TableReward(reward), value_model, *optimizers)
    args = train_ppo.Args(out="", init="", reward_model="", data="", seed=seed, steps=steps, lr=lr, value_lr=value_lr,
                          batch_size=ROWS, minibatch_size=ROWS // 2, missing_eos_penalty=None)
    for step in range(steps):
        train_ppo.anneal(models, args, step)
        # systematic sampling: each row has the policy's distribution, and all of them together little noise
        u = (torch.arange(ROWS) + torch.rand(1, generator=g)) / ROWS
        y = torch.searchsorted(distribution(policy).cumsum(0), u).clamp(max=80)
        one = torch.ones(ROWS, dtype=torch.long)
        samples = Samples(TOKENS[y], prompt_len=one, length=5 * one, stopped=one.bool())
        train_ppo.ppo_step(models, samples, args, kl_coef=beta, step=step)
    return total_variation(p_ref, optimum), total_variation(distribution(policy), optimum)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_ppo_converges_to_the_optimum(seed, beta):
    start, end = train(seed, beta)
    assert start >= 0.2 and end <= 0.02, (start, end)


@pytest.mark.skipif(not os.environ.get("MINIRLAIF_SLOW"), reason="minutes; MINIRLAIF_SLOW=1 runs it")
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_a_transformer_converges_too(seed, beta):
    start, end = train(seed, beta, make=transformer, steps=400, lr=3e-3, value_lr=5e-3)
    assert start >= 0.1 and end <= 0.02, (start, end)


def break_kl_sign(monkeypatch):
    shape = ppo.shape_rewards
    monkeypatch.setattr(ppo, "shape_rewards", lambda s, lp, ref, mask, kl_coef: shape(s, lp, ref, mask, -kl_coef))


def break_value_shift(monkeypatch):
    """The value of a state is read one token late: after the token that it should be the baseline of."""
    monkeypatch.setattr(ValueModel, "forward", lambda self, tokens, mask: torch.where(mask, self.scalars(tokens), 0.0))


def break_mask(monkeypatch):
    """The last token of a response is taken for a pad."""
    mask = train_ppo.response_mask
    monkeypatch.setattr(train_ppo, "response_mask", lambda prompt_len, length, T: mask(prompt_len, length - 1, T))


def break_beta(monkeypatch):
    """The penalty is charged twice."""
    shape = ppo.shape_rewards
    monkeypatch.setattr(ppo, "shape_rewards", lambda s, lp, ref, mask, kl_coef: shape(s, lp, ref, mask, 2 * kl_coef))


@pytest.mark.parametrize("sabotage", [break_kl_sign, break_value_shift, break_mask, break_beta])
def test_broken_code_does_not(monkeypatch, sabotage):
    sabotage(monkeypatch)
    start, end = train(seed=0, beta=1.0)
    assert start >= 0.2 and end >= 0.05, (start, end)
