"""All of RLAIF on the built-in toy world, from random weights to an aligned policy, in one command.

    python demo.py                  # about eight minutes on two CPU cores
    python demo.py --quick          # under 90 seconds, weaker results

Each stage is a script of this repository, called with the settings below; what it writes under --out is what the next one
reads. A stage that is done is skipped, so a run that was stopped goes on where it was.
"""

import json
import os
import platform
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import critique
import distill
import evaluate
import label
import pretrain
import train_ppo
import train_rm
from minirlaif import cli, corpus, data, world

HARMLESSNESS = ["danger", "insult", "bias", "ad", "harm", "evasion"]


@dataclass
class Args:
    out: str = cli.arg("runs/demo", "folder to write; stages that are done there are skipped")
    seed: int = cli.arg(0, "seed of every stage")
    quick: bool = cli.arg(False, "a tenth of the training, for a first look and for CI")
    device: str = cli.arg("auto", "auto takes cuda, mps or cpu, the first that is there", choices=["auto", "cpu", "cuda", "mps"])
    dtype: str = cli.arg("auto", "bf16 is autocast over fp32 weights; auto measures", choices=["auto", "fp32", "bf16"])


@dataclass
class Size:
    """What --quick makes smaller."""

    documents: int = 40000
    critique_prompts: int = 512
    helpful_samples: int = 512
    labels: int = 3000
    helpful_labels: int = 1500
    ppo_steps: int = 32
    distill_prompts: int = 1500
    held_out: int = 800


def main(args: Args) -> dict:
    out = Path(args.out)
    size = Size(8000, 128, 128, 500, 200, 4, 300, 500) if args.quick else Size()
    common = dict(seed=args.seed, device=args.device, dtype=args.dtype, resume=True)
    path = lambda *names: str(out.joinpath(*names))  # noqa: E731
    heldout, prompts, helpful = (
        path("world", "heldout.jsonl"),
        path("world", "prompts.jsonl"),
        path("world", "helpful.jsonl"),
    )
    base, sl, rl, rm = path("base"), path("sl_cai"), path("rl_cai"), path("rm")

    def make_labels(name, judge, prompts, limit, principles, seed=args.seed):
        return label.Args(
            policy=sl,
            contrast=base,
            judge=judge,
            data=prompts,
            limit=limit,
            principles=principles,
            out=path(name),
            **{**common, "seed": seed},
        )

    stages = {
        "world": (
            corpus.main,
            corpus.Args(out=path("world"), documents=size.documents, held_out=size.held_out, seed=args.seed),
        ),
        "pretrain": (pretrain.main, pretrain.Args(data=[path("world", "documents.jsonl")], out=base, epochs=2, **common)),
        "critique": (
            critique.main,
            critique.Args(model=base, prompts=prompts, limit=size.critique_prompts, out=path("critique"), **common),
        ),
        "helpful": (
            critique.main,
            critique.Args(model=base, prompts=helpful, limit=size.helpful_samples, rounds=0, out=path("helpful"), **common),
        ),
        "sl_cai": (
            pretrain.main,
            pretrain.Args(
                init=base,
                data=[path("critique", "completions.jsonl"), path("helpful", "completions.jsonl")],
                out=sl,
                lr=5e-4,
                epochs=2,
                **common,
            ),
        ),
        "label": (label.main, make_labels("labels", base, prompts, size.labels, HARMLESSNESS)),
        "label_helpful": (
            label.main,
            make_labels("labels_helpful", base, helpful, size.helpful_labels, ["helpfulness"]),
        ),
        "train_rm": (
            train_rm.main,
            train_rm.Args(
                init=sl,
                data=[path("labels", "preferences.jsonl"), path("labels_helpful", "preferences.jsonl")],
                out=rm,
                epochs=2,
                **common,
            ),
        ),
        "train_ppo": (
            train_ppo.main,
            train_ppo.Args(init=sl, reward_model=rm, data=prompts, steps=size.ppo_steps, out=rl, **common),
        ),
        "distill": (
            distill.main,
            distill.Args(
                model=base,
                prompts=prompts,
                limit=size.distill_prompts,
                eval_prompts=heldout,
                out=path("distilled"),
                **common,
            ),
        ),
        "label_heldout": (label.main, make_labels("labels_heldout", base, heldout, None, HARMLESSNESS, args.seed + 1)),
        "label_heldout_sl": (
            label.main,
            make_labels("labels_heldout_sl", sl, heldout, None, HARMLESSNESS, args.seed + 1),
        ),
        "evaluate": (
            evaluate.main,
            evaluate.Args(
                policies=[
                    f"base={base}",
                    f"prompted={base}+preamble",
                    f"distilled={path('distilled')}",
                    f"sl_cai={sl}",
                    f"rl_cai={rl}",
                ],
                prompts=heldout,
                ref=sl,
                baseline="sl_cai",
                judge=base,
                preferences=path("labels_heldout", "preferences.jsonl"),
                reward_model=rm,
                out=path("evaluate"),
                **common,
            ),
        ),
        "evaluate_sl_judge": (
            evaluate.main,
            evaluate.Args(preferences=path("labels_heldout_sl", "preferences.jsonl"), out=path("evaluate_sl_judge"), **common),
        ),
    }
    timing = out / "seconds.json"
    seconds = json.loads(timing.read_text()) if timing.exists() else {}
    started = time.monotonic()
    for i, (name, (stage, stage_args)) in enumerate(stages.items(), 1):
        if name in seconds:
            continue
        print(f"\n[{i}/{len(stages)}] {name}", flush=True)
        began = time.monotonic()
        stage(stage_args)
        seconds[name] = round(time.monotonic() - began, 1)
        with data.atomic_write(timing) as f:
            f.write(json.dumps(seconds).encode())
    results = collect(args, out, seconds)
    data_out = json.dumps(results, indent=2)
    with data.atomic_write(out / "results.json") as f:
        f.write(data_out.encode())
    with data.atomic_write(out / "report.md") as f:
        f.write(report(out, results).encode())
    print("\n" + evaluate.table(results["policies"]))
    print(f"\n{time.monotonic() - started:.0f} s; see {out / 'report.md'} and {out / 'results.json'}")
    return results


def collect(args: Args, out: Path, seconds: dict) -> dict:
    """results.json: what every stage reached, against gold, on held-out requests."""
    read = lambda *names: json.loads(out.joinpath(*names).read_text())  # noqa: E731
    found, sl_judge = read("evaluate", "results.json"), read("evaluate_sl_judge", "results.json")
    ppo = [json.loads(line) for line in (out / "rl_cai" / "metrics.jsonl").read_text().splitlines()]
    distilled = json.loads((out / "distilled" / "metrics.jsonl").read_text().splitlines()[-1])
    labels, reward = found["labels"], found["reward_model"]
    flat = lambda d, *keys: {k: v for key in keys for k, v in ((key, d[key]["value"]), (key + "_ci", d[key]["ci"]))}  # noqa: E731
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024**2 if sys.platform == "darwin" else 1024)
    return {
        "seed": args.seed,
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "dtype": read("base", "args.json").get("dtype"),
        },
        "seconds": {**seconds, "total": round(sum(seconds.values()), 1)},
        "peak_memory_mb": round(peak),
        "labeler": {
            **flat(labels, "agreement_principle", "agreement_overall", "agreement_unseen", "flip_rate", "one_order"),
            "sl_cai_judge_agreement": sl_judge["labels"]["agreement_principle"]["value"],
            "by_principle": labels["by_principle"],
            "failures": found["failures"],
            "n": labels["n"],
        },
        "reward_model": {**flat(reward, "gold_accuracy", "label_accuracy"), "n": reward["n"]},
        "ppo": {
            "kl_first": ppo[0]["objective/kl"],
            "kl_last": ppo[-1]["objective/kl"],
            "reward_first": ppo[0]["objective/scores"],
            "reward_last": ppo[-1]["objective/scores"],
        },
        "distill": {"kl_before": distilled["val/kl_before"], "kl_after": distilled["val/kl_after"]},
        "policies": found["policies"],
    }


def report(out: Path, results: dict) -> str:
    """report.md: the table, the judge against each kind of failure, three held-out requests, the curves."""
    labeler, reward = results["labeler"], results["reward_model"]
    lines = [
        f"# RLAIF on the toy world, seed {results['seed']}",
        "",
        f"{results['seconds']['total']:.0f} s, {results['peak_memory_mb']} MB, {results['machine']}",
        "",
        evaluate.table(results["policies"]),
        "",
        f"Judge against gold on held-out pairs (n = {labeler['n']}): {labeler['agreement_principle']:.3f} on the principle asked,"
        f" {labeler['agreement_overall']:.3f} on less harm in all, {labeler['agreement_unseen']:.3f} on what its text left out;"
        f" flip rate {labeler['flip_rate']:.3f}; the SL-CAI policy as judge {labeler['sl_cai_judge_agreement']:.3f}.",
        f"Reward model on the same pairs: {reward['gold_accuracy']:.3f} against gold,"
        f" {reward['label_accuracy']:.3f} against the labels.",
        "",
        "| a right answer against | principle | judge prefers the right one |",
        "| --- | --- | --- |",
        *(
            f"| {name} | {r['principle']} | {r['value']:.2f} [{r['ci'][0]:.2f}, {r['ci'][1]:.2f}] |"
            for name, r in labeler["failures"].items()
        ),
        "",
        "## Three held-out requests",
    ]
    samples = [json.loads(line) for line in (out / "evaluate" / "samples.jsonl").read_text().splitlines()]
    by_policy: dict[str, list] = {}
    for s in samples:
        by_policy.setdefault(s["policy"], []).append(s)
    for i in range(3):
        lines += ["", f"**{world.parse_request(samples[i]['prompt']).text}**", ""]
        lines += [f"- {name}: {rows[i]['response'].strip()}" for name, rows in by_policy.items()]
    if plot(out):
        lines += ["", "## Curves", "", "![reward, KL and losses](curves.png)"]
    return "\n".join(lines) + "\n"


def plot(out: Path) -> bool:
    """curves.png, if matplotlib is there."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError:
        print('no curves.png: matplotlib is not installed (pip install -e ".[plot]")')
        return False
    panels = [
        ("base", "loss/train", "pretraining loss (nats)"),
        ("rm", "loss/preference", "reward model loss (nats)"),
        ("rl_cai", "objective/scores", "PPO: score"),
        ("rl_cai", "objective/kl", "PPO: KL to SL-CAI (nats a response)"),
        ("distilled", "loss/kl", "distillation KL (nats a token)"),
    ]
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3), layout="constrained")
    for axis, (stage, key, title) in zip(axes, panels, strict=True):
        rows = [json.loads(line) for line in (out / stage / "metrics.jsonl").read_text().splitlines()]
        points = [(r["step"], r[key]) for r in rows if key in r]
        axis.plot(*zip(*points, strict=True))
        axis.set(title=title, xlabel="step")
    figure.savefig(out / "curves.png", dpi=80)
    plt.close(figure)
    return True


if __name__ == "__main__":
    cli.run(main, Args)
