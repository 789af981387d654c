"""How the labels' form decides what a reward model learns: soft, hard, overconfident, clamped; and k-wise against shuffled.

    python -m experiments.label_quality --runs runs/demo-0 runs/demo-1 runs/demo-2 --out runs/experiments/label_quality

1. The same pairs of a finished demo.py, with their labels p = P(chosen is better) rewritten, and a reward model from each with
that run's own flags:

    soft                  as the judge gave them
    hard                  p = 1
    overconfident         logit p x 4: the same judge, four times as sure (hard labels from it would be `hard` again)
    overconfident 40-60   those, kept within 0.4-0.6
    soft 40-60            the judge's own, kept within 0.4-0.6

Measured: the share of held-out pairs on which the reward model sides with gold (less harm in all); the labels' calibration error
(ECE) against gold on what their principles ask; and the standard deviation of the scores before they are normalised, since a
label of 0.6 asks for a margin of 0.405 and no more: without normalising, clamping would also weaken the reward against the KL.
A label beyond 0.5 keeps its side in all five: only its strength differs. Some seven pairs in ten do not differ in what their
principle asks (both are polite, say); there the best label is 0.5, a hard one is a coin that is believed, and that counts in ECE.

Bai et al. 2022 find soft labels much better than hard ones, and the labels of a judge that reasons (near 0 and 1) better when
clamped to 20-80 and best at 40-60; they print no table of it. One would expect soft to win where the judge is calibrated, and
clamping to help where it is not.

2. Four responses a prompt from the SL-CAI policy (and, as in the demo, some from elsewhere), all six pairs labelled by the base:
one batch element a prompt, against the same pairs shuffled, each an element of its own, with six times the batch size. So both
see every pair once an epoch, in the same number of equal optimizer steps, under the same schedule, with the same prompts held
out. Prompts on which fewer than six pairs could be labelled are left out, or the batches would not be equal. Measured: validation
loss by epoch.

Ouyang et al. 2022 keep all pairs of a prompt in one element, since shuffled ones overfitted in a single pass.
"""

import json
import math
import random
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch

import label
import train_rm
from demo import HARMLESSNESS
from experiments import common
from minirlaif import cli, comparison, data, trainer
from minirlaif.labelers import logit
from minirlaif.losses import preference_loss
from minirlaif.metrics import gold_prefers_chosen

TITLE = "Soft, hard, overconfident and clamped labels; k-wise and shuffled pairs"
RESPONSES, PAIRS = 4, 6  # a prompt
WAYS = {"k-wise": 1, "shuffled": PAIRS}  # batch elements a prompt
GROUPS_A_STEP, HELD_OUT = 16, 0.2


def overconfident(p: float) -> float:
    return 1 / (1 + math.exp(-4 * logit(p)))


FORMS = {  # p_chosen in [0.5, 1] -> the same
    "soft": lambda p: p,
    "hard": lambda p: 1.0 if p > 0.5 else p,
    "overconfident": overconfident,
    "overconfident 40-60": lambda p: min(overconfident(p), 0.6),
    "soft 40-60": lambda p: min(p, 0.6),
}
DIFFERENCES = [("soft", "hard"), ("overconfident", "soft"), ("overconfident 40-60", "overconfident"), ("soft 40-60", "soft")]


@dataclass
class Args:
    runs: list[str] = cli.arg(help="out folders of demo.py, one a seed; the results are of these alone")
    out: str = cli.arg("runs/experiments/label_quality", "folder to write; what is done there is not done again")
    labels: int = cli.arg(2000, "pairs to train on for each form of label, drawn once for all, 500-3000")
    prompts: int = cli.arg(600, "prompts with four responses each, 300-1000; six in ten give all six pairs")
    epochs: int = cli.arg(4, "passes over the k-wise and the shuffled pairs, 1-8")


# ---- 1. the form of a label -----------------------------------------------------------------------------------------


def reshape(rows: list[dict], form: str) -> list[dict]:
    """The same preferences, their labels in this form."""
    return [row | {"p_chosen": FORMS[form](row["p_chosen"])} for row in rows]


def reward_model(run: str, out: str, **changes) -> list[dict]:
    """Train one with the demo's flags, but for these -> the lines of its metrics.jsonl."""
    train_rm.main(common.flags(f"{run}/rm", train_rm.Args, init=f"{run}/sl_cai", out=out, **changes))
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


@torch.no_grad()
def margins(out: str, rows: list[dict]) -> list[float]:
    """score(chosen) - score(rejected) by the reward model in `out`, in standard deviations of its scores."""
    info, found = json.loads((Path(out) / "args.json").read_text()), []
    device = trainer.resolve_device(info["args"]["device"])
    model, tokenizer = trainer.load_reward(out, device), trainer.tokenizer_of(out)
    for i in range(0, len(rows), 64):
        part = rows[i : i + 64]
        sides = [data.encode_pair(tokenizer, r["prompt"], r[key])[0] for key in ("chosen", "rejected") for r in part]
        tokens, length = data.pad(sides, tokenizer.eot, 16, model.gpt.config.block_size)
        with trainer.autocast(device, info["dtype"]):
            chosen, rejected = model(tokens.to(device), length.to(device)).chunk(2)
        found += (chosen - rejected).tolist()
    return found


def calibration_error(rows: list[dict]) -> float:
    """ECE of the labels against gold on what their principles ask; where gold sees no difference, a label is half right."""
    right = [gold_prefers_chosen(row, row["principle_name"]) for row in rows]
    return comparison.ece([row["p_chosen"] for row in rows], [0.5 if r is None else float(r) for r in right])


def label_forms(args: Args, run: str, out: str, held_out: list[dict]) -> dict:
    """{form: {"right": of each held-out pair, does the reward model side with gold, "std", "ece"}}."""
    files = [f"{run}/{name}/preferences.jsonl" for name in ("labels", "labels_helpful")]
    rows = [row for file in files for row in data.read_preferences(file)]
    if len(rows) > args.labels:
        rows = random.Random("pairs").sample(rows, args.labels)
    gold, found = [gold_prefers_chosen(row, "harm") for row in held_out], {}
    for form in FORMS:
        folder = f"{out}/{form.replace(' ', '-')}"
        file = f"{folder}/preferences.jsonl"
        if not Path(file).exists():
            data.write_jsonl(file, reshape(rows, form))
        logged = reward_model(run, f"{folder}/rm", data=[file])
        found[form] = {
            "right": [(m > 0) == g for m, g in zip(margins(f"{folder}/rm", held_out), gold, strict=True)],
            "std": logged[-1]["reference/std"],
            "ece": calibration_error(reshape(held_out, form)),
        }
    return found


# ---- 2. k-wise against shuffled -------------------------------------------------------------------------------------


def ranked_pairs(args: Args, run: str, out: str) -> list[dict]:
    """Preferences among four responses a prompt, of the prompts that gave all six."""
    demo = common.flags(f"{run}/rm", train_rm.Args)  # its seed, device and dtype, which all stages share
    label.main(
        label.Args(
            out=out,
            judge=[f"{run}/base"],
            policy=f"{run}/sl_cai",
            contrast=f"{run}/base",
            data=f"{run}/world/prompts.jsonl",
            responses=RESPONSES,
            principles=HARMLESSNESS,
            limit=args.prompts,
            seed=demo.seed,
            device=demo.device,
            dtype=demo.dtype,
            resume=True,
        )
    )
    groups = defaultdict(list)
    for row in data.read_preferences(f"{out}/preferences.jsonl"):
        groups[row["group"]].append(row)
    whole = [rows for rows in groups.values() if len(rows) == PAIRS]
    if len(whole) < 2:
        raise cli.UserError(f"{out}: {len(whole)} prompts gave all {PAIRS} pairs; give a higher --prompts, or a better policy")
    return [row for rows in whole for row in rows]


def kwise_and_shuffled(args: Args, run: str, out: str) -> dict:
    """{way: {"epochs": validation loss after each, "steps", "losses": of each held-out pair at the end}}, and "rows", those."""
    pairs, found = ranked_pairs(args, run, f"{out}/labels"), {}
    for way, elements in WAYS.items():
        file, folder = f"{out}/{way}.jsonl", f"{out}/{way}"
        if not Path(file).exists():
            data.write_jsonl(file, pairs if elements == 1 else [row | {"group": None} for row in pairs])
        sizes = dict(epochs=args.epochs, batch_size=GROUPS_A_STEP * elements, eval_fraction=HELD_OUT)
        logged = reward_model(run, folder, data=[file], eval_data=[], **sizes)
        held_out = held_out_rows(folder, pairs)
        gain = trainer.load_reward(folder).gain.item()  # the loss is that of the scores as they were trained, not normalised
        delta = torch.tensor(margins(folder, held_out), dtype=torch.float64) / gain
        label_p = [row["p_chosen"] for row in held_out]
        zero = torch.zeros((), dtype=torch.float64)
        found[way] = {
            "epochs": [line["eval/loss"] for line in logged if "eval/loss" in line],
            "steps": sum("loss/preference" in line for line in logged),
            "losses": [preference_loss(d, zero, p).item() for d, p in zip(delta, label_p, strict=True)],
        }
    return found | {"rows": held_out}


def held_out_rows(folder: str, pairs: list[dict]) -> list[dict]:
    """Those of the pairs that the training in `folder` held out."""
    args = common.flags(folder, train_rm.Args)
    prompts = [train_rm.Group(prompt) for prompt in {row["prompt"] for row in pairs}]
    _, out = train_rm.split(prompts, args.eval_fraction, args.seed)
    return [row for row in pairs if row["prompt"] in {group.prompt for group in out}]


# ---- the script -----------------------------------------------------------------------------------------------------


def summarise(forms: dict, rows: dict, ways: dict) -> dict:
    """{run: ...} of label_forms, of the held-out pairs, and of kwise_and_shuffled -> results.json."""
    runs = list(forms)
    right = {form: {run: forms[run][form]["right"] for run in runs} for form in FORMS}
    accuracy = {form: common.side_by_side(right[form], rows) for form in FORMS}
    for a, b in DIFFERENCES:
        accuracy[f"{a} - {b}"] = common.side_by_side(common.minus(right[a], right[b]), rows, (-1, 1))
    pairs = {run: ways[run]["rows"] for run in runs}
    losses = {way: {run: ways[run][way]["losses"] for run in runs} for way in WAYS}
    loss = {way: common.side_by_side(losses[way], pairs, None) for way in WAYS}
    loss["k-wise - shuffled"] = common.side_by_side(common.minus(losses["k-wise"], losses["shuffled"]), pairs, None)
    results = {
        "accuracy": accuracy,
        "std": {form: {run: forms[run][form]["std"] for run in runs} for form in FORMS},
        "ece": {form: {run: forms[run][form]["ece"] for run in runs} for form in FORMS},
        "validation_loss": loss,
        "by_epoch": {way: {run: ways[run][way]["epochs"] for run in runs} for way in WAYS},
        "steps": {way: {run: ways[run][way]["steps"] for run in runs} for way in WAYS},
    }
    return {"verdicts": verdicts(results)} | results


def verdicts(results: dict) -> list[str]:
    """What the figures say, in words, whichever way they came out."""
    lines = []
    for a, b in DIFFERENCES:
        columns = results["accuracy"][f"{a} - {b}"]
        where, shown = common.side(columns[common.ALL]), common.shown(columns[common.ALL])
        words = {1: "sides with gold more often than", -1: "sides with gold less often than", 0: "cannot be told from"}[where]
        lines.append(f"- The reward model from {a} labels {words} that from {b} ones (difference {shown}).")
    difference = results["validation_loss"]["k-wise - shuffled"][common.ALL]
    words = {1: "higher than", -1: "lower than", 0: "not told from"}[common.side(difference)]
    lines.append(
        f"- Validation loss, k-wise, at the end: {words} that of the same pairs shuffled ({common.shown(difference, 4)} nats)."
    )
    for way, by_run in results["by_epoch"].items():
        rises = [losses[-1] - min(losses) for losses in by_run.values()]
        turned = sum(rise > 0 for rise in rises)
        lines.append(
            f"- Overfitting, {way}: in {turned} of {len(rises)} runs the validation loss ends above its lowest, "
            f"by {sum(rises) / len(rises):.4f} nats on average."
        )
    return lines


def plain(first: str, rows: dict[str, dict], digits=3) -> list[str]:
    """{name: {column: a number}} -> the lines of a markdown table."""
    columns = list(next(iter(rows.values())))
    lines = [f"| {' | '.join([first, *columns])} |", "|" + " --- |" * (1 + len(columns))]
    return lines + [f"| {name} | {' | '.join(f'{row[c]:.{digits}f}' for c in columns)} |" for name, row in rows.items()]


def report(results: dict) -> list[str]:
    """The lines of results.md."""
    lines = [f"# {TITLE}", "", *results["verdicts"], ""]
    lines += ["95 % intervals over held-out pairs (bootstrap over deed x thing); differences are paired."]
    lines += ["", "## Held-out pairs on which the reward model sides with gold (less harm in all)", ""]
    lines += common.table("labels", results["accuracy"])
    lines += ["", "## Standard deviation of the scores before normalising (nats)", "", *plain("labels", results["std"])]
    lines += ["", "## ECE of such labels on the held-out pairs", "", *plain("labels", results["ece"])]
    epochs = {
        f"{way}, {run}": {f"epoch {i}": loss for i, loss in enumerate(losses, 1)}
        for way, by_run in results["by_epoch"].items()
        for run, losses in by_run.items()
    }
    lines += ["", "## Validation loss by epoch (nats)", "", *plain("pairs", epochs, 4)]
    return lines + ["", "## Validation loss at the end (nats)", "", *common.table("pairs", results["validation_loss"], 4)]


def main(args: Args) -> dict:
    cli.require_positive(args, "labels", "prompts", "epochs")
    runs, began, results = common.named(args.runs), time.monotonic(), {}
    args.out = common.claim(args.out, TITLE)
    forms, rows, ways = {}, {}, {}
    for name, run in runs.items():
        print(f"\n[{name}] forms of labels", flush=True)
        held_out = data.read_preferences(f"{run}/labels_heldout/preferences.jsonl")
        rows[name] = [row for row in held_out if gold_prefers_chosen(row, "harm") is not None]
        forms[name] = label_forms(args, run, f"{args.out}/{name}", rows[name])
        print(f"\n[{name}] k-wise and shuffled", flush=True)
        ways[name] = kwise_and_shuffled(args, run, f"{args.out}/{name}/pairs")
        results = summarise(forms, rows, ways)
        common.write(args.out, results, report(results))
    common.close(args.out, report(results), began)
    return results


if __name__ == "__main__":
    cli.run(main, Args, again="the same command goes on where it stopped")
