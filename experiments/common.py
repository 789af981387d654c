"""What the experiments on finished runs of demo.py share: their flags, what gold says, figures with the runs side by side."""

import json
import os
import time
from pathlib import Path

import torch

from minirlaif import data
from minirlaif.cli import UserError
from minirlaif.metrics import cluster, rate

ALL = "all runs"


def named(runs: list[str]) -> dict[str, str]:
    """Out folders of demo.py -> {name of the folder: its path, `spelled`}. UserError: two of one name, or no such run."""
    found = {Path(run).resolve().name: spelled(run) for run in runs}
    if len(found) < len(runs) or not runs or "" in runs:
        raise UserError("--runs: give one or more out folders of demo.py, each with a name of its own")
    if missing := next((run for run in runs if not (Path(run) / "evaluate" / "results.json").exists()), None):
        raise UserError(f"{missing}: no finished run of demo.py (no evaluate/results.json); run demo.py --out {missing}")
    return found


def spelled(path: str) -> str:
    """One spelling of a path, since a run's flags are compared as text: from the working directory, else from the root."""
    full, here = Path(path).resolve(), Path.cwd()
    return str(full.relative_to(here) if full.is_relative_to(here) else full)


def claim(out: str, title: str, quick=False) -> str:
    """Mark the folder `out` as that of the experiment with this title -> its path, `spelled`.

    What is done there is not done again, so it must be of one kind. UserError: a file, or it holds something else's results.
    """
    folder, mine = Path(out), title + ", --quick" * quick
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {out}: must name a folder, and this is a file")
    mark, made = folder / "experiment.txt", folder / "results.md"
    for file, line in ((mark, mine), (made, f"# {title}")):
        if file.exists() and (found := file.read_text(errors="replace").partition("\n")[0]) != line:
            raise UserError(f"--out {out}: holds '{found[:99]}', not '{line}'; give another --out")
    if (folder / "results.json").exists() and not (mark.exists() or made.exists()):  # as demo.py and evaluate.py leave it
        raise UserError(f"--out {out}: holds results.json of something else; give another --out")
    folder.mkdir(parents=True, exist_ok=True)
    with data.atomic_write(mark) as f:
        f.write(mine.encode())
    return spelled(out)


def begun(out: str, settings: dict, key: str) -> dict:
    """results.json as it stands, or one without entries under `key`. UserError: damaged, or made with other settings."""
    file = Path(out) / "results.json"
    if not file.exists():
        return {"settings": settings, key: {}}
    try:
        results = json.loads(file.read_bytes())
        made, _ = results["settings"], results[key].keys()
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{file}: damaged, or not of this experiment; give another --out") from None
    if made != settings:
        raise UserError(f"{file}: was made with {made}, not {settings}; give another --out")
    return results


def differ(seeds: list[int]):
    """UserError: a seed stands there twice."""
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {' '.join(map(str, seeds))}: each of them once")


def use_threads(n: int):
    """Let torch use n threads. UserError: not above 0, or more than there are processors, with which it may crash."""
    most = os.cpu_count() or 1
    if not 0 < n <= most:
        raise UserError(f"--threads {n}: must be above 0 and at most {most}, the processors of this machine")
    torch.set_num_threads(n)


def flags(folder: str, Args, **changes):
    """The Args that the run in `folder` had, with these changed, and resumable: what is compared differs in nothing else."""
    file = Path(folder) / "args.json"
    try:
        return Args(**json.loads(file.read_text())["args"] | {"resume": True} | changes)
    except OSError as e:
        raise UserError(f"{file}: {e.strerror}") from None
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{file}: not the flags of a run of this version ({e}); run demo.py again") from None


# ---- figures --------------------------------------------------------------------------------------------------------


def side_by_side(values: dict[str, list], rows: dict[str, list[dict]], span=(0, 1)) -> dict[str, dict]:
    """{run: a value a row} -> {run: {"value", "ci", "n"}, ..., ALL: the same of all of them together}.

    What is resampled are deeds x things, each with its rows of all runs, which are asked about the same ones: another run adds
    answers, and no deed. So the last interval is about these runs, asked of other deeds; what other seeds would have given
    shows in how the runs differ, and a handful of seeds says little about it. A text from outside the toy world that only one
    run has is a cluster of its own. span: of a value, as in metrics.interval: (-1, 1) for differences, None for nats.
    """
    clusters = {run: [cluster(row) for row in rows[run]] for run in values}
    pooled = [value for run in values for value in values[run]]
    keys = [key for run in values for key in clusters[run]]
    alone = {run: rate(values[run], clusters[run], span) for run in values}
    together = rate(pooled, keys, span)
    if len(set(pooled)) == 1:  # with no spread to resample the interval counts rows, and another run's ask nothing new
        together["ci"] = max(alone.values(), key=lambda one: one["n"])["ci"]
    return alone | {ALL: together}


def minus(a: dict[str, list], b: dict[str, list]) -> dict[str, list]:
    """Paired differences, run by run."""
    return {run: [x - y for x, y in zip(a[run], b[run], strict=True)] for run in a}


def shown(found: dict | None, digits=3) -> str:
    if found is None or found["value"] is None:
        return ""
    ci = "n/a" if found["ci"] is None else ", ".join(f"{end:.{digits}f}" for end in found["ci"])
    return f"{found['value']:.{digits}f} [{ci}]"


def table(first: str, rows: dict[str, dict[str, dict]], digits=3) -> list[str]:
    """{name of a row: {column: rate}} -> the lines of a markdown table; columns in the order of the first row."""
    columns = list(next(iter(rows.values())))
    lines = [f"| {' | '.join([first, *columns])} |", "|" + " --- |" * (1 + len(columns))]
    return lines + [
        f"| {' | '.join([name, *(shown(row.get(column), digits) for column in columns)])} |" for name, row in rows.items()
    ]


def side(difference: dict) -> int:
    """Which side of 0 the whole interval is on: 1, -1, or 0 where it holds 0, or nobody knows."""
    low, high = difference["ci"] or (0, 0)
    return (low > 0) - (high < 0)


def contradict(columns: dict) -> bool:
    """Whether a difference is above 0 in one run alone, and below it in another."""
    return {1, -1} <= {side(one) for run, one in columns.items() if run != ALL}


def told(columns: dict, digits=3) -> tuple[int, str]:
    """The side of 0 that a difference of all runs is on, 0 where one run contradicts another, and its figures in words."""
    where, alone = side(columns[ALL]), [side(one) for run, one in columns.items() if run != ALL]
    if contradict(columns):
        return 0, f"{shown(columns[ALL], digits)}, but the runs contradict each other"
    return where, f"{shown(columns[ALL], digits)}, {alone.count(where)} of {len(alone)} runs alone"


def error_bars(found: list[dict]) -> list[list[float]]:
    """For errorbar: how far intervals reach below and above their means, which a percentile bootstrap need not hold."""
    return [[max(0, x["value"] - x["ci"][0]) for x in found], [max(0, x["ci"][1] - x["value"]) for x in found]]


def pyplot(path):
    """matplotlib.pyplot, or None and a line that says why there will be no `path`."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print(f'no {Path(path).name}: matplotlib is not installed (pip install -e ".[plot]")')
        return None
    return pyplot


def close(out: str, lines: list[str], began: float):
    """Print the report, and how long it took since `began` (time.monotonic)."""
    print("\n" + "\n".join(lines))
    print(f"\n{time.monotonic() - began:.0f} s; see {out}/results.md and {out}/results.json")


def write(out: str, results: dict, lines: list[str]):
    """results.md and results.json, replaced together after every step: what is there can be read at any time."""
    Path(out).mkdir(parents=True, exist_ok=True)
    # results.md is first: `claim` knows the folder by it
    for name, content in (("results.md", "\n".join(lines) + "\n"), ("results.json", json.dumps(results, indent=2))):
        with data.atomic_write(Path(out) / name) as f:
            f.write(content.encode())
