"""LoRA: off is the base, bit for bit; each adapter sees only its own; merged is the same model; all trainers take it."""

import copy
import shutil
from dataclasses import replace

import pytest
import torch
from small import interrupted, rows_of, write
from torch.utils.checkpoint import checkpoint

import distill
import pretrain
import train_ppo
import train_rm
from bench import memory
from minirlaif import cli, lora, ppo, trainer
from minirlaif.cli import UserError
from minirlaif.heads import RewardModel, ValueModel
from minirlaif.lora import Adapter
from minirlaif.model import GPT, GPTConfig, response_mask, token_logprobs
from minirlaif.sampling import generate
from minirlaif.tokenizer import write_ranks

CONFIG = GPTConfig(block_size=32, vocab_size=37, n_layer=2, n_head=2, n_embd=16)
CPU = torch.device("cpu")


def make_base(seed=0, std=0.2):
    base, generator = GPT(CONFIG).eval(), trainer.rng(seed, "base")
    with torch.no_grad():
        for p in base.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * std + (p if p.dim() == 1 else 0))
    return base


def make_adapter(base, seed=1, std=0.3, **options):
    """One that has been trained, if to no end: B is not 0."""
    adapter = Adapter(base, 4, trainer.rng(seed), **options).eval()
    with torch.no_grad():
        for b in adapter.B.values():
            b.normal_(std=std, generator=trainer.rng(seed, "B"))
    return adapter


@pytest.fixture
def base():
    return make_base()


@pytest.fixture(scope="module")
def batch():
    tokens = torch.randint(37, (4, 20), generator=trainer.rng(3))
    length = torch.tensor([20, 13, 9, 17])
    return tokens, response_mask(torch.tensor([5, 4, 2, 9]), length, 20), length


def snapshot(model):
    return {name: w.clone() for name, w in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# the adapter


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_new_adapter_changes_no_bit(base, batch, dtype):
    adapter, (tokens, mask, _) = Adapter(base, 4, trainer.rng(1)), batch
    with trainer.autocast(CPU, dtype):
        for ours, theirs in zip(token_logprobs(adapter, tokens, mask), token_logprobs(base, tokens, mask), strict=True):
            assert torch.equal(ours, theirs)
        prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
        ours, theirs = (generate(model, prompts, 12, eot=36, seed=5) for model in (adapter, base))
    assert torch.equal(ours.tokens, theirs.tokens) and torch.equal(ours.length, theirs.length)


def test_it_adds_alpha_over_rank_b_a_x_to_every_matrix_of_a_block(base):
    adapter = make_adapter(base, alpha=6)
    assert len(adapter.A) == len(adapter.B) == 4 * CONFIG.n_layer
    for layer, block in enumerate(base.h):
        for name, linear in block.named_modules():
            if isinstance(linear, torch.nn.Linear):
                x = torch.randn(3, 5, linear.in_features, generator=trainer.rng(layer, name))
                key = f"h/{layer}/{name.replace('.', '/')}"
                assert adapter.A[key].shape == (4, linear.in_features) and adapter.B[key].shape == (linear.out_features, 4)
                torch.testing.assert_close(adapter.delta(linear, x), 6 / 4 * x @ adapter.A[key].T @ adapter.B[key].T)


def test_targets_leave_the_rest_alone(base, batch):
    adapter = make_adapter(base, targets=("mlp.c_fc",))
    assert sorted(adapter.A) == ["h/0/mlp/c_fc", "h/1/mlp/c_fc"]
    changed = [name for name, w in adapter.merged_state_dict().items() if not torch.equal(w, base.state_dict()[name])]
    assert changed == ["h.0.mlp.c_fc.weight", "h.1.mlp.c_fc.weight"]
    merged = GPT(CONFIG).eval()
    merged.load_state_dict(adapter.merged_state_dict())
    torch.testing.assert_close(adapter(batch[0]), merged(batch[0]), atol=1e-5, rtol=0)


def test_the_start_of_a_comes_from_the_generator_alone(base):
    a, b, c = (Adapter(base, 32, trainer.rng(seed)) for seed in (0, 0, 1))
    assert same(a.state_dict(), b.state_dict()) and not same(a.state_dict(), c.state_dict())
    assert a.A["h/0/mlp/c_proj"].std().item() == pytest.approx(64**-0.5, rel=0.05)  # N(0, 1 / in)
    assert not any(b.any() for b in a.B.values())


def test_parameters_and_state_are_the_adapters_alone(base):
    adapter = make_adapter(base.train())
    assert {name.split(".")[0] for name in adapter.state_dict()} == {"A", "B"}
    assert sum(p.numel() for p in adapter.parameters()) == CONFIG.n_layer * 4 * (16 + 48 + 16 + 16 + 16 + 64 + 64 + 16)
    assert not any(p.requires_grad for p in base.parameters())
    adapter.train()
    assert not base.training  # dropout stays off


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_off_is_the_base_bit_for_bit_after_training(base, batch, dtype):
    tokens, mask, _ = batch
    weights, before = snapshot(base), token_logprobs(base, tokens, mask)[0]
    adapter = Adapter(base, 4, trainer.rng(1))
    optimizer = trainer.configure_optimizer(adapter, 0.1, weight_decay=0.1)
    for _ in range(3):
        with trainer.autocast(CPU, dtype):
            loss = -token_logprobs(adapter, tokens, mask)[0].sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert same(base.state_dict(), weights) and base.lm_head.weight is base.wte.weight
    assert torch.equal(token_logprobs(base, tokens, mask)[0], before)
    assert token_logprobs(adapter, tokens, mask)[0].sum() > before.sum() + 10  # it did learn
    assert all(p.grad is None for p in base.parameters())


def test_the_cache_sees_the_adapter(base):
    """Greedy decoding, token by token behind a cache, is what whole forwards choose."""
    adapter, prompts = make_adapter(base), [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10]]
    samples = generate(adapter, prompts, 10, eot=36, temperature=0)
    for prompt, response in zip(prompts, samples.responses(), strict=True):
        ids = list(prompt)
        for token in response:
            assert adapter(torch.tensor([ids]))[0, -1].argmax() == token
            ids.append(token)
    assert not torch.equal(samples.tokens, generate(base, prompts, 10, eot=36, temperature=0).tokens)


def test_full_kl_takes_adapter_and_base(base, batch):
    tokens, mask, _ = batch
    kl = ppo.full_kl(make_adapter(base), base, tokens, mask)
    assert (kl > 0).all() and not ppo.full_kl(Adapter(base, 4), base, tokens, mask).any()


# several on one base


def test_each_adapter_sees_only_its_own(base, batch):
    tokens, mask, length = batch
    roles = {
        "policy": make_adapter(base, 1),
        "value": ValueModel(make_adapter(base, 2)),
        "reward": RewardModel(make_adapter(base, 3), generator=trainer.rng(3)),
    }
    with torch.no_grad():
        roles["value"].head.weight.normal_(generator=trainer.rng(2))

    def outputs():
        return {
            "policy": token_logprobs(roles["policy"], tokens, mask)[0].detach(),
            "value": roles["value"](tokens, mask).detach(),
            "reward": roles["reward"](tokens, length).detach(),
            "reference": token_logprobs(base, tokens, mask)[0],
        }

    for role, model in roles.items():
        before = outputs()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1)
        changed = {name for name, x in outputs().items() if not torch.equal(x, before[name])}
        assert changed == {role}
    roles["value"](tokens, mask).sum().backward()
    assert all(p.grad is not None for p in roles["value"].parameters())
    assert all(p.grad is None for model in (roles["policy"], roles["reward"], base) for p in model.parameters())


def test_recomputation_in_backward_uses_the_same_adapter(base, batch):
    """Another adapter, and none, run between the forward and the backward that computes the forward again."""
    first, other, (tokens, mask, _) = make_adapter(base, 1), make_adapter(base, 2), batch

    def gradients(between):
        h = checkpoint(first.hidden, tokens, use_reentrant=False)
        loss = first.logits(h).float().log_softmax(-1)[mask].pow(2).mean()
        if between:
            token_logprobs(other, tokens, mask), token_logprobs(base, tokens, mask)
        return torch.autograd.grad(loss, list(first.parameters()))

    assert all(torch.equal(a, b) for a, b in zip(gradients(False), gradients(True), strict=True))


def test_a_copy_is_its_own_on_the_same_base(base, batch):
    tokens, mask, length = batch
    reward = RewardModel(make_adapter(base), generator=trainer.rng(0)).requires_grad_(False)
    reward.gain.fill_(2.0)
    reward.bias.fill_(-0.5)
    value = ValueModel(reward)
    assert value.gpt is not reward.gpt and value.gpt.base is base is copy.deepcopy(reward).gpt.base
    assert value.gain == 2.0 and value.bias == -0.5 and all(p.requires_grad for p in value.parameters())
    torch.testing.assert_close(value(tokens, mask)[0, 19], reward(tokens[:1, :19], torch.tensor([19]))[0])
    before = snapshot(reward)
    with torch.no_grad():
        for p in value.parameters():
            p.add_(1.0)
    assert same(reward.state_dict(), before)


def test_the_value_model_of_a_full_reward_model_is_an_adapter_on_it(base, batch):
    tokens, mask, _ = batch
    reward = RewardModel(base, generator=trainer.rng(0))
    reward.gain.fill_(3.0)
    value = ValueModel(reward, lora.trainable(reward.gpt, 4, trainer.rng(1)))
    assert value.gpt.base is reward.gpt and torch.equal(value(tokens, mask), ValueModel(reward)(tokens, mask))


# merging and files


def test_merge_and_unmerge(base, batch):
    adapter, tokens = make_adapter(base), batch[0]
    weights, with_adapter, without = snapshot(base), adapter(tokens), base(tokens)
    adapter.merge()
    torch.testing.assert_close(base(tokens), with_adapter, atol=1e-5, rtol=0)
    assert (base(tokens) - without).abs().max() > 0.1
    assert all(torch.equal(w, base.state_dict()[name]) for name, w in adapter.merged_state_dict().items() if "ln" in name)
    adapter.unmerge()
    assert max((w - weights[name]).abs().max() for name, w in base.state_dict().items()) < 1e-6


def test_merged_weights_are_the_adapted_model_and_the_base_stays(base, batch):
    adapter, weights = make_adapter(base), snapshot(base)
    merged = GPT(CONFIG).eval()
    merged.load_state_dict(adapter.merged_state_dict())
    torch.testing.assert_close(merged(batch[0]), adapter(batch[0]), atol=1e-5, rtol=0)
    assert same(base.state_dict(), weights)


def test_a_saved_gpt_adapter_comes_back_and_so_does_the_merged_model(base, batch, tmp_path):
    adapter = make_adapter(base, alpha=3, targets=("attn.c_attn", "mlp.c_proj"))
    lora.save(tmp_path, adapter, "gpt", "toy")
    back = lora.load(tmp_path, base, "gpt")
    assert (back.rank, back.alpha, back.targets) == (4, 3, ("attn.c_attn", "mlp.c_proj"))
    assert torch.equal(back(batch[0]), adapter(batch[0]))
    torch.testing.assert_close(trainer.load_gpt(tmp_path)(batch[0]), adapter(batch[0]), atol=1e-5, rtol=0)
    assert set(torch.load(tmp_path / "adapter.pt", weights_only=True)["model"]) == set(adapter.state_dict())


def test_a_saved_reward_adapter_comes_back_with_its_scale(base, batch, tmp_path):
    tokens, _, length = batch
    reward = RewardModel(make_adapter(base), generator=trainer.rng(0)).eval()
    reward.gain.fill_(2.0)
    reward.bias.fill_(-0.5)
    lora.save(tmp_path, reward, "reward", "toy")
    assert torch.equal(lora.load(tmp_path, base, "reward")(tokens, length), reward(tokens, length))
    torch.testing.assert_close(trainer.load_reward(tmp_path)(tokens, length), reward(tokens, length), atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="kind 'reward adapter', where 'gpt adapter' is needed"):
        lora.load(tmp_path, base, "gpt")


def test_a_full_model_is_saved_as_before(base, tmp_path):
    lora.save(tmp_path, base, "gpt", "toy")
    assert same(trainer.load_gpt(tmp_path).state_dict(), base.state_dict()) and not (tmp_path / "adapter.pt").exists()


def test_an_adapter_belongs_to_its_base(base, tmp_path):
    lora.save(tmp_path, make_adapter(base), "gpt", "toy")
    other = copy.deepcopy(base)
    assert lora.base_hash(other) == lora.base_hash(base)
    with torch.no_grad():
        other.h[1].mlp.c_proj.bias[3] += 1e-3
    with pytest.raises(UserError, match="belongs to other weights") as error:
        lora.load(tmp_path, other, "gpt")
    assert "\n" not in str(error.value) and lora.base_hash(base)[:12] in str(error.value)


# the trainers


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base that ends its answers now and then, and data for every trainer, over a vocabulary of bytes."""
    home = tmp_path_factory.mktemp("lora")
    write_ranks(home / "bytes.tiktoken", {bytes([i]): i for i in range(256)})
    config = GPTConfig(block_size=96, vocab_size=257, n_layer=1, n_head=2, n_embd=16, dropout=0.5)
    gpt = GPT(config).init_weights(trainer.rng(0, "base"))
    with torch.no_grad():
        for p in gpt.parameters():  # a preamble should matter
            p.mul_(8 if p.dim() == 2 else 1)
        gpt.ln_f.bias.copy_(8 * gpt.wte.weight[256])  # end-of-text in about one token of ten
    trainer.save_model(home / "base.pt", config, gpt.state_dict(), "gpt", str(home / "bytes.tiktoken"))
    prompts = [f"\n\nHuman: {'ab' * n}?\n\nAssistant:" for n in range(1, 8)] * 4
    write(home / "prompts.jsonl", [{"prompt": p} for p in prompts])
    write(home / "completions.jsonl", [{"prompt": p, "completion": " yes", "stopped": True} for p in prompts] * 2)
    write(home / "pairs.jsonl", [{"prompt": p, "chosen": " a!", "rejected": " b."} for p in prompts])
    return home


COMMON = dict(lora_rank=4, device="cpu", dtype="fp32")


def sft_args(home, out, **changes):
    data = [str(home / "completions.jsonl")]
    args = pretrain.Args(
        data=data, out=str(out), init=str(home / "base.pt"), lr=1e-2, warmup=2, tokens_per_batch=256, eval_fraction=0, **COMMON
    )
    return replace(args, **changes)


def rm_args(home, out, **changes):
    args = train_rm.Args(
        out=str(out), init=str(home / "sft"), data=[str(home / "pairs.jsonl")], batch_size=6, lr=1e-2, **COMMON
    )
    return replace(args, **changes)


def ppo_args(home, out, **changes):
    args = train_ppo.Args(
        out=str(out), init=str(home / "sft"), reward_model=str(home / "rm"), data=str(home / "prompts.jsonl"), steps=2,
        batch_size=8, minibatch_size=4, lr=1e-2, value_lr=1e-2, max_new_tokens=8, **COMMON,
    )
    return replace(args, **changes)


def distill_args(home, out, **changes):
    args = distill.Args(
        model=str(home / "base.pt"), data=[str(home / "prompts.jsonl")], eval_data=str(home / "prompts.jsonl"),
        out=str(out), preamble="Be kind.", epochs=2, batch_size=4, max_new_tokens=32, **COMMON,
    )
    return replace(args, **changes)


@pytest.fixture(scope="module")
def runs(home):
    """SFT, reward model and PPO, all as adapters: home/sft, home/rm, home/rl; and the models that PPO had in memory."""
    pretrain.main(sft_args(home, home / "sft"))
    train_rm.main(rm_args(home, home / "rm"))
    load, kept = train_ppo.load_models, []
    with pytest.MonkeyPatch.context() as m:
        m.setattr(train_ppo, "load_models", lambda *a: kept.append(load(*a)) or kept[-1])
        train_ppo.main(ppo_args(home, home / "rl"))
    return home, kept[0]


def load_models(args):
    return train_ppo.load_models(args, trainer.tokenizer_of(args.init), CPU, None)


def test_ppo_has_one_base_which_is_the_merged_sft_policy_and_stays_it(runs):
    home, models = runs
    reference = models.ref_policy
    assert models.policy.base is reference is models.reward_model.gpt.base is models.value_model.gpt.base
    sft = trainer.load_gpt(home / "sft").state_dict()
    assert not same(sft, trainer.load_gpt(home / "base.pt").state_dict())
    assert same(reference.state_dict(), sft)  # after training, bit for bit
    assert same(models.reward_model.state_dict(), lora.load(home / "rm", reference, "reward").state_dict())
    rows = rows_of(home / "rl" / "metrics.jsonl")
    assert rows[0]["objective/kl"] == rows[0]["objective/kl_full"] == 0 < rows[-1]["objective/kl_full"]
    trained = lora.load(home / "rl", reference, "gpt")
    assert same(trained.state_dict(), models.policy.state_dict())
    assert same(trainer.load_gpt(home / "rl").state_dict(), trained.merged_state_dict())


def test_the_value_adapter_starts_as_the_reward_adapter(runs, batch):
    home, _ = runs
    models = load_models(ppo_args(home, home / "new"))
    assert same(models.value_model.state_dict(), models.reward_model.state_dict())
    trained = {p for group in models.value_optimizer.param_groups for p in group["params"]}
    assert trained == set(models.value_model.parameters()) and not trained & set(models.reward_model.parameters())


def test_a_full_reward_model_and_a_function_do_too(runs, monkeypatch, tmp_path):
    home, _ = runs
    reward = str(home / "rm" / "model.pt")  # the file is the merged model, which knows nothing of an adapter
    models = load_models(ppo_args(home, home / "new", reward_model=reward))
    assert isinstance(models.reward_model.gpt, GPT) and models.value_model.gpt.base is models.reward_model.gpt
    assert models.value_model.gain == models.reward_model.gain and models.policy.base is models.ref_policy
    (tmp_path / "mine.py").write_text("def score(prompts, responses):\n    return [float(len(r)) for r in responses]\n")
    monkeypatch.chdir(tmp_path)
    args = ppo_args(home, tmp_path / "run", reward_model="mine:score", steps=1)
    assert load_models(args).value_model.gpt.base is not None and train_ppo.main(args)["objective/kl"] == 0


def test_a_reward_adapter_of_another_base_is_an_error(runs, tmp_path):
    home, _ = runs
    with pytest.raises(UserError, match="rm: its adapter belongs to other weights"):
        train_ppo.main(ppo_args(home, tmp_path / "run", init=str(home / "base.pt")))
    argv = ["--out", str(tmp_path / "cli"), "--init", str(home / "base.pt"), "--reward-model", str(home / "rm")]
    with pytest.raises(SystemExit) as stop:
        cli.run(train_ppo.main, train_ppo.Args, [*argv, "--data", str(home / "prompts.jsonl"), "--lora-rank", "4"])
    assert stop.value.code == 2


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_lr_zero_keeps_kl_at_zero_and_the_ratio_at_one(runs, tmp_path, dtype):
    home, _ = runs
    metrics = train_ppo.main(ppo_args(home, tmp_path / "run", lr=0.0, dtype=dtype, ppo_epochs=1))
    assert metrics["objective/kl"] == metrics["objective/kl_full"] == metrics["policy/approx_kl"] == 0
    assert metrics["policy/ratio"] == pytest.approx(1, abs=1e-6)


def test_a_new_model_has_nothing_to_adapt(home, tmp_path):
    with pytest.raises(UserError, match="--lora-rank.*--init"):
        pretrain.main(sft_args(home, tmp_path / "run", init=None))


def test_distillation_through_an_adapter(home, tmp_path):
    distill.main(distill_args(home, tmp_path / "run", epochs=12, lr=3e-2))
    losses = [row["loss/kl"] for row in rows_of(tmp_path / "run" / "metrics.jsonl") if "loss/kl" in row]
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    assert lora.load(tmp_path / "run", trainer.load_gpt(home / "base.pt"), "gpt").rank == 4  # the teacher is as it was


TRAINERS = {
    "pretrain": (pretrain.main, sft_args),
    "train_rm": (train_rm.main, rm_args),
    "train_ppo": (train_ppo.main, ppo_args),
    "distill": (distill.main, distill_args),
}


@pytest.mark.parametrize("name, dtype", [("pretrain", "fp32"), ("train_rm", "bf16"), ("train_ppo", "fp32"), ("distill", "bf16")])
def test_resumed_is_uninterrupted_bit_for_bit_and_the_checkpoint_holds_no_base(runs, tmp_path, monkeypatch, name, dtype):
    home, _ = runs
    main, make_args = TRAINERS[name]
    whole, cut = (make_args(home, tmp_path / out, dtype=dtype) for out in ("whole", "cut"))
    main(whole)
    interrupted(monkeypatch, main, cut, after=1)
    for file in ("model.pt", "adapter.pt"):
        a, b = (torch.load(tmp_path / out / file, weights_only=True)["model"] for out in ("whole", "cut"))
        assert same(a, b)
    state = torch.load(tmp_path / "cut" / "state.pt", weights_only=True)["state"]
    models = [part for part in state.values() if isinstance(part, dict) and any("A." in key for key in part)]
    assert len(models) == (2 if name == "train_ppo" else 1)
    assert not any("wte" in key or "ln_f" in key for part in models for key in part)


def test_resume_reads_the_reward_adapter_that_it_began_with(runs, tmp_path, monkeypatch):
    home, rm = runs[0], tmp_path / "rm"
    shutil.copytree(home / "rm", rm)
    args = ppo_args(home, tmp_path / "run", reward_model=str(rm))

    def stop(run, step, make_state):
        run.save_state({"step": step, **make_state()})
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(trainer.Run, "end_step", stop)
        train_ppo.main(args)
    content = torch.load(rm / "adapter.pt", weights_only=True)
    content["model"]["gain"] *= 2
    torch.save(content, rm / "adapter.pt")
    with pytest.raises(UserError, match="rm has changed since this run began"):
        train_ppo.main(replace(args, resume=True))


def test_the_bench_of_memory_runs(capsys):
    (found,) = memory.main(memory.Args(quick=True, threads=1))
    full, adapters = found["full"]["trainable"], found["lora"]["trainable"]
    assert 0 < adapters < 0.1 * full and found["lora"]["peak"] > 0 and found["share"] < 1
    assert "| the demo's, 4 x 128 | fp32 |" in capsys.readouterr().out
