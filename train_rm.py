"""The reward model: a GPT with a scalar head, trained to agree with (soft) preferences.

Reads preferences.jsonl, or HH-RLHF files as they are published. Pairs that share a `group` (responses to one prompt)
are one batch element: every response is scored once and all labelled pairs enter the loss together. At the end the
scores are shifted and scaled to mean 0 and standard deviation 1 on reference samples, so that a KL coefficient means
the same whatever labels came in: labels clamped to 0.6 alone would ask for margins of 0.405.

Sources: Stiennon et al. 2020; Ouyang et al. 2022 (k-wise batches); Bai et al. 2022 (soft labels). Left out: preference
model pretraining, margins, ensembles. Dropout is off, as everywhere.
"""

import json
import math
import time
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from minirlaif import cli, data, ddp, lora, trainer
from minirlaif.cli import UserError
from minirlaif.heads import RewardModel
from minirlaif.losses import kwise_loss, preference_loss

TOKENS_PER_FORWARD = {"cpu": 1024, "mps": 8192, "cuda": 65536}  # more is no faster there, and memory grows with it


@dataclass
class Args:
    out: str = cli.arg(help="run folder to write")
    init: str = cli.arg(help="the language model to start from: model file or run folder")
    data: list[str] = cli.arg(help="preferences.jsonl or HH-RLHF files (.jsonl, .jsonl.gz)")
    eval_data: list[str] = cli.arg([], help="held-out files; none: a part of --data")
    eval_fraction: float = cli.arg(0.1, help="part of the prompts held out, without --eval-data, 0-0.2")
    normalise_on: str | None = cli.arg(None, help="completions.jsonl or preferences with the reference samples; none: --data")
    on_bad_row: str = cli.arg("error", help="a row that cannot be used: stop, or skip and count it", choices=["error", "skip"])
    epochs: int = cli.arg(1, help="passes over the data, 1-3; preferences are soon overfitted")
    batch_size: int = cli.arg(64, help="batch elements (pairs, or groups of pairs) an optimizer step, 16-128")
    lr: float = cli.arg(3e-4, help="peak learning rate, 1e-6 (large models) to 5e-4 (tiny ones): warmup, then cosine to a tenth")
    weight_decay: float = cli.arg(0.01, help="AdamW's decay of matrices, 0-0.1")
    max_grad_norm: float = cli.arg(1.0, help="clip the gradient's norm at this")
    lora_rank: int = cli.arg(0, help="rank of an adapter to train, not the weights, 4-64, at about 10 times the --lr; 0: none")
    seed: int = cli.arg(0, help="decides the split, the order and the head")
    device: str = cli.arg("auto", "auto takes cuda, mps or cpu, the first that is there", choices=["auto", "cpu", "cuda", "mps"])
    dtype: str = cli.arg("auto", "bf16 is autocast over fp32 weights; auto measures", choices=["auto", "fp32", "bf16"])
    resume: bool = cli.arg(False, help="continue the run in --out")


@dataclass
class Group:
    """Responses to one prompt, and the labels of their pairs: p[i, j] holds P(response i is better than j), i < j."""

    prompt: str
    texts: list[str] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)  # prompt + response + end-of-text
    p: dict[tuple[int, int], list[float]] = field(default_factory=dict)  # a pair may be labelled more than once

    def add(self, pair, p_first):
        """pair: two (text, ids)."""
        for text, ids in pair:
            if text not in self.texts:
                self.texts.append(text)
                self.ids.append(ids)
        i, j = (self.texts.index(text) for text, _ in pair)
        if i > j:
            i, j, p_first = j, i, 1 - p_first
        self.p.setdefault((i, j), []).append(p_first)


def main(args: Args):
    cli.require_positive(args, "epochs", "batch_size", "max_grad_norm")
    cli.require_not_negative(args, "weight_decay", "lr", "lora_rank")
    cli.require_share(args, "eval_fraction")
    device = ddp.start(trainer.resolve_device(args.device))
    with trainer.Run(args.out, args, args.resume) as run:
        if run.finished:
            return None
        tokenizer = trainer.tokenizer_of(args.init)
        gpt = lora.trainable(trainer.load_gpt(args.init, device), args.lora_rank, trainer.rng(args.seed, "adapter"))
        model = RewardModel(gpt, generator=trainer.rng(args.seed, "head")).eval()
        optimizer = trainer.configure_optimizer(model, args.lr, args.weight_decay)
        precision = trainer.autocast(device, run.resolve_dtype(device, gpt))

        def read(paths):
            return [group for path in paths for group in load_groups(path, tokenizer, gpt.config, args.on_bad_row)]

        train, held_out = read(args.data), read(args.eval_data)
        if not args.eval_data:
            train, held_out = split(train, args.eval_fraction, args.seed)
        reference = reference_samples(args, train, tokenizer, gpt.config)  # now: a wrong path should not cost a training
        steps_per_epoch = math.ceil(len(train) / args.batch_size)
        total = args.epochs * steps_per_epoch
        state, start = run.load_state(), 0
        if state:
            start = state["step"]
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])

        def make_state():
            return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

        progress = tqdm(range(start, total), "reward model", initial=start, total=total, mininterval=1, disable=ddp.rank() > 0)
        seen, started = 0, time.monotonic()
        for step in progress:
            epoch, place = divmod(step, steps_per_epoch)
            order = torch.randperm(len(train), generator=trainer.rng(args.seed, "order", epoch)).tolist()
            batch = [train[i] for i in order[place * args.batch_size : (place + 1) * args.batch_size]]
            for parameters in optimizer.param_groups:
                parameters["lr"] = args.lr * trainer.lr_at(step, total, total // 20, "cosine", min_ratio=0.1)
            loss, mine = 0.0, ddp.share(batch)
            for part in in_parts(mine, device) if mine else ():  # each weighs as many elements as it has: the mean is the batch's
                scores, p = score_groups(model, part, tokenizer.eot, precision)
                part_loss = kwise_loss(scores, p) * len(part) / len(batch)
                part_loss.backward()
                loss += part_loss.item()
            loss = ddp.total(torch.tensor(loss, device=device)).item()
            ddp.sum_gradients(model)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm).item()
            trainer.check_finite({"loss": loss, "gradient": norm})  # before the step that would spoil the weights
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seen += sum(len(ids) for group in batch for ids in group.ids)
            speed = seen / (time.monotonic() - started)
            metrics = {"loss/preference": loss, "loss/grad_norm": norm, "lr": optimizer.param_groups[0]["lr"]}
            metrics["tokens_per_second"] = speed
            if place + 1 == steps_per_epoch and step + 1 < total:
                metrics |= evaluate(model, held_out, tokenizer.eot, precision)
            run.log(step, **metrics)
            progress.set_postfix(loss=f"{loss:.3f}", tok_s=f"{speed:,.0f}", refresh=False)
            run.end_step(step + 1, make_state)

        metrics = evaluate(model, held_out, tokenizer.eot, precision) | length_heuristics(held_out)
        metrics |= normalise(model, reference, args.normalise_on or "--data", tokenizer.eot, precision)
        run.log(total, **metrics)
        lora.save(run.folder, model, "reward", tokenizer.name)
        run.finish()
    if not metrics.get("eval/pairs"):
        print(f"{args.out}: trained; no decided pair was held out, so its accuracy was not measured")
    else:
        low, high = metrics["eval/accuracy_low"], metrics["eval/accuracy_high"]
        print(f"{args.out}: held-out accuracy {metrics['eval/accuracy']:.3f} (95% interval {low:.3f} to {high:.3f}, "
              f"{metrics['eval/pairs']} pairs), loss {metrics['eval/loss']:.3f}; ln 2 is chance. The longer response is the "
              f"preferred one in {metrics['eval/longer_is_better']:.3f}, the shorter in {metrics['eval/shorter_is_better']:.3f}")
    return metrics


def load_groups(path, tokenizer, config, on_bad_row):
    """A preference file -> list[Group]; without the key `group`, each pair is a group of its own."""

    def encode(row):
        texts = row["chosen"], row["rejected"]
        return row, [(text, encode_checked(tokenizer, row["prompt"], text, True, config)) for text in texts]

    groups = {}
    rows = data.convert(data.read_preferences(path, on_bad_row), encode, on_bad_row)
    for number, (row, pair) in enumerate(rows):
        key = number if row.get("group") is None else (row["prompt"], json.dumps(row["group"]))
        groups.setdefault(key, Group(row["prompt"])).add(pair, row["p_chosen"])
    return list(groups.values())


def encode_checked(tokenizer, prompt, response, stopped, config):
    """Ids of prompt + response; BadRow where they do not fit into the context."""
    ids, prompt_len = data.encode_pair(tokenizer, prompt, response, stopped)
    data.check_length(prompt_len, len(ids) - prompt_len, config.block_size)
    return ids


def split(groups, fraction, seed):
    """(train, held out): by prompt, so that no prompt is on both sides."""
    prompts = sorted({group.prompt for group in groups})
    order = torch.randperm(len(prompts), generator=trainer.rng(seed, "split")).tolist()
    out = {prompts[i] for i in order[: round(fraction * len(prompts))]}
    train = [group for group in groups if group.prompt not in out]
    if not train:
        raise UserError(f"--eval-fraction {fraction}: nothing is left to train on")
    return train, [group for group in groups if group.prompt in out]


def in_parts(groups, device):
    """The groups cut into lists that go through a forward together: of like length, and of bounded memory."""
    lengths = [max(map(len, group.ids)) for group in groups]
    most = max(len(group.ids) for group in groups)
    budget = TOKENS_PER_FORWARD[device.type] // most
    batches = data.batches_by_tokens(lengths, budget, torch.Generator().manual_seed(0))
    return [[groups[i] for i in batch] for batch in batches]


def score_groups(model, groups, eot, precision):
    """One forward over all responses of the groups -> scores [N, k], and p [N, k, k] with NaN where there is no label."""
    device, k = model.gain.device, max(len(group.ids) for group in groups)
    tokens, length = data.pad([ids for group in groups for ids in group.ids], eot, 16, model.gpt.config.block_size)
    with precision:
        flat = model(data.to_device(tokens, device), data.to_device(length, device))  # [R], 2N for N pairs
    row = torch.zeros(len(groups), k, dtype=torch.long)
    p, first = torch.full((len(groups), k, k), math.nan), 0
    for n, group in enumerate(groups):
        row[n, : len(group.ids)] = torch.arange(first, first + len(group.ids))
        first += len(group.ids)
        for (i, j), labels in group.p.items():
            p[n, i, j] = sum(labels) / len(labels)  # the loss is linear in p: the mean label gives the mean loss
    return flat[data.to_device(row, device)], data.to_device(p, device)


@torch.no_grad()
def score_all(model, groups, eot, precision):
    """[(scores [N, k], p [N, k, k]), ...] over all groups."""
    return [score_groups(model, part, eot, precision) for part in in_parts(groups, model.gain.device)]


def evaluate(model, groups, eot, precision):
    """Loss and accuracy against the labels, pair by pair. A label of 0.5 is a tie: it counts in the loss only."""
    if not groups:
        return {}
    margins, labels = [], []
    for scores, p in score_all(model, groups, eot, precision):
        labelled = ~p.isnan()
        margins.append((scores[:, :, None] - scores[:, None, :])[labelled])
        labels.append(p[labelled])
    margin, label = torch.cat(margins), torch.cat(labels)
    decided = label != 0.5
    right = int(((margin > 0) == (label > 0.5))[decided].sum())
    pairs = int(decided.sum())
    low, high = wilson(right, pairs)
    return {
        "eval/loss": preference_loss(margin, torch.zeros_like(margin), label).item(),
        "eval/accuracy": right / max(1, pairs), "eval/accuracy_low": low, "eval/accuracy_high": high,
        "eval/pairs": pairs, "eval/ties": len(label) - pairs,
    }


def length_heuristics(groups):
    """Baselines that read nothing: how often the longer, and the shorter, response (in tokens) is the preferred one."""
    sides = []  # > 0: the longer one is preferred; 0: both are of one length
    for group in groups:
        for (i, j), labels in group.p.items():
            p = sum(labels) / len(labels)
            if p != 0.5:
                sides.append((len(group.ids[i]) - len(group.ids[j])) * (p - 0.5))
    n = max(1, len(sides))
    return {"eval/longer_is_better": sum(d > 0 for d in sides) / n, "eval/shorter_is_better": sum(d < 0 for d in sides) / n}


def reference_samples(args, train, tokenizer, config):
    """Ids of the samples on which scores shall have mean 0 and std 1: those of --normalise-on, or all of the training data."""
    path = args.normalise_on
    if path is None:
        return [ids for group in train for ids in group.ids]
    if "completion" in data.read_jsonl(path, on_bad_row=args.on_bad_row)[0]:
        return data.convert(
            data.read_completions(path, args.on_bad_row),
            lambda row: encode_checked(tokenizer, row["prompt"], row["completion"], row["stopped"], config),
            args.on_bad_row,
        )
    return [ids for group in load_groups(path, tokenizer, config, args.on_bad_row) for ids in group.ids]


def normalise(model, samples, where, eot, precision):
    """Scores of the reference samples (ids) to mean 0, std 1, through the model's gain and bias; their raw mean and std."""
    alone = [Group(prompt="", ids=[ids]) for ids in samples]
    scores = torch.cat([scores.flatten() for scores, _ in score_all(model, alone, eot, precision)])
    try:
        model.normalise(scores)
    except ValueError as e:
        raise UserError(f"{where}: {e}") from None
    return {"reference/mean": scores.mean().item(), "reference/std": scores.std().item(), "reference/samples": len(scores)}


def wilson(right, n, z=1.96):
    """95% interval of a proportion (Wilson 1927): honest at small n and near 0 and 1, unlike p +- 1.96 se."""
    if n == 0:
        return 0.0, 1.0
    p, zz = right / n, z * z / n
    centre, half = (p + zz / 2) / (1 + zz), z * math.sqrt(p * (1 - p) / n + zz / (4 * n)) / (1 + zz)
    return centre - half, centre + half


if __name__ == "__main__":
    cli.run(main, Args)
