"""Comparisons: labels with those who know, two policies by their win rate, several by Elo. Pure functions of rows and arrays.

An outcome is 1 (the first one wins), 0 (the second does) or 0.5 (a tie). Intervals are 95 % bootstraps over prompts; what was
said about one prompt (in the toy world: one deed and thing) is resampled together. Policies are compared on the same prompts,
so that resampling prompts is the paired bootstrap. Outcomes that are all the same prove little: `metrics.interval` and
`reweighted` say how little.
"""

import math
import re
from collections import Counter

import numpy as np

from minirlaif import world
from minirlaif.metrics import answers, cluster, flipped, gold_prefers_chosen, outcome, rate

GOLD_KNOWS = {*world.KINDS, "harm", "evasion", "helpfulness", "honesty"}  # names of principles that the toy world can decide
ELO = 400 / math.log(10)  # Elo points a nat of log odds


def fault(error: str) -> str:
    """An error without its numbers, so that failures can be counted by kind."""
    return "; ".join(dict.fromkeys(re.sub(r"\d+(\.\d+)?", "N", part) for part in error.split("; ")))


# ---- labels ---------------------------------------------------------------------------------------------------------


def calibration(p, right, bins: int = 10) -> list[dict]:
    """The reliability diagram: a row {"low", "high", "n", "p", "right"} for every bin of [0, 1] that holds something, with the
    mean of p and the mean of right (1, 0, or 0.5 where no side was taken). low <= p < high, but for the last bin, p <= 1."""
    p, right = np.asarray(p, dtype=float), np.asarray(right, dtype=float)
    key = np.minimum((p * bins).astype(int), bins - 1)
    return [
        dict(low=b / bins, high=(b + 1) / bins, n=int(n), p=float(p[key == b].mean()), right=float(right[key == b].mean()))
        for b, n in enumerate(np.bincount(key, minlength=bins))
        if n
    ]


def ece(p, right, bins: int = 10) -> float | None:
    """Expected calibration error: |confidence - share right|, averaged over the bins by their sizes (Guo et al. 2017).

    In [0, 1]; None without labels. Noise alone makes it positive, the more the fewer labels a bin has.
    """
    rows = calibration(p, right, bins)
    return sum(r["n"] * abs(r["p"] - r["right"]) for r in rows) / len(p) if rows else None


def truth(row: dict) -> tuple[float, str] | None:
    """Is response 1 the better one (1.0, 0.0), and who says so ("human", "gold")? None: nobody knows, or they cannot rank.

    People speak through `human_p`, P(response 1 is better), or `ranks` of responses 1 and 2 (smaller is better). The gold scorer
    speaks on toy-world requests, under a principle whose name it knows; "inverse-" before a name asks for the worse. Response 1
    is `chosen` if `first_is_chosen`.
    """
    ranks, name = row.get("ranks") or [], row.get("principle_name") or ""
    if row.get("human_p") is not None:
        first, who = outcome(row["human_p"]), "human"
    elif len(ranks) == 2:
        first, who = outcome(0.5 + ranks[1] - ranks[0]), "human"
    elif (asks := name.removeprefix("inverse-")) in GOLD_KNOWS and world.parse_request(row["prompt"]) is not None:
        chosen = gold_prefers_chosen(row, asks)
        first = 0.5 if chosen is None else float(chosen == row.get("first_is_chosen", True))
        first, who = 1 - first if name != asks else first, "gold"
    else:
        return None
    return None if first == 0.5 else (first, who)


def hit(p: float, first: float) -> float:
    """Is P(response 1 is better) on the right side (1, 0, or 0.5 for a tie), where `first` (1.0 or 0.0) says if it is better?"""
    return 1 - abs(outcome(p) - first)


def one_order(asked: list[tuple[float, float, float]], clusters) -> dict:
    """The answers of each order alone, (P(response 1 is better) shown first, and shown second, is it?), as rates: "one order",
    the mean of the two; "better first", where the better response stood first, and "better second".

    The last two are pulled apart by a bias for a place; their mean is not, whichever response a file happens to name first.
    """
    hits = [[hit(x, first) for x in ((p, q) if first else (q, p))] for p, q, first in asked]
    a, b = np.reshape(hits, (-1, 2)).T
    return {name: rate(x, clusters) for name, x in (("one order", (a + b) / 2), ("better first", a), ("better second", b))}


def label_report(rows: list[dict]) -> dict:
    """What a preference file is worth (rows of preferences.jsonl, including those without a label).

    Of all rows: the shares "tie", "failed" (nobody answered, whether a coin was flipped instead or not), "random" (it was) and
    "partly_failed" (some of several judges or principles gave no answer), the commonest "errors", tokens and cost (a failed
    answer is paid for, too), which the "labels", those that did not fail, share in "cost_per_label". Of the labels: "agreement"
    with people or gold (see `truth`; a tie is half right), overall and "by_principle"; "ece" and "calibration" of p_chosen;
    "flip_rate", how often one position won in both orders, in the answers of each judge and under each principle (see
    metrics.answers), and "flips_to_first", how often that was the position shown first.

    "orders", of the labels that hold both: what `one_order` gives; "mean probability"; "mean logit", which takes the same side
    as that, always, and differs in calibration alone.

    "kinds": how many labels come from probabilities (soft), from hard choices (verdict), from both (mixed).
    """
    random = [bool(r.get("is_random")) for r in rows]
    failed = [x or r.get("p_chosen") is None or r.get("status") == "failed" for r, x in zip(rows, random, strict=True)]
    judged = [r for r, x in zip(rows, failed, strict=True) if not x]
    clusters = [cluster(r) for r in rows]
    cost = sum(r.get("cost") or 0 for r in rows)

    known = [(r, *found) for r in judged if (found := truth(r))]

    def has_orders(r):
        return r.get("p_first") is not None and r.get("p_first_swapped") is not None

    def p_label(r):
        return r["p_chosen"] if r.get("first_is_chosen", True) else 1 - r["p_chosen"]

    def p_mean(r):
        return (r["p_first"] + r["p_first_swapped"]) / 2

    def logit_mean(r):
        p = np.clip([r["p_first"], r["p_first_swapped"]], 1e-6, 1 - 1e-6)
        return 1 / (1 + math.exp(-np.mean(np.log(p) - np.log1p(-p))))

    def agreement(group, p_of):
        return rate([hit(p_of(r), first) for r, first, _ in group], [cluster(r) for r, _, _ in group])

    def confidence(group, *ps_of):
        found = [(p_of(r), first) for r, first, _ in group for p_of in ps_of]
        p, right = [max(p, 1 - p) for p, _ in found], [hit(p, first) for p, first in found]
        return {"ece": ece(p, right), "calibration": calibration(p, right)}

    ordered, orders = [x for x in known if has_orders(x[0])], {}
    if ordered:
        asked = [(r["p_first"], r["p_first_swapped"], first) for r, first, _ in ordered]
        orders = {name: {"agreement": x} for name, x in one_order(asked, [cluster(r) for r, _, _ in ordered]).items()}
        orders["one order"] |= confidence(ordered, lambda r: r["p_first"], lambda r: r["p_first_swapped"])
        orders["mean probability"] = {"agreement": agreement(ordered, p_mean), **confidence(ordered, p_mean)}
        orders["mean logit"] = confidence(ordered, logit_mean)
    both = [(flipped(p, q), p > 0.5, cluster(r)) for r in judged for p, q in answers(r)]
    names = sorted({r.get("principle_name") or "" for r, _, _ in known} - {""})
    return {
        "n": len(rows),
        "labels": len(judged),
        "truth": dict(Counter(who for _, _, who in known)),
        "agreement": agreement(known, p_label),
        **confidence(known, p_label),
        "by_principle": {name: agreement([x for x in known if x[0].get("principle_name") == name], p_label) for name in names},
        "orders": orders,
        "flip_rate": rate([flip for flip, _, _ in both], [key for _, _, key in both]),
        "flips_to_first": rate([first for flip, first, _ in both if flip], [key for flip, _, key in both if flip]),
        "tie": rate([r.get("p_chosen") == 0.5 for r in rows], clusters),
        "failed": rate(failed, clusters),
        "partly_failed": rate([bool(r.get("error")) and not x for r, x in zip(rows, failed, strict=True)], clusters),
        "random": rate(random, clusters),
        "kinds": dict(Counter(r["kind"] for r in rows if r.get("kind"))),
        "errors": dict(Counter(fault(r["error"]) for r in rows if r.get("error")).most_common(5)),
        "prompt_tokens": sum(r.get("prompt_tokens") or 0 for r in rows),
        "completion_tokens": sum(r.get("completion_tokens") or 0 for r in rows),
        "cost": cost,
        "cost_per_label": cost / len(judged) if judged else None,
    }


def hhh_report(rows: list[dict], labels: list) -> dict:
    """A judge on multiple choice. rows: {"prompt", "responses" (A, B), "correct" (0: A, 1: B), "category" or None}; labels: a
    labelers.Label each.

    {"all", "judged", "by_category"}: the accuracies of "always A" and "longer" (in characters; equal lengths are wrong), and, for
    the rows with a label, "accuracy" (a tie is half right), what `one_order` gives and "flip_rate". Rows without a label are
    counted in "left_out", by kind.
    """

    def baselines(group):
        longer = [len(r["responses"][r["correct"]]) > len(r["responses"][1 - r["correct"]]) for r, _ in group]
        prompts = [r["prompt"] for r, _ in group]
        return {"always A": rate([r["correct"] == 0 for r, _ in group], prompts), "longer": rate(longer, prompts)}

    def accuracies(group):
        found, prompts = baselines(group), [r["prompt"] for r, _ in group]
        found["accuracy"] = rate([hit(label.p, 1 - r["correct"]) for r, label in group], prompts)
        found |= one_order([(label.p_first, label.p_first_swapped, 1 - r["correct"]) for r, label in group], prompts)
        return found | {"flip_rate": rate([label.flipped for _, label in group], prompts)}

    everything = list(zip(rows, labels, strict=True))
    judged = [(r, label) for r, label in everything if label.p is not None]
    categories = sorted({r["category"] for r, _ in judged if r["category"]})
    return {
        "all": baselines(everything),
        "judged": accuracies(judged),
        "by_category": {name: accuracies([x for x in judged if x[0]["category"] == name]) for name in categories},
        "left_out": dict(Counter(fault(label.error or "") for label in labels if label.p is None)),
        "prompt_tokens": sum(label.prompt_tokens for label in labels),
        "completion_tokens": sum(label.completion_tokens for label in labels),
        "cost": sum(label.cost for label in labels),
    }


# ---- policies -------------------------------------------------------------------------------------------------------


def logistic(X, y, weight, penalty) -> np.ndarray:
    """Weighted logistic regression of y in [0, 1] on X [n, d], by Newton's method -> the coefficients [d].

    They minimise the cross-entropy + sum(penalty · beta²) / 2. A small positive penalty [d] keeps finite what the data would
    drive to infinity.
    """

    def loss(beta):
        z = X @ beta
        return weight @ (np.logaddexp(0, z) - y * z) + penalty @ beta**2 / 2

    beta = np.zeros(X.shape[1])
    for _ in range(100):
        p = 0.5 + 0.5 * np.tanh(X @ beta / 2)
        gradient = X.T @ (weight * (p - y)) + penalty * beta
        step = np.linalg.solve((X.T * (weight * p * (1 - p))) @ X + np.diag(penalty), gradient)
        while loss(beta - step) > loss(beta) and abs(step).max() > 1e-9:  # the full step can overshoot
            step /= 2
        beta = beta - step
        if abs(step).max() <= 1e-9:
            break
    return beta


def reweighted(n: int, virtual, clusters=None, resamples: int = 1000):
    """The Bayesian bootstrap (Rubin 1981): (weights [n], weights of shape `virtual`) for each of `resamples` draws.

    A value weighs Exp(1) instead of a whole number of times, those of one cluster the same: nobody's only game is ever left
    out. So does each of the `virtual` values. With a virtual win and a virtual loss, k wins of n have the posterior
    Beta(k + 1, n - k + 1), that of Bayes and Laplace: where all n are the same, it is about as wide as Wilson's interval.
    """
    _, key = np.unique(range(n) if clusters is None else clusters, return_inverse=True)
    rng = np.random.default_rng(0)
    for _ in range(resamples):
        yield rng.exponential(size=key.max() + 1)[key], rng.exponential(size=virtual)


def win_rate(outcomes, clusters=None) -> dict:
    """{"value", "ci", "n", "wins", "ties", "losses"} of the first policy; a tie is half a win."""
    x = np.asarray(outcomes, dtype=float)
    return {**rate(x, clusters), "wins": int((x == 1).sum()), "ties": int((x == 0.5).sum()), "losses": int((x == 0).sum())}


def length_corrected(outcomes, lengths: list[tuple[int, int]], clusters=None, resamples: int = 1000) -> dict:
    """The win rate at equal length (Lee et al. 2023): {"value", "ci", "n", "slope"}.

    A logistic regression of the outcome on log(length of the first / length of the second), read where that is 0. They use the
    ratio and read it at 1; its logarithm treats both policies alike. lengths: (first, second) in characters. slope: log odds of
    winning per nat of length ratio. Where length, or one policy, decides everything, it is kept finite by one more win and
    one more loss at equal length (see `reweighted`) and a weak normal prior of the slope (standard deviation 3).
    """
    n, ratio = len(lengths), np.log([max(1, a) / max(1, b) for a, b in lengths] + [1, 1])
    X, y, penalty = np.stack([np.ones(n + 2), ratio], 1), np.append(outcomes, [1.0, 0.0]), np.array([1e-6, 0.1])

    def fit(weight, virtual):
        intercept, slope = logistic(X, y, np.append(weight, virtual), penalty)
        return float(1 / (1 + np.exp(-intercept))), float(slope)

    value, slope = fit(np.ones(n), np.ones(2))
    draws = reweighted(n, 2, clusters, resamples // 2)  # twice each, so that both policies are treated alike
    ci = np.percentile([fit(w, v)[0] for w, drawn in draws for v in (drawn, drawn[::-1])], [2.5, 97.5])
    return {"value": value, "ci": ci.tolist(), "n": n, "slope": slope}


def bradley_terry(wins, prior=1.0) -> np.ndarray:
    """wins [K, K], how often i beat j (a tie is half a win to each) -> Elo ratings [K] with mean 1000.

    P(i beats j) = 1 / (1 + 10 ** ((elo_j - elo_i) / 400)). prior: wins (or [K, K] of them) added to both sides of every pair that
    met, without which a policy that never lost would have no finite rating.
    """
    wins = np.asarray(wins, dtype=float)
    pairs, wins = [(i, j) for i in range(len(wins)) for j in range(i) if wins[i, j] + wins[j, i] > 0], wins + prior
    won, n = np.array([wins[i, j] for i, j in pairs]), np.array([wins[i, j] + wins[j, i] for i, j in pairs])
    X = np.array([np.eye(len(wins))[i] - np.eye(len(wins))[j] for i, j in pairs])
    beta = logistic(X, won / n, n, np.full(len(wins), 1e-6))  # only differences count: the penalty picks one of the solutions
    return 1000 + ELO * (beta - beta.mean())


def elo(outcomes, clusters=None, resamples: int = 1000) -> list[dict]:
    """outcomes [n, K, K] -> K of {"value", "ci"}. outcomes[t, i, j]: did i beat j on prompt t; outcomes[t, j, i] is 1 minus it;
    nan: not judged. The weights are those of prompts, so that all pairs change together, and of the prior (see `reweighted`)."""
    wins = np.nan_to_num(np.asarray(outcomes, dtype=float))
    ratings = bradley_terry(wins.sum(0))
    weights = reweighted(len(wins), wins.shape[1:], clusters, resamples // 2)  # twice each, as in length_corrected
    draws = [bradley_terry(np.tensordot(w, wins, 1), prior) for w, drawn in weights for prior in (drawn, drawn.T)]
    low, high = np.percentile(draws, [2.5, 97.5], axis=0)
    return [{"value": float(r), "ci": [float(a), float(b)]} for r, a, b in zip(ratings, low, high, strict=True)]
