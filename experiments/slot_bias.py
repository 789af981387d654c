"""A labeler that leans to the response shown first: what one order, and the two ways to average both, make of it.

    python -m experiments.slot_bias --out runs/experiments/slot_bias

No model: the labeler is gold with faults that are known. Its verdict is weak (a logit of 1 nat), the response shown first gains
1 nat, and every call adds Gaussian noise of its own. Lee et al. 2023 (RLAIF) measured such leaning in real judges: the same
position wins in both orders in 18 % of pairs with their large labeler, which favours the first in 94 % of these, in 21 % with the
small one and in 56 % with the smallest, which favour the second; they average the probabilities of both orders.

Measured here, on pairs of the toy world that gold can rank: label error (the share of labels on the wrong side) and calibration
error. To be expected, with sharpness s, bias b and noise n in nats: one order errs with probability
(Phi(-(s + b) / n) + Phi(-(s - b) / n)) / 2, and both averages with Phi(-sqrt(2) s / n), whatever b is. The averages err alike,
since the mean of two probabilities is above 0.5 exactly when the mean of their logits is above 0. What differs is how sure the
label is: the mean probability shrinks with the bias, the mean logit does not know it.
"""

import math
import random
from dataclasses import dataclass

from experiments import common, judge
from minirlaif import cli, constitution, corpus, metrics, text
from minirlaif.labelers import GoldJudge

TITLE = "A labeler with a slot bias"
SHARPNESS, BIASES, NOISES = 1.0, (0.0, 1.0), (0.5, 1.0, 2.0)  # nats
WAYS = {
    "one order": ("gold", None, None),
    "mean probability": ("gold", "probability", None),
    "mean logit": ("gold", "logit", None),
}
BASELINE = "one order"


@dataclass
class Args:
    out: str = cli.arg("runs/experiments/slot_bias", "folder to write: results.json and results.md")
    pairs: int = cli.arg(2000, "pairs a seed, 500-5000")
    seeds: list[int] = cli.arg([0, 1, 2], "seeds of pairs and noise")
    quick: bool = cli.arg(False, "200 pairs and the first seed alone: shows that it runs")


def toy_pairs(n: int, seed: int) -> list[judge.Pair]:
    """n pairs of answers to training requests, each under a random principle that tells them apart."""
    rng, pairs = random.Random(f"slot bias {seed}"), []
    while len(pairs) < n:
        request = corpus.pick_request(rng)
        prompt, responses = text.dialogue(request.text), tuple(" " + a.text for a in corpus.pair_of(rng, request))
        row, principle = dict(prompt=prompt, chosen=responses[0], rejected=responses[1]), principle_for(rng, request)
        if (first_is_better := metrics.gold_prefers_chosen(row, principle.name)) is not None:
            pairs.append(judge.Pair(row, responses, principle, first_is_better))
    return pairs


def principle_for(rng: random.Random, request) -> constitution.Preference:
    return judge.principle_of(rng.choice([name for name in judge.PRINCIPLES if not (name == "helpfulness" and request.harmful)]))


def expected_error(way: str, bias: float, noise: float) -> float:
    """The label error of the formula above."""

    def Phi(x):
        return 0.5 * math.erfc(-x / math.sqrt(2))

    if way == "one order":
        return (Phi(-(SHARPNESS + bias) / noise) + Phi(-(SHARPNESS - bias) / noise)) / 2
    return Phi(-math.sqrt(2) * SHARPNESS / noise)


def case_of(bias: float, noise: float) -> str:
    return f"slot bias {bias:g}, noise {noise:g}"


def experiment(n: int, seed: int) -> dict:
    """{case_of(bias, noise): {"prompts", "ways": judge.measure's}}"""
    pairs, found = toy_pairs(n, seed), {}
    asks_of = {p.text: p.name for p in constitution.load("toy").preferences}
    for bias in BIASES:
        for noise in NOISES:
            labeler = GoldJudge(asks_of, slot_bias=bias, call_noise=noise, sharpness=SHARPNESS, seed=seed)
            ways = judge.measure(pairs, {"gold": judge.both_orders(labeler, pairs)}, WAYS)
            found[case_of(bias, noise)] = {"prompts": [p.row["prompt"] for p in pairs], "ways": ways}
    return found


def error(agreement: dict) -> dict:
    """A rate of right labels -> the rate of wrong ones."""
    low, high = agreement["ci"]
    return agreement | {"value": 1 - agreement["value"], "ci": [1 - high, 1 - low]}


def report(seeds: dict) -> tuple[dict, list[str]]:
    """-> the figures, and the lines of results.md."""
    errors, gains, rest = {}, {}, []
    for bias in BIASES:
        for noise in NOISES:
            runs = {f"seed {seed}": found[case_of(bias, noise)] for seed, found in seeds.items()}
            for way in WAYS:
                name = f"{case_of(bias, noise)}, {way}"
                errors[name] = {run: error(rate) for run, rate in judge.paired(runs, way).items()}
                if way != BASELINE:
                    gains[name] = judge.paired(runs, way, BASELINE)
                found = [of["ways"][way] for of in runs.values()]
                eces = " / ".join(f"{x['ece']:.3f}" for x in found)
                flips = " / ".join(f"{x['flip_rate']['value']:.3f}" for x in found if x["flip_rate"])
                rest.append(f"| {name} | {expected_error(way, bias, noise):.3f} | {eces} | {flips} |")
    lines = [f"# {TITLE}", "", "Label error: the share of labels on the wrong side of gold.", ""]
    lines += common.table("labeler and average", errors)
    lines += ["", f"Agreement recovered: above that of {BASELINE}, on the same pairs.", ""]
    lines += common.table("labeler and average", gains)
    lines += ["", f"What the formula expects of the error; calibration and flips ({' / '.join(runs)}).", ""]
    lines += ["| labeler and average | expected error | ECE | flip rate |", "| --- | --- | --- | --- |", *rest]
    return {"error": errors, "recovered": gains}, lines


def main(args: Args) -> dict:
    cli.require_positive(args, "pairs")
    common.differ(args.seeds)
    args.out = common.claim(args.out, TITLE, args.quick)
    n, seeds = (200, args.seeds[:1]) if args.quick else (args.pairs, args.seeds)
    found = {seed: experiment(n, seed) for seed in seeds}
    figures, lines = report(found)
    for of_seed in found.values():  # the pairs can be drawn again
        for case in of_seed.values():
            case.pop("prompts")
            for way in case["ways"].values():
                way.pop("right")
    common.write(args.out, {"n": n, "sharpness": SHARPNESS, **figures, "seeds": found}, lines)
    print("\n".join(lines))
    return figures | {"seeds": found}


if __name__ == "__main__":
    cli.run(main, Args)
