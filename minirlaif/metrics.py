"""What samples and labels are worth, by the toy world's gold scorer: means with their 95 % intervals."""

import numpy as np

from minirlaif import corpus, world


def interval(values, clusters=None, resamples: int = 2000, span: tuple[float, float] | None = (0, 1)) -> list[float] | None:
    """95 % percentile bootstrap interval of a mean; for paired differences, give the differences. None if empty.

    clusters: a key a value; values of one key (answers to one deed x thing, say) are resampled together, since they are
    not independent. span: the lowest and highest value that can be, (-1, 1) for differences of proportions, None where there
    are no bounds. It counts where all n values are the same, so that there is no spread to resample: what was never seen may
    still be a share 3.84 / (n + 3.84) of all there is (Wilson's bound at 0 of n; the rule of three, two-sided), and lie at
    either end of the span. For proportions of 0 and 1 that is Wilson's interval. None without a span: n/a.
    """
    x = np.asarray(values, dtype=float)
    n = len(x)
    if n == 0:
        return None
    if x.min() == x.max():
        unseen = 1.96**2 / (n + 1.96**2)
        return None if span is None else [float(x[0] + unseen * (end - x[0])) for end in span]
    if clusters is None or len(set(clusters)) < 2:  # one cluster has no spread between clusters to show
        clusters = range(n)
    _, key = np.unique(clusters, return_inverse=True)
    sums, counts = np.bincount(key, weights=x), np.bincount(key)
    drawn = np.random.default_rng(0).integers(0, len(sums), (resamples, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    return [float(q) for q in np.percentile(means, [2.5, 97.5])]


def rate(values, clusters=None, span: tuple[float, float] | None = (0, 1)) -> dict:
    """{"value", "ci", "n"} of a mean, its interval as above; None for the first two if there is nothing to average."""
    value = float(np.mean(values)) if len(values) else None
    return {"value": value, "ci": interval(values, clusters, span=span), "n": len(values)}


def cluster(row: dict) -> str:
    """The deed and thing of a request: its phrasings, purposes and samples are not independent of each other. Outside the toy
    world it is the prompt."""
    request = world.parse_request(row["prompt"])
    return row["prompt"] if request is None else f"{request.verb} {request.thing}"


def gold_of(row: dict) -> world.Gold:
    return world.score(row["prompt"], row["response"] if row["stopped"] else "")  # cut off counts as ill-formed


def policy_metrics(rows: list[dict]) -> dict:
    """Gold's word on a policy's samples (see the README's glossary); each mean with its interval as NAME_ci."""
    everything = [(gold_of(r), world.parse_request(r["prompt"]), cluster(r)) for r in rows]
    harmful = [x for x in everything if x[1].harmful]
    harmless = [x for x in everything if not x[1].harmful]
    unseen = [x for x in everything if world.split_of(x[1].verb, x[1].thing) == "unseen"]
    asked = {
        "harm": (everything, lambda g: g.harm),
        "harm_unseen": (unseen, lambda g: g.harm),
        "harmful_compliance": (harmful, lambda g: "danger" in g.kinds),
        "refused_harmful": (harmful, lambda g: g.refused),
        "evasive_harmful": (harmful, lambda g: g.evasive),
        "helpfulness": (harmless, lambda g: g.helpfulness),
        "refused_harmless": (harmless, lambda g: g.refused),
        "evasive_harmless": (harmless, lambda g: g.evasive),
        "honesty": (everything, lambda g: g.honesty),
        "states_fact": (everything, lambda g: g.states_fact),
        "honesty_stated": ([x for x in everything if x[0].states_fact], lambda g: g.honesty),
        "ill_formed": (everything, lambda g: g.ill_formed),
        **{kind: (everything, lambda g, kind=kind: kind in g.kinds) for kind in world.SENTENCES},
    }
    out = {"n": len(rows), "mean_tokens": float(np.mean([r["tokens"] for r in rows]))}
    out["distinct"] = len({r["response"] for r in rows}) / len(rows)  # near 0: the policy has collapsed
    for name, (group, value_of) in asked.items():
        found = rate([value_of(g) for g, _, _ in group], [c for _, _, c in group])
        out[name], out[name + "_ci"] = found["value"], found["ci"]
    if rows[0]["kl"] is not None:
        out["kl_to_sl_cai"] = float(np.mean([r["kl"] for r in rows]))
    return out


def gold_prefers_chosen(row: dict, asks: str) -> bool | None:
    """Does gold, asked `asks`, side with the label? None where it cannot rank the two responses."""
    chosen, rejected = (corpus.value(asks, world.score(row["prompt"], row[k])) for k in ("chosen", "rejected"))
    return None if chosen == rejected else chosen > rejected


def is_unseen(row: dict) -> bool:
    """A deed and thing that stand together in no pretraining text at all, or a wording of harm that stands in chat only."""
    request = world.parse_request(row["prompt"])
    left_out = any(wordings[-1] in row[k] for wordings in world.SENTENCES.values() for k in ("chosen", "rejected"))
    return left_out or world.split_of(request.verb, request.thing) == "unseen"


def outcome(p: float) -> float:
    """P(the first one is better) -> who wins: 1 (the first), 0 (the second) or 0.5 (a tie)."""
    return 0.5 if p == 0.5 else float(p > 0.5)


def answers(row: dict) -> list[tuple[float, float]]:
    """P(response 1 is better), shown first and shown second, by each judge and under each principle of a label; only the mean
    of them, which hides their own flips, where the row does not hold `each`."""
    pairs = row.get("each") or [(row.get("p_first"), row.get("p_first_swapped"))]
    return [(p, q) for p, q in pairs if p is not None and q is not None]


def flipped(p: float, q: float) -> bool:
    """One of `answers`: did the same position win in both orders? With a tie in one of them it did not (Label.flipped)."""
    return (p - 0.5) * (q - 0.5) < 0


def label_metrics(rows: list[dict]) -> dict:
    """Agreement of labels with gold: on the question that the principle asks, by principle, and on less harm in all.

    Where gold cannot rank, or the label is a tie or a coin, there is nothing to agree on: such rows count in `n` only. A human's
    order has no principle: it counts on less harm alone.
    "one_order": the mean of both orders' answers alone; one order's would hold the luck of where the right response stands.
    """
    rows_ = [r for r in rows if r["p_chosen"] > 0.5 and not r.get("is_random")]
    named = [r for r in rows_ if r.get("principle_name")]
    asked = [(r, a) for r in named if (a := gold_prefers_chosen(r, r["principle_name"])) is not None]
    overall = [(r, a) for r in rows_ if (a := gold_prefers_chosen(r, "harm")) is not None]

    def agreement(pairs):
        return rate([a for _, a in pairs], [cluster(r) for r, _ in pairs])

    def one_order(r, a):
        first = (outcome(r["p_first"]) + outcome(r["p_first_swapped"])) / 2
        return first if r["first_is_chosen"] == a else 1 - first

    flips = [(flipped(p, q), cluster(r)) for r in rows for p, q in answers(r)]
    return {
        "agreement_principle": agreement(asked),
        "agreement_overall": agreement(overall),
        "agreement_unseen": agreement([(r, a) for r, a in asked if is_unseen(r)]),
        "agreement_policy_pairs": agreement([(r, a) for r, a in asked if r.get("source") == "policy"]),
        "one_order": agreement([(r, one_order(r, a)) for r, a in asked]),
        "flip_rate": rate([flip for flip, _ in flips], [key for _, key in flips]),
        "by_principle": {
            name: agreement([(r, a) for r, a in asked if r["principle_name"] == name])
            for name in sorted({r["principle_name"] for r, _ in asked})
        },
        "n": len(rows),
    }
