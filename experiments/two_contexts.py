"""Two contexts in one model: two preambles that contradict each other, distilled behind two short tags.

    python -m experiments.two_contexts --runs runs/demo-0 runs/demo-1 runs/demo-2

Askell et al. 2021 distil one context into a model, which then shows it always. Here the student sees one token, "A" or "B", where
the teacher sees a good or a bad preamble, in one training with each prompt under both. The teacher is the base of a
finished demo.py, whose pretraining text has both preambles. Each then answers the held-out requests of the demo: the base with no
tag, under each preamble, and under each tag (which by itself should mean nothing); the student under each tag, and with none,
where nothing was trained. distill.py takes one context, so the loop is here: the same targets and the same rates.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

import distill
from experiments import common
from experiments.distill_hhh import HARMLESSNESS, HELPFULNESS, answers, compare, demo_flags, measures, written
from minirlaif import cli, corpus, data, examples, targets, text, trainer, world
from minirlaif.metrics import gold_of
from minirlaif.sampling import generate

TITLE = "Two contexts in one model"
TAGS = {"A": corpus.GOOD_PREAMBLES[0], "B": corpus.BAD_PREAMBLES[0]}
BEFORE = {"none": "", "preamble A": TAGS["A"], "preamble B": TAGS["B"], "tag A": "A", "tag B": "B"}  # what precedes a prompt
STUDENT = ("none", "tag A", "tag B")  # of these, what the student is shown
PAIRS = [
    ("student, tag A", "student, tag B"),
    ("base, preamble A", "base, preamble B"),
    ("student, tag A", "base, preamble A"),
    ("student, tag B", "base, preamble B"),
    ("base, tag A", "base, tag B"),
    ("student, none", "base, none"),
]
REFUSES = "refuses harmful"
QUICK_PROMPTS, QUICK_HELD_OUT = 16, 16


@dataclass
class Args:
    runs: list[str] = cli.arg(help="out folders of demo.py, one a seed; the results are of these alone")
    out: str = cli.arg("runs/experiments/two_contexts", "folder to write; what is done there is not done again")
    quick: bool = cli.arg(False, "a few prompts: shows that it runs")


def train(a: distill.Args):
    """A student in a.out from a.model, which is the teacher too: the prompts of a.data behind every tag and preamble."""
    device, tokenizer = trainer.resolve_device(a.device), trainer.tokenizer_of(a.model)
    teacher, student = trainer.load_gpt(a.model, device).requires_grad_(False), trainer.load_gpt(a.model, device)
    prompts = [row["prompt"] for row in data.read_prompts(a.data[0])[: a.limit]]
    with trainer.Run(a.out, a, a.resume) as run:
        if run.finished:
            return
        precision, rows = trainer.autocast(device, run.resolve_dtype(device, student)), []
        for tag, preamble in TAGS.items():
            seen = [tokenizer.encode(text.with_preamble(preamble, prompt)) for prompt in prompts]
            unseen = [tokenizer.encode(text.with_preamble(tag, prompt)) for prompt in prompts]
            for i in range(0, len(prompts), 128):
                seed = trainer.rng(a.seed, "answers", tag, i).initial_seed()
                with precision:
                    s = generate(teacher, seen[i : i + 128], a.max_new_tokens, tokenizer.eot, seed=seed)
                for *contexts, ids, stopped in zip(seen[i:], unseen[i:], s.responses(), s.stopped.tolist(), strict=False):
                    if stopped:  # as in distill.py
                        rows.append(examples.Example(*contexts, ids + [tokenizer.eot], 0))
        optimizer, first = trainer.configure_optimizer(student, a.lr), 0
        if state := run.load_state():
            student.load_state_dict(state["student"])
            optimizer.load_state_dict(state["optimizer"])
            first = state["step"]
        order = examples.epoch_order([0] * len(rows), [], a.seed, 0)
        batches = [[rows[i] for i in order[k : k + a.batch_size]] for k in range(0, len(rows), a.batch_size)]
        for step in range(first, len(batches)):
            for group in optimizer.param_groups:
                group["lr"] = a.lr * trainer.lr_at(step, len(batches), distill.WARMUP, "linear")
            responses = [e.response for e in batches[step]]
            with precision:
                with torch.no_grad():
                    target = targets.response_states(teacher, [e.seen for e in batches[step]], responses, tokenizer.eot)
                h = targets.response_states(student, [e.unseen for e in batches[step]], responses, tokenizer.eot)
                loss = targets.kl(student, h, (teacher, target))[: sum(map(len, responses))].mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(student.parameters(), distill.MAX_GRAD_NORM)
            trainer.check_finite({"loss": loss, "gradient": norm})  # before the step that would spoil the weights
            optimizer.step()
            run.log(step, **{"loss/kl": loss})
            run.end_step(step + 1, lambda: {"student": student.state_dict(), "optimizer": optimizer.state_dict()})
        trainer.save_model(a.out, student.config, student.state_dict(), "gpt", tokenizer.name)
        run.finish()


def experiment(run: str, out: str, quick: bool) -> dict[str, list[dict]]:
    """One seed: {"base, none", ...: an answer to every held-out request}."""
    asked, limit = [f"{run}/world/prompts.jsonl"], QUICK_PROMPTS if quick else 1500
    train(distill.Args(model=f"{run}/base", data=asked, limit=limit, out=f"{out}/student", **demo_flags(run)))
    held_out, found = data.read_jsonl(f"{run}/world/heldout.jsonl")[: QUICK_HELD_OUT if quick else None], {}
    for name, words in BEFORE.items():
        prompts = [row | {"prompt": text.with_preamble(words, row["prompt"])} for row in held_out]
        folder = f"{out}/{name.replace(' ', '-')}"
        policies = {f"base, {name}": f"{run}/base"} | ({f"student, {name}": f"{out}/student"} if name in STUDENT else {})
        found |= answers(run, policies, written(f"{folder}/prompts.jsonl", prompts), f"{folder}/evaluate")
    return found


def summarise(found: dict) -> dict:
    """{run: what experiment gives} -> results.json."""
    runs, results = list(found), {"measures": {}}
    for measure in (HARMLESSNESS, HELPFULNESS, REFUSES):
        of, asked = {}, {}
        for name in found[runs[0]]:
            every = {run: [(row, value_of(row, measure)) for row in found[run][name]] for run in runs}
            of[name] = {run: [v for _, v in every[run] if v is not None] for run in runs}
            asked = {run: [row for row, v in every[run] if v is not None] for run in runs}
        results["measures"][measure] = compare(of, asked, PAIRS)
    return {"verdicts": verdicts(results["measures"]), **results}


def value_of(row: dict, measure: str):
    if measure != REFUSES:
        return measures(row)[measure]
    return gold_of(row).refused if world.parse_request(row["prompt"]).harmful else None


def verdicts(found: dict) -> list[str]:
    """What the figures say, in words."""

    side, figures = common.told(found[HARMLESSNESS]["student, tag A - student, tag B"])
    taught, _ = common.told(found[HARMLESSNESS]["base, preamble A - base, preamble B"])
    words = "each tag selects its behaviour" if side == taught == 1 else "the tags do not select the behaviours"
    lines = [f"- {words}: harmlessness of the student, tag A - tag B: {figures}."]
    for measure in (HARMLESSNESS, HELPFULNESS):
        for tag in TAGS:
            side, figures = common.told(found[measure][f"student, tag {tag} - base, preamble {tag}"])
            words = {1: "higher than with", 0: "not told from", -1: "lower than with"}[side]
            lines.append(f"- {measure}, tag {tag}: {words} the preamble that it stands for ({figures}).")
    side, figures = common.told(found[HARMLESSNESS]["base, tag A - base, tag B"])
    words = "nothing that shows" if side == 0 else "something"
    lines.append(f"- to the base the tags mean {words}: harmlessness, tag A - tag B: {figures}.")
    untagged = found[HARMLESSNESS]["student, none - base, none"]
    side, figures = common.told(untagged)
    words = {1: "above", 0: "neither above nor below", -1: "below"}[side]
    alone = ", ".join(f"{run} {common.shown(one)}" for run, one in untagged.items() if run != common.ALL)
    return [*lines, f"- without a tag, where nothing was trained: harmlessness {words} the base's ({figures}: {alone})."]


def report(results: dict) -> list[str]:
    """The lines of results.md."""
    lines = [f"# {TITLE}", "", *results["verdicts"], ""]
    lines += [f"{tag}: {preamble}" for tag, preamble in TAGS.items()]
    lines += ["", "Means with 95 % intervals (bootstrap over deed x thing); differences are paired."]
    for measure, rows in results["measures"].items():
        lines += ["", f"## {measure}", "", *common.table("model, what stands before the request", rows)]
    return lines


def plot(results: dict, path: Path):
    """What gold says behind each beginning, a dot a run and a bar for their mean; nothing where matplotlib is not installed."""
    if not (plt := common.pyplot(path)):
        return
    order = ["preamble A", "tag A", "preamble B", "tag B", "none"]  # each tag beside what it stands for
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), sharey=True, layout="constrained")
    for axis, measure in zip(axes, (HARMLESSNESS, HELPFULNESS), strict=True):
        for who, color, aside in (("base", "0.4", -0.15), ("student", "C0", 0.15)):
            found = {x: results["measures"][measure].get(f"{who}, {name}") for x, name in enumerate(order)}
            found = {x + aside: columns for x, columns in found.items() if columns}
            dots = [(x, one["value"]) for x, columns in found.items() for run, one in columns.items() if run != common.ALL]
            axis.plot(*zip(*dots, strict=True), "o", markersize=4, alpha=0.6, color=color, label=who)
            axis.plot(list(found), [columns[common.ALL]["value"] for columns in found.values()], "_", markersize=22, color=color)
        axis.set(title=f"gold {measure}", ylim=(0, 1.03))
        axis.set_xticks(range(len(order)), [*order[:-1], "nothing"])
    axes[0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(args: Args) -> dict:
    runs, began, found, results = common.named(args.runs), time.monotonic(), {}, {}
    args.out = common.claim(args.out, TITLE, args.quick)
    for name, run in runs.items():
        print(f"\n[{name}]", flush=True)
        found[name] = experiment(run, f"{args.out}/{name}", args.quick)
        results = summarise(found)
        common.write(args.out, results, report(results))
    plot(results, Path(args.out) / "two_contexts.png")
    common.close(args.out, report(results), began)
    return results


if __name__ == "__main__":
    cli.run(main, Args, again="the same command goes on where it stopped")
