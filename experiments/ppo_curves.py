"""What PPO does step by step: score, KL to the reference and gold, on the policy's own samples.

    python -m experiments.ppo_curves --runs runs/demo-0 runs/demo-1 runs/demo-2 --out runs/experiments/ppo_curves

The PPO stage of finished runs of demo.py again, with the same flags and --dump-rollouts for every sample, so that gold can say
of each step what its samples were worth: no sample is drawn for it, and PPO reads none of what is dumped. The score is the
reward model's, in standard deviations; the KL is the exact one, nats a response; gold harm is a mean over all samples of a
step, helpfulness over those of harmless requests.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import train_ppo
from experiments import common
from minirlaif import cli, data, world
from minirlaif.metrics import gold_of

TITLE = "PPO step by step"
CURVES = {
    "objective/scores": "score (standard deviations)",
    "objective/kl_full": "KL to SL-CAI (nats a response)",
    "harm": "gold harm",
    "helpfulness": "gold helpfulness",
}


@dataclass
class Args:
    runs: list[str] = cli.arg(help="out folders of demo.py, one a seed; the results are of these alone")
    out: str = cli.arg("runs/experiments/ppo_curves", "folder to write; what is done there is not done again")


def curves(folder: Path) -> dict[str, list[float]]:
    """{curve: a value a step} of a run of train_ppo that has dumped all of its rollouts."""
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = {name: [row.get(name) for row in metrics] for name in CURVES}
    for step in range(len(metrics)):
        rows = data.read_jsonl(folder / "rollouts" / f"{step:05d}.jsonl")
        golds = [gold_of(row) for row in rows]
        harmless = [not world.parse_request(row["prompt"]).harmful for row in rows]
        helpful = [gold.helpfulness for gold, asked in zip(golds, harmless, strict=True) if asked]
        found["harm"][step] = sum(gold.harm for gold in golds) / len(golds)
        found["helpfulness"][step] = sum(helpful) / len(helpful) if helpful else None
    return found


def report(found: dict[str, dict]) -> list[str]:
    lines = [f"# {TITLE}", ""]
    lines += ["Means of the first, the middle and the last four steps, on the policy's own samples.", ""]
    lines += ["| | " + " | ".join(found) + " |", "| --- |" + " --- |" * len(found)]
    for name, title in CURVES.items():
        cells = []
        for run in found.values():
            values, n = [v for v in run[name] if v is not None], len(run[name])
            parts = values[:4], values[n // 2 - 2 : n // 2 + 2], values[-4:]
            cells.append(" → ".join(f"{sum(part) / max(1, len(part)):.3f}" for part in parts))
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return lines


def plot(found: dict[str, dict], path: Path):
    plt = common.pyplot(path)
    if plt is None:
        return
    figure, axes = plt.subplots(1, len(CURVES), figsize=(4 * len(CURVES), 3), layout="constrained")
    for axis, (name, title) in zip(axes, CURVES.items(), strict=True):
        for run, values in found.items():
            axis.plot(values[name], label=run)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main(args: Args) -> dict:
    runs, began, found = common.named(args.runs), time.monotonic(), {}
    args.out = common.claim(args.out, TITLE)
    for name, run in runs.items():
        out = Path(args.out) / name
        demo = common.flags(f"{run}/rl_cai", train_ppo.Args)
        changes = dict(init=f"{run}/sl_cai", reward_model=f"{run}/rm", data=f"{run}/world/prompts.jsonl", out=str(out))
        train_ppo.main(common.flags(f"{run}/rl_cai", train_ppo.Args, **changes, dump_rollouts=demo.batch_size))
        found[name] = curves(out)
        common.write(args.out, found, report(found))
        plot(found, Path(args.out) / "ppo-curves.png")
    common.close(args.out, report(found), began)
    return found


if __name__ == "__main__":
    cli.run(main, Args, again="the same command goes on where it stopped")
