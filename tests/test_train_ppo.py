"""train_ppo.py end to end on tiny made-up models: what starts at zero, what must not move, and what resume must keep."""

import inspect
import json
from dataclasses import replace

import pytest
import torch

import evaluate_words
import train_ppo
from minirlaif import cli, ppo, rollouts, trainer
from minirlaif.cli import UserError
from minirlaif.heads import RewardModel
from minirlaif.model import GPT, GPTConfig
from minirlaif.tokenizer import load_tokenizer, write_ranks

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a policy, a reward model and prompts of several lengths, over a vocabulary of bytes."""
    home = tmp_path_factory.mktemp("ppo")
    write_ranks(home / "bytes.tiktoken", {bytes([i]): i for i in range(256)})
    name = str(home / "bytes.tiktoken")
    config = GPTConfig(block_size=64, vocab_size=257, n_layer=1, n_head=2, n_embd=16, dropout=0.5)
    policy = GPT(config).init_weights(trainer.rng(0, "policy"))
    with torch.no_grad():  # an entropy well below that of noise, and end-of-text now and then
        policy.wte.weight.mul_(8)
        policy.wte.weight[256] += 0.3
    other = GPT(config).init_weights(trainer.rng(0, "other"))
    reward_model = RewardModel(GPT(config).init_weights(trainer.rng(0, "rm")), generator=trainer.rng(0, "head"))
    reward_model.gain.fill_(2.0)
    trainer.save_model(home / "policy.pt", config, policy.state_dict(), "gpt", name)
    trainer.save_model(home / "other.pt", config, other.state_dict(), "gpt", name)
    trainer.save_model(home / "reward.pt", config, reward_model.state_dict(), "reward", name)
    prompts = [f"\n\nHuman: {'ab' * n}?\n\nAssistant:" for n in range(1, 8)]
    (home / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    return home


def make_args(home, out, **changes):
    args = train_ppo.Args(
        out=str(out), init=str(home / "policy.pt"), reward_model=str(home / "reward.pt"),
        data=str(home / "prompts.jsonl"), steps=4, batch_size=10, minibatch_size=4, ppo_epochs=2, lr=1e-3,
        value_lr=1e-3, max_new_tokens=12, device="cpu", dtype="fp32",
    )
    return replace(args, **changes)


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def spy(monkeypatch, module, name):
    """The calls of module.name from now on: a list of (its arguments by name, defaults included; its result)."""
    original, calls = getattr(module, name), []

    def watched(*args, **kwargs):
        bound = inspect.signature(original).bind(*args, **kwargs)
        bound.apply_defaults()
        calls.append((bound.arguments, original(*args, **kwargs)))
        return calls[-1][1]

    monkeypatch.setattr(module, name, watched)
    return calls


@pytest.fixture(scope="module")
def finished(home, tmp_path_factory):
    """A run that was never stopped, its metrics, and the models it had in memory."""
    out, kept = tmp_path_factory.mktemp("run") / "ppo", []
    load = train_ppo.load_models
    with pytest.MonkeyPatch.context() as m:
        m.setattr(train_ppo, "load_models", lambda *a: kept.append(load(*a)) or kept[-1])
        train_ppo.main(make_args(home, out))
    return out, metrics(out), kept[0]


def test_every_step_is_logged_with_finite_numbers(finished):
    out, rows, _ = finished
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    for key in ("objective/scores", "objective/kl", "policy/approx_kl", "loss/policy", "loss/value", "val/clipfrac",
                "val/explained_variance", "speed/tokens_per_second", "objective/entropy"):
        assert all(isinstance(row[key], float) for row in rows), key
    assert all(row["objective/entropy"] > 0 and row["objective/kl_k3"] >= 0 for row in rows)
    assert [row["lr/policy"] for row in rows] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])


def test_the_policy_moved_and_the_frozen_models_did_not(home, finished):
    out, rows, models = finished
    assert rows[0]["objective/kl"] == 0 and rows[-1]["objective/kl_k3"] > 0
    start = trainer.load_gpt(home / "policy.pt").state_dict()
    assert same(models.ref_policy.state_dict(), start)  # bit for bit, the tied head included
    assert same(models.reward_model.state_dict(), trainer.load_reward(home / "reward.pt").state_dict())
    assert same(models.policy.state_dict(), trainer.load_gpt(out).state_dict())
    assert not any(torch.equal(a, b) for a, b in zip(models.policy.parameters(), models.ref_policy.parameters(), strict=True))
    assert not same(models.value_model.state_dict(), models.reward_model.state_dict())
    assert models.policy.lm_head.weight is models.policy.wte.weight


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_lr_zero_keeps_kl_at_zero_and_the_ratio_at_one(home, tmp_path, monkeypatch, dtype):
    """Every token, exactly, in bf16 too. Every model has dropout 0.5: it must be off in all of them."""
    policy_loss, drift = ppo.policy_loss, []

    def watched(logprobs, old_logprobs, *rest):
        drift.append((logprobs - old_logprobs).abs().max().item())
        return policy_loss(logprobs, old_logprobs, *rest)

    monkeypatch.setattr(ppo, "policy_loss", watched)
    monkeypatch.setitem(train_ppo.TOKENS_PER_FORWARD, "cpu", 100)
    train_ppo.main(make_args(home, tmp_path / "run", lr=0.0, dtype=dtype, ppo_epochs=1))
    assert len(drift) > 4 * 3 and max(drift) == 0
    for row in metrics(tmp_path / "run"):
        assert row["objective/kl"] == row["objective/kl_k3"] == row["policy/approx_kl"] == row["policy/clipfrac"] == 0
        assert row["policy/ratio"] == pytest.approx(1, abs=1e-6)  # a mean of exact ones, summed in fp32


def test_the_rollout_is_scored_in_the_shapes_of_the_first_epoch(home, tmp_path, monkeypatch):
    """Another padding would round otherwise: no ratio would be exactly 1."""
    seen = {train_ppo: [], ppo: []}
    for module, shapes in seen.items():

        def watched(model, tokens, *rest, shapes=shapes, original=module.token_logprobs):
            if any(p.requires_grad for p in model.parameters()):  # the policy, not the reference
                shapes.append((tokens.shape, tokens.tolist()))
            return original(model, tokens, *rest)

        monkeypatch.setattr(module, "token_logprobs", watched)
    monkeypatch.setitem(train_ppo.TOKENS_PER_FORWARD, "cpu", 100)
    train_ppo.main(make_args(home, tmp_path / "run", steps=2, ppo_epochs=1, max_new_tokens=4))
    scored, updated = seen[train_ppo], seen[ppo]
    assert len({shape[1] for shape, _ in updated}) > 1
    assert all(x in scored for x in updated) and len(scored) == len(updated) + 1  # step 0 checks its first part


def test_the_update_gets_whitened_advantages_and_returns_from_before_whitening(home, tmp_path, monkeypatch):
    """By hand, row by row, from what the models said; a lambda, a kl_coef and clip ranges that are no defaults."""
    lam, kl_coef = 0.6, 0.3
    changes = {"ref": str(home / "other.pt"), "lam": lam, "kl_coef": kl_coef, "cliprange": 0.13, "cliprange_value": 0.37}
    scored, updated = spy(monkeypatch, train_ppo, "score"), spy(monkeypatch, ppo, "update")
    train_ppo.main(make_args(home, tmp_path / "run", steps=2, **changes))
    for (given, x), (update, _) in zip(scored, updated, strict=True):
        advantages, mask = [], x["mask"]
        for b, m in enumerate(mask):
            rewards = -kl_coef * (x["logprobs"] - x["ref_logprobs"])[b, m]
            rewards[-1] += x["scores"][b] if given["samples"].stopped[b] else min(x["scores"][b], -1.0)
            values = torch.cat([x["values"][b, m], torch.zeros(1)])  # nothing is to come after the last token
            delta = rewards + values[1:] - values[:-1]
            advantages += [sum(lam**k * d for k, d in enumerate(delta[t:])) for t in range(len(delta))]
        advantages = torch.stack(advantages)  # of the whole batch, real tokens only
        whitened = (advantages - advantages.mean()) / advantages.std(correction=0)
        rollout = update["rollout"]
        assert torch.equal(rollout.mask, mask) and torch.equal(rollout.values, x["values"])
        torch.testing.assert_close(rollout.advantages[mask], whitened, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(rollout.returns[mask], advantages + x["values"][mask], rtol=1e-4, atol=1e-5)
        assert not rollout.advantages[~mask].any()
        assert (update["cliprange"], update["cliprange_value"]) == (0.13, 0.37)
    assert len(updated) == 2


def test_the_end_of_text_is_trained(home, tmp_path, monkeypatch):
    """The last token of whoever stopped is end-of-text, and has a log-prob, an advantage, a return and a gradient."""
    generated, updated = spy(monkeypatch, train_ppo, "generate"), spy(monkeypatch, ppo, "update")
    losses = spy(monkeypatch, ppo, "policy_loss")
    train_ppo.main(make_args(home, tmp_path / "run", steps=1, batch_size=96, minibatch_size=48, ppo_epochs=1))
    (_, samples), (update, _) = generated[0], updated[0]
    rollout, rows = update["rollout"], samples.stopped.nonzero().squeeze(1)
    end = samples.length[rows] - 1
    assert len(rows) > 2 and (rollout.tokens[rows, end] == 256).all() and rollout.mask[rows, end].all()
    assert not rollout.mask[rows, end + 1].any()
    assert (rollout.logprobs[rows, end] < 0).all() and rollout.advantages[rows, end].all() and rollout.returns[rows, end].all()
    assert not any(x.requires_grad for x in rollout)
    assert sum(int(call["mask"].sum()) for call, _ in losses) == int((samples.length - samples.prompt_len).sum())


def test_metrics_are_of_real_tokens(home, tmp_path, monkeypatch):
    """Row by row by hand, from what the models said of the real tokens and nothing else."""
    scored, updated = spy(monkeypatch, train_ppo, "score"), spy(monkeypatch, ppo, "update")
    train_ppo.main(make_args(home, tmp_path / "run", steps=1, ref=str(home / "other.pt"), kl_coef=0.3))
    (_, x), (update, _), row = scored[0], updated[0], metrics(tmp_path / "run")[0]
    n = len(x["mask"])
    real = {name: torch.cat([x[name][b, m] for b, m in enumerate(x["mask"])]) for name in ("logprobs", "ref_logprobs", "values")}
    d, rollout = real["logprobs"] - real["ref_logprobs"], update["rollout"]
    entropy = torch.cat([x["entropy"][b, m] for b, m in enumerate(x["mask"])])
    returns = torch.cat([rollout.returns[b, m] for b, m in enumerate(rollout.mask)])
    hand = {
        "objective/kl": d.sum() / n, "objective/kl_k3": ((-d).exp() - 1 + d).sum() / n, "objective/entropy": entropy.mean(),
        "objective/non_score_reward": -0.3 * d.sum() / n, "objective/response_tokens": torch.tensor(len(d) / n),
        "objective/scores": x["scores"].mean(), "objective/scores_std": x["scores"].std(correction=0),
        "val/values": real["values"].mean(),
        "val/explained_variance": 1 - (returns - real["values"]).var(correction=0) / returns.var(correction=0),
    }  # fmt: skip
    assert {name: row[name] for name in hand} == pytest.approx({k: v.item() for k, v in hand.items()}, rel=1e-3, abs=1e-5)
    assert len(d) < x["mask"].numel() / 2, "mostly pads"


def test_the_temperature_of_sampling_is_that_of_every_logprob(home, tmp_path, monkeypatch):
    generated, scored = spy(monkeypatch, train_ppo, "generate"), spy(monkeypatch, train_ppo, "score")
    updated = spy(monkeypatch, ppo, "update")
    ref = str(home / "other.pt")
    train_ppo.main(make_args(home, tmp_path / "run", steps=2, ref=ref, lr=0.0, ppo_epochs=1, temperature=0.7))
    assert len(generated) == len(scored) == len(updated) == 2
    for call, _ in generated:
        assert (call["temperature"], call["top_k"], call["top_p"]) == (0.7, None, None)
    for given, x in scored:
        for name, model in (("logprobs", given["models"].policy), ("ref_logprobs", given["models"].ref_policy)):
            for b, t in x["mask"].nonzero().tolist():
                logits = model(x["tokens"][b : b + 1, :t])[0, -1].detach() / 0.7
                assert x[name][b, t].item() == pytest.approx(logits.log_softmax(-1)[x["tokens"][b, t]].item(), abs=1e-4)
    for _, stats in updated:
        assert stats["policy/approx_kl"] == 0 and stats["policy/ratio"] == pytest.approx(1, abs=1e-6)


def test_adam_has_the_eps_of_ppo(home, tmp_path):
    args = make_args(home, tmp_path)
    models = train_ppo.load_models(args, trainer.tokenizer_of(args.init), CPU, None)
    for optimizer in (models.policy_optimizer, models.value_optimizer):
        assert {group["eps"] for group in optimizer.param_groups} == {1e-5}


def test_a_wrong_reference_is_seen_before_the_first_update(home, tmp_path, monkeypatch):
    load = train_ppo.load_models

    def other_reference(*a):
        return load(*a)._replace(ref_policy=trainer.load_gpt(home / "other.pt"))

    monkeypatch.setattr(train_ppo, "load_models", other_reference)
    with pytest.raises(AssertionError, match="KL to the reference"):
        train_ppo.main(make_args(home, tmp_path / "run"))


def test_dropout_is_seen_before_the_first_update(home, tmp_path, monkeypatch):
    load = train_ppo.load_models
    monkeypatch.setattr(train_ppo, "load_models", lambda *a: (lambda m: m.policy.train() and m)(load(*a)))
    with pytest.raises(AssertionError, match="log ratio"):
        train_ppo.main(make_args(home, tmp_path / "run"))


def test_dropout_is_off_in_all_models_to_the_end(finished):
    for model in finished[2][:4]:
        assert not any(m.training for m in model.modules())


def test_another_reference_may_be_named(home, tmp_path):
    train_ppo.main(make_args(home, tmp_path / "run", ref=str(home / "other.pt"), steps=1))
    assert metrics(tmp_path / "run")[0]["objective/kl"] > 0.1


def test_optimizer_steps_are_epochs_times_minibatches(home, tmp_path, monkeypatch):
    steps = {}
    step = torch.optim.AdamW.step

    def counted(self, *args, **kwargs):
        steps[id(self)] = steps.get(id(self), 0) + 1
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    train_ppo.main(make_args(home, tmp_path / "run", steps=2, batch_size=8, minibatch_size=4, ppo_epochs=3))
    assert list(steps.values()) == [2 * 3 * 2] * 2


class Killed(BaseException):
    """Like kill -9: nothing gets to clean up."""


@pytest.mark.parametrize("kill_at", [1, 3])
def test_killed_and_resumed_is_uninterrupted_bit_for_bit(home, finished, tmp_path, monkeypatch, kill_at):
    out, reference, _ = tmp_path / "run", finished[0], finished[1]
    args = make_args(home, out)
    step_of = train_ppo.ppo_step

    def killed(models, samples, args, kl_coef, step, *rest):
        if step == kill_at:
            raise Killed
        return step_of(models, samples, args, kl_coef, step, *rest)

    end_step = trainer.Run.end_step
    monkeypatch.setattr(trainer.Run, "end_step", lambda run, *a: setattr(run, "save_every_s", 0.0) or end_step(run, *a))
    monkeypatch.setattr(train_ppo, "ppo_step", killed)
    with pytest.raises(Killed):
        train_ppo.main(args)
    monkeypatch.setattr(train_ppo, "ppo_step", step_of)
    torch.manual_seed(12345)  # nothing may depend on the global generator
    train_ppo.main(replace(args, resume=True))
    assert same(trainer.load_gpt(out).state_dict(), trainer.load_gpt(reference).state_dict())
    timeless = [[{k: v for k, v in row.items() if "speed" not in k} for row in metrics(o)] for o in (out, reference)]
    assert timeless[0] == timeless[1]


def test_resume_keeps_the_value_model_and_the_adapted_kl_coef(home, tmp_path, monkeypatch):
    end_step = trainer.Run.end_step
    monkeypatch.setattr(trainer.Run, "end_step", lambda run, *a: setattr(run, "save_every_s", 0.0) or end_step(run, *a))
    args = make_args(home, tmp_path / "run", kl_target=0.01, kl_horizon=50.0, steps=3)
    train_ppo.main(args)
    coefs = [row["objective/kl_coef"] for row in metrics(tmp_path / "run")]
    kls = [row["objective/kl"] for row in metrics(tmp_path / "run")]
    hand = ppo.AdaptiveKL(0.1, 0.01, 50.0)
    assert coefs == pytest.approx([0.1, *(hand.update(kl, 10) for kl in kls[:2])], rel=1e-4) and coefs[1] < 0.1
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)["state"]
    assert state["step"] == 3 and state["kl_coef"] == pytest.approx(hand.update(kls[2], 10), rel=1e-4)
    assert not torch.equal(state["value_model"]["head.weight"], trainer.load_reward(home / "reward.pt").head.weight)
    assert len(state["value_optimizer"]["state"]) == len(list(trainer.load_reward(home / "reward.pt").parameters()))


def test_resume_with_other_frozen_weights_is_an_error(home, tmp_path, monkeypatch):
    end_step = trainer.Run.end_step
    monkeypatch.setattr(trainer.Run, "end_step", lambda run, *a: setattr(run, "save_every_s", 0.0) or end_step(run, *a))
    moved = tmp_path / "reward.pt"
    moved.write_bytes((home / "reward.pt").read_bytes())
    args, step_of = make_args(home, tmp_path / "run", reward_model=str(moved)), train_ppo.ppo_step

    def killed(*a):
        if a[4] == 2:
            raise Killed
        return step_of(*a)

    monkeypatch.setattr(train_ppo, "ppo_step", killed)
    with pytest.raises(Killed):
        train_ppo.main(args)
    monkeypatch.setattr(train_ppo, "ppo_step", step_of)
    changed = trainer.load_reward(moved)
    changed.gain.mul_(2)
    name = load_tokenizer(str(home / "bytes.tiktoken")).name
    trainer.save_model(moved, changed.gpt.config, changed.state_dict(), "reward", name)
    with pytest.raises(UserError, match="has changed since this run began"):
        train_ppo.main(replace(args, resume=True))


def test_the_last_metrics_survive_a_stop_after_the_last_step(home, finished, tmp_path, monkeypatch):
    """Ctrl-C during the last step: the checkpoint is complete, and only the export is missing."""
    end_step = trainer.Run.end_step
    monkeypatch.setattr(trainer.Run, "end_step", lambda run, *a: setattr(run, "interrupted", a[0] == 4) or end_step(run, *a))
    args = make_args(home, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        train_ppo.main(args)
    monkeypatch.setattr(trainer.Run, "end_step", end_step)
    last = train_ppo.main(replace(args, resume=True))
    assert last["objective/scores"] == pytest.approx(finished[1][-1]["objective/scores"], rel=1e-4)
    assert same(trainer.load_gpt(tmp_path / "run").state_dict(), trainer.load_gpt(finished[0]).state_dict())


def test_training_raises_the_reward(home, tmp_path):
    """Forty steps without a KL penalty or a cap: the score must go up by more than its noise."""
    args = make_args(home, tmp_path / "run", steps=40, batch_size=32, minibatch_size=16, lr=3e-3, value_lr=3e-3,
                     kl_coef=0.0, missing_eos_penalty=None)
    train_ppo.main(args)
    rows = metrics(tmp_path / "run")
    first, last = (sum(row["objective/scores"] for row in part) / 5 for part in (rows[:5], rows[-5:]))
    assert last > first + 5 * rows[0]["objective/scores_std"] / (5 * 32) ** 0.5


def test_missing_eos_is_counted_and_capped(home, tmp_path):
    train_ppo.main(make_args(home, tmp_path / "a", steps=1, max_new_tokens=1, missing_eos_penalty=-50.0, kl_coef=0.0))
    row = metrics(tmp_path / "a")[0]
    assert row["objective/missing_eos"] > 0.5 and row["objective/scores"] > -50  # scores are shown as they were given
    stopped = 1 - row["objective/missing_eos"]
    assert row["objective/rlhf_reward"] == pytest.approx(-50 * (1 - stopped), abs=5 * stopped + 1e-3)


def test_the_exact_kl_is_what_its_estimates_estimate(home, tmp_path):
    """Of a policy far from its reference: k1 and k3 over 200 responses, and the sum over the vocabulary."""
    train_ppo.main(make_args(home, tmp_path / "run", ref=str(home / "other.pt"), steps=1, batch_size=200))
    row = metrics(tmp_path / "run")[0]
    assert row["objective/kl_full"] > 1
    assert row["objective/kl"] == pytest.approx(row["objective/kl_full"], rel=0.2)


def test_whitened_rewards_keep_their_mean(home, tmp_path, monkeypatch):
    seen = spy(monkeypatch, ppo, "gae")
    plain, whitened = make_args(home, tmp_path / "a", steps=1), make_args(home, tmp_path / "b", steps=1, whiten_rewards=True)
    train_ppo.main(plain)
    train_ppo.main(whitened)
    (before, _), (after, _) = seen
    x, y = before["rewards"][before["mask"]], after["rewards"][after["mask"]]
    assert y.mean().item() == pytest.approx(x.mean().item(), abs=1e-5)
    assert y.std(correction=0).item() == pytest.approx(1, abs=1e-4) and x.std(correction=0).item() != pytest.approx(1, abs=0.1)
    assert torch.allclose(y, (x - x.mean()) / x.std(correction=0) + x.mean(), atol=1e-4)


def test_an_update_ends_where_approx_kl_passes_its_bound(home, tmp_path):
    """A bound that the second epoch passes: the steps before it are those of a run without one, and no more are taken."""
    changes = dict(steps=3, lr=0.03, batch_size=8, minibatch_size=8, ppo_epochs=4)
    train_ppo.main(make_args(home, tmp_path / "bound", **changes, max_approx_kl=1e-4))
    train_ppo.main(make_args(home, tmp_path / "one", **changes | {"ppo_epochs": 1}))
    train_ppo.main(make_args(home, tmp_path / "loose", **changes, max_approx_kl=1e4))
    bound, loose = metrics(tmp_path / "bound")[0], metrics(tmp_path / "loose")[0]
    assert (bound["policy/updates"], loose["policy/updates"]) == (1, 4)
    assert bound["policy/grad_norm"] == metrics(tmp_path / "one")[0]["policy/grad_norm"]  # of the steps that were taken
    assert same(trainer.load_gpt(tmp_path / "bound").state_dict(), trainer.load_gpt(tmp_path / "one").state_dict())


def test_the_limit_of_a_batch_may_be_drawn(home, tmp_path, monkeypatch):
    drawn = spy(monkeypatch, train_ppo, "generate")
    capped = spy(monkeypatch, ppo, "penalise_missing_eos")
    train_ppo.main(make_args(home, tmp_path / "run", steps=8, min_new_tokens=4, max_new_tokens=7))
    limits = [arguments["max_new_tokens"] for arguments, _ in drawn]
    assert set(limits) <= {4, 5, 6, 7} and len(set(limits)) > 1
    assert all(arguments["penalty"] is None for arguments, _ in capped)


def test_rollouts_can_be_followed_token_by_token(home, tmp_path, capsys):
    """The columns of a dump obey PPO's equations."""
    train_ppo.main(make_args(home, tmp_path / "run", ref=str(home / "other.pt"), steps=2, dump_rollouts=3, kl_coef=0.5))
    path = tmp_path / "run" / "rollouts" / "00001.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["row"] for row in rows] == [0, 1, 2]
    for row in rows:
        n = len(row["tokens"])
        assert all(len(row[name]) == n for name in rollouts.COLUMNS)
        kl = [a - b for a, b in zip(row["logprob"], row["ref_logprob"], strict=True)]
        assert row["kl"] == pytest.approx(kl, abs=1e-4)
        score = [0.0] * (n - 1) + [row["score"]]
        assert row["reward"] == pytest.approx([s - 0.5 * x for s, x in zip(score, kl, strict=True)], abs=1e-4)
        assert row["return"][-1] == pytest.approx(row["reward"][-1], abs=1e-4)  # nothing comes after the last token
    evaluate_words.tokens(evaluate_words.TokensArgs(file=[str(path)], row=2))
    shown = capsys.readouterr().out
    assert f"{rows[2]['logprob'][0]:12.4f}" in shown and len(shown.strip().splitlines()) == len(rows[2]["tokens"]) + 8
    for broken in ({"kl": []}, {"kl": rows[0]["kl"][:-1]}, {"kl": ["a"] * len(rows[0]["tokens"])}):
        (tmp_path / "broken.jsonl").write_text(json.dumps(rows[0] | broken) + "\n")
        with pytest.raises(UserError, match="broken.jsonl:1: 'kl' should be one number a token"):
            evaluate_words.tokens(evaluate_words.TokensArgs(file=[str(tmp_path / "broken.jsonl")]))
    with pytest.raises(UserError, match="no row 9, but 0, 1, 2"):
        evaluate_words.tokens(evaluate_words.TokensArgs(file=[str(path)], row=9))


@pytest.mark.parametrize("model", ["policy", "reward_model", "value_model"])
def test_nan_stops_with_one_line(home, tmp_path, monkeypatch, model):
    load = train_ppo.load_models

    def spoiled(*a):
        models = load(*a)
        with torch.no_grad():
            next(getattr(models, model).parameters()).fill_(float("nan"))
        return models

    monkeypatch.setattr(train_ppo, "load_models", spoiled)
    with pytest.raises(UserError, match="step 0: .* is nan; last good checkpoint: none yet; .*--lr") as error:
        train_ppo.main(make_args(home, tmp_path / "run"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"temperature": 0.0}, "--temperature"),
        ({"minibatch_size": 0}, "--minibatch-size"),
        ({"max_new_tokens": 60}, "prompts.jsonl:1: longer than the model's context"),
        ({"reward_model": "policy.pt"}, "policy.pt: holds a model of kind 'gpt'"),
        ({"init": "nowhere"}, "nowhere"),
        ({"min_new_tokens": 13}, "--min-new-tokens 13: more than --max-new-tokens 12"),
        ({"dump_rollouts": -1}, "--dump-rollouts"),
        ({"kl_target": 3.0, "kl_coef": 0.0}, "--kl-target: needs a --kl-coef above 0"),
        ({"kl_target": 3.0, "kl_horizon": 5.0}, "--kl-horizon of at least --batch-size"),
        ({"missing_eos_penalty": float("-inf")}, "--missing-eos-penalty -inf"),
        ({"lora_rank": 1000}, "--lora-rank 1000: more than its widest matrix has, 64"),
    ],
)
def test_wrong_flags_are_named(home, tmp_path, changes, message):
    changes = {k: str(home / v) if isinstance(v, str) else v for k, v in changes.items()}
    with pytest.raises(UserError, match=message):
        train_ppo.main(make_args(home, tmp_path / "run", **changes))


def test_each_round_uses_every_prompt_once():
    drawn = [i for step in range(7) for i in train_ppo.pick(7, step, 3, seed=0)]
    rounds = [drawn[i : i + 7] for i in (0, 7, 14)]
    assert all(sorted(r) == list(range(7)) for r in rounds) and rounds[0] != rounds[1]
    assert train_ppo.pick(3, 0, 10, seed=0) == train_ppo.pick(3, 0, 10, seed=0) != train_ppo.pick(3, 0, 10, seed=1)


def test_help_has_at_most_25_flags_of_its_own(capsys):
    with pytest.raises(SystemExit):
        cli.parse(train_ppo.Args, ["--help"])
    assert "--kl-target" in capsys.readouterr().out
    own = train_ppo.Args.__dataclass_fields__.keys() - {"out", "seed", "device", "dtype", "resume"}  # every script has these
    assert len(own) <= 25
