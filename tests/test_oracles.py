"""PPO against the code of others: verl 0.9.1's core_algos, and one update of TRL 1.12's PPO trainer with the same weights.

A development check: it skips where they are not installed (docs/oracles.md says how, and explains every difference).
Nothing of theirs is copied: verl's functions are called, TRL's trainer is run, and its local variables are read.
"""

import copy
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minirlaif import ppo
from minirlaif.heads import RewardModel, ValueModel
from minirlaif.model import GPT, GPTConfig, response_mask, token_logprobs

same = torch.testing.assert_close


def module(name):
    """The module, or a skip that says what is missing (of verl and TRL, or of what they import)."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    return pytest.importorskip(name, exc_type=ImportError)


def differs(a, b):
    """Not just rounding, anywhere."""
    return bool(((a - b).abs() > 1e-3).all())


# verl: functions on a grid whose mask is 0 or 1


@pytest.fixture(scope="module")
def verl():
    return module("verl.trainer.ppo.core_algos")


def ragged(seed, B=6, T=11):
    """Five random [B, T] grids, and a mask of one run a row, of 1 to T-1 tokens."""
    g = torch.Generator().manual_seed(seed)
    prompt_len = torch.randint(1, T, (B,), generator=g)
    length = torch.stack([torch.randint(int(n), T, (), generator=g) for n in prompt_len]) + 1
    return (*torch.randn(5, B, T, generator=g, dtype=torch.float64), response_mask(prompt_len, length, T))


SEEDS = pytest.mark.parametrize("seed", range(5))


def bessel(mask):
    """Both divide the variance by n - 1 where masked_whiten divides by n: their advantages are ours times this."""
    n = mask.sum()
    return ((n - 1) / n).sqrt()


@SEEDS
@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8)])
def test_verl_gae(verl, seed, gamma, lam):
    rewards, values, *_, mask = ragged(seed)
    theirs, their_returns = verl.compute_gae_advantage_return(rewards, values, mask.double(), gamma, lam)
    advantages, returns = ppo.gae(rewards, values, mask, gamma, lam)
    same(returns[mask], their_returns[mask])
    same(ppo.masked_whiten(advantages, mask)[mask] * bessel(mask), theirs[mask], rtol=1e-6, atol=1e-6)
    poisoned, _ = verl.compute_gae_advantage_return(rewards, values.masked_fill(~mask, torch.nan), mask.double(), gamma, lam)
    assert poisoned.isnan().any()  # 0 x NaN; ours does not read what stands at pads
    same(ppo.gae(rewards, values.masked_fill(~mask, torch.nan), mask, gamma, lam)[0], advantages)


def test_verl_steps_over_holes(verl):
    """Tokens of a tool in mid-response: to verl the row without them. Ours has no such rows, and would end one there."""
    rewards, values = torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    holes = torch.tensor([[True, True, False, False, True, True]])
    _, theirs = verl.compute_gae_advantage_return(rewards, values, holes.double(), 1.0, 0.95)
    _, returns = ppo.gae(rewards[holes][None], values[holes][None], torch.ones(1, 4, dtype=torch.bool))
    same(theirs[holes], returns[0])


def test_one_token_cannot_be_whitened_over_n_minus_1(verl):
    one = torch.ones(1, 1)
    with pytest.raises(ValueError):
        verl.verl_F.masked_whiten(one, one)
    assert module("trl.experimental.ppo.ppo_trainer").masked_whiten(one, one).isnan()
    assert ppo.masked_whiten(one, one.bool()) == 0


@SEEDS
def test_verl_kl_penalties(verl, seed):
    logprobs, d, *_ = ragged(seed)
    d = d.clamp(-2, 2)
    for names, estimator in {("kl", "k1"): ppo.k1, ("mse", "k2"): ppo.k2, ("low_var_kl", "k3"): ppo.k3}.items():
        for name in names:
            same(estimator(d), verl.kl_penalty(logprobs, logprobs - d, name))
    d = torch.tensor([-4.0, -30.0])  # k3 is exp(4) - 1 - 4 = 49.6 and 1e13: verl says 10 to both
    assert verl.kl_penalty(d, torch.zeros(2), "k3").tolist() == [10, 10] and ppo.k3(d).min() > 49


@SEEDS
def test_verl_rewards(verl, seed):
    logprobs, ref, scores, *_, mask = ragged(seed)
    last = mask & ~torch.nn.functional.pad(mask, (0, 1))[:, 1:]
    theirs = verl.compute_rewards(last * scores[:, :1], logprobs, ref, 0.3)
    same(ppo.shape_rewards(scores[:, 0], logprobs, ref, mask, 0.3)[mask], theirs[mask])


def test_verl_controllers(verl):
    for target, settings in ((None, {"type": "fixed"}), (6.0, {"type": "adaptive", "target_kl": 6.0, "horizon": 500})):
        ours = ppo.AdaptiveKL(0.15, target, horizon=500)
        theirs = verl.get_kl_controller(SimpleNamespace(kl_coef=0.15, **settings))
        for kl in (60.0, 6.6, 5.7, 0.0, -1.0, 6.0, 7.3):
            theirs.update(kl, 64)
            assert ours.update(kl, 64) == pytest.approx(theirs.value, rel=1e-12)


@SEEDS
def test_verl_policy_loss(verl, seed):
    new, old, advantages, *_, mask = ragged(seed)
    new = (old + new / 3).requires_grad_()
    loss, stats = ppo.policy_loss(new, old, advantages, mask, 0.2)
    theirs, clipfrac, *_ = verl.compute_policy_loss(old, new, advantages, mask.double(), 0.2, clip_ratio_c=1e9)
    same(loss, theirs)
    same(stats["policy/clipfrac"], clipfrac.float(), rtol=1e-5, atol=1e-6)
    same(torch.autograd.grad(loss, new), torch.autograd.grad(theirs, new))


def test_verl_caps_what_a_bad_token_may_cost(verl):
    """Dual clip, on by default: ratio 5 at advantage -1 costs 5 in PPO and 3, without a gradient, in verl."""
    one = torch.ones(1, 1)
    ours, _ = ppo.policy_loss(5 * one.log() + torch.tensor(5.0).log(), 0 * one, -one, one.bool())
    theirs, *_ = verl.compute_policy_loss(0 * one, torch.tensor([[5.0]]).log(), -one, one, 0.2)
    assert ours.item() == pytest.approx(5) and theirs.item() == 3


@SEEDS
def test_verl_value_loss(verl, seed):
    new, old, returns, *_, mask = ragged(seed)
    new.requires_grad_()
    loss, stats = ppo.value_loss(new, old, returns, mask, 0.2)
    theirs, clipfrac = verl.compute_value_loss(new, returns, old, mask.double(), 0.2)
    same(loss, theirs)
    same(stats["val/clipfrac"], clipfrac.float(), rtol=1e-5, atol=1e-6)
    same(torch.autograd.grad(loss, new), torch.autograd.grad(theirs, new))


# TRL: one update of its trainer

R, EOS, PAD = 6, 11, 12  # longest response
PROMPTS = [[1], [2, 3, 4], [5, 6], [7, 8, 9, 10], [3, 3], [4, 1, 2], [9], [5, 5, 5]]
PROMPT_LEN = torch.tensor([len(p) for p in PROMPTS])
# two rows are cut at the limit, one stops in the last slot, five stop early
RAGGED = [[1, 2, 3, 4, 5, 6], [7, EOS], [2, 2, 2, 2, 2, EOS], [EOS], [8, 9, 10, EOS], [9, 9, 1, 4, 1, 3], [5, 0, EOS], [6, EOS]]
FULL = [[(3 * b + t * t) % 11 for t in range(R)] for b in range(8)]
STOPPED = torch.tensor([row[-1] == EOS for row in RAGGED])
EARLY = torch.tensor([len(row) < R for row in RAGGED])


def from_hugging_face(theirs):
    """Our GPT with the weights of a Hugging Face GPT-2. (There, linear layers store their transpose.)"""
    gpt = GPT(GPTConfig(block_size=32, vocab_size=13, n_layer=2, n_head=2, n_embd=16))
    linear = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    state = {name: w.t() if name.endswith(linear) else w for name, w in theirs.transformer.state_dict().items()}
    state = {name: w for name, w in state.items() if name in gpt.state_dict()}  # without their constant masks
    gpt.load_state_dict(state | {"lm_head.weight": state["wte.weight"]})
    return gpt.eval()


def scalar(theirs):
    model = RewardModel(from_hugging_face(theirs)).eval()
    model.head.weight.data.copy_(theirs.score.weight)
    return model


class CountingSGD(torch.optim.SGD):
    steps = 0

    def step(self, *args):
        self.steps += 1
        return super().step(*args)


@pytest.fixture(scope="module")
def trl(tmp_path_factory):
    """A function that runs TRL's trainer for one update on given responses and says all that happened."""
    ppo_trainer, transformers = module("trl.experimental.ppo.ppo_trainer"), module("transformers")
    datasets = module("datasets")

    size = dict(vocab_size=13, n_positions=32, n_embd=16, n_layer=2, n_head=2, eos_token_id=EOS, pad_token_id=PAD)
    config = transformers.GPT2Config(**size, num_labels=1)
    g = torch.Generator().manual_seed(0)

    def make(kind):
        model = kind(config).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=g) * 0.25 + (p if p.dim() == 1 else 0))
        return model

    language = [make(transformers.GPT2LMHeadModel) for _ in range(2)]
    scalars = [make(transformers.GPT2ForSequenceClassification) for _ in range(2)]

    def update(responses, pad=PAD, own_dataloader=False, **changes):
        policy, ref, reward, value = (copy.deepcopy(m) for m in (*language, *scalars))
        for m in (policy, ref, reward, value):
            m.config.pad_token_id = pad
        settings = dict(
            output_dir=str(tmp_path_factory.mktemp("trl")), report_to="none", save_strategy="no", use_cpu=True, bf16=False,
            per_device_train_batch_size=8, gradient_accumulation_steps=1, num_mini_batches=1, num_ppo_epochs=2,
            total_episodes=8, num_sample_generations=0, response_length=R, stop_token="eos", temperature=0.7,
            kl_coef=0.3, vf_coef=1.0, lam=0.95, disable_tqdm=True, max_grad_norm=1e-3,
        )  # fmt: skip
        queries = torch.tensor([[pad] * (4 - len(p)) + p for p in PROMPTS])  # TRL pads prompts on the left
        given = torch.tensor([r + [pad] * (R - len(r)) for r in responses])
        optimizer = CountingSGD([*policy.parameters(), *value.parameters()], lr=0.02)
        trainer = ppo_trainer.PPOTrainer(
            ppo_trainer.PPOConfig(**settings | changes), SimpleNamespace(pad_token_id=pad, eos_token_id=EOS), policy, ref, reward,
            datasets.Dataset.from_list([{"input_ids": row} for row in queries.tolist()]), value,
            data_collator=lambda rows: {"input_ids": torch.tensor([row["input_ids"] for row in rows])},
            optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
        )  # fmt: skip
        if not own_dataloader:  # it shuffles
            trainer.dataloader = [{"input_ids": queries}]
        seen = SimpleNamespace(before=copy.deepcopy((policy, ref, reward, value)), after=(policy, value), steps=[])

        def rollout(model, queries, batch_size, pad_token_id, generation_config):
            """In place of sampling: the given responses, and TRL's own logits of them."""
            both = torch.cat([queries, given], 1)
            return both, ppo_trainer.forward(model, both, pad).logits[:, 3:-1] / generation_config.temperature

        whiten, backward = ppo_trainer.masked_whiten, trainer.accelerator.backward

        def at_whitening(*args, **kwargs):
            result = whiten(*args, **kwargs)
            seen.rollout = SimpleNamespace(**sys._getframe(1).f_locals | {"whitened": result})
            return result

        def at_backward(loss):
            seen.steps.append(SimpleNamespace(**sys._getframe(1).f_locals))
            backward(loss)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ppo_trainer, "batch_generation", rollout)
            patch.setattr(ppo_trainer.np.random, "permutation", lambda n: np.r_[0:n:2, 1:n:2])  # it sets no seed
            patch.setattr(ppo_trainer, "masked_whiten", at_whitening)
            patch.setattr(trainer.accelerator, "backward", at_backward)
            patch.setattr(trainer, "log", lambda metrics: setattr(seen, "metrics", metrics))
            trainer.train()
        seen.optimizer_steps = optimizer.steps
        return seen

    return update


@torch.no_grad()
def our_rollout(models, responses, lam=0.95):
    """What ours makes of the same: its models, and its rollout on its own grid (right-padded: prompt, then response)."""
    policy, ref = (from_hugging_face(m) for m in models[:2])
    reward, value_model = scalar(models[2]), ValueModel(scalar(models[3]))
    value_model.head.bias.requires_grad_(False)  # TRL's head has none
    tokens = torch.tensor([(p + r + [PAD] * 10)[:10] for p, r in zip(PROMPTS, responses, strict=True)])
    length = PROMPT_LEN + torch.tensor([len(r) for r in responses])
    mask = response_mask(PROMPT_LEN, length, 10)
    logprobs, ref_logprobs = (token_logprobs(m, tokens, mask, 0.7)[0] for m in (policy, ref))
    values, scores = value_model(tokens, mask), reward(tokens, length)
    rewards = ppo.shape_rewards(scores, logprobs, ref_logprobs, mask, kl_coef=0.3)
    advantages, returns = ppo.gae(rewards, values, mask, lam=lam)
    rollout = ppo.Rollout(tokens, mask, length, logprobs, values, advantages, returns)
    return policy, value_model, rollout, SimpleNamespace(ref_logprobs=ref_logprobs, scores=scores, rewards=rewards)


def on_their_grid(x):
    """[8, 10] with each prompt's own start -> TRL's [8, R], where slot 0 is the first response token."""
    return x.gather(1, PROMPT_LEN[:, None] + torch.arange(R))


def test_trl_where_every_response_fills_its_slots(trl):
    """No slot behind a response, so no difference but the n - 1 of whitening: rollout, losses of both epochs, and weights."""
    theirs = trl(FULL, stop_token=None)
    policy, value_model, ours, more = our_rollout(theirs.before, FULL)
    t = theirs.rollout
    for name, x in (("logprobs", ours.logprobs), ("ref_logprobs", more.ref_logprobs), ("values", ours.values),
                    ("rewards", more.rewards), ("advantages", ours.advantages), ("returns", ours.returns)):  # fmt: skip
        same(on_their_grid(x), getattr(t, name), atol=1e-5, rtol=1e-5, msg=lambda s, name=name: f"{name}: {s}")
    same(more.scores, t.scores, atol=1e-5, rtol=1e-5)
    whitened = ppo.masked_whiten(ours.advantages, ours.mask) * bessel(ours.mask)
    same(on_their_grid(whitened), t.whitened, atol=1e-5, rtol=1e-5)

    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.02) for m in (policy, value_model)]
    epochs, stats = [[[torch.arange(8)]]] * 2, []
    for epoch in epochs:  # one at a time, to see the loss of each
        stats.append(ppo.update(policy, value_model, *optimizers, ours._replace(advantages=whitened), [epoch], temperature=0.7,
                                max_grad_norm=1e9))  # fmt: skip
    for step, stat in zip(theirs.steps, stats, strict=True):
        assert stat["loss/policy"] == pytest.approx(step.pg_loss.item(), rel=1e-4, abs=1e-6)
        assert stat["loss/value"] == pytest.approx(step.vf_loss.item(), rel=1e-4)
    assert stats[0]["policy/clipfrac"] == 0 and stats[1]["policy/clipfrac"] > 0.05 and stats[1]["val/clipfrac"] > 0.05
    # max_grad_norm was 1e-3: TRL's loop does not clip, or its weights would be elsewhere
    assert min(stat[f"{name}/grad_norm"] for stat in stats for name in ("policy", "value")) > 0.01
    for a, b in ((policy, from_hugging_face(theirs.after[0])), (value_model, scalar(theirs.after[1]))):
        for name, w in b.state_dict().items():
            same(a.state_dict()[name], w, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("lam", [1.0, 0.95])
def test_trl_pays_the_score_one_slot_after_the_end(trl, lam):
    """Behind an early end TRL has one slot more: it gets the score, and a value. With lambda 1 that cancels; else not."""
    theirs, (_, _, ours, more) = trl(RAGGED, lam=lam), our_rollout(trl(RAGGED).before, RAGGED, lam)
    t, real = theirs.rollout, on_their_grid(ours.mask)
    assert torch.equal(~t.padding_mask, real) and torch.equal(STOPPED & ~EARLY, torch.arange(8) == 2)
    for name, x in (("logprobs", ours.logprobs), ("ref_logprobs", more.ref_logprobs), ("values", ours.values)):
        same(on_their_grid(x)[real], getattr(t, name)[real], atol=1e-5, rtol=1e-5)
    same(more.scores, t.scores, atol=1e-5, rtol=1e-5)  # the same position is read
    rewards, advantages = on_their_grid(more.rewards), on_their_grid(ours.advantages)
    same(rewards[~EARLY], t.rewards[~EARLY], atol=1e-5, rtol=1e-5)
    end = t.sequence_lengths[EARLY, None]
    same(t.rewards[EARLY].gather(1, end + 1)[:, 0], more.scores[EARLY], atol=1e-5, rtol=1e-5)
    same((rewards - t.rewards)[EARLY].gather(1, end)[:, 0], more.scores[EARLY], atol=1e-5, rtol=1e-5)

    if lam == 1:
        same(advantages[real], t.advantages[real], atol=1e-5, rtol=1e-5)
        same(on_their_grid(ours.returns)[real], t.returns[real], atol=1e-5, rtol=1e-5)
    else:
        same(advantages[~EARLY], t.advantages[~EARLY], atol=1e-5, rtol=1e-5)
        assert differs(advantages[EARLY].gather(1, end), t.advantages[EARLY].gather(1, end))
    # all of the difference: our gae on rows that are one slot longer
    longer, _ = ppo.gae(t.rewards, t.values, ~t.padding_mask_p1, lam=lam)
    same(longer, t.advantages, atol=1e-5, rtol=1e-5)
    same(ppo.masked_whiten(longer, real)[real] * bessel(real), t.whitened[real], atol=1e-5, rtol=1e-5)


def test_trl_losses_of_ragged_rows(trl):
    """Given its rollout, TRL's policy loss is ours; its value loss has one token more for each early end."""
    theirs = trl(RAGGED)
    for step in theirs.steps:
        real, and_one = (~m[step.micro_batch_inds] for m in (theirs.rollout.padding_mask, theirs.rollout.padding_mask_p1))
        loss, stats = ppo.policy_loss(step.new_logprobs, step.mb_logprobs, step.mb_advantage, real)
        same(loss, step.pg_loss)
        value, _ = ppo.value_loss(step.vpred, step.mb_values, step.mb_return, and_one)
        same(value, step.vf_loss)
        assert differs(ppo.value_loss(step.vpred, step.mb_values, step.mb_return, real)[0], step.vf_loss)
        assert and_one.sum() - real.sum() == EARLY.sum()
    # its metrics are means over pads too, where the ratio is 1: the last epoch's, with the first's exact 1 and 0
    d = step.new_logprobs - step.mb_logprobs
    assert theirs.metrics["val/ratio"] == pytest.approx((1 + d.exp().mean().item()) / 2, rel=1e-5)
    assert theirs.metrics["policy/approxkl_avg"] == pytest.approx(ppo.k2(d).mean().item() / 2, rel=1e-4)
    diluted = ppo.k2(d).mean() / ppo.masked_mean(ppo.k2(d), real)
    assert diluted.item() == pytest.approx(real.float().mean().item(), rel=1e-4) and diluted < 0.7
    assert stats["policy/ratio"].item() != pytest.approx(d.exp().mean().item(), rel=1e-3)


def test_trl_takes_the_missing_eos_penalty_off_the_score(trl):
    """Whatever the score is, where ours caps it; from none that stopped, be it in the last slot."""
    plain, penalised = (trl(RAGGED, missing_eos_penalty=x).rollout.scores for x in (None, 2.0))
    same(plain - 2.0 * ~STOPPED, penalised)
    cap = plain[~STOPPED].mean()  # one of the two rows is above it
    expected = [x if stopped else min(x, cap) for x, stopped in zip(plain, STOPPED, strict=True)]
    assert ppo.penalise_missing_eos(plain, STOPPED, cap).tolist() == expected


def test_trl_forgets_the_end_where_it_is_the_pad(trl):
    """With pad == eos the end-of-text has no log-prob, no advantage and no say in the score: it is never learned."""
    theirs = trl(RAGGED[:3] + [[4, EOS]] + RAGGED[4:], pad=EOS).rollout  # (a response of the end alone reads the prompt)
    ends = (theirs.sequence_lengths + 1)[STOPPED]
    assert ends.tolist() == [1, 5, 1, 3, 2, 1]  # where the end-of-text stands
    assert theirs.padding_mask[STOPPED].gather(1, ends[:, None]).all()
    _, _, ours, more = our_rollout(trl(RAGGED).before, RAGGED[:3] + [[4, EOS]] + RAGGED[4:])
    assert on_their_grid(ours.mask)[STOPPED].gather(1, ends[:, None]).all()
    assert differs(more.scores[STOPPED], theirs.scores[STOPPED])
    same(more.scores[~STOPPED], theirs.scores[~STOPPED], atol=1e-5, rtol=1e-5)


def test_trl_steps_with_accumulation(trl):
    """Two minibatches of two parts each, for two epochs: 2 steps, or 8 at the last batch of the data set. Never the 4."""
    accumulated = dict(per_device_train_batch_size=2, gradient_accumulation_steps=4, num_mini_batches=2)
    runs = [trl(RAGGED, own_dataloader=own, **accumulated) for own in (False, True)]
    assert [len(run.steps) for run in runs] == [8, 8] and [run.optimizer_steps for run in runs] == [2, 8]


def test_trl_takes_means_of_means_with_accumulation(trl):
    """Two parts of unequal length: in TRL each part counts the same, in ours each token."""
    theirs = trl(RAGGED, per_device_train_batch_size=4, gradient_accumulation_steps=2, num_ppo_epochs=1)
    assert theirs.optimizer_steps == 1
    policy, _, ours, _ = our_rollout(theirs.before, RAGGED)
    advantages = torch.zeros(8, 10).scatter(1, PROMPT_LEN[:, None] + torch.arange(R), theirs.rollout.whitened)
    parts = [torch.tensor(step.micro_batch_inds) for step in theirs.steps]
    counts = [int(ours.mask[rows].sum()) for rows in parts]
    assert counts[0] != counts[1]

    def moved(counts):
        model = copy.deepcopy(policy)
        for rows, count in zip(parts, counts, strict=True):
            logprobs, _ = token_logprobs(model, ours.tokens[rows], ours.mask[rows], 0.7)
            loss, _ = ppo.policy_loss(logprobs, ours.logprobs[rows], advantages[rows], ours.mask[rows], count=count)
            loss.backward()
        return model.wte.weight.detach() - 0.02 * model.wte.weight.grad

    after = from_hugging_face(theirs.after[0]).wte.weight
    same(moved([2 * n for n in counts]), after, atol=1e-6, rtol=1e-4)
    assert (moved([sum(counts)] * 2) - after).abs().max() > 1e-4


def test_trl_samples_log_probs_of_the_decoder(trl):
    """TRL keeps the log-probs of generation (cache, left pads, temperature + 1e-7): in fp32 those of our forward."""
    ppo_trainer, transformers = module("trl.experimental.ppo.ppo_trainer"), module("transformers")
    theirs = trl(FULL, stop_token=None, num_ppo_epochs=1).before[0]
    queries = torch.tensor([[PAD] * (4 - len(p)) + p for p in PROMPTS])
    torch.manual_seed(0)
    how = transformers.GenerationConfig(max_new_tokens=R, temperature=0.7 + 1e-7, top_k=0.0, top_p=1.0, do_sample=True)
    theirs.generation_config.eos_token_id = None
    sampled, logits = ppo_trainer.batch_generation(theirs, queries, 8, PAD, how)
    responses = sampled[:, 4:]
    _, _, ours, _ = our_rollout((theirs, theirs, *trl(FULL, stop_token=None, num_ppo_epochs=1).before[2:]), responses.tolist())
    same(on_their_grid(ours.logprobs), ppo_trainer.selective_log_softmax(logits, responses), atol=1e-5, rtol=1e-5)
