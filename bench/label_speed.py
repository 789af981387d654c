"""Labels a second on this machine: batches with shared prefixes, batches without, and one prompt after the other.

    python -m bench.label_speed

The job is label.py's: k responses a prompt, all pairs of them, each in both orders. Weights are random, which costs what
trained ones cost. The three ways take turns in every round, so that what else the machine does hits them alike; printed are
medians over rounds. All three must give the same probabilities. Only the letters' rows of the head are computed in any of
them, which a plain loop would not do: it is given that.
"""

import random
import statistics
import time
from dataclasses import dataclass
from itertools import combinations

import torch

from experiments import common, judge
from minirlaif import cli, constitution, corpus, data, text, trainer
from minirlaif.labelers import Call, LocalJudge
from minirlaif.model import GPT, GPTConfig
from minirlaif.tokenizer import load_tokenizer


@dataclass
class Args:
    prompts: int = cli.arg(48, "prompts, each with 6 pairs of 4 responses, 16-256")
    responses: int = cli.arg(4, "responses a prompt, 2-8")
    rounds: int = cli.arg(5, "how often each way takes its turn, 3-15")
    batch_size: int = cli.arg(16, "rows forwarded together, 8-512")
    threads: int = cli.arg(2, "threads of torch")
    quick: bool = cli.arg(False, "2 prompts, 1 round: shows that it runs")


def candidates(prompts: int, responses: int, seed: int = 0) -> list[dict]:
    """Rows of candidates.jsonl: requests of the toy world with so many different answers each."""
    rng, rows = random.Random(f"candidates {seed}"), []
    for _ in range(prompts):
        request, answers = corpus.pick_request(rng), set()
        while len(answers) < responses:
            answers.add(" " + corpus.anything(rng, request).text)
        rows.append(dict(prompt=text.dialogue(request.text), responses=sorted(answers)))
    return rows


def calls_of(rows: list[dict]) -> list[Call]:
    """Both orders of all pairs, each pair under a random principle."""
    rng, calls = random.Random("label speed"), []
    for row in rows:
        for pair in combinations(row["responses"], 2):
            principle = rng.choice(constitution.load("toy").preferences).text
            calls += [Call(row["prompt"], shown, principle) for shown in (pair, pair[::-1])]
    return calls


@torch.no_grad()
def plain(local: LocalJudge, calls: list[Call], batch_size: int) -> list[float]:
    """P(first letter) by whole forwards of batch_size rows of about one length; nothing is shared."""
    asked = [local.encode(call) for call in calls]
    order, p = sorted(range(len(calls)), key=lambda i: len(asked[i])), [0.0] * len(calls)
    for k in range(0, len(order), batch_size):
        rows = order[k : k + batch_size]
        tokens, length = data.pad([asked[i] for i in rows], local.tokenizer.eot)
        h = local.model.hidden(tokens)[torch.arange(len(rows)), length - 1]
        found = (h @ local.model.lm_head.weight[local.letters].T).softmax(-1)[:, 0].tolist()
        for i, value in zip(rows, found, strict=True):
            p[i] = value
    return p


def measure(local: LocalJudge, calls: list[Call], rounds: int) -> dict[str, dict]:
    """{way: {"speed": median labels a second, "ratio": to the loop in the same round, median and extremes}}"""
    ways = {
        "batches, shared prefixes": lambda: [answer.p for answer in local.ask(calls)],
        "batches": lambda: plain(local, calls, local.batch_size),
        "one prompt after the other": lambda: plain(local, calls, 1),
    }
    seconds, p = {name: [] for name in ways}, {}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            p[name] = way()
            if turn:  # the first round warms up
                seconds[name].append(time.perf_counter() - began)
    *fast, loop = ways
    for name in fast:
        off = max(abs(a - b) for a, b in zip(p[name], p[loop], strict=True))
        assert off < 1e-4, f"{name}: a probability is off by {off}"
    found = {}
    for name in ways:
        ratios = [slow / fast for slow, fast in zip(seconds[loop], seconds[name], strict=True)]
        found[name] = {
            "speed": len(calls) / 2 / statistics.median(seconds[name]),
            "ratio": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
        }
    return found


def main(args: Args) -> dict:
    cli.require_positive(args, "prompts", "rounds", "batch_size")
    common.use_threads(args.threads)
    if args.responses < 2:
        raise cli.UserError(f"--responses {args.responses}: it takes two to compare")
    prompts, rounds = (2, 1) if args.quick else (args.prompts, args.rounds)
    tokenizer = load_tokenizer("toy")
    model = GPT(GPTConfig(vocab_size=tokenizer.n_vocab)).init_weights(trainer.rng(0)).eval()  # the demo's shape
    calls, found = calls_of(candidates(prompts, args.responses)), {}
    for shots in (0, 2):
        before = judge.exemplars(tokenizer)[:shots]
        local = LocalJudge(model, tokenizer, torch.device("cpu"), "fp32", args.batch_size, before)
        tokens = statistics.fmean(len(local.encode(call)) for call in calls)
        found[f"{shots} exemplars, {tokens:.0f} tokens a prompt"] = measure(local, calls, rounds)
    print(
        f"{len(calls) // 2} labels ({prompts} prompts, {args.responses} responses each, both orders), "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, fp32, {args.threads} threads, {rounds} rounds\n\n"
        "| what is asked | way | labels a second | times the loop (lowest to highest) |\n| --- | --- | --- | --- |"
    )
    for case, ways in found.items():
        for way, f in ways.items():
            print(f"| {case} | {way} | {f['speed']:.0f} | {f['ratio']:.2f} ({f['lowest']:.2f} to {f['highest']:.2f}) |")
    return found


if __name__ == "__main__":
    cli.run(main, Args)
