"""What a context costs with every request, and what distilling it saves: tokens, seconds to decode, cache.

    python -m experiments.distill_cost --out runs/experiments/distill_cost

A request is a prompt of 16 tokens and an answer of 32, behind a context C of 16 to 512 tokens. Three ways to answer it:

    prompted     C is read again with every request
    cached       C's keys and values were computed once (prefix.root) and every request goes on from them: the honest competitor
    distilled    no C: distill.py has moved it into the weights

Only cost is measured, and random weights cost what trained ones cost; the block size is 1024, and no token ends an answer. The
ways take turns in every round, so that what else the machine does hits them alike; seconds are medians over the rounds, ratios
are medians (and ranges) of what single rounds say. On one thread of a CPU they are seconds of computing, since a clock on the
wall would measure a busy machine's other users, too. Counted: tokens that the model computes for a request; seconds for the
whole answer, and until its first token; keys and values that a request holds, in fp32.

Left out: what distilling costs, once (bench/distill_targets.py has seconds a step), and caches that requests share in memory
(`generate` gives each row a copy of C's).

What the papers say (Askell et al. 2021; Bai et al. 2022): a prompt takes room and time with each request, which distillation
gives back; they measure neither. So nothing here can disagree with them in shape; but how much of it is left where C is cached
is shown. What came out here, with C of 512 tokens: read each time, 11.7 times the tokens and 1.7 to 8.5 times the seconds of
the distilled model; cached, as many tokens as it and 1.1 (one request at a time) to 3.2 times (32 at a time) its seconds, since
every token that is written still looks back at C. Up to 128 tokens of C, a cache takes one request at a time 1.1 times at most.
"""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from experiments import common
from minirlaif import cli, prefix, trainer
from minirlaif.model import GPT, GPTConfig
from minirlaif.sampling import generate

TITLE = "What a context costs with every request"
BLOCK, PROMPT, ANSWER = 1024, 16, 32  # tokens
CONTEXTS = (16, 32, 64, 128, 256, 512)
CASES = {  # name: layers, heads, width, vocabulary; requests that are answered together; rounds
    "the demo's shape (0.9 M), 1 at a time": (4, 4, 128, 768, 1, 15),
    "the demo's shape (0.9 M), 32 at a time": (4, 4, 128, 768, 32, 9),
    "GPT-2's shape (124 M), 1 at a time": (12, 12, 768, 50257, 1, 3),
}
QUICK = {"tiny, 2 at a time": (1, 2, 16, 300, 2, 1)}
DISTILLED = "distilled"


@dataclass
class Args:
    out: str = cli.arg("runs/experiments/distill_cost", "folder to write; cases that are there are not measured again")
    threads: int = cli.arg(1, "threads of torch")
    device: str = cli.arg("cpu", "where to measure", choices=["auto", "cpu", "cuda", "mps"])
    quick: bool = cli.arg(False, "a tiny model, two contexts, one round: shows that it runs")


def key(way: str, context: int) -> str:
    return f"{way}, {context}"


def ways_of(model: GPT, contexts, requests: int) -> dict[str, tuple[list, object, int]]:
    """{name: (prompts, root or None, tokens of C)}: the same requests without C, and with each C, read or cached."""
    draw = trainer.rng(1)

    def ids(n):
        return torch.randint(model.config.vocab_size, (n,), generator=draw).tolist()

    asked, c = [ids(PROMPT) for _ in range(requests)], ids(max(contexts))
    ways = {DISTILLED: (asked, None, 0)}
    for n in contexts:
        prompts = [c[:n] + prompt for prompt in asked]
        _, root = prefix.follow(model, prefix.root(model, [], 0), [0], [c[:n]], 0)
        ways[key("prompted", n)], ways[key("cached", n)] = (prompts, None, n), (prompts, root, n)
    return ways


def answer(model: GPT, prompts: list, root, tokens: int):
    """Samples of `tokens` tokens each: the vocabulary holds no end."""
    return generate(model, prompts, tokens, eot=model.config.vocab_size, root=root)


def seconds(model: GPT, prompts: list, root, tokens: int) -> float:
    clock = time.process_time if model.device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    began = clock()
    answer(model, prompts, root, tokens).tokens.cpu()  # a GPU is waited for
    return clock() - began


@torch.no_grad()
def measure(case, contexts, device) -> dict:
    """{way: {"context", "tokens", "cache_bytes" (a request), "first", "whole" (seconds, a round each)}} of one case."""
    *layers_heads_width, n_vocab, requests, rounds = case
    model = GPT(GPTConfig(BLOCK, n_vocab, *layers_heads_width)).init_weights(trainer.rng(0)).to(device).eval()
    found, ways = {}, ways_of(model, contexts, requests)
    for name, (_, root, n) in ways.items():
        read = PROMPT + (n if root is None else 0)
        cache = 2 * 4 * model.config.n_layer * model.config.n_embd * (n + PROMPT + ANSWER)
        found[name] = {"context": n, "tokens": read + ANSWER, "cache_bytes": cache, "first": [], "whole": []}
    for turn in range(rounds + 1):
        for name, (prompts, root, _) in ways.items():
            first = seconds(model, prompts, root, 1)
            if turn:  # the first round warms up
                found[name]["first"].append(first)
                found[name]["whole"].append(seconds(model, prompts, root, ANSWER))
    return found


# ---- what it says ---------------------------------------------------------------------------------------------------


def ratio(found: dict, name: str, what: str) -> tuple[float, float, float]:
    """Seconds in units of the distilled model's of the same round: median, least, most."""
    of_rounds = [a / b for a, b in zip(found[name][what], found[DISTILLED][what], strict=True)]
    return statistics.median(of_rounds), min(of_rounds), max(of_rounds)


def times(values: tuple[float, float, float]) -> str:
    return "{:.2f} [{:.2f}, {:.2f}]".format(*values)


def verdicts(cases: dict) -> list[str]:
    lines = []
    for case, found in cases.items():
        n = max(row["context"] for row in found.values())
        tokens = found[key("prompted", n)]["tokens"] / found[DISTILLED]["tokens"]
        read, cached = (ratio(found, key(way, n), "whole") for way in ("prompted", "cached"))
        longer = sum(a > b for a, b in zip(found[key("cached", n)]["whole"], found[DISTILLED]["whole"], strict=True))
        lines.append(
            f"- {case}, C of {n}: prompted computes {tokens:.1f} times the tokens of distilled and takes {times(read)} times as "
            f"long; with C cached it is as many tokens and {times(cached)} times as long, more in {longer} of "
            f"{len(found[DISTILLED]['whole'])} rounds."
        )
    return lines


def report(cases: dict) -> list[str]:
    """The lines of results.md."""
    lines = [f"# {TITLE}", "", *verdicts(cases), ""]
    lines += [
        f"Prompts of {PROMPT} tokens, answers of {ANSWER}; times: of the distilled model's, median [range] over the rounds."
    ]
    head = ["C", "way", "tokens a request", "keys and values (KiB)", "first token (ms)", "answer (ms)", "times, first token"]
    for case, found in cases.items():
        lines += ["", f"## {case}", "", f"| {' | '.join([*head, 'times, answer'])} |", "|" + " --- |" * (len(head) + 1)]
        for name, row in found.items():
            ms = (f"{1000 * statistics.median(row[what]):.1f}" for what in ("first", "whole"))
            compared = (times(ratio(found, name, what)) if name != DISTILLED else "1" for what in ("first", "whole"))
            cells = [row["context"] or "none", name.split(",")[0], row["tokens"], f"{row['cache_bytes'] / 1024:,.0f}"]
            lines.append(f"| {' | '.join(map(str, [*cells, *ms, *compared]))} |")
    return lines


def plot(cases: dict, path: Path):
    """Times of the distilled model's over the length of C, a panel a case; nothing where matplotlib is not installed."""
    plt = common.pyplot(path)
    if plt is None:
        return
    figure, axes = plt.subplots(1, len(cases), figsize=(4.3 * len(cases), 3.4), layout="constrained", squeeze=False)
    for axis, (case, found) in zip(axes[0], cases.items(), strict=True):
        contexts = sorted({row["context"] for row in found.values()} - {0})
        for color, way in enumerate(("prompted", "cached")):
            for what, style, label in (("whole", "-", "answer"), ("first", "--", "first token")):
                middle, low, high = zip(*(ratio(found, key(way, n), what) for n in contexts), strict=True)
                axis.plot(contexts, middle, style, marker=".", color=f"C{color}", label=f"{way}, {label}")
                axis.fill_between(contexts, low, high, color=f"C{color}", alpha=0.15, linewidth=0)
        axis.axhline(1, color="0.6", zorder=0)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_title(case, fontsize=9)
        axis.set(xlabel="tokens of C", xticks=contexts, xticklabels=contexts)
    axes[0][0].set_ylabel("times of the distilled model's")
    axes[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main(args: Args) -> dict:
    common.use_threads(args.threads)
    began, device = time.monotonic(), trainer.resolve_device(args.device)
    args.out = common.claim(args.out, TITLE)
    cases, contexts = (QUICK, CONTEXTS[:2]) if args.quick else (CASES, CONTEXTS)
    settings = {"contexts": list(contexts), "threads": args.threads, "device": device.type}
    results = common.begun(args.out, settings, "cases")
    for name, case in cases.items():
        if name not in results["cases"]:
            print(name, flush=True)
            results["cases"][name] = measure(case, contexts, device)
        results["verdicts"] = verdicts(results["cases"])
        common.write(args.out, results, report(results["cases"]))
    plot(results["cases"], Path(args.out) / "distill-cost.png")
    common.close(args.out, report(results["cases"]), began)
    return results


if __name__ == "__main__":
    cli.run(main, Args, again="the same command goes on where it stopped")
