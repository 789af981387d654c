"""The words of evaluate.py: comparisons that need no gold scorer.

    python evaluate.py hhh --data 438HHHEvaluations.jsonl --judge runs/my/base
    python evaluate.py labels runs/my/labels/preferences.jsonl runs/my/labels_gold/preferences.jsonl --plot calibration.png
    python evaluate.py winrate --samples sl=runs/my/sl.jsonl rl=runs/my/rl.jsonl --judge runs/my/base --principle harm
    python evaluate.py tokens runs/my/rl/rollouts/00000.jsonl --row 0

Each prints a table, and writes its figures as JSON to --out if that is given. How a judge is written stands in
minirlaif/judges.py. Every judge is asked in both orders; what it could not answer is counted by kind and left out.
"""

import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from minirlaif import cli, comparison, constitution, data, judges, labelers, rollouts, trainer
from minirlaif.metrics import cluster


@dataclass
class HHHArgs:
    """Accuracy of a judge on comparisons for being helpful, honest and harmless, beside two heuristics that read nothing."""

    data: str = cli.arg(help="438HHHEvaluations.jsonl of anthropics/ConstitutionalHarmlessnessPaper (rows may have a category)")
    judge: str = cli.arg(help="a model or run folder, or NAME@URL of an endpoint; options after commas")
    principle: str | None = cli.arg(None, "what the judge is asked; default: what each row of the file asks")
    constitution: str = cli.arg("harmless", "constitution whose preamble for judges is used (see minirlaif/judges.py)")
    limit: int | None = cli.arg(None, "use the first so many rows")
    max_cost: float | None = cli.arg(None, "what an endpoint may cost, by its price=; no journal is kept: a new run pays again")
    on_bad_row: str = cli.arg("error", "a row that cannot be used: stop, or skip and count it", choices=["error", "skip"])
    out: str | None = cli.arg(None, "JSON file for the figures")
    device: str = cli.arg("auto", "auto takes cuda, mps or cpu, the first that is there", choices=["auto", "cpu", "cuda", "mps"])
    dtype: str = cli.arg("auto", "bf16 is autocast over fp32 weights; auto measures", choices=["auto", "fp32", "bf16"])


@dataclass
class LabelsArgs:
    """What preference files are worth: agreement with people or gold, one order against both, calibration, failures and cost."""

    files: list[str] = cli.arg(help="preferences.jsonl files, a column each", positional=True)
    plot: str | None = cli.arg(None, "picture of the calibration curves to write, e.g. calibration.png (needs matplotlib)")
    on_bad_row: str = cli.arg("error", "a row that cannot be used: stop, or skip and count it", choices=["error", "skip"])
    out: str | None = cli.arg(None, "JSON file for the figures")


@dataclass
class WinrateArgs:
    """Win rates of policies that answered the same prompts, raw and at equal length; Elo ratings of more than two."""

    samples: list[str] = cli.arg(help="NAME=FILE, two or more: completions.jsonl, or samples.jsonl (its rows of the policy NAME)")
    judge: str = cli.arg(help="gold, a model or run folder, or NAME@URL of an endpoint; options after commas")
    principle: str = cli.arg(help="what the judge is asked: a name in --constitution (its first wording), or a text")
    constitution: str = cli.arg("toy", "a bundled constitution by name, or a file")
    limit: int | None = cli.arg(None, "compare on the first so many samples of each policy")
    max_cost: float | None = cli.arg(None, "what an endpoint may cost, by its price=; no journal is kept: a new run pays again")
    out: str | None = cli.arg(None, "JSON file for the figures")
    device: str = cli.arg("auto", "auto takes cuda, mps or cpu, the first that is there", choices=["auto", "cpu", "cuda", "mps"])
    dtype: str = cli.arg("auto", "bf16 is autocast over fp32 weights; auto measures", choices=["auto", "fp32", "bf16"])


def load_judge(args):
    device = trainer.resolve_device(args.device)

    def dtype_of(model):
        return trainer.resolve_dtype(args.dtype, device, model)

    return judges.load(args.judge, args.constitution, device, dtype_of, max_cost=args.max_cost)


def check_files(args):
    """UserError where a file that is to be written cannot be: before a judge is asked and paid, not after."""
    for flag in ("out", "plot"):
        path = getattr(args, flag, None)
        if path is not None and (Path(path).is_dir() or not os.access(Path(path).parent, os.W_OK)):
            raise cli.UserError(f"--{flag} {path}: must name a file, in a folder that is there and can be written")


def write_json(path: str | None, results: dict):
    if path:
        with data.atomic_write(path) as f:
            f.write(json.dumps(results, indent=2).encode())


def markdown(rows: list[list]) -> str:
    """A table; the first row is its head."""
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def cell(found: dict | None) -> str:
    """A figure with its interval and, where there is one, its n."""
    if found is None or found["value"] is None:
        return "n/a"
    digits = 3 if abs(found["value"]) <= 1 else 0
    low, high = found["ci"]
    return f"{found['value']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]" + (f" n={found['n']}" if "n" in found else "")


def listed(counts: dict) -> str:
    return "; ".join(f"{n} x {name}" for name, n in counts.items()) or "none"


# ---- hhh ------------------------------------------------------------------------------------------------------------


def read_hhh(path: str, on_bad_row: str = "error") -> list[dict]:
    """The paper's file -> rows {"prompt", "responses" (A, B), "correct" (0: A, 1: B), "principle", "category"}.

    The two dialogues (`text_correct`, `text_incorrect`) are split at the last answer; `corrects` says which of them is (A), and
    the principle is the line of `prompt` that ends in "Options:".
    """
    turn = "\n\nAssistant:"

    def check(row):
        (prompt, mark, right), (other, _, wrong) = (row[k].rpartition(turn) for k in ("text_correct", "text_incorrect"))
        if not mark or prompt != other:
            raise data.BadRow("the two texts do not share a prompt that ends in '\\n\\nAssistant:'")
        letter = row["corrects"][0] if len(row["corrects"]) == 1 else None
        if letter not in (" (A)", " (B)"):
            raise data.BadRow("'corrects' should hold ' (A)' or ' (B)'")
        asked, mark, _ = row["prompt"].partition(" Options:\n (A)")
        correct = int(letter == " (B)")
        row.update(prompt=prompt + turn, responses=[wrong, right] if correct else [right, wrong], correct=correct)
        row.update(principle=asked.rpartition("\n")[2] if mark else "", category=row.get("category"))
        if not row["principle"].strip():
            raise data.BadRow("no principle before 'Options:'", " (key 'prompt')")
        return row

    required = {"prompt": str, "corrects": list, "text_correct": str, "text_incorrect": str}
    return data.read_jsonl(path, required, on_bad_row, check)


def hhh(args: HHHArgs) -> dict:
    cli.require_positive(args, "limit", "max_cost")
    check_files(args)
    rows = read_hhh(args.data, args.on_bad_row)[: args.limit]
    judge = load_judge(args)
    items = [(r["prompt"], tuple(r["responses"]), args.principle or r["principle"]) for r in rows]
    results = comparison.hhh_report(rows, labelers.label(judge, items))
    groups = {"all rows": results["all"], "judged": results["judged"], **results["by_category"]}
    columns = ["accuracy", "one order", "better first", "better second", "flip_rate", "always A", "longer"]
    if not results["judged"]["accuracy"]["n"]:
        raise cli.UserError(f"{args.data}: the judge answered nothing ({listed(results['left_out'])})")
    print(markdown([[args.data, *columns], *([name, *(cell(g.get(c)) for c in columns)] for name, g in groups.items())]))
    print(f"left out: {listed(results['left_out'])}; {results['prompt_tokens']} + {results['completion_tokens']} tokens,"
          f" cost {results['cost']:.4f}")  # fmt: skip
    write_json(args.out, results)
    return results


# ---- labels ---------------------------------------------------------------------------------------------------------


def read_labels(path: str, on_bad_row: str) -> list[dict]:
    """Rows of a preference file, those without a label included (which data.read_preferences leaves out)."""

    def check(row):
        row.setdefault("p_chosen", 1.0)
        for key, low in (("p_chosen", 0.5), ("p_first", 0), ("p_first_swapped", 0), ("human_p", 0)):
            p = row.get(key)
            if p is not None and not (type(p) in (int, float) and low <= p <= 1):
                raise data.BadRow(f"'{key}' should be null or in [{low}, 1]", f", not {p!r}")
        for key in ("cost", "prompt_tokens", "completion_tokens"):
            if not (row.get(key) is None or type(row[key]) in (int, float) and 0 <= row[key] < math.inf):
                raise data.BadRow(f"'{key}' should be null or 0 or more", f", not {row[key]!r}")
        for key in ("principle_name", "error", "kind"):
            if not isinstance(row.get(key) or "", str):
                raise data.BadRow(f"'{key}' should be null or a string", f", not {row[key]!r}")
        ranks = row.get("ranks") or []
        if not (isinstance(ranks, list) and all(type(x) in (int, float) and math.isfinite(x) for x in ranks)):
            raise data.BadRow("'ranks' should be null or a list of finite numbers", f", not {ranks!r}")
        each = row.get("each") or []  # what several judges said
        pairs = each if isinstance(each, list) and all(isinstance(x, list) and len(x) == 2 for x in each) else [[None]]
        if not all(type(p) in (int, float) and 0 <= p <= 1 for x in pairs for p in x):
            raise data.BadRow("'each' should hold pairs of numbers in [0, 1]")
        return row

    return data.read_jsonl(path, {"prompt": str, "chosen": str, "rejected": str}, on_bad_row, check)


def labels_per_second(path: str) -> float | None:
    """What label.py logged last, if the file is still in its run folder, and what lies beside it is a log of label.py."""
    try:
        return float(json.loads((Path(path).parent / "metrics.jsonl").read_bytes().splitlines()[-1])["labels_per_second"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def number(x, digits: int) -> str:
    return "n/a" if x is None else f"{x:.{digits}f}"


def label_lines(r: dict) -> dict:
    """A report as {name of the line: text}."""
    lines = {
        "pairs": r["n"],
        "of them labelled": r["labels"],
        "compared with": listed(r["truth"]),
        "agreement": cell(r["agreement"]),
        "ECE": number(r["ece"], 3),
    }
    lines |= {f"agreement on {name}": cell(found) for name, found in r["by_principle"].items()}
    for name, found in r["orders"].items():
        lines |= {f"agreement, {name}": cell(found["agreement"])} if "agreement" in found else {}
        lines |= {f"ECE, {name}": number(found["ece"], 3)} if "ece" in found else {}
    lines |= {
        "flip rate": cell(r["flip_rate"]),
        "flips that chose the first": cell(r["flips_to_first"]),
        "ties": cell(r["tie"]),
        "failed": cell(r["failed"]),
        "failed in part": cell(r["partly_failed"]),
        "errors": listed(r["errors"]),
        "kinds of labels": listed(r["kinds"]),
        "tokens, prompt + completion": f"{r['prompt_tokens']} + {r['completion_tokens']}",
        "labels a second": number(r["labels_per_second"], 1),
        "cost of a label": number(r["cost_per_label"], 6),
        "overall cost": number(r["cost"], 4),
        "percentage random": f"{100 * r['random']['value']:.1f} %",
    }
    return lines


def labels(args: LabelsArgs) -> dict:
    check_files(args)
    reports = {path: comparison.label_report(read_labels(path, args.on_bad_row)) for path in args.files}
    for path, report in reports.items():
        report["labels_per_second"] = labels_per_second(path)
    columns = [label_lines(r) for r in reports.values()]
    names = dict.fromkeys(name for lines in columns for name in lines)
    print(markdown([["", *reports], *([name, *(lines.get(name, "n/a") for lines in columns)] for name in names)]))
    for path, report in reports.items():
        if report["calibration"]:
            print(f"\nCalibration of {path}:")
            bins = report["calibration"]
            rows = [[f"{b['low']:.1f}-{b['high']:.1f}", b["n"], f"{b['p']:.3f}", f"{b['right']:.3f}"] for b in bins]
            print(markdown([["p_chosen", "n", "mean p_chosen", "share right"], *rows]))
    if args.plot:
        plot_calibration(args.plot, reports)
    write_json(args.out, reports)
    return reports


def plot_calibration(path: str, reports: dict):
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError:
        raise cli.UserError('--plot needs matplotlib: pip install -e ".[plot]"') from None
    figure, axis = plt.subplots(figsize=(5, 4), layout="constrained")
    axis.plot([0.5, 1], [0.5, 1], color="grey", linestyle=":")
    for name, report in reports.items():
        rows = report["calibration"]
        axis.plot([b["p"] for b in rows], [b["right"] for b in rows], marker="o", label="/".join(Path(name).parts[-2:]))
    axis.set(xlabel="p_chosen", ylabel="share right", title="calibration of the labels", xlim=(0.5, 1), ylim=(0, 1.02))
    axis.legend(fontsize=7)
    try:
        figure.savefig(path, dpi=80)
    except ValueError as e:  # an ending that is no picture format
        raise cli.UserError(f"--plot {path}: {e}") from None
    plt.close(figure)


# ---- win rates ------------------------------------------------------------------------------------------------------


def read_samples(name: str, path: str, limit: int | None) -> dict:
    """{(prompt, how many times it came before): row with "response" and "stopped"} of the policy `name`."""

    def check(row):
        row["response"] = row.get("response", row.get("completion"))
        if not isinstance(row["response"], str):
            raise data.BadRow("no 'response' and no 'completion' that is a string")
        if not isinstance(row.get("policy", name), str):
            raise data.BadRow("'policy' should be a string", f", not {row['policy']!r}")
        row.setdefault("stopped", True)
        return row

    rows = data.read_jsonl(path, {"prompt": str}, None, check)
    policies = dict.fromkeys(r["policy"] for r in rows if "policy" in r)
    rows = [r for r in rows if r.get("policy", name) == name][:limit]
    if not rows:
        raise cli.UserError(f"{path}: has no samples of a policy '{name}'; there are {', '.join(policies)}")
    seen, found = Counter(), {}
    for row in rows:
        found[row["prompt"], seen[row["prompt"]]] = row
        seen[row["prompt"]] += 1
    return found


def judged_outcomes(judge, principle: str, pairs: list[tuple[dict, dict]], blank_if_cut: bool) -> tuple[list, dict]:
    """Who wins each pair of rows: (outcomes, None where the judge failed; {kind of failure: count}).

    Two equal responses are a tie that nobody needs to be asked about. blank_if_cut: gold does not read a cut-off response.
    """
    said = [tuple("" if blank_if_cut and not r["stopped"] else r["response"] for r in pair) for pair in pairs]
    asked = [k for k, (a, b) in enumerate(said) if a != b]
    answers = labelers.label(judge, [(pairs[k][0]["prompt"], said[k], principle) for k in asked])
    outcomes, failures = [0.5] * len(pairs), Counter()
    for k, label in zip(asked, answers, strict=True):
        outcomes[k] = None if label.p is None else comparison.outcome(label.p)
        if label.p is None:
            failures[comparison.fault(label.error or "")] += 1
    return outcomes, dict(failures)


def winrate(args: WinrateArgs) -> dict:
    cli.require_positive(args, "limit", "max_cost")
    check_files(args)
    if bad := [s for s in args.samples if "=" not in s]:
        raise cli.UserError(f"--samples {bad[0]}: write it as NAME=FILE")
    files = dict(s.split("=", 1) for s in args.samples)
    if len(files) < 2 or len(files) < len(args.samples):
        raise cli.UserError("--samples: give two or more policies, each with its own name")
    samples = {name: read_samples(name, path, args.limit) for name, path in files.items()}
    asked = constitution.wording(args.constitution, args.principle)
    names, judge = list(samples), load_judge(args)
    keys = list(dict.fromkeys(key for rows in samples.values() for key in rows))
    number_of = {key: t for t, key in enumerate(keys)}
    table = np.full((len(keys), len(names), len(names)), np.nan)
    results = {"pairs": {}, "cut_off": {name: sum(not r["stopped"] for r in rows.values()) for name, rows in samples.items()}}
    for i, j in combinations(range(len(names)), 2):
        one, two = samples[names[i]], samples[names[j]]
        both = [key for key in one if key in two]
        if not both:
            raise cli.UserError(f"--samples: {names[i]} and {names[j]} have no prompt in common")
        pairs = [(one[key], two[key]) for key in both]
        outcomes, left_out = judged_outcomes(judge, asked, pairs, judge.name == "gold")
        kept = [(x, key, pair) for x, key, pair in zip(outcomes, both, pairs, strict=True) if x is not None]
        if not kept:
            raise cli.UserError(f"{names[i]} against {names[j]}: the judge answered nothing ({listed(left_out)})")
        values, clusters = [x for x, _, _ in kept], [cluster(a) for _, _, (a, _) in kept]
        lengths = [(len(a["response"]), len(b["response"])) for _, _, (a, b) in kept]
        for x, key, _ in kept:
            table[number_of[key], i, j], table[number_of[key], j, i] = x, 1 - x
        results["pairs"][f"{names[i]} against {names[j]}"] = {
            **comparison.win_rate(values, clusters),
            "length_corrected": comparison.length_corrected(values, lengths, clusters),
            "mean_lengths": np.mean(lengths, axis=0).tolist(),
            "left_out": left_out,
        }
    head = [f"{args.judge}, {args.principle}", "win rate", "at equal length", "wins / ties / losses", "characters", "left out"]
    rows = [
        [name, cell(r), cell(r["length_corrected"]), f"{r['wins']} / {r['ties']} / {r['losses']}",
         " / ".join(f"{n:.0f}" for n in r["mean_lengths"]), listed(r["left_out"])]
        for name, r in results["pairs"].items()
    ]  # fmt: skip
    print(markdown([head, *rows]))
    if len(names) > 2:
        results["elo"] = dict(zip(names, comparison.elo(table, [cluster({"prompt": p}) for p, _ in keys]), strict=True))
        ranked = sorted(results["elo"].items(), key=lambda item: -item[1]["value"])
        print("\n" + markdown([["policy", "Elo"], *([name, cell(r)] for name, r in ranked)]))
    print(f"cut off, and judged so: {listed(results['cut_off'])}")
    write_json(args.out, results)
    return results


# ---- tokens: single responses, as PPO saw them ----------------------------------------------------------------------


@dataclass
class TokensArgs:
    """Responses that train_ppo.py --dump-rollouts wrote: each token with its log-probs, KL, reward, value, advantage, return."""

    file: list[str] = cli.arg(help="RUN/rollouts/STEP.jsonl", positional=True)
    row: int | None = cli.arg(None, help="this row of each file alone")


def tokens(args: TokensArgs) -> list[str]:
    tables = []
    for path in args.file:
        rows = data.read_jsonl(path, rollouts.KEYS, None, rollouts.check)
        if args.row is not None and args.row not in (known := [row["row"] for row in rows]):
            raise cli.UserError(f"{path}: no row {args.row}, but {', '.join(map(str, known))}")
        tables += [rollouts.table(row) for row in rows if args.row in (None, row["row"])]
    print("\n\n".join(tables))
    return tables


WORDS = {"hhh": (hhh, HHHArgs), "labels": (labels, LabelsArgs), "winrate": (winrate, WinrateArgs), "tokens": (tokens, TokensArgs)}
