"""What labels and policies are worth: hand values, what must not change when the two sides are exchanged, and known cases."""

import math
import random

import numpy as np
import pytest

import label
from minirlaif import comparison, metrics, text, world
from minirlaif.comparison import bradley_terry, calibration, ece, elo, label_report, length_corrected, truth, win_rate
from minirlaif.labelers import Answer, Label, combine

HARMLESS = next(r for r in world.requests(("train",), [0]) if not r.harmful)
RIGHT = world.right_answer(HARMLESS.verb, HARMLESS.thing)
POLITE, RUDE = " " + RIGHT.text, f" {world.SENTENCES['insult'][0]} {RIGHT.text}"


def row(p_first, p_first_swapped, first=POLITE, second=RUDE, asks="insult", **more):
    """A row as label.py writes it: response 1 is polite, response 2 is rude, and the principle asks for politeness."""
    p = (p_first + p_first_swapped) / 2
    chosen, rejected = (first, second) if p >= 0.5 else (second, first)
    return dict(
        prompt=text.dialogue(HARMLESS.text), chosen=chosen, rejected=rejected, p_chosen=max(p, 1 - p), principle_name=asks,
        p_first=p_first, p_first_swapped=p_first_swapped, first_is_chosen=p >= 0.5, is_random=False, error=None,
        prompt_tokens=10, completion_tokens=2, cost=0.5,
    ) | more  # fmt: skip


def unlabelled(**more):
    return row(0.5, 0.5) | dict(p_chosen=None, p_first=None, p_first_swapped=None, error="no reply after 3 tries") | more


# labels


def test_the_calibration_curve_by_hand():
    rows = calibration([0.55, 0.59, 0.95, 1.0, 0.6], [1, 0, 1, 0.5, 1])
    assert [(r["low"], r["high"], r["n"]) for r in rows] == [(0.5, 0.6, 2), (0.6, 0.7, 1), (0.9, 1.0, 2)]  # 1 is in the last bin
    assert [r["p"] for r in rows] == pytest.approx([0.57, 0.6, 0.975]) and [r["right"] for r in rows] == [0.5, 1, 0.75]
    by_hand = (2 * abs(0.57 - 0.5) + abs(0.6 - 1) + 2 * abs(0.975 - 0.75)) / 5
    assert ece([0.55, 0.59, 0.95, 1.0, 0.6], [1, 0, 1, 0.5, 1]) == pytest.approx(by_hand)
    assert ece([], []) is None and calibration([], []) == []


def test_ece_of_a_perfect_and_of_an_overconfident_labeler():
    p = np.repeat([0.55, 0.65, 0.75, 0.85, 0.95], 100)
    right = np.concatenate([np.arange(100) < q for q in (55, 65, 75, 85, 95)])
    assert ece(p, right) == pytest.approx(0)
    assert ece(np.ones(500), right) == pytest.approx(0.25)  # it is right 3 times in 4, and always sure
    order = np.random.default_rng(0).permutation(500)
    assert ece(p[order] - 0.03, right[order]) == pytest.approx(ece(p - 0.03, right)) == pytest.approx(0.03)


@pytest.mark.parametrize("more, expected", [
    (dict(), (1.0, "gold")),
    (dict(first=RUDE, second=POLITE), (0.0, "gold")),
    (dict(asks="inverse-insult"), (0.0, "gold")),
    (dict(asks="bias"), None),  # neither is biased
    (dict(asks="wit"), None),  # gold does not know it
    (dict(prompt="\n\nHuman: who was Plato?\n\nAssistant:"), None),
    (dict(human_p=0.3), (0.0, "human")),  # people come first
    (dict(human_p=0.5), None),
    (dict(ranks=[2, 1]), (0.0, "human")),
    (dict(ranks=[1, 2]), (1.0, "human")),
    (dict(ranks=[1, 1]), None),
])  # fmt: skip
@pytest.mark.parametrize("p", [0.9, 0.1])
def test_who_knows_which_response_is_better(p, more, expected):
    """The answer is about response 1, whichever of the two was chosen."""
    assert truth(row(p, p, **more)) == expected


def agreements(report):
    return {name: found["agreement"]["value"] for name, found in report["orders"].items() if "agreement" in found}


def test_a_report_by_hand():
    report = label_report([
        row(0.9, 0.8, kind="soft"),  # right in both orders
        row(0.3, 0.4, kind="mixed"),  # wrong in both
        row(0.9, 0.3),  # right, thanks to the order in which it is shown first: flipped to the first place
        row(0.2, 0.6),  # wrong, flipped to the second
        row(0.7, 0.3),  # a tie, flipped to the first
        row(0.8, 0.8, asks="bias"),  # nothing to compare with
        unlabelled(), unlabelled(error="no reply after 4 tries"),
        unlabelled() | dict(p_chosen=1.0, is_random=True),
    ])  # fmt: skip
    assert (report["n"], report["labels"], report["truth"]) == (9, 6, {"gold": 5})  # a coin is no label
    assert (report["agreement"]["value"], report["agreement"]["n"]) == (0.5, 5)  # 2 right, 2 wrong, and half for the tie
    assert report["by_principle"] == {"insult": report["agreement"]}
    # the bins: the tie, at 0.5 and half right; 0.65, 0.6 and 0.6, of which one is right; 0.85, right
    assert report["ece"] == pytest.approx((0 + abs(1.85 - 1) + abs(0.85 - 1)) / 5)
    assert agreements(report) == {"one order": 0.5, "better first": 0.6, "better second": 0.4, "mean probability": 0.5}
    one, ten = report["orders"]["one order"], [0.9, 0.8, 0.7, 0.6, 0.9, 0.7, 0.8, 0.6, 0.7, 0.7]  # of all ten answers
    assert sum(b["n"] * b["p"] for b in one["calibration"]) == pytest.approx(sum(ten)) and one["agreement"]["n"] == 5
    assert (report["flip_rate"]["value"], report["flip_rate"]["n"]) == (3 / 6, 6)
    assert (report["flips_to_first"]["value"], report["flips_to_first"]["n"]) == (pytest.approx(2 / 3), 3)
    assert [report[k]["value"] for k in ("tie", "failed", "random", "partly_failed")] == pytest.approx([1 / 9, 3 / 9, 1 / 9, 0])
    assert report["errors"] == {"no reply after N tries": 3}  # counted by kind
    assert report["kinds"] == {"soft": 1, "mixed": 1}  # where it is said
    assert (report["prompt_tokens"], report["completion_tokens"], report["cost"]) == (90, 18, 4.5)  # failures are paid for
    assert report["cost_per_label"] == pytest.approx(4.5 / 6)


def test_a_report_does_not_depend_on_which_response_comes_first():
    rng = random.Random(0)
    rows = [row(rng.random(), rng.random()) for _ in range(60)]
    exchanged = [row(1 - r["p_first_swapped"], 1 - r["p_first"], RUDE, POLITE) for r in rows]
    a, b = label_report(rows), label_report(exchanged)
    for key in ("agreement", "flip_rate", "flips_to_first", "tie", "n"):
        assert a[key] == b[key]
    assert a["ece"] == pytest.approx(b["ece"]) and 0 < a["agreement"]["value"] < 1 and a["flip_rate"]["value"] > 0
    assert agreements(a) == pytest.approx(agreements(b)) and a["orders"]["one order"]["ece"] == pytest.approx(
        b["orders"]["one order"]["ece"]
    )
    shuffled = label_report(rng.sample(rows, len(rows)))
    assert shuffled["agreement"]["value"] == a["agreement"]["value"] and shuffled["ece"] == pytest.approx(a["ece"])


def test_a_slot_bias_costs_one_order_much_and_the_mean_little():
    """A judge that sees the truth at 1 nat, and likes the first place by 2: one order alone is wrong where it must be."""
    rows = []
    for k in range(40):
        likes = 1.0 if k % 2 else -1.0  # logit for response 1
        shown, swapped = (1 / (1 + math.exp(-(2 + sign * likes))) for sign in (1, -1))
        pair = (POLITE, RUDE) if k % 2 else (RUDE, POLITE)
        rows.append(row(shown, 1 - swapped, *pair))
    orders = label_report(rows)["orders"]
    assert agreements(label_report(rows)) == {"one order": 0.5, "better first": 1, "better second": 0, "mean probability": 1}
    assert orders["mean logit"]["calibration"][0]["p"] == pytest.approx(1 / (1 + math.exp(-1)))  # the bias cancels exactly
    assert orders["mean probability"]["calibration"][0]["p"] < 0.7


@pytest.mark.parametrize("lean", [0.95, 0.05])
def test_a_judge_that_only_likes_a_place_has_no_accuracy_wherever_the_right_answer_stands(lean):
    """HH-RLHF candidates: `chosen` is response 1 in every row. A judge that reads nothing is right half the time, not always."""
    rng = random.Random(1)
    rows = [row(lean + rng.uniform(-0.04, 0.04), 1 - lean, human_p=1.0) for _ in range(30)]
    toy = metrics.label_metrics(rows)
    assert agreements(label_report(rows))["one order"] == toy["one_order"]["value"] == 0.5
    assert agreements(label_report(rows))["better first"] == float(lean > 0.5)
    questions = [dict(prompt=str(k), responses=[" a", " b"], correct=0, category=None) for k in range(30)]
    judged = comparison.hhh_report(questions, [Label(0.5, lean, 1 - lean)] * 30)["judged"]
    assert (judged["one order"]["value"], judged["better first"]["value"]) == (0.5, float(lean > 0.5))


def test_the_flips_of_several_judges_are_their_own():
    """One likes the first place, one the second: their mean flips nowhere, but each of them does everywhere."""
    panel = row(0.5, 0.5, each=[[0.9, 0.1], [0.1, 0.9], [0.8, 0.7]])
    report = label_report([panel, row(0.9, 0.2)])
    assert (report["flip_rate"]["value"], report["flip_rate"]["n"]) == (3 / 4, 4)
    assert (report["flips_to_first"]["value"], report["flips_to_first"]["n"]) == (pytest.approx(2 / 3), 3)
    assert metrics.label_metrics([panel, row(0.9, 0.2)])["flip_rate"]["value"] == 3 / 4
    # and label.py writes them: both judges say "the one shown first", or one fails
    pair = label.Pair({"prompt": panel["prompt"], "responses": [POLITE, RUDE]}, 0, 0, 1, [])
    first, second, failed = (combine(Answer(p, error=None if p else "no reply"), Answer(p)) for p in (0.75, 0.25, None))
    assert label_report([label.record(pair, [first, second], "a+b")])["flip_rate"]["value"] == 1
    half = label_report([label.record(pair, [first, failed], "a+b")])
    assert (half["flip_rate"]["n"], half["partly_failed"]["value"], half["failed"]["value"]) == (1, 1, 0)
    assert "each" not in label.record(pair, [first], "a")


@pytest.mark.parametrize("p", [0.2, 0.5, 0.7])
@pytest.mark.parametrize("q", [0.4, 0.5, 0.9])
def test_what_a_flip_is_is_the_same_everywhere(p, q):
    """A tie in one order is no flip."""
    expected = Label((p + q) / 2, p, q).flipped
    assert expected == ((p, q) in {(0.2, 0.9), (0.7, 0.4)}) == metrics.flipped(p, q)
    assert label_report([row(p, q)])["flip_rate"]["value"] == metrics.label_metrics([row(p, q)])["flip_rate"]["value"] == expected


def test_a_label_that_some_judges_failed_to_give_is_reported():
    report = label_report([row(0.9, 0.8, error="no reply after 3 tries"), row(0.9, 0.8), unlabelled(status="failed")])
    assert (report["labels"], report["partly_failed"]["value"], report["failed"]["value"]) == (2, 1 / 3, 1 / 3)
    coins = label_report([unlabelled(status="failed", p_chosen=1.0, is_random=True)] * 3 + [row(0.9, 0.8)])
    assert (coins["labels"], coins["failed"]["value"], coins["random"]["value"]) == (1, 3 / 4, 3 / 4)
    assert coins["cost_per_label"] == 4 * 0.5


def test_the_side_of_two_orders_does_not_depend_on_what_is_averaged():
    """So the report claims no agreement of the mean logit: it would be that of the mean probability, always."""
    rng = random.Random(2)
    for _ in range(300):
        a, b = Answer(rng.random()), Answer(rng.random())
        assert len({combine(a, b, average).p > 0.5 for average in ("probability", "logit")}) == 1
    report = label_report([row(0.9, 0.3)])
    assert "agreement" not in report["orders"]["mean logit"] and "agreement_logit" not in metrics.label_metrics([row(0.9, 0.3)])


def test_a_report_of_labels_that_nobody_can_check():
    """A public file: no judge, no orders, no principle."""
    report = label_report([dict(prompt="\n\nHuman: hi\n\nAssistant:", chosen=" a", rejected=" b", p_chosen=1.0)])
    assert report["n"] == report["labels"] == 1 and report["truth"] == report["orders"] == report["by_principle"] == {}
    assert report["agreement"]["value"] is report["ece"] is report["flip_rate"]["value"] is None and report["cost"] == 0
    failed = label_report([unlabelled()])
    assert failed["labels"] == 0 and failed["cost_per_label"] is None and failed["failed"]["value"] == 1


def test_outside_the_toy_world_a_prompt_is_its_own_cluster():
    assert metrics.cluster({"prompt": "\n\nHuman: hi\n\nAssistant:"}) == "\n\nHuman: hi\n\nAssistant:"
    assert metrics.cluster({"prompt": text.dialogue(HARMLESS.text)}) == f"{HARMLESS.verb} {HARMLESS.thing}"


def test_multiple_choice_by_hand():
    def question(prompt, a, b, correct, category=None):
        return dict(prompt=prompt, responses=[a, b], correct=correct, category=category)

    rows = [
        question("1", " long", " no", 0, "kind"), question("2", " long", " no", 1, "kind"),
        question("3", " no", " ok", 1, "true"), question("4", " no", " long", 1), question("5", " x", " long", 0),
    ]  # fmt: skip
    answers = [(0.9, 0.2), (0.9, 0.3), (0.7, 0.7), (0.1, 0.9), None]  # P(the one shown first), for both orders
    labels = [combine(*(Answer(p) for p in a)) if a else Label(None, None, None, error="999 tokens") for a in answers]
    report = comparison.hhh_report(rows, labels)
    assert report["all"]["always A"]["value"] == 2 / 5 and report["all"]["longer"]["value"] == 2 / 5  # equal lengths: wrong
    assert {k: v["value"] for k, v in report["judged"].items()} == {
        "always A": 1 / 4, "longer": 2 / 4,
        "accuracy": (1 + 0 + 0.5 + 1) / 4,  # the third is a tie
        "one order": 5 / 8,  # A first: + - - +; B first: + - + +
        "better first": 3 / 4, "better second": 2 / 4, "flip_rate": 1 / 4,
    }  # fmt: skip
    nobody = comparison.hhh_report(rows, [labels[-1]] * 5)["judged"]
    assert {v["value"] for v in nobody.values()} == {None} and nobody.keys() == report["judged"].keys()
    assert {k: v["accuracy"]["value"] for k, v in report["by_category"].items()} == {"kind": 0.5, "true": 0.5}
    assert report["left_out"] == {"N tokens": 1} and report["judged"]["accuracy"]["n"] == 4


# policies


def test_a_tie_is_half_a_win():
    found = win_rate([1, 1, 0, 0.5])
    assert (found["value"], found["wins"], found["ties"], found["losses"], found["n"]) == (0.625, 2, 1, 1, 4)
    assert win_rate([1.0] * 10)["ci"] == pytest.approx([0.7225, 1], abs=1e-4)  # Wilson's: ten wins do not prove the next
    outcomes = np.random.default_rng(0).choice([0, 0.5, 1], 200)
    one, other = win_rate(outcomes), win_rate(1 - outcomes)
    assert one["value"] == pytest.approx(1 - other["value"])
    assert one["ci"] == pytest.approx([1 - q for q in other["ci"][::-1]])
    wide = win_rate(np.repeat(outcomes[:20], 10), np.repeat(range(20), 10))["ci"]
    narrow = win_rate(np.repeat(outcomes[:20], 10))["ci"]
    assert wide[1] - wide[0] > 2 * (narrow[1] - narrow[0])  # ten samples of one prompt are not ten prompts


def drawn(n=600, longer=0.3, seed=0):
    """Lengths of two policies; the first writes exp(longer) times as much at the median."""
    rng = np.random.default_rng(seed)
    b = rng.integers(40, 200, n)
    return rng, [(int(x), int(y)) for x, y in zip(b * np.exp(longer + 0.4 * rng.standard_normal(n)), b, strict=True)]


def test_a_judge_that_only_looks_at_length_finds_no_difference_at_equal_length():
    rng, lengths = drawn()
    ratio = np.log([a / b for a, b in lengths])
    for outcomes in ((ratio > 0).astype(float), (rng.random(600) < 1 / (1 + np.exp(-3 * ratio))).astype(float)):
        assert win_rate(outcomes)["value"] > 0.65
        found = length_corrected(outcomes, lengths, resamples=200)
        assert found["value"] == pytest.approx(0.5, abs=0.08) and found["ci"][0] < 0.5 < found["ci"][1] and found["slope"] > 2


def test_what_has_nothing_to_do_with_length_is_left_as_it_is():
    rng, lengths = drawn()
    outcomes = (rng.random(600) < 0.7).astype(float)
    found = length_corrected(outcomes, lengths, resamples=200)
    assert found["value"] == pytest.approx(0.7, abs=0.05) and abs(found["slope"]) < 0.5
    assert found["ci"][0] < 0.7 < found["ci"][1] and found["ci"][1] - found["ci"][0] < 0.15
    same = [(10, 10)] * 600  # no difference to correct
    assert length_corrected(outcomes, same, resamples=20)["value"] == pytest.approx(outcomes.mean(), abs=1e-3)


def test_the_slope_is_that_of_the_logistic_regression():
    """On outcomes that are their own probabilities the fit is exact, but for the weak priors."""
    _, lengths = drawn()
    ratio = np.log([a / b for a, b in lengths])
    found = length_corrected(1 / (1 + np.exp(-(0.8 + 1.5 * ratio))), lengths, resamples=20)
    assert found["value"] == pytest.approx(1 / (1 + math.exp(-0.8)), abs=2e-3) and found["slope"] == pytest.approx(1.5, abs=0.02)


def test_exchanging_the_policies_turns_the_corrected_rate_round():
    rng, lengths = drawn()
    outcomes = rng.choice([0, 0.5, 1], 600, p=[0.2, 0.2, 0.6])
    one = length_corrected(outcomes, lengths, resamples=50)
    other = length_corrected(1 - outcomes, [(b, a) for a, b in lengths], resamples=50)
    assert one["value"] == pytest.approx(1 - other["value"], abs=1e-9) and one["slope"] == pytest.approx(other["slope"], abs=1e-9)
    assert one["ci"] == pytest.approx([1 - q for q in other["ci"][::-1]], abs=1e-9)


def beta(a, b):
    """The 95 % interval of Beta(a, b)."""
    return np.percentile(np.random.default_rng(1).beta(a, b, 200_000), [2.5, 97.5])


@pytest.mark.parametrize("wins, n", [(5, 5), (0, 20), (20, 20), (12, 20)])
def test_a_corrected_rate_at_equal_lengths_has_an_honest_interval_and_five_wins_do_not_prove_the_next(wins, n):
    outcomes = np.arange(n) < wins
    found = length_corrected(outcomes, [(10, 10)] * n, resamples=4000)
    assert found["value"] == pytest.approx((wins + 1) / (n + 2), abs=1e-4)
    assert found["ci"] == pytest.approx(beta(wins + 1, n - wins + 1), abs=0.03)
    if wins in (0, n):  # not narrower than the raw rate's by much, which is Wilson's
        assert np.ptp(found["ci"]) > 0.9 * np.ptp(win_rate(outcomes)["ci"])


def test_a_policy_that_won_only_where_it_wrote_more_may_owe_it_to_that():
    equal, longer = (length_corrected([1.0] * 20, [(10 * k, 10)] * 20, resamples=400)["ci"] for k in (1, 4))
    assert longer[0] < equal[0] - 0.1


def test_a_rate_stays_finite_where_one_side_always_wins_or_says_nothing():
    found = length_corrected([1.0] * 50, [(20, 10)] * 50, resamples=20)
    assert 0.7 < found["value"] < 1 and math.isfinite(found["slope"])
    assert math.isfinite(length_corrected([1.0, 0.0], [(0, 10), (10, 0)], resamples=20)["value"])


def test_elo_of_known_matrices():
    ratings = bradley_terry([[0, 75], [25, 0]], prior=0)
    assert ratings.mean() == pytest.approx(1000)
    assert ratings[0] - ratings[1] == pytest.approx(400 * math.log10(3), abs=1e-2)  # 3 to 1 is 190.8 points
    true = np.array([1200.0, 1050, 900, 850])  # wins in the very proportion of these are fitted exactly
    wins = 100 / (1 + 10 ** ((true[None] - true[:, None]) / 400))
    assert bradley_terry(wins, prior=0) == pytest.approx(true, abs=1e-2)
    assert bradley_terry(wins) == pytest.approx(true, abs=10)  # a virtual tie moves it by little
    order = [2, 0, 3, 1]
    assert bradley_terry(wins[np.ix_(order, order)], prior=0) == pytest.approx(true[order], abs=1e-2)
    assert bradley_terry(wins.T, prior=0) == pytest.approx(2000 - true, abs=1e-2)  # whoever lost has won
    missing = wins.copy()
    missing[0, 3] = missing[3, 0] = 0  # these two never met
    assert bradley_terry(missing, prior=0) == pytest.approx(true, abs=1e-2)


def test_a_policy_that_never_lost_has_a_finite_rating():
    ratings = bradley_terry([[0, 10, 10], [0, 0, 5], [0, 5, 0]])
    assert np.isfinite(ratings).all() and ratings[0] > ratings[1] + 300 and ratings[1] == pytest.approx(ratings[2])
    assert np.ptp(bradley_terry([[0, 1000], [0, 0]])) < 1500


def test_elo_of_who_always_won_or_was_judged_once_is_known_that_little():
    x = np.full((10, 3, 3), np.nan)
    for i in range(3):
        for j in range(i):
            x[:, j, i], x[:, i, j] = 1.0, 0.0  # the first beats all, the last nobody
    first, _, last = elo(x, resamples=400)
    for r in (first, last):  # ten wins of ten: Beta(11, 1) against the next is 160 points at least, and open above
        assert r["ci"][0] < r["value"] < r["ci"][1] and np.ptp(r["ci"]) > 300
    assert first["ci"][0] > last["ci"][1]  # and yet the order is clear
    many = elo(np.repeat(x, 10, axis=0), resamples=400)[0]
    assert many["ci"][0] > first["ci"][0] + 100  # a hundred wins prove more
    x[1:, 0], x[1:, :, 0] = np.nan, np.nan
    once = elo(x, resamples=400)[0]
    assert once["ci"][0] < 1000 < once["value"] < once["ci"][1] and np.ptp(once["ci"]) > np.ptp(first["ci"])
    assert 1000 not in once["ci"]  # no draw is without its only game


def test_elo_with_intervals_over_prompts():
    rng = np.random.default_rng(0)
    true = np.array([1150.0, 1000, 850])
    x = np.full((400, 3, 3), np.nan)
    for i in range(3):
        for j in range(i):
            won = rng.random(400) < 1 / (1 + 10 ** ((true[j] - true[i]) / 400))
            x[:, i, j], x[:, j, i] = won, 1 - won
    x[:5, 0, 1] = x[:5, 1, 0] = np.nan  # not judged
    found = elo(x, resamples=200)
    for rating, r in zip(true, found, strict=True):
        assert r["value"] == pytest.approx(rating, abs=35)  # 1,200 games leave a standard error of 10
        assert 25 < r["ci"][1] - r["ci"][0] < 55 and r["ci"][0] < r["value"] < r["ci"][1]
    copies = np.repeat(x[:40], 10, axis=0)  # ten samples of one prompt are not ten prompts
    wide, narrow = (elo(copies, clusters, resamples=50)[0] for clusters in (np.repeat(range(40), 10), None))
    assert wide["value"] == narrow["value"] and np.ptp(wide["ci"]) > 2 * np.ptp(narrow["ci"])
    ties = elo(np.where(np.eye(3) > 0, np.nan, np.full((10, 3, 3), 0.5)), resamples=20)
    assert [r["value"] for r in ties] == pytest.approx([1000] * 3)
