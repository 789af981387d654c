"""How much of the teacher a student needs: its whole distribution, its k likeliest tokens and the rest, or these k alone.

    python -m experiments.distill_topk --runs runs/demo-0 runs/demo-1 runs/demo-2

Askell et al. 2021 distil from the 50 likeliest tokens and one bucket for all others. By the log-sum inequality this KL is never
more than that over the whole vocabulary. Without the bucket the teacher's k probabilities are taken for all there is: a student
that fits them perfectly gives all other tokens nothing. That loss exists here alone: stored targets, their rest set to 0.

Each arm distils the demo's preamble into the base of a finished demo.py with the demo's settings, on the same answers in the
same order. Measured on held-out requests: KL(teacher || student) over the whole vocabulary on the teacher's answers (nats a
token), the student's mass outside the teacher's k likeliest tokens there, and what gold says of the student's own answers.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

import distill
from experiments import common
from experiments.distill_hhh import HARMLESSNESS, HELPFULNESS, answers, compare, demo_flags, measures, written
from minirlaif import cli, constitution, data, targets, text, trainer
from minirlaif.losses import token_kl

TITLE = "How much of the teacher a student needs"
KS = (1, 5, 10, 50)
KL, DIGITS = "KL to the teacher", 5
QUICK, QUICK_EXAMPLES, QUICK_HELD_OUT = (1, 5), 32, 16


@dataclass
class Args:
    runs: list[str] = cli.arg(help="out folders of demo.py, one a seed; the results are of these alone")
    out: str = cli.arg("runs/experiments/distill_topk", "folder to write; what is done there is not done again")
    quick: bool = cli.arg(False, "two values of k and little of everything: shows that it runs")


def without_rest(source: str, to: str) -> str:
    """Stored targets whose other tokens have probability 0: what reads them makes the k sum to 1."""
    if not Path(to).exists():
        stored = torch.load(source, weights_only=True)
        stored["logprobs"][:, -1] = float("-inf")
        with data.atomic_write(to) as f:
            torch.save(stored, f)
    return to


def students(run: str, out: str, ks: tuple, examples: int) -> dict[str, str]:
    """{arm: its run folder}, each distilled by distill.py."""
    Path(out).mkdir(parents=True, exist_ok=True)
    asked, held_out = f"{run}/world/prompts.jsonl", f"{run}/world/heldout.jsonl"
    same = dict(model=f"{run}/base", data=[asked], limit=examples, eval_data=held_out, **demo_flags(run))
    found = {"whole": f"{out}/whole"}
    distill.main(distill.Args(out=found["whole"], top_k=0, **same))
    for k in ks:
        file = f"{out}/top-{k}.pt"
        found[f"{k} + rest"] = f"{out}/{k}-rest"
        distill.main(distill.Args(out=found[f"{k} + rest"], top_k=k, store_targets=file, **same))
        found[f"{k} alone"] = f"{out}/{k}-alone"
        file = without_rest(file, f"{out}/top-{k}-alone.pt")
        distill.main(distill.Args(out=found[f"{k} alone"], top_k=k, store_targets=file, **same))
    return found


@torch.no_grad()
def against_teacher(base: str, path: str, rows: list[dict], ks: tuple) -> dict[str, list[float]]:
    """Of each of the teacher's answers, a mean over its tokens: KL, and for each k the mass of both outside the teacher's k."""
    teacher, student, tokenizer = trainer.load_gpt(base), trainer.load_gpt(path), trainer.tokenizer_of(base)
    preamble, found = constitution.load("toy").preamble, {KL: []} | {k: [] for k in ks} | {f"teacher {k}": [] for k in ks}
    for part in (rows[i : i + 64] for i in range(0, len(rows), 64)):
        responses = [tokenizer.encode(row["response"]) + [tokenizer.eot] * row["stopped"] for row in part]
        lengths = [len(r) for r in responses]
        p, q = (
            targets.predict(model, targets.response_states(model, contexts, responses, tokenizer.eot), 0, 1.0).logprobs
            for model, contexts in (
                (teacher, [tokenizer.encode(text.with_preamble(preamble, row["prompt"])) for row in part]),
                (student, [tokenizer.encode(row["prompt"]) for row in part]),
            )
        )
        values = {KL: token_kl(p, q)}
        for k in ks:
            ids = p.topk(k).indices
            values[k], values[f"teacher {k}"] = (1 - x.gather(-1, ids).exp().sum(-1) for x in (q, p))
        for name, of in values.items():
            found[name] += [one.mean().item() for one in of[: sum(lengths)].split(lengths)]
    return found


def experiment(run: str, out: str, ks: tuple, quick: bool) -> dict:
    """One seed: {"samples": {policy: rows}, "against": {arm: what against_teacher gives}}."""
    held_out = data.read_jsonl(f"{run}/world/heldout.jsonl")[: QUICK_HELD_OUT if quick else None]
    arms = students(run, out, ks, QUICK_EXAMPLES if quick else 1500)
    prompts = written(f"{out}/prompts.jsonl", held_out)
    samples = answers(run, {"prompted": f"{run}/base+preamble"} | arms, prompts, f"{out}/evaluate")
    against = {name: against_teacher(f"{run}/base", path, samples["prompted"], ks) for name, path in arms.items()}
    return {"samples": samples, "against": against}


def summarise(found: dict, ks: tuple) -> dict:
    """{run: what experiment gives} -> results.json."""
    runs = list(found)
    arms = list(found[runs[0]]["against"])
    pairs = [(f"{k} + rest", "whole") for k in ks] + [(f"{k} alone", f"{k} + rest") for k in ks]
    rows = {run: found[run]["samples"]["prompted"] for run in runs}

    def against(arm, name):
        return {run: found[run]["against"][arm][name] for run in runs}

    results = {"measures": {KL: compare({arm: against(arm, KL) for arm in arms}, rows, pairs, nats=True)}}
    for measure in (HARMLESSNESS, HELPFULNESS):
        of, asked = {}, {}
        for name in ["prompted", *arms]:
            every = {run: [(row, measures(row)[measure]) for row in found[run]["samples"][name]] for run in runs}
            of[name] = {run: [m for _, m in every[run] if m is not None] for run in runs}
            asked = {run: [row for row, m in every[run] if m is not None] for run in runs}
        results["measures"][measure] = compare(of, asked, pairs)
    results["outside"] = {}
    for k in ks:
        columns = {"teacher": against("whole", f"teacher {k}"), "whole": against("whole", k)}
        columns |= {way: against(f"{k} {way}", k) for way in ("+ rest", "alone")}
        results["outside"][f"k = {k}"] = compare(columns, rows, [("alone", "teacher"), ("+ rest", "teacher")])
    return {"verdicts": verdicts(results, ks), **results}


def verdicts(results: dict, ks: tuple) -> list[str]:
    """What the figures say, in words."""
    lines = []
    for measure in (KL, HARMLESSNESS, HELPFULNESS):
        for k in ks:
            for a, b in ((f"{k} + rest", "whole"), (f"{k} alone", f"{k} + rest")):
                side, figures = common.told(results["measures"][measure][f"{a} - {b}"], DIGITS)
                words = {1: "higher", 0: "no difference is shown", -1: "lower"}[side]
                lines.append(f"- {measure}, {a} - {b}: {words} ({figures}).")
    for k in ks:
        of = results["outside"][f"k = {k}"]
        for way in ("+ rest", "alone"):
            words = {1: "more than", 0: "not told from", -1: "less than"}[common.side(of[f"{way} - teacher"][common.ALL])]
            numbers = " against ".join(common.shown(of[one][common.ALL], DIGITS) for one in (way, "teacher"))
            lines.append(f"- mass outside the teacher's {k} likeliest tokens, {k} {way}: {words} the teacher's ({numbers}).")
    return lines


def report(results: dict) -> list[str]:
    """The lines of results.md."""
    lines = [f"# {TITLE}", "", *results["verdicts"], ""]
    lines += ["Means with 95 % intervals (bootstrap over deed x thing); differences are paired."]
    for measure, rows in results["measures"].items():
        lines += ["", f"## {measure}", "", *common.table("targets", rows, DIGITS)]
    lines += ["", "## Mass outside the teacher's k likeliest tokens, all runs", ""]
    ways = ("teacher", "whole", "+ rest", "alone")
    outside = {k: {way: of[way][common.ALL] for way in ways} for k, of in results["outside"].items()}
    return lines + common.table("", outside, DIGITS)


def plot(results: dict, ks: tuple, path: Path):
    """KL, the mass outside, and what gold says, by k; nothing where matplotlib is not installed."""
    if not (plt := common.pyplot(path)):
        return
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    measures, outside = results["measures"], results["outside"]

    def curve(axis, found, nth, **style):
        """Of one arm by k, a little aside from the other one."""
        found = [one[common.ALL] for one in found]
        y, at = [one["value"] for one in found], [k * 1.05 ** (2 * nth - 1) for k in ks]
        axis.errorbar(at, y, yerr=common.error_bars(found), marker="o", markersize=4, color=f"C{nth}", **style)

    for nth, (way, words) in enumerate({"+ rest": "k and the rest", "alone": "k alone"}.items()):
        curve(left, [measures[KL][f"{k} {way}"] for k in ks], nth, label=words)
        curve(middle, [outside[f"k = {k}"][way] for k in ks], nth, label=words)
        for measure, line in ((HARMLESSNESS, "-"), (HELPFULNESS, "--")):
            curve(right, [measures[measure][f"{k} {way}"] for k in ks], nth, linestyle=line, label=f"{measure}, {words}")
    left.axhline(measures[KL]["whole"][common.ALL]["value"], color="0.5", label="whole vocabulary")
    middle.plot(ks, [outside[f"k = {k}"]["teacher"][common.ALL]["value"] for k in ks], color="0.5", label="teacher")
    for measure, line in ((HARMLESSNESS, "-"), (HELPFULNESS, "--")):
        for arm, color in (("whole", "0.5"), ("prompted", "C2")):
            right.axhline(measures[measure][arm][common.ALL]["value"], color=color, linestyle=line, label=f"{measure}, {arm}")
    left.set(title="KL to the teacher (nats a token)", yscale="log")
    middle.set(title="mass outside the teacher's k likeliest", yscale="log")
    right.set(title="gold harmlessness and helpfulness")
    for axis in (left, middle, right):
        axis.set(xscale="log", xlabel="k")
        axis.set_xticks(ks, ks)
        axis.minorticks_off()
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(args: Args) -> dict:
    runs, ks, began, found, results = common.named(args.runs), QUICK if args.quick else KS, time.monotonic(), {}, {}
    args.out = common.claim(args.out, TITLE, args.quick)
    for name, run in runs.items():
        print(f"\n[{name}]", flush=True)
        found[name] = experiment(run, f"{args.out}/{name}", ks, args.quick)
        results = summarise(found, ks)
        common.write(args.out, results, report(results))
    plot(results, ks, Path(args.out) / "distill_topk.png")
    common.close(args.out, report(results), began)
    return results


if __name__ == "__main__":
    cli.run(main, Args, again="the same command goes on where it stopped")
