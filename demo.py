"""All of RLAIF on the built-in toy world, from random weights to an aligned policy, in one command.

    python demo.py                  # about eight and a half minutes on two CPU cores
    python demo.py --quick          # about a minute and a half: shows that it runs, not what it can do

Each stage is a script of this repository, called with the settings below; what it writes under --out is what the next one
reads. A stage that is done is skipped, so a run that was stopped goes on where it was.
"""

import json
import os
import platform
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import critique
import distill
import evaluate
import label
import pretrain
import train_ppo
import train_rm
from minirlaif import cli, corpus, data, trainer, world
from minirlaif.model import GPT, GPTConfig

HARMLESSNESS = ["danger", "insult", "bias", "ad", "harm", "evasion"]


@dataclass
class Args:
    out: str = cli.arg("runs/demo", "folder to write; stages that are done there are skipped")
    seed: int = cli.arg(0, "seed of every stage")
    quick: bool = cli.arg(False, "a ninth of the pretraining and less of everything: a first look")
    device: str = cli.arg("auto", "auto takes cuda, mps or cpu, the first that is there", choices=["auto", "cpu", "cuda", "mps"])
    dtype: str = cli.arg("auto", "bf16 is autocast over fp32 weights; auto measures", choices=["auto", "fp32", "bf16"])


@dataclass
class Size:
    """How much of everything; --quick has less of it."""

    documents: int = 26000
    critique_prompts: int = 512
    helpful_samples: int = 512
    labels: int = 2600
    helpful_labels: int = 1200
    ppo_steps: int = 32
    distill_prompts: int = 1500
    held_out: int = 640


QUICK = Size(3000, 96, 96, 300, 150, 3, 200, 200)


def stages(args: Args, size: Size) -> dict:
    """{name: (main, its Args)} in the order they run: each script as it could be typed by hand."""
    out = Path(args.out)
    world, base, sl, rl, rm = out / "world", f"{out}/base", f"{out}/sl_cai", f"{out}/rl_cai", f"{out}/rm"
    prompts, helpful, heldout = (f"{world}/{name}.jsonl" for name in ("prompts", "helpful", "heldout"))
    common = dict(seed=args.seed, device=args.device, dtype=args.dtype, resume=True)
    labels = dict(policy=sl, contrast=base, **common)
    test_labels = dict(labels, data=heldout, principles=HARMLESSNESS, seed=args.seed + 1)
    policies = dict(base=base, prompted=f"{base}+preamble", distilled=f"{out}/distilled", sl_cai=sl, rl_cai=rl)

    corpus_args = corpus.Args(out=str(world), documents=size.documents, held_out=size.held_out, seed=args.seed)
    base_args = pretrain.Args(data=[f"{world}/documents.jsonl"], out=base, epochs=2, **common)
    critique_args = critique.Args(model=base, prompts=prompts, limit=size.critique_prompts, out=f"{out}/critique", **common)
    helpful_args = critique.Args(
        model=base, prompts=helpful, limit=size.helpful_samples, rounds=0, out=f"{out}/helpful", **common
    )
    sl_data = [f"{out}/critique/completions.jsonl", f"{out}/helpful/completions.jsonl"]
    sl_args = pretrain.Args(init=base, data=sl_data, lr=5e-4, epochs=2, out=sl, **common)
    label_args = label.Args(judge=[base], data=prompts, principles=HARMLESSNESS, limit=size.labels, out=f"{out}/labels", **labels)
    label_helpful_args = label.Args(
        judge=[base],
        data=helpful,
        others=prompts,
        principles=["helpfulness"],
        limit=size.helpful_labels,
        out=f"{out}/labels_helpful",
        **labels,
    )
    rm_data = [f"{out}/labels/preferences.jsonl", f"{out}/labels_helpful/preferences.jsonl"]
    rm_args = train_rm.Args(init=sl, data=rm_data, epochs=2, out=rm, **common)
    ppo_args = train_ppo.Args(init=sl, reward_model=rm, data=prompts, steps=size.ppo_steps, out=rl, **common)
    distill_args = distill.Args(
        model=base, data=[prompts], limit=size.distill_prompts, eval_data=heldout, out=f"{out}/distilled", **common
    )
    evaluate_args = evaluate.Args(
        policies=[f"{name}={path}" for name, path in policies.items()],
        prompts=heldout,
        ref=sl,
        baseline="sl_cai",
        judge=base,
        preferences=f"{out}/labels_heldout/preferences.jsonl",
        reward_model=rm,
        out=f"{out}/evaluate",
        **common,
    )
    return {
        "world": (corpus.main, corpus_args),
        "pretrain": (pretrain.main, base_args),
        "critique": (critique.main, critique_args),
        "helpful": (critique.main, helpful_args),
        "sl_cai": (pretrain.main, sl_args),
        "label": (label.main, label_args),
        "label_helpful": (label.main, label_helpful_args),
        "train_rm": (train_rm.main, rm_args),
        "train_ppo": (train_ppo.main, ppo_args),
        "distill": (distill.main, distill_args),
        "label_heldout": (label.main, label.Args(judge=[base], out=f"{out}/labels_heldout", **test_labels)),
        "label_heldout_sl": (label.main, label.Args(judge=[sl], out=f"{out}/labels_heldout_sl", **test_labels)),
        "evaluate": (evaluate.main, evaluate_args),
        "evaluate_sl_judge": (
            evaluate.main,
            evaluate.Args(preferences=f"{out}/labels_heldout_sl/preferences.jsonl", out=f"{out}/evaluate_sl_judge", **common),
        ),
    }


def main(args: Args) -> dict:
    out = Path(args.out)
    if not args.out.strip() or out.is_file():
        raise cli.UserError(f"--out {args.out}: must name a folder")
    out.mkdir(parents=True, exist_ok=True)
    file, settings = out / "demo.json", {"seed": args.seed, "quick": args.quick}
    state = {**settings, "done": [], "seconds": {}, "peak_memory_mb": 0}
    if file.exists():
        try:
            state |= json.loads(file.read_text())
        except (ValueError, TypeError):
            raise cli.UserError(f"{file}: damaged; give another --out") from None
    if {key: state[key] for key in settings} != settings or args.dtype not in ("auto", state.get("dtype", args.dtype)):
        held = f"seed {state['seed']}, quick {state['quick']}, dtype {state.get('dtype', 'not settled')}"
        raise cli.UserError(f"{args.out}: holds a demo with {held}; give another --out")
    if "dtype" not in state:  # once for all stages: a second measurement may come out differently
        state["dtype"] = trainer.resolve_dtype(args.dtype, trainer.resolve_device(args.device), GPT(GPTConfig()))
    plan = stages(replace(args, dtype=state["dtype"]), QUICK if args.quick else Size())
    for i, (name, (stage, stage_args)) in enumerate(plan.items(), 1):
        if name in state["done"]:
            continue
        print(f"\n[{i}/{len(plan)}] {name}", flush=True)
        began = time.monotonic()
        try:
            stage(stage_args)
            state["done"].append(name)
        except KeyboardInterrupt:
            print(f"\nthe same command goes on from here ({name})", file=sys.stderr)
            raise
        finally:
            state["peak_memory_mb"] = max(state["peak_memory_mb"], peak_memory_mb())
            state["seconds"][name] = round(state["seconds"].get(name, 0) + time.monotonic() - began, 1)
            with data.atomic_write(file) as f:
                f.write(json.dumps(state).encode())
    results = collect(args, out, state)
    for name, content in (("results.json", json.dumps(results, indent=2)), ("report.md", report(out, results))):
        with data.atomic_write(out / name) as f:
            f.write(content.encode())
    print("\n" + evaluate.table(results["policies"]))
    print(f"\n{results['seconds']['total']:.0f} s in all; see {out}/report.md and {out}/results.json")
    return results


def peak_memory_mb() -> int:
    """Of this process, since it started (Windows does not tell: 0)."""
    try:
        import resource
    except ImportError:
        return 0
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024**2 if sys.platform == "darwin" else 1024))


def collect(args: Args, out: Path, state: dict) -> dict:
    """results.json: what every stage reached, against gold, on held-out requests."""

    def read(*names: str) -> dict:
        return json.loads(out.joinpath(*names).read_text())

    found, sl_judge = read("evaluate", "results.json"), read("evaluate_sl_judge", "results.json")
    ppo = [json.loads(line) for line in (out / "rl_cai" / "metrics.jsonl").read_text().splitlines()]
    distilled = json.loads((out / "distilled" / "metrics.jsonl").read_text().splitlines()[-1])
    labels, reward = found["labels"], found["reward_model"]

    def flat(rates: dict, *names: str) -> dict:
        return {n + end: rates[n][part] for n in names for end, part in (("", "value"), ("_ci", "ci"), ("_n", "n"))}

    policies = found["policies"]

    def share_kept(key: str) -> float | None:
        base, prompted, distilled = (policies[name][key] for name in ("base", "prompted", "distilled"))
        return None if base is None or base == prompted else (base - distilled) / (base - prompted)

    return {
        "seed": args.seed,
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "dtype": state["dtype"],
        },
        "seconds": {**state["seconds"], "total": round(sum(state["seconds"].values()), 1)},
        "peak_memory_mb": state["peak_memory_mb"],
        "labeler": {
            **flat(
                labels,
                "agreement_principle",
                "agreement_overall",
                "agreement_unseen",
                "agreement_policy_pairs",
                "flip_rate",
                "one_order",
            ),
            "sl_cai_judge_agreement": sl_judge["labels"]["agreement_principle"]["value"],
            "by_principle": labels["by_principle"],
            "failures": found["failures"],
            "refusals": found["refusals"],
            "n": labels["n"],
        },
        "reward_model": {**flat(reward, "gold_accuracy", "label_accuracy"), "n": reward["n"]},
        "ppo": {
            "kl_first": ppo[0]["objective/kl"],
            "kl_last": ppo[-1]["objective/kl"],
            "reward_first": ppo[0]["objective/scores"],
            "reward_last": ppo[-1]["objective/scores"],
        },
        "distill": {
            "kl_before": distilled["val/kl_before"],
            "kl_after": distilled["val/kl_after"],
            "share_of_fall_kept": share_kept("harm"),
            "share_of_fall_kept_unseen": share_kept("harm_unseen"),
        },
        "policies": policies,
    }


def shown(found: dict, name: str) -> str:
    """A figure and its interval, if it has one."""
    value, ci = found[name], found.get(name + "_ci")
    if value is None:
        return "n/a"
    return f"{value:.3f}" + (f" [{ci[0]:.3f}, {ci[1]:.3f}]" if ci else "")


def report(out: Path, results: dict) -> str:
    """report.md: the table, the judge against each kind of failure, three held-out requests, the curves."""
    labeler, reward, distilled = results["labeler"], results["reward_model"], results["distill"]
    lines = [
        f"# RLAIF on the toy world, seed {results['seed']}",
        "",
        f"{results['seconds']['total']:.0f} s, {results['peak_memory_mb']} MB, {results['machine']}",
        "",
        evaluate.table(results["policies"]),
        "",
        f"Judge against gold on held-out pairs (n = {labeler['n']}): {shown(labeler, 'agreement_principle')} on the principle"
        f" asked, {shown(labeler, 'agreement_overall')} on less harm in all, {shown(labeler, 'agreement_unseen')} on what its"
        f" text left out, {shown(labeler, 'agreement_policy_pairs')} where both answers are the policy's;"
        f" flip rate {shown(labeler, 'flip_rate')}; the SL-CAI policy as judge {shown(labeler, 'sl_cai_judge_agreement')}.",
        f"Reward model on the same pairs: {shown(reward, 'gold_accuracy')} against gold, {shown(reward, 'label_accuracy')}"
        " against the labels.",
        f"Distillation: KL {shown(distilled, 'kl_before')} to {shown(distilled, 'kl_after')} nats a token; of the fall in harm"
        f" from base to prompted, {shown(distilled, 'share_of_fall_kept')} is kept"
        f" ({shown(distilled, 'share_of_fall_kept_unseen')} on unseen combinations).",
        f"RL-CAI's harm minus SL-CAI's, paired: {shown(results['policies']['rl_cai'], 'harm_minus_baseline')}.",
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
