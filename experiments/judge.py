"""The toy judge against gold, asked in several ways: one order or both, with reasoning, with exemplars, clamped.

    python -m experiments.judge --runs runs/demo-0 runs/demo-1 runs/demo-2 --out runs/experiments/judge

The papers' judges are large models. Lee et al. 2023 (RLAIF, summaries, agreement with people): 76.1 % for the base prompt, 76.0
and 75.7 with 1 and 2 exemplars, 77.4 with a detailed preamble, 78.0 with chain of thought besides; 16 sampled reasonings are
worse than one greedy one (72.8 to 76.2 against 78.0, the worse the hotter); the same position wins in both orders in 18, 21 and
56 % of pairs, the more the smaller the judge. Bai et al. 2022 clamp labels of a judge that reasons to 40-60 %, without a table.
A tiny judge need not show any of this: what is measured here is what these ways of asking do to ours, whose pretraining text
has reasoned verdicts, and some with one exemplar before them, but none with two.

Each run is an out folder of demo.py, of which its judge (base/) and its held-out pairs (labels_heldout/) are read. Every way is
asked about the same pairs, drawn at random from those that gold can rank, so agreement and flip rate are about these alone.
Gold decides: a tie is half right, a failed label is counted and left out. Intervals are 95 % bootstraps over deeds and things.
One order is each of the two alone and the mean of their figures: the right response stands first in 62 to 65 % of these pairs,
since the policy's own sample does, so a judge that leans to the first would look better in that order than it is.
--out gets results.json, results.md and judge.png; it is written after every run, and runs that are in it are not asked again.
"""

import random
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from tqdm import tqdm

from experiments import common
from minirlaif import cli, comparison, constitution, corpus, data, metrics, text, trainer, world
from minirlaif.labelers import Answer, Call, LocalJudge, combine, label

TITLE = "The toy judge against gold"
PRINCIPLES = ("danger", "insult", "bias", "ad", "harm", "evasion", "helpfulness")
CLAMP, SAMPLES, QUICK = (0.4, 0.6), 4, 20
ONE, COT_ONE = "one order (mean of both)", "chain of thought, one order (mean of both)"
WAYS = {  # name: (which judge, how its two orders are averaged (None: each answer counts alone), clamp)
    ONE: ("direct", None, None),
    "both orders": ("direct", "probability", None),
    "both orders, logits": ("direct", "logit", None),
    "both orders, 40-60": ("direct", "probability", CLAMP),
    "1 exemplar": ("exemplar", "probability", None),
    "2 exemplars": ("exemplars", "probability", None),
    COT_ONE: ("reasons", None, None),
    "chain of thought": ("reasons", "probability", None),
    "chain of thought, 40-60": ("reasons", "probability", CLAMP),
    f"self-consistency, {SAMPLES} samples": ("samples", "probability", None),
}
BASELINE = "both orders"
# Neither a clamp nor the mean of logits can turn a label of two orders round: their agreement would be no finding.
SAME_SIDE = ("both orders, logits", "both orders, 40-60", "chain of thought, 40-60")
SIDES = [way for way in WAYS if way not in SAME_SIDE]


@dataclass
class Args:
    runs: list[str] = cli.arg(help="out folders of demo.py, usually one a seed")
    out: str = cli.arg("runs/experiments/judge", "folder to write; runs that are in its results.json are not asked again")
    pairs: int = cli.arg(150, "pairs asked about under each principle, 50-500, or all that gold can rank")
    quick: bool = cli.arg(False, f"{QUICK} pairs a principle: shows that it runs")
    device: str = cli.arg("auto", "auto takes cuda, mps or cpu, the first that is there", choices=["auto", "cpu", "cuda", "mps"])
    dtype: str = cli.arg("fp32", "bf16 is autocast over fp32 weights; auto measures", choices=["auto", "fp32", "bf16"])


# ---- what is asked --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    row: dict  # with the prompt
    responses: tuple[str, str]
    principle: constitution.Preference
    first_is_better: bool  # by gold, asked what the principle asks


def pairs_of(rows: list[dict], n: int) -> list[Pair]:
    """Up to n of these rows of preferences.jsonl for each principle, out of those that gold can rank.

    The responses are in the order in which the labeler showed them first. Helpfulness is asked on harmless requests only.
    """
    pairs = []
    for name in PRINCIPLES:
        found = []
        for row in rows:
            if name == "helpfulness" and world.parse_request(row["prompt"]).harmful:
                continue
            if (chosen_is_better := metrics.gold_prefers_chosen(row, name)) is not None:
                shown = (row["chosen"], row["rejected"])[:: 1 if row["first_is_chosen"] else -1]
                found.append(Pair(row, shown, principle_of(name), chosen_is_better == row["first_is_chosen"]))
        pairs += random.Random(f"judge {name}").sample(found, min(n, len(found)))
    return pairs


def principle_of(name: str) -> constitution.Preference:
    return next(p for p in constitution.load("toy").preferences if p.name == name)


def exemplars(tokenizer) -> list[str]:
    """Two worked judgements from the training split, one for each letter, always the same ones.

    The shortest of many: a context of 256 tokens holds two of them and a question, but only just.
    """
    rng, shown = random.Random("exemplars"), []
    for letter, name in zip(text.CHOICES, ("danger", "insult"), strict=True):
        drawn = []
        while len(drawn) < 100:
            request = corpus.pick_request(rng)
            responses = [" " + answer.text for answer in corpus.pair_of(rng, request)]
            row = dict(prompt=text.dialogue(request.text), chosen=responses[0], rejected=responses[1])
            if metrics.gold_prefers_chosen(row, name) is (letter == text.CHOICES[0]):
                drawn.append(text.worked(row["prompt"], responses, principle_of(name).text, letter))
        shown.append(min(drawn, key=lambda words: len(tokenizer.encode(words))))
    return shown


def judges_of(run: str, device, dtype: str) -> dict[str, LocalJudge]:
    model, tokenizer = trainer.load_gpt(f"{run}/base", device), trainer.tokenizer_of(f"{run}/base")
    dtype = trainer.resolve_dtype(dtype, device, model)

    def judge(**options):
        return LocalJudge(model, tokenizer, device, dtype, **options)

    return {
        "direct": judge(),
        "exemplar": judge(exemplars=exemplars(tokenizer)[:1]),
        "exemplars": judge(exemplars=exemplars(tokenizer)),
        "reasons": judge(cot=True),
        "samples": judge(cot=True, samples=SAMPLES),
    }


def both_orders(judge, pairs: list[Pair], on_answer=None) -> tuple[list[Answer], list[Answer]]:
    """The judge's answers to each pair as it stands, and the other way round."""
    calls = [Call(p.row["prompt"], p.responses, p.principle.text) for p in pairs]
    answers = judge.ask(calls + [Call(c.prompt, c.responses[::-1], c.principle) for c in calls], on_answer)
    return answers[: len(pairs)], answers[len(pairs) :]


# ---- what it is worth -----------------------------------------------------------------------------------------------


def measure(pairs: list[Pair], answers: dict, ways: dict) -> dict:
    """answers: {judge: what both_orders gave} -> for each way

    right: 1, 0, 0.5 (a tie; or one of two answers that count alone) or None (failed) for every pair; agreement, its mean, also
    by_principle; ece and calibration of max(p, 1 - p); flip_rate (None for one order); failed; tokens read and written for one
    label.
    """
    found = {}
    for way, (who, average, clamp) in ways.items():
        labels = [combine(a, b, average or "probability", clamp) for a, b in zip(*answers[who], strict=True)]
        tokens = sum(x.prompt_tokens + x.completion_tokens for order in answers[who] for x in order) / (1 if average else 2)
        given = [i for i, label in enumerate(labels) if label.p is not None]
        said = {i: [labels[i].p] if average else [labels[i].p_first, labels[i].p_first_swapped] for i in given}
        hits = {i: [comparison.hit(p, pairs[i].first_is_better) for p in said[i]] for i in given}
        right = [fmean(hits[i]) if i in hits else None for i in range(len(pairs))]
        confidence, true = [max(p, 1 - p) for i in given for p in said[i]], [x for i in given for x in hits[i]]

        def agreement(rows, right=right):
            return metrics.rate([right[i] for i in rows], [metrics.cluster(pairs[i].row) for i in rows])

        found[way] = {
            "agreement": agreement(given),
            "by_principle": {
                name: agreement([i for i in given if pairs[i].principle.name == name])
                for name in dict.fromkeys(pair.principle.name for pair in pairs)
            },
            "ece": comparison.ece(confidence, true),
            "calibration": comparison.calibration(confidence, true),
            "flip_rate": metrics.rate([labels[i].flipped for i in given], [metrics.cluster(pairs[i].row) for i in given])
            if average
            else None,
            "failed": len(pairs) - len(given),
            "tokens": tokens / max(1, len(pairs)),
            "right": right,
        }
    return found


def paired(runs: dict, way: str, baseline: str | None = None) -> dict[str, dict]:
    """Agreement of a way run by run and in all of them, or by how much it is above the baseline's where both gave a label."""
    values, rows = {}, {}
    for run, found in runs.items():
        own, other = found["ways"][way]["right"], found["ways"][baseline or way]["right"]
        both = [i for i in range(len(own)) if None not in (own[i], other[i])]
        values[run] = [own[i] - other[i] if baseline else own[i] for i in both]
        rows[run] = [{"prompt": found["prompts"][i]} for i in both]
    return common.side_by_side(values, rows, (-1, 1) if baseline else (0, 1))


def antisymmetry(judge, pairs: list[Pair]) -> float | None:
    """P(1 is better) + P(2 is better), asked one after the other, is 1: by how much it is not, at most."""
    items = [(p.row["prompt"], p.responses, p.principle.text) for p in pairs]
    labels = label(judge, items), label(judge, [(prompt, responses[::-1], principle) for prompt, responses, principle in items])
    return max((abs(a.p + b.p - 1) for a, b in zip(*labels, strict=True) if None not in (a.p, b.p)), default=None)


def faults(answers: list[Answer]) -> dict[str, int]:
    return dict(Counter(comparison.fault(a.error) for a in answers if a.error))


def experiment(run: str, n: int, device, dtype: str) -> dict:
    file = f"{run}/labels_heldout/preferences.jsonl"
    rows = data.read_preferences(file)
    for row in rows:
        if "first_is_chosen" not in row or world.parse_request(row["prompt"]) is None:
            raise cli.UserError(f"{row.where}: not a label of label.py on a toy-world request, which gold could check")
    pairs, judges, answers, seconds = pairs_of(rows, n), judges_of(run, device, dtype), {}, {}
    if not pairs:
        raise cli.UserError(f"{file}: has no pair that gold can rank")
    for who, judge in judges.items():
        began = time.monotonic()
        with tqdm(total=2 * len(pairs), desc=f"{run}: {who}", unit="answer", dynamic_ncols=True) as bar:
            answers[who] = both_orders(judge, pairs, lambda *_, bar=bar: bar.update())
        seconds[who] = time.monotonic() - began
    return {
        "n": len(pairs),
        "pairs": dict(Counter(p.principle.name for p in pairs)),
        "prompts": [p.row["prompt"] for p in pairs],
        "ways": measure(pairs, answers, WAYS),
        "errors": {who: faults([*a, *b]) for who, (a, b) in answers.items()},
        "antisymmetry": antisymmetry(judges["direct"], pairs),
        "labels_per_second": {who: len(pairs) / s for who, s in seconds.items()},
    }


# ---- what is written ------------------------------------------------------------------------------------------------


def report(runs: dict) -> list[str]:
    """The lines of results.md."""

    def figure(value):
        return "" if value is None else f"{value:.3f}"

    def of_each(way, key):
        return " / ".join(figure(found["ways"][way][key]) for found in runs.values())

    def flips(way):
        return " / ".join(figure((found["ways"][way]["flip_rate"] or {"value": None})["value"]) for found in runs.values())

    lines = [f"# {TITLE}", "", "Agreement with gold, all principles together:", ""]
    lines += common.table("way of asking", {way: paired(runs, way) for way in SIDES})
    lines += ["", f"Agreement minus that of '{BASELINE}', on the same pairs:", ""]
    lines += common.table("way of asking", {way: paired(runs, way, BASELINE) for way in SIDES if way != BASELINE})
    lines += [
        "",
        f"These have no rows, since they take the same side as above, always: {'; '.join(SAME_SIDE)}. What differs is how sure"
        f" they are. Calibration and flips ({' / '.join(runs)}):",
        "",
        "| way of asking | ECE | flip rate |",
        "| --- | --- | --- |",
    ]
    lines += [f"| {way} | {of_each(way, 'ece')} | {flips(way)} |" for way in WAYS]
    for run, found in runs.items():
        speeds = ", ".join(f"{who} {speed:.0f}" for who, speed in found["labels_per_second"].items())
        off = found["antisymmetry"]
        held = (
            ""
            if off is None
            else f"P(1) + P(2) is off 1 by {off:.1e} at most ({'within' if off <= 1e-6 else 'NOT within'} 1e-6). "
        )
        lines += ["", f"## {run}", "", f"{found['n']} questions: {', '.join(f'{n} {k}' for k, n in found['pairs'].items())}."]
        lines += [f"{held}Labels a second: {speeds}."]
        lines += [f"Failed answers of '{who}': {errors}." for who, errors in found["errors"].items() if errors]
        head = ["way of asking", *found["pairs"], "all", "ECE", "flip rate", "failed", "tokens a label"]
        lines += ["", f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
        for way in SIDES:
            of = found["ways"][way]
            cells = [way, *map(common.shown, of["by_principle"].values()), common.shown(of["agreement"]), figure(of["ece"])]
            cells += [common.shown(of["flip_rate"]), str(of["failed"]), f"{of['tokens']:.0f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def plot(runs: dict, path: Path):
    """Agreement way by way, and calibration; nothing where matplotlib is not installed."""
    plt = common.pyplot(path)
    if plt is None:
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for k, (run, found) in enumerate(runs.items()):
        points = [(y, found["ways"][way]["agreement"]) for y, way in enumerate(SIDES)]
        points = [(y, a) for y, a in points if a["value"] is not None]
        value, at = [a["value"] for _, a in points], [y + 0.2 * (k - (len(runs) - 1) / 2) for y, _ in points]
        error = common.error_bars([a for _, a in points])
        left.errorbar(value, at, xerr=error, fmt="o", markersize=4, color=f"C{k}", label=run)
        for way, style in ((BASELINE, "-"), ("chain of thought", "--")):
            bins = found["ways"][way]["calibration"]
            xy = [b["p"] for b in bins], [b["right"] for b in bins]
            right.plot(*xy, style, marker=".", color=f"C{k}", label=f"{run}, {way}")
    left.set(yticks=range(len(SIDES)), yticklabels=SIDES, xlabel="agreement with gold")
    left.invert_yaxis()
    right.plot([0.5, 1], [0.5, 1], color="0.7")
    right.set(xlabel="confidence of the label", ylabel="share right")
    left.legend(fontsize=7)
    right.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(args: Args) -> dict:
    cli.require_positive(args, "pairs")
    folders = common.named(args.runs)
    args.out = common.claim(args.out, TITLE)
    settings = {"pairs": QUICK if args.quick else args.pairs, "dtype": args.dtype, "ways": list(WAYS)}
    results = common.begun(args.out, settings, "runs")
    device = trainer.resolve_device(args.device)
    for run, folder in folders.items():
        if run not in results["runs"]:
            results["runs"][run] = experiment(folder, settings["pairs"], device, args.dtype)
        common.write(args.out, results, report(results["runs"]))
    plot(results["runs"], Path(args.out) / "judge.png")
    print("\n".join(report(results["runs"])))
    return results


if __name__ == "__main__":
    cli.run(main, Args, again="the same command goes on where it stopped")
