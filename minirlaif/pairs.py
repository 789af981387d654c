"""Pairs of responses to a prompt: which can be compared, what a judge is asked about them, and the row that labels become."""

import random
import statistics
from collections import Counter
from dataclasses import dataclass
from itertools import combinations

from minirlaif.labelers import Call, Label
from minirlaif.metrics import answers, flipped


def fault_of(row: dict, i: int, j: int) -> str | None:
    """Why responses i and j cannot be compared, if they cannot."""
    if not all(row.get("stopped", [True] * (j + 1))[k] for k in (i, j)):
        return "cut off"
    if not all(row["responses"][k].strip() for k in (i, j)):
        return "empty"
    return "same response twice" if row["responses"][i] == row["responses"][j] else None


@dataclass
class Pair:
    """Two responses to a prompt, and the principles that they are judged under."""

    row: dict
    number: int  # of the row: the group that its pairs form
    i: int
    j: int
    principles: list

    def calls(self, judge: int):
        """[(key in the journal, Call)]: for each principle, both orders."""
        shown = self.row["responses"][self.i], self.row["responses"][self.j]
        return [
            (f"{self.number}/{self.i}/{self.j}/{judge}/{n}/{order}", Call(self.row["prompt"], pair, p.text))
            for order, pair in enumerate((shown, shown[::-1]))
            for n, p in enumerate(self.principles)
        ]


def pairs_of(rows: list[dict], first: int, principles, per_pair: int, rng: random.Random) -> tuple[list[Pair], Counter]:
    """All pairs of these rows (the first of them has this number) that can be compared, and the faults of the others."""
    pairs, left_out = [], Counter()
    for number, row in enumerate(rows, first):
        for i, j in combinations(range(len(row["responses"])), 2):
            drawn = rng.sample(principles, min(per_pair, len(principles)))
            if fault := fault_of(row, i, j):
                left_out[fault] += 1
            else:
                pairs.append(Pair(row, number, i, j, drawn))
    return pairs, left_out


def labels_by_rank(pair: Pair) -> list[Label]:
    """A human's order: certain, or a tie."""
    a, b = (pair.row["ranks"][k] for k in (pair.i, pair.j))
    p = 0.5 if a == b else float(a < b)
    return [Label(p, p, p)]


def record(pair: Pair, labels: list[Label], judge: str, on_failure: str = "drop", rng: random.Random | None = None) -> dict:
    """A row of preferences.jsonl from all labels of a pair (judges x principles): their mean, and how far they disagree."""

    def mean(values):
        return round(statistics.fmean(values), 6) if values else None

    good = [label for label in labels if label.p is not None]
    p = statistics.fmean(label.p for label in good) if good else None
    status = "failed" if p is None else "tie" if round(p, 6) == 0.5 else "ok"
    is_random = p is None and on_failure == "random"
    if is_random:  # as if it were certain, but marked
        p = float(rng.random() < 0.5)
    first_is_chosen = p is None or p >= 0.5
    chosen, rejected = (pair.row["responses"][k] for k in ((pair.i, pair.j) if first_is_chosen else (pair.j, pair.i)))
    sources = pair.row.get("sources", ["candidates"] * (pair.j + 1))
    return dict(
        prompt=pair.row["prompt"],
        chosen=chosen,
        rejected=rejected,
        p_chosen=None if p is None else round(max(p, 1 - p), 6),
        group=pair.number,
        status=status,
        labeler=judge,
        principle=" / ".join(principle.text for principle in pair.principles),
        principle_name="+".join(principle.name for principle in pair.principles),
        source="+".join(sorted({sources[k] for k in (pair.i, pair.j)} - {"policy"})) or "policy",
        p_first=mean([label.p_first for label in good]),
        p_first_swapped=mean([label.p_first_swapped for label in good]),
        **({"each": [[round(x.p_first, 6), round(x.p_first_swapped, 6)] for x in good]} if len(labels) > 1 else {}),
        disagreement=round(statistics.pstdev([label.p for label in good]), 6) if good else None,
        first_is_chosen=first_is_chosen,
        is_random=is_random,
        kind=None if not good or judge == "ranks" else good[0].kind if len({label.kind for label in good}) == 1 else "mixed",
        error="; ".join(dict.fromkeys(label.error for label in labels if label.error)) or None,
        **({"human_p": labels_by_rank(pair)[0].p} if pair.row.get("ranks") and judge != "ranks" else {}),
        prompt_tokens=sum(label.prompt_tokens for label in labels),
        completion_tokens=sum(label.completion_tokens for label in labels),
        cost=sum(label.cost for label in labels),
    )


def flip_rate(rows: list[dict]) -> float:
    """How often the same position won in both orders, in the answers of each judge and under each principle."""
    flips = [flipped(p, q) for row in rows for p, q in answers(row)]
    return sum(flips) / max(1, len(flips))
