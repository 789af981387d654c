"""PPO: raise a policy's reward without letting it drift from its reference. To be read top to bottom.

Four models take part. The policy (--init, the supervised model) learns; a frozen copy of it is the reference; the reward
model, or a labeler or Python function in its place, scores whole responses; the value model, a copy of the reward model
(of the policy, where there is none), learns to predict what is still to come. Each step samples a batch from the policy,
turns scores and KL into advantages, and takes ppo_epochs x minibatches steps of both optimizers; then the samples are
thrown away.

Sources: Ziegler et al. 2019; Stiennon et al. 2020 (a separate value model that starts from the reward model);
Huang et al. 2023, 2024 (the details). Left out: pretraining gradients (PPO-ptx), a discount (gamma is 1 in all
of these papers), vf_coef (the value model has its own optimizer: --value-lr), an entropy bonus.
"""

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from minirlaif import cli, data, ddp, lora, ppo, rewards, rollouts, trainer
from minirlaif.cli import UserError
from minirlaif.heads import RewardModel, ValueModel
from minirlaif.model import GPT, response_mask, token_logprobs
from minirlaif.sampling import Samples, gather, generate

TOKENS_PER_FORWARD = {"cpu": 1024, "mps": 8192, "cuda": 65536}  # more is no faster there, and memory grows with it

REFERENCE_SAMPLES = 256  # of the reference, on which a labeler's or a function's scores are normalised
FP32 = nullcontext()


@dataclass
class Args:
    out: str = cli.arg(help="run folder to write")
    init: str = cli.arg(help="the policy to start from: model file or run folder")
    reward_model: str = cli.arg(help="who scores: a run of train_rm.py, judge:PATH (d-RLAIF), or module:function (rewards.py)")
    data: str = cli.arg(help="prompts.jsonl, or an HH-RLHF file (its prompts are used)")
    on_bad_row: str = cli.arg("error", help="a row that cannot be used: stop, or skip and count it", choices=["error", "skip"])
    ref: str | None = cli.arg(None, help="the frozen reference, where it is not a copy of --init")
    steps: int = cli.arg(36, help="batches of samples to learn from, 10-1000")
    batch_size: int = cli.arg(128, help="samples a step, 32-512")
    minibatch_size: int = cli.arg(32, help="samples an optimizer step, 8-128")
    ppo_epochs: int = cli.arg(2, help="passes over each batch, 1-4")
    lr: float = cli.arg(5e-5, help="learning rate of the policy, linear to 0; 1e-6 (large models) to 1e-4 (tiny ones)")
    value_lr: float = cli.arg(3e-4, help="learning rate of the value model, linear to 0; 1e-6 to 1e-3")
    kl_coef: float = cli.arg(0.1, help="what a nat of drift costs, in standard deviations of the score, 0.01-0.2")
    kl_target: float | None = cli.arg(None, help="nats a response to steer the KL to, by adapting kl_coef, 1-10; none: fixed")
    kl_horizon: float = cli.arg(10_000, help="samples that such a correction takes, 1000-100000")
    max_approx_kl: float | None = cli.arg(None, help="end a step's updates where approx_kl passes this, 0.01-0.1")
    whiten_rewards: bool = cli.arg(False, help="scale each batch's rewards to variance 1 (their mean stays)")
    cliprange: float = cli.arg(0.2, help="how far the ratio to the sampling policy may pay, either way of 1, 0.1-0.3")
    cliprange_value: float = cli.arg(0.2, help="how far a value may pay to move, in standard deviations of the score, 0.1-0.5")
    lam: float = cli.arg(0.95, help="lambda of GAE, 0.9-1; 1 is the whole return, 0 one step")
    temperature: float = cli.arg(1.0, help="of sampling, and so of all log-probs, 0.7-1")
    max_new_tokens: int = cli.arg(32, help="longest response in tokens, end-of-text included, 16-256")
    min_new_tokens: int | None = cli.arg(None, help="draw each batch's limit from this to --max-new-tokens (no cap then)")
    missing_eos_penalty: float | None = cli.arg(-1.0, help="cap on the score of a response without an end, -3 to 0; inf: off")
    dump_rollouts: int = cli.arg(0, help="responses a step to write, token by token, for evaluate.py tokens, 0-128")
    lora_rank: int = cli.arg(0, help="rank of an adapter to train, not the weights, 4-64, at about 10 times the --lr; 0: none")
    seed: int = cli.arg(0, help="decides prompts, samples and minibatches")
    device: str = cli.arg("auto", "auto takes cuda, mps or cpu, the first that is there", choices=["auto", "cpu", "cuda", "mps"])
    dtype: str = cli.arg("auto", "bf16 is autocast over fp32 weights; auto measures", choices=["auto", "fp32", "bf16"])
    resume: bool = cli.arg(False, help="continue the run in --out")


class Models(NamedTuple):
    policy: GPT | lora.Adapter
    ref_policy: GPT  # frozen
    reward_model: RewardModel | rewards.TextReward  # frozen
    value_model: ValueModel
    policy_optimizer: torch.optim.Optimizer
    value_optimizer: torch.optim.Optimizer


@torch.no_grad()
def score(models: Models, samples: Samples, parts, temperature, precision):
    """What all four models say of the samples: dict of tokens, mask, logprobs, ref_logprobs, values, entropy [B, T],
    scores [B], and the exact KL to the reference summed over all tokens. `parts` are the index tensors that go through a
    forward together; of several processes each scores its own, and all get the whole."""
    length = samples.length.cpu()
    limit = min(gpt.config.block_size for gpt in (models.policy, models.ref_policy, models.value_model.gpt))
    T = max(ppo.padded_length(length, limit), samples.tokens.shape[1])
    tokens = F.pad(samples.tokens, (0, T - samples.tokens.shape[1]))
    mask = response_mask(samples.prompt_len, samples.length, T)
    logprobs, ref_logprobs, values, entropy = torch.zeros(4, *tokens.shape, device=tokens.device)
    scores, kl_full = torch.zeros(len(tokens), device=tokens.device), torch.zeros((), device=tokens.device)
    reads_text = isinstance(models.reward_model, rewards.TextReward)
    if reads_text:
        rows = ddp.share(torch.arange(len(tokens)))
        scores[rows] = models.reward_model(samples)[rows].to(tokens.device)
    for rows in parts:
        width = ppo.padded_length(length[rows], T)  # the shape that the update will use
        t, m = tokens[rows, :width], mask[rows, :width]
        with precision:
            logprobs[rows, :width], entropy[rows, :width] = token_logprobs(models.policy, t, m, temperature)
            ref_logprobs[rows, :width], _ = token_logprobs(models.ref_policy, t, m, temperature)
            values[rows, :width] = models.value_model(t, m)
            kl_full += ppo.full_kl(models.policy, models.ref_policy, t, m, temperature).sum()
            if not reads_text:
                scores[rows] = models.reward_model(t, samples.length[rows])
    result = {"logprobs": logprobs, "ref_logprobs": ref_logprobs, "values": values, "entropy": entropy, "scores": scores}
    result["kl_full"] = kl_full
    result = {name: ddp.total(x) for name, x in result.items()}  # each process has filled in its rows
    trainer.check_finite(result)
    return {"tokens": tokens, "mask": mask, **result}


def ppo_step(models: Models, samples: Samples, args: Args, kl_coef, step, precision=FP32, dump=None):
    """Steps 2 to 5: learn from one batch of samples -> metrics. FloatingPointError: something is not finite.

    dump: called with the rollout, its ref_logprobs and rewards [B, T], and scores [B], before the update."""
    # The minibatches are drawn first: the log-probs of the rollout come from the very forwards of the first epoch, so
    # its ratios are 1 exactly, and not 1 up to the rounding of another shape.
    length, budget = samples.length.cpu(), TOKENS_PER_FORWARD[samples.tokens.device.type]
    generators = (trainer.rng(args.seed, "minibatches", step, epoch) for epoch in range(args.ppo_epochs))
    epochs = [ppo.split_rows(length, args.minibatch_size, budget, g) for g in generators]

    # 2. Score the samples with all four models
    parts = [rows for minibatch in epochs[0] for rows in minibatch]
    x = score(models, samples, parts, args.temperature, precision)
    mask, log_ratio = x["mask"], x["logprobs"] - x["ref_logprobs"]

    # 3. Rewards: the KL penalty on every token, the score on the last
    # a limit that was drawn at random is not the policy's doing
    penalty = args.missing_eos_penalty if args.min_new_tokens is None else None
    scores = ppo.penalise_missing_eos(x["scores"], samples.stopped, penalty)
    token_rewards = ppo.shape_rewards(scores, x["logprobs"], x["ref_logprobs"], mask, kl_coef)
    if args.whiten_rewards:
        token_rewards = ppo.masked_whiten(token_rewards, mask, shift_mean=False)
    trainer.check_finite({"rewards": token_rewards})

    # 4. Advantages, whitened over the whole batch; the returns are taken before that
    advantages, returns = ppo.gae(token_rewards, x["values"], mask, gamma=1.0, lam=args.lam)
    advantages = ppo.masked_whiten(advantages, mask, shift_mean=True)
    rollout = ppo.Rollout(x["tokens"], mask, length, x["logprobs"], x["values"], advantages, returns)
    if dump is not None:
        dump(rollout, x["ref_logprobs"], token_rewards, scores)

    if step == 0 and parts:  # a wrong reference, dropout, or log-probs of another forward would show here
        part = rollout.select(parts[0])
        with precision:
            now = token_logprobs(models.policy, part.tokens, part.mask, args.temperature)[0].detach()  # frees its graph
        drift = {"log ratio": (now - part.logprobs).abs().max().item()}
        drift["KL to the reference"] = 0.0 if args.ref else log_ratio.abs().max().item()
        tolerance = 0.05 if isinstance(precision, torch.autocast) else 1e-5  # on a CPU both are 0
        assert max(drift.values()) <= tolerance, f"before the first update all of these should be 0: {drift}"

    # 5. Update: ppo_epochs x minibatches steps of both optimizers
    stats = ppo.update(
        models.policy, models.value_model, models.policy_optimizer, models.value_optimizer, rollout, epochs,
        cliprange=args.cliprange, cliprange_value=args.cliprange_value, temperature=args.temperature,
        max_approx_kl=args.max_approx_kl, precision=precision,
    )
    kl = log_ratio.sum(1).mean().item()  # nats a response
    return stats | {
        "objective/scores": x["scores"].mean().item(),
        "objective/scores_std": x["scores"].std(correction=0).item(),
        "objective/kl": kl,
        "objective/kl_k3": torch.where(mask, ppo.k3(log_ratio), 0.0).sum(1).mean().item(),
        "objective/kl_full": x["kl_full"].item() / len(mask),
        "objective/non_score_reward": -kl_coef * kl,
        "objective/rlhf_reward": scores.mean().item() - kl_coef * kl,
        "objective/entropy": ppo.masked_mean(x["entropy"], mask).item(),  # nats a token
        "objective/missing_eos": (~samples.stopped).float().mean().item(),
        "objective/response_tokens": mask.sum(1).float().mean().item(),
        "objective/kl_coef": kl_coef,
        "val/values": ppo.masked_mean(x["values"], mask).item(),
        "val/explained_variance": ppo.explained_variance(x["values"], returns, mask).item(),
    }


def main(args: Args):
    numbers = ("steps", "batch_size", "minibatch_size", "ppo_epochs", "max_new_tokens", "temperature", "kl_target")
    cli.require_positive(args, *numbers, "kl_horizon", "cliprange", "cliprange_value", "max_approx_kl", "min_new_tokens")
    cli.require_not_negative(args, "kl_coef", "lr", "value_lr", "dump_rollouts", "lora_rank")
    if not 0 <= args.lam <= 1:
        raise UserError(f"--lam {args.lam}: must be in 0-1")
    if args.missing_eos_penalty is not None and not args.missing_eos_penalty > -math.inf:
        raise UserError(f"--missing-eos-penalty {args.missing_eos_penalty}: must be a number, or inf for none")
    if args.min_new_tokens is not None and args.min_new_tokens > args.max_new_tokens:
        raise UserError(f"--min-new-tokens {args.min_new_tokens}: more than --max-new-tokens {args.max_new_tokens}")
    if args.kl_target is not None and not (args.kl_coef > 0 and args.kl_horizon >= args.batch_size):
        raise UserError("--kl-target: needs a --kl-coef above 0 to adapt, and a --kl-horizon of at least --batch-size samples")
    if min(args.batch_size, args.minibatch_size) < ddp.world():
        raise UserError(f"--batch-size, --minibatch-size: fewer rows than the {ddp.world()} processes")
    device = ddp.start(trainer.resolve_device(args.device))
    with trainer.Run(args.out, args, args.resume) as run:
        if run.finished:
            return None
        tokenizer = trainer.tokenizer_of(args.init, *([args.ref] if args.ref else []))
        models = load_models(args, tokenizer, device, lambda model: run.resolve_dtype(device, model))
        prompts = load_prompts(args, tokenizer, models)
        precision = trainer.autocast(device, run.resolve_dtype(device, models.policy))
        kl = ppo.AdaptiveKL(args.kl_coef, args.kl_target, args.kl_horizon)
        parts = {name: part for name, part in models._asdict().items() if name not in ("ref_policy", "reward_model")}

        state, start, metrics = run.load_state(), 0, {}
        if state:
            start, kl.kl_coef, metrics = state["step"], state["kl_coef"], state["metrics"]
            for name, part in parts.items():
                part.load_state_dict(state[name])

        def sample(model, step, batch_size, *key):
            batch = [prompts[i] for i in ddp.share(pick(len(prompts), step, batch_size, args.seed))]
            noise, n = trainer.rng(args.seed, "sample", *key).initial_seed(), args.max_new_tokens
            if args.min_new_tokens is not None:
                n = torch.randint(args.min_new_tokens, n + 1, (), generator=trainer.rng(args.seed, "limit", *key)).item()
            with precision:  # no top-k or top-p: a policy that leaves out tokens is another policy
                rows = ddp.share(range(batch_size))
                return gather(generate(model, batch, n, tokenizer.eot, args.temperature, seed=noise, rows=rows))

        scale = {}
        if isinstance(models.reward_model, rewards.TextReward):
            if state:
                models.reward_model.mean, models.reward_model.std = state["scale"].values()
            else:
                print(f"{args.out}: scoring {REFERENCE_SAMPLES} samples of the reference, to normalise by", flush=True)
                # in several batches, each with its own limit where that is drawn, as in training
                batches = [sample(models.ref_policy, i, REFERENCE_SAMPLES // 16, "reference", i) for i in range(16)]
                models.reward_model.normalise(batches)
            scale = {"reference/mean": models.reward_model.mean, "reference/std": models.reward_model.std}

        def make_state():
            weights = {name: part.state_dict() for name, part in parts.items()}
            return {"kl_coef": kl.kl_coef, "metrics": metrics, "scale": scale, **weights}

        progress = tqdm(range(start, args.steps), "ppo", initial=start, total=args.steps, mininterval=1, disable=ddp.rank() > 0)
        for step in progress:
            began = time.perf_counter()
            learning_rates = anneal(models, args, step)

            # 1. Sample: the policy continues a batch of prompts
            samples = sample(models.policy, step, args.batch_size, step)

            # 2. to 5. Score, reward, advantages, update
            dump = None
            if args.dump_rollouts and ddp.rank() == 0:
                path = run.folder / "rollouts" / f"{step:05d}.jsonl"  # one file a step: a step done again writes it again
                dump = partial(rollouts.write, path, step, tokenizer, samples.stopped, args.dump_rollouts)
            metrics = ppo_step(models, samples, args, kl.kl_coef, step, precision, dump)
            kl.update(metrics["objective/kl"], args.batch_size)

            # 6. Log, and save now and then
            metrics |= learning_rates | (scale if step == 0 else {})
            tokens = metrics["objective/response_tokens"] * args.batch_size
            metrics["speed/tokens_per_second"] = tokens / (time.perf_counter() - began)
            run.log(step, **metrics)
            progress.set_postfix({name: f"{metrics[f'objective/{name}']:.3f}" for name in ("scores", "kl")}, refresh=False)
            run.end_step(step + 1, make_state)

        lora.save(run.folder, models.policy, "gpt", tokenizer.name)
        run.finish()
    print(f"{args.out}: score {metrics['objective/scores']:.3f} at {metrics['objective/kl']:.2f} nats from the reference")
    return metrics


def load_models(args, tokenizer, device, dtype_of):
    """All models and optimizers. The frozen ones are read again on resume; Run checks that their files are the same.

    With --lora-rank, policy and value model are adapters, and so is the reward model if it was trained as one: all on one base,
    the reference. (The value model of a reward model that was trained in full is an adapter on that.)
    """
    base = trainer.load_gpt(args.init, device).requires_grad_(False)
    policy = lora.trainable(base, args.lora_rank, trainer.rng(args.seed, "policy adapter"))
    ref_policy = trainer.load_gpt(args.ref, device).requires_grad_(False) if args.ref else base
    if args.lora_rank and (Path(args.reward_model) / "adapter.pt").exists():
        reward_model = lora.load(args.reward_model, base, "reward")
    else:
        reward_model = rewards.load(args.reward_model, tokenizer, device, dtype_of)
    source = base
    if isinstance(reward_model, RewardModel):
        trainer.tokenizer_of(args.init, args.reward_model)
        source = reward_model.requires_grad_(False).eval()
    trunk = lora.trainable(getattr(source, "gpt", source), args.lora_rank, trainer.rng(args.seed, "value adapter"))
    value_model = ValueModel(source, trunk)
    # Adam's eps is 1e-5 in PPO code since the first: it keeps steps small while gradients are
    optimizers = [
        trainer.configure_optimizer(model, lr, weight_decay=0.0, eps=1e-5)
        for model, lr in ((policy, args.lr), (value_model, args.value_lr))
    ]
    # dropout is off, also while training: the policy that is scored must be the policy that sampled
    return Models(policy.eval(), ref_policy.eval(), reward_model, value_model.eval(), *optimizers)


def load_prompts(args, tokenizer, models):
    """Lists of ids, each short enough to leave room for a response in every model's context."""
    room = min(m.config.block_size for m in (models.policy, models.ref_policy, models.value_model.gpt))
    data.check_room(args.max_new_tokens, room)

    def encode(row):
        ids = tokenizer.encode(row["prompt"])
        data.check_length(len(ids), args.max_new_tokens, room)
        return ids

    return data.convert(data.read_prompts(args.data, args.on_bad_row), encode, args.on_bad_row)


def pick(n, step, batch_size, seed):
    """Which of n prompts make up a step's batch: all in a new random order, round after round."""
    places = range(step * batch_size, (step + 1) * batch_size)
    orders = {i // n: None for i in places}
    orders = {turn: torch.randperm(n, generator=trainer.rng(seed, "prompts", turn)).tolist() for turn in orders}
    return [orders[i // n][i % n] for i in places]


def anneal(models, args, step):
    """Set both learning rates for this step, linear to 0, and return them as metrics."""
    left = trainer.lr_at(step, args.steps, kind="linear")
    rates = {"lr/policy": args.lr * left, "lr/value": args.value_lr * left}
    for optimizer, rate in zip((models.policy_optimizer, models.value_optimizer), rates.values(), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
    return rates


if __name__ == "__main__":
    cli.run(main, Args)
