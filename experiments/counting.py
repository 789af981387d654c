"""Counting: prompting is not fine-tuning. What C = "1 2 ... 63" does in the context, in the weights by distillation, or as text.

    python -m experiments.counting --seeds 0 1 2 --out runs/experiments/counting

A small GPT is pretrained on pages of one to three lines. A line is a count (consecutive integers from any of 100 starts; half of
the counts hold 2 to 10, half 2 to 100) or a sentence that begins with a number. On a third of the pages nine lines in ten are
counts, on the others one in ten. So nobody can know which of the two a lone "63" at the start of a page begins, and a count that
stands before it, which is what C is, makes another count likelier. Lines end independently of each other: one that stopped at 63
says nothing about the next. (Had each page one end for all its counts, a reader of C would rightly expect 63 to end again.) What
an ideal reader of these pages expects can be computed (`ideal`).

    no intervention    the pretrained model and the input alone: a control. On the input 1 ... 63 it is, to the letter, the
                       paper's prompted model, whose prompt is the count itself. So it may well be high, and then that input shows
                       what fine-tuning breaks and nothing of what C does; the input 63 is there for that
    prompted           C, a new line, the input
    fine-tuned on C    pretrain.py --init on the text C (end-of-text follows, as after every page), 50 passes; the input alone
    distilled          distill.py with C as the context, on single lines like those of the pretraining, half counts and half
                       sentences, of which none holds 63 or 64: what is asked at the end is never shown; the input alone

Measured: P(64) after the inputs 1 ... 63 and 63, and P(n + 1) after 1 ... n and n for every n below 100; P(the line ends); and,
as the tax, the log-loss on sentences from where it is plain that they are some. The design (pages, C, passes, learning rates;
"high" is above 0.5, "low" below 0.1, near is within 0.05) was fixed before looking at any fine-tuned or distilled model;
only the size of the pretraining was settled first, on a seed that is not reported, by how near the control comes to `ideal`.
Intervals are the range of the seeds: that of three holds the median over all seeds in three cases of four.

What the paper found (Askell et al. 2021, section 2.2; an example without figures): a model prompted with 1 ... 63 gives 64 a high
probability; fine-tuned on that text it gives it a low one, as it has learnt that 63 ends; distillation is the way to have the
former in the weights.

What came out here, on seeds 0, 1 and 2: the shape agrees. After 1 ... 63 the prompted model gives 64 a probability of 0.98, the
fine-tuned one less than 0.0001, the distilled one 0.96; but so does no intervention, 0.97. After 63: no intervention 0.52,
prompted 0.97, fine-tuned less than 0.0001, distilled 0.94. What does not fit: on seed 2 the distilled model gives 64 after 63
only 0.89, which is not near, against 0.96 for what follows 62: of all n below 100 it falls short of the prompted model most at
63, which its text left out. And this small base makes more of C than an ideal reader, who stops at 0.86.
"""

import functools
import json
import operator
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import distill
import pretrain
from experiments import common
from minirlaif import cli, data, tokenizer, trainer

TITLE = "Counting: C = 1 … 63"
LAST = 63  # of C
STARTS, SHORT, LONGEST = 100, 10, 100  # a count starts at 1-100; half hold 2-10 numbers, half 2-100
SHOWN = 100  # every n below is measured
TOP = STARTS + LONGEST - 1
PAGES_OF_COUNTS, MOSTLY = 1 / 3, 0.9  # share of such pages; of a page's lines that are of its kind
LINES = 3  # a page has 1-3
THINGS = ["boats", "sheep", "loaves", "letters", "lamps", "chairs", "coins", "geese", "barrels", "books", "bells", "carts"]
DEEDS = ["stood", "lay", "waited", "rested", "vanished", "gathered", "turned", "remained"]
WHERE = ["near", "behind", "under", "beside", "above", "inside"]
PLACES = ["harbour", "mill", "church", "market", "bridge", "orchard", "tower", "barn", "garden", "station"]
HIGH, LOW, NEAR = 0.5, 0.1, 0.05

WAYS = ("no intervention", "prompted", "fine-tuned on C", "distilled")
INPUTS = (f"1 … {LAST}", f"{LAST}")


@dataclass
class Args:
    out: str = cli.arg("runs/experiments/counting", "folder to write; what is done there is not done again")
    seeds: list[int] = cli.arg([0, 1, 2], "seeds of text, weights and order")
    device: str = cli.arg("auto", "auto takes cuda, mps or cpu, the first that is there", choices=["auto", "cpu", "cuda", "mps"])
    quick: bool = cli.arg(False, "a tiny model, little text and the first seed alone: shows that it runs")


# ---- text -----------------------------------------------------------------------------------------------------------


def count(first: int, last: int) -> str:
    return "\n" + "".join(f" {n}" for n in range(first, last + 1))


C = count(1, LAST)


def any_count(rng: random.Random) -> str:
    first = rng.randint(1, STARTS)
    return count(first, first + rng.randint(2, rng.choice((SHORT, LONGEST))) - 1)


def sentence(rng: random.Random) -> str:
    words = (rng.choice(words) for words in (THINGS, DEEDS, WHERE, PLACES))
    return "\n {} {} {} {} the {} .".format(rng.randint(1, TOP), *words)


def page(rng: random.Random) -> str:
    share = MOSTLY if rng.random() < PAGES_OF_COUNTS else 1 - MOSTLY
    return "".join((any_count if rng.random() < share else sentence)(rng) for _ in range(rng.randint(1, LINES)))


def unasked(line, rng: random.Random, n: int) -> list[dict]:
    """n lines of a kind without 63 and 64, as completions of their first word."""
    rows = []
    while len(rows) < n:
        words = line(rng).split(" ")
        if not {str(LAST), str(LAST + 1)} & {*words}:
            rows.append({"prompt": " ".join(words[:2]), "completion": "".join(f" {w}" for w in words[2:])})
    return rows


def vocabulary() -> dict[bytes, int]:
    """{bytes: rank}: the 256 bytes, which must be there, and one token for each number and word, its space included."""
    words = [*range(1, TOP + 1), *THINGS, *DEEDS, *WHERE, *PLACES, "the", "."]
    return {bytes([b]): b for b in range(256)} | {f" {word}".encode(): 256 + i for i, word in enumerate(words)}


def ideal() -> dict[str, dict[str, float]]:
    """{way: {input: P(64)}} of a reader who knows how pages are made; without and with C before the input."""

    def counts_after(number, share):  # P(the line is a count | it begins with this number)
        return share / STARTS / (share / STARTS + (1 - share) / TOP) if number <= STARTS else 0.0

    long = (LONGEST - LAST) / (LONGEST - LAST + 1)  # lengths beyond 63, of those from 63 on
    a, b = PAGES_OF_COUNTS * MOSTLY, (1 - PAGES_OF_COUNTS) * (1 - MOSTLY)  # P(kind of page, and its first line is a count)
    after_count = (a * MOSTLY + b * (1 - MOSTLY)) / (a + b)
    shares = {"no intervention": a + b, "prompted": after_count}
    return {way: dict(zip(INPUTS, (long, counts_after(LAST, share)), strict=True)) for way, share in shares.items()}


# ---- a seed ---------------------------------------------------------------------------------------------------------


def train(seed: int, out: str, words: str, args: Args) -> dict:
    """Texts, base, fine-tuned and distilled model of a seed, each skipped if it is there -> {way: (model folder, context)}."""
    pages, lines, asked = (300, 20, 30) if args.quick else (30000, 1000, 500)
    shape = dict(n_layer=1, n_head=2, n_embd=32) if args.quick else dict(n_layer=3, n_head=4, n_embd=64)
    rng = random.Random(f"counting {seed}")
    texts = {
        "pages": [{"text": page(rng)} for _ in range(pages)],
        "c": [{"text": C}],
        "counts": unasked(any_count, rng, lines),
        "sentences": unasked(sentence, rng, lines),
        "held_out": [{"text": sentence(rng)} for _ in range(asked)],
    }
    for name, rows in texts.items():
        if not Path(file := f"{out}/{name}.jsonl").exists():
            data.write_jsonl(file, rows)
    base, same = f"{out}/base", dict(seed=seed, device=args.device, dtype="fp32", resume=True)
    pretrain.main(pretrain.Args(data=[f"{out}/pages.jsonl"], out=base, tokenizer=words, block_size=320, **shape, **same))
    tuned = dict(init=base, epochs=5 if args.quick else 50, lr=1e-3, warmup=5, out=f"{out}/tuned")
    pretrain.main(pretrain.Args(data=[f"{out}/c.jsonl"], **tuned, **same))
    lines = [f"{out}/counts.jsonl", f"{out}/sentences.jsonl"]
    distill.main(distill.Args(model=base, data=lines, weights=[1, 1], preamble=C, epochs=2, out=f"{out}/distilled", **same))
    return dict(zip(WAYS, ((base, ""), (base, C), (f"{out}/tuned", ""), (f"{out}/distilled", "")), strict=True))


@torch.no_grad()
def measure(model, encode, eot: int, context: str, held_out: list[str]) -> dict:
    """-> {input: {"P(64)", "P(the line ends)", "P(n + 1)": mean over all n below 100}}, "curves" {input: P(n + 1) for n from 1},
    and "loss" on sentences."""
    head, numbers = encode(context + "\n"), encode(count(1, SHOWN))[1:]
    ends = [*encode("\n"), eot]
    long = model(torch.tensor([head + numbers[:-1]], device=model.device))[0, len(head) :]
    short = model(torch.tensor([[*head, n] for n in numbers[:-1]], device=model.device))[:, -1]
    found = {"curves": {}}
    for name, logits in zip(INPUTS, (long, short), strict=True):
        p = logits.float().softmax(-1)  # (99, V): row n - 1 is what follows 1 ... n, or n
        curve = p[torch.arange(SHOWN - 1), numbers[1:]].tolist()
        found["curves"][name] = curve
        found[name] = {"P(64)": curve[LAST - 1], "P(the line ends)": float(p[LAST - 1, ends].sum())}
        found[name]["P(n + 1)"] = sum(curve) / len(curve)
    # from the third word on: the number may begin a count, and the thing after it says that it does not
    rows, start = [encode(context) + encode(line) for line in held_out], len(head) + 2
    tokens = torch.tensor(rows, device=model.device)  # sentences are of one length
    logits = model(tokens)[:, start - 1 : -1]
    found["loss"] = float(F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, start:].flatten()))
    return found


def experiment(seed: int, args: Args, words: str) -> dict:
    out, found = f"{args.out}/seed{seed}", {}
    folders, device = train(seed, out, words, args), trainer.resolve_device(args.device)
    held_out = [row["text"] for row in data.read_jsonl(f"{out}/held_out.jsonl")]
    for way, (folder, context) in folders.items():
        names = trainer.tokenizer_of(folder)
        found[way] = measure(trainer.load_gpt(folder, device), names.encode, names.eot, context, held_out)
    last = json.loads((Path(out) / "distilled" / "metrics.jsonl").read_text().splitlines()[-1])
    found["distilled"]["kl"] = {when: last[f"val/kl_{when}"] for when in ("before", "after")}
    return found


# ---- what it says ---------------------------------------------------------------------------------------------------


def over(seeds: dict, *keys) -> list[float]:
    """One figure of each seed: found[key][key]..."""
    return [functools.reduce(operator.getitem, keys, found) for found in seeds.values()]


def spread(values: list[float]) -> str:
    found = (sum(values) / len(values), min(values), max(values))
    return "{:.3f} [{:.3f}, {:.3f}]".format(*(round(x, 3) + 0.0 for x in found))  # no -0.000


def verdicts(seeds: dict) -> list[str]:
    """What the figures say, in words; what does not agree with the paper is said in the same place."""
    lines = []
    for name in INPUTS:
        none, prompted, tuned, distilled = (over(seeds, way, name, "P(64)") for way in WAYS)
        high, low = min(prompted) > HIGH, max(tuned) < LOW
        lines.append(f"- After {name}, prompted: P(64) = {spread(prompted)}, {'high' if high else 'NOT high'} on every seed.")
        lines.append(f"- After {name}, fine-tuned on C: P(64) = {spread(tuned)}, {'low' if low else 'NOT low'} on every seed.")
        if name == INPUTS[0]:  # the only one of the paper
            lines[-1] += f" The paper's shape (high and low): {'agrees' if high and low else 'does NOT agree'}."
        near = sum(abs(a - b) <= NEAR for a, b in zip(distilled, prompted, strict=True))
        lines.append(
            f"- After {name}, distilled: P(64) = {spread(distilled)}, within {NEAR} of prompted on {near} of {len(seeds)} seeds."
        )
        gap = [a - b for a, b in zip(prompted, none, strict=True)]
        if min(none) > HIGH and max(gap) <= NEAR:
            control = "high without any intervention, so that this input shows what fine-tuning breaks and not what C does"
        elif min(gap) > NEAR:
            shares = [(d - n) / g for d, n, g in zip(distilled, none, gap, strict=True)]
            control = f"C raises it, by {spread(gap)}, of which distillation carries {spread(shares)}"
        else:
            control = f"C changes it by {spread(gap)}: not the same way on every seed"
        lines.append(f"- After {name}, no intervention: P(64) = {spread(none)}: {control}.")
    before = over(seeds, WAYS[0], "loss")
    tax = {way: [a - b for a, b in zip(over(seeds, way, "loss"), before, strict=True)] for way in WAYS[1:]}
    shown = ", ".join(f"{way} {spread(values)}" for way, values in tax.items())
    return [*lines, f"- Tax: log-loss on sentences above that of no intervention, nats a token: {shown}."]


def report(results: dict) -> list[str]:
    """The lines of results.md."""
    seeds, truth = results["seeds"], results["ideal"]
    lines = [f"# {TITLE}", "", *results["verdicts"], ""]
    lines += ["Mean and range of the seeds; ideal: a reader who knows how the pages are made.", ""]

    def table(title, rows, exact=None):
        """rows: {name: keys of the figure}; exact: {name: what an ideal reader would say}."""
        head = [title, *(f"seed {seed}" for seed in seeds), "all", *(["ideal"] if exact else [])]
        lines.extend([f"| {' | '.join(head)} |", "|" + " --- |" * len(head)])
        for name, keys in rows.items():
            cells = [name, *(f"{v:.3f}" for v in over(seeds, *keys)), spread(over(seeds, *keys))]
            lines.append(f"| {' | '.join(cells + ([exact.get(name, '')] if exact else []))} |")
        lines.append("")

    for name, given in zip(INPUTS, ("1 … n", "n"), strict=True):
        exact = {way: f"{p[name]:.3f}" for way, p in truth.items()}
        table(f"P(64) after {name}", {way: (way, name, "P(64)") for way in WAYS}, exact)
        table(f"P(the line ends) after {name}", {way: (way, name, "P(the line ends)") for way in WAYS})
        table(f"P(n + 1) after {given}, mean of n below {SHOWN}", {way: (way, name, "P(n + 1)") for way in WAYS})
    table("log-loss on sentences (nats a token)", {way: (way, "loss") for way in WAYS})
    table("KL to the prompted model (nats a token)", {when: ("distilled", "kl", when) for when in ("before", "after")})
    return lines[:-1]


def plot(results: dict, path: Path):
    """Bars of P(64), a dot a seed, and P(n + 1) for every n; nothing where matplotlib is not installed."""
    plt = common.pyplot(path)
    if plt is None:
        return
    seeds, truth = results["seeds"], results["ideal"]
    figure, (bars, *curves) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained", width_ratios=(1.3, 1, 1))
    for k, way in enumerate(WAYS):
        for x, name in enumerate(INPUTS):
            at, values = x + 0.2 * (k - 1.5), over(seeds, way, name, "P(64)")
            bars.bar(at, sum(values) / len(values), 0.18, color=f"C{k}", label=None if x else way)
            bars.plot([at] * len(values), values, "o", markersize=3, color="black")
            if way in truth:
                bars.plot([at - 0.09, at + 0.09], [truth[way][name]] * 2, color="black", linewidth=1)
        for axis, name in zip(curves, INPUTS, strict=True):
            mean = torch.tensor(over(seeds, way, "curves", name)).mean(0)
            axis.plot(range(1, SHOWN), mean, color=f"C{k}", linewidth=4 if way == "prompted" else 1.2)
    bars.set(xticks=range(len(INPUTS)), xticklabels=[f"after {name}" for name in INPUTS], ylabel="P(64)", ylim=(0, 1.05))
    bars.set_title("dots: seeds; lines: the ideal reader", fontsize=9)
    figure.legend(*bars.get_legend_handles_labels(), loc="outside upper center", ncols=len(WAYS))
    for axis, given in zip(curves, ("1 … n", "n"), strict=True):
        axis.set(xlabel="n", ylabel=f"P(n + 1) after {given}", ylim=(0, 1.05))
        axis.axvline(LAST, color="0.8", zorder=0)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main(args: Args) -> dict:
    common.differ(args.seeds)
    args.out = common.claim(args.out, TITLE, args.quick)
    began, words, seeds = time.monotonic(), Path(args.out) / "numbers.tiktoken", args.seeds[:1] if args.quick else args.seeds
    if not words.exists():
        tokenizer.write_ranks(words, vocabulary())
    results = {"ideal": ideal(), "seeds": {}}
    for seed in seeds:
        print(f"\n[seed {seed}]", flush=True)
        results["seeds"][seed] = experiment(seed, args, str(words))
        results["verdicts"] = verdicts(results["seeds"])
        common.write(args.out, results, report(results))
    plot(results, Path(args.out) / "counting.png")
    common.close(args.out, report(results), began)
    return results


if __name__ == "__main__":
    cli.run(main, Args, again="the same command goes on where it stopped")
