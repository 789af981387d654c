"""experiments/rlaif_rlhf.py and label_quality.py from end to end on a demo that takes seconds, and their figures by hand."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import label
import pretrain
import train_ppo
import train_rm
from experiments import common, label_quality, ppo_curves, rlaif_rlhf
from minirlaif import constitution, corpus, data, labelers, text, trainer, world
from minirlaif.cli import UserError
from minirlaif.metrics import gold_of, gold_prefers_chosen, interval

CPU = dict(device="cpu", dtype="fp32")
TOY = constitution.load("toy")
HARMLESS = [p for p in TOY.preferences if p.name in ("danger", "insult", "bias", "ad", "harm", "evasion")]
HELPFUL = TOY.preferences_for("helpfulness")


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def preferences(path, n, principles, seed, splits=("train",)):
    """n pairs of answers, labelled by a judge that is often wrong, as label.py writes them."""
    rng, rows = random.Random(seed), []
    judge = labelers.GoldJudge({p.text: p.name for p in principles}, noise=0.3, sharpness=1.0, call_noise=0.5)
    while len(rows) < n:
        request = corpus.pick_request(rng, splits)
        prompt, pair = text.dialogue(request.text), tuple(" " + a.text for a in corpus.pair_of(rng, request))
        if pair[0] != pair[1]:
            row, principle = dict(prompt=prompt, responses=list(pair), sources=["policy", "hot"]), rng.choice(principles)
            (found,) = labelers.label(judge, [(prompt, pair, principle.text)])
            rows.append(label.record(label.Pair(row, len(rows), 0, 1, [principle]), [found], "noisy"))
    data.write_jsonl(path, rows)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What demo.py leaves behind, as far as the experiments read it."""
    run = tmp_path_factory.mktemp("demo") / "first"
    corpus.main(corpus.Args(out=str(run / "world"), documents=10, prompts=48, held_out=16))
    shape = dict(n_layer=2, n_head=2, n_embd=32, lr=1e-2, warmup=10, tokens_per_batch=512)
    asked = [corpus.pick_request(random.Random(i)) for i in range(900)]
    said = [[[text.dialogue(r.text), 0], [" " + corpus.helpful_only(random.Random(0), r, 0).text, 1]] for r in asked]
    data.write_jsonl(run / "chat.jsonl", [{"segments": segments} for segments in said])
    pretrain.main(pretrain.Args(data=[f"{run}/chat.jsonl"], out=f"{run}/base", eval_fraction=0.05, **shape, **CPU))  # it can stop
    shutil.copytree(run / "base", run / "sl_cai")
    for name, n, principles in (("labels", 60, HARMLESS), ("labels_helpful", 30, HELPFUL), ("labels_heldout", 40, HARMLESS)):
        preferences(run / name / "preferences.jsonl", n, principles, name, ("role",) if name == "labels_heldout" else ("train",))
    files = [f"{run}/{name}/preferences.jsonl" for name in ("labels", "labels_helpful")]
    sl, common_flags = f"{run}/sl_cai", dict(resume=True, **CPU)
    train_rm.main(train_rm.Args(init=sl, data=files, out=f"{run}/rm", batch_size=16, epochs=2, lr=3e-3, **common_flags))
    train_ppo.main(
        train_ppo.Args(
            init=sl,
            reward_model=f"{run}/rm",
            data=f"{run}/world/prompts.jsonl",
            out=f"{run}/rl_cai",
            steps=1,
            batch_size=8,
            minibatch_size=4,
            lr=1e-3,
            max_new_tokens=12,
            **common_flags,
        )
    )
    evaluate.main(
        evaluate.Args(
            policies=[f"base={run}/base", f"sl_cai={sl}", f"rl_cai={run}/rl_cai"],
            prompts=f"{run}/world/heldout.jsonl",
            ref=sl,
            preferences=f"{run}/labels_heldout/preferences.jsonl",
            reward_model=f"{run}/rm",
            out=f"{run}/evaluate",
            max_new_tokens=12,
            **common_flags,
        )
    )
    # so small a model says nothing that gold could tell apart, so the demo's policies are given something to say
    samples, rng = rows_of(run / "evaluate" / "samples.jsonl"), random.Random(1)
    rates = {"base": 0.8, "sl_cai": 0.2, "rl_cai": 0.4}
    for row in samples:
        answer = corpus.helpful_only(rng, world.parse_request(row["prompt"]), rates[row["policy"]])
        row |= dict(response=" " + answer.text, stopped=rng.random() < 0.9, kl=rng.gauss(1, 1))
    data.write_jsonl(run / "evaluate" / "samples.jsonl", samples)
    return run


@pytest.fixture(scope="module")
def arms(run, tmp_path_factory):
    """(out, results) of all arms on two runs; the second is a copy of the first, moved."""
    home = tmp_path_factory.mktemp("rl")
    shutil.copytree(run, home / "second")
    out = home / "out"
    return out, rlaif_rlhf.main(rlaif_rlhf.Args(runs=[str(run), str(home / "second")], out=str(out)))


# RLAIF against RLHF


def test_pairs_are_rebuilt_in_the_order_in_which_they_were_shown(tmp_path):
    """The order decides which response a slot bias helped, so it is seen in p_first."""
    biased, rng, calls = labelers.GoldJudge({p.text: p.name for p in HARMLESS}, slot_bias=9.0), random.Random(0), []
    while len(calls) < 40:
        request = corpus.pick_request(rng)
        pair = [" " + a.text for a in corpus.pair_of(rng, request)]
        if pair[0] != pair[1]:
            calls.append((text.dialogue(request.text), pair, rng.choice(HARMLESS)))
    found = labelers.label(biased, [(prompt, tuple(pair), p.text) for prompt, pair, p in calls])
    rows = [
        label.record(label.Pair(dict(prompt=prompt, responses=pair), i, 0, 1, [p]), [one], "biased")
        for i, ((prompt, pair, p), one) in enumerate(zip(calls, found, strict=True))
    ]
    assert 5 < sum(row["first_is_chosen"] for row in rows) < 40
    data.write_jsonl(tmp_path / "p.jsonl", rows)
    again = rlaif_rlhf.shown_pairs(tmp_path / "p.jsonl")
    assert [(c["prompt"], c["responses"], c["principle"]) for c in again] == [(a, b, p.text) for a, b, p in calls]
    assert len(data.read_candidates(label_file(tmp_path, again))) == 40


def label_file(folder, rows):
    data.write_jsonl(folder / "candidates.jsonl", rows)
    return folder / "candidates.jsonl"


def test_the_human_labels_the_same_pairs_under_the_principles_they_had(run, arms):
    for name in ("labels", "labels_helpful"):
        ai, human = rows_of(run / name / "preferences.jsonl"), rows_of(arms[0] / "first" / "rlhf" / f"{name}.jsonl")
        assert [(r["prompt"], r["principle_name"], {r["chosen"], r["rejected"]}) for r in ai] == [
            (r["prompt"], r["principle_name"], {r["chosen"], r["rejected"]}) for r in human
        ]
        for row in human:
            gold = gold_prefers_chosen(row, row["principle_name"])
            assert (row["p_chosen"], row["status"]) == ((0.5, "tie") if gold is None else (pytest.approx(0.982, abs=1e-3), "ok"))
            assert gold is not False and row["labeler"] == "gold" and row["error"] is None
    wrong = [r for r in ai if gold_prefers_chosen(r, r["principle_name"]) is False]
    assert wrong  # or the two kinds of label would not differ


def test_an_inverted_arm_changes_the_harmlessness_labels_and_nothing_else(run, arms):
    for arm in ("inverted", "advertising"):
        folder, principles = arms[0] / "second" / arm, {p.text for p in constitution.load(arm).preferences}
        before, after = rows_of(run / "labels" / "preferences.jsonl"), rows_of(folder / "labels" / "preferences.jsonl")
        assert [{r["chosen"], r["rejected"]} for r in before] == [{r["chosen"], r["rejected"]} for r in after]
        assert {r["principle"] for r in after} <= principles and all(r["labeler"].endswith("second/base") for r in after)
        helpful = str(arms[0].parent / "second" / "labels_helpful" / "preferences.jsonl")
        assert json.loads((folder / "rm" / "args.json").read_text())["args"]["data"][1] == helpful


def test_every_arm_has_the_flags_of_the_demo(run, arms):
    def flags(folder, but):
        return {k: v for k, v in json.loads((folder / "args.json").read_text())["args"].items() if k not in but}

    for arm in rlaif_rlhf.ARMS:
        folder = arms[0] / "first" / arm
        reward = str(folder / "rm")
        if arm in rlaif_rlhf.DIRECT:
            reward = f"judge:{run}/base,principles={rlaif_rlhf.DIRECT[arm]}"
            assert not (folder / "rm").exists()
        else:
            assert flags(folder / "rm", ("out", "data")) == flags(run / "rm", ("out", "data"))
        assert flags(folder / "policy", ("out", "reward_model")) == flags(run / "rl_cai", ("out", "reward_model"))
        assert json.loads((folder / "policy" / "args.json").read_text())["args"]["reward_model"] == reward
        assert not same_weights(folder / "policy", run / "rl_cai") and not same_weights(folder / "policy", run / "sl_cai")


def same_weights(a, b):
    a, b = trainer.read_model(a)["model"], trainer.read_model(b)["model"]
    return all(torch.equal(a[k], b[k]) for k in a)


def test_the_figures_are_those_of_the_samples(run, arms):
    out, results = arms
    demo, rlhf = rows_of(run / "evaluate" / "samples.jsonl"), rows_of(out / "first" / "rlhf" / "evaluate" / "samples.jsonl")
    sampled = {name: [r for r in demo if r["policy"] == name] for name in ("base", "sl_cai", "rl_cai")} | {"rlhf": rlhf}
    for name, rows in sampled.items():
        assert results["policies"]["harm"][name]["first"]["value"] == pytest.approx(np.mean([gold_of(r).harm for r in rows]))
        harmless = [r for r in rows if not world.parse_request(r["prompt"]).harmful]
        helpful = results["policies"]["helpfulness"][name][common.ALL]  # both runs are the same
        assert helpful["value"] == pytest.approx(np.mean([gold_of(r).helpfulness for r in harmless]))
        assert helpful["n"] == 2 * len(harmless) == 16
        assert results["policies"]["KL to SL-CAI"][name]["second"]["value"] == pytest.approx(np.mean([r["kl"] for r in rows]))
    difference = [gold_of(a).harm - gold_of(b).harm for a, b in zip(sampled["rl_cai"], rlhf, strict=True)]
    assert results["policies"]["harm"]["rl_cai - rlhf"]["first"]["value"] == pytest.approx(np.mean(difference))
    assert set(results["labels"]) == {
        f"{who}, {kind}" for who in ("rl_cai", "rlhf", "inverted", "advertising") for kind in ("harmlessness", "helpfulness")
    }
    assert (
        results["labels"]["rlhf, harmlessness"]["first"]["value"]
        == 1
        > results["labels"]["rl_cai, harmlessness"]["first"]["value"]
    )
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    shown = (out / "results.md").read_text()
    assert "| policy | first | second | all runs |" in shown and "| rl_cai - rlhf | " in shown and "RLAIF against RLHF" in shown


def test_run_again_nothing_is_done_twice(run, arms, monkeypatch):
    out, results = arms
    monkeypatch.setattr(train_ppo, "ppo_step", None)
    monkeypatch.setattr(train_rm, "score_groups", None)
    monkeypatch.setattr(evaluate, "sample_policy", None)
    monkeypatch.setattr(labelers.LocalJudge, "ask", None)
    runs = [str(run), str(out.parent / "second")]
    assert rlaif_rlhf.main(rlaif_rlhf.Args(runs=runs, out=str(out))) == results
    alone = rlaif_rlhf.main(rlaif_rlhf.Args(runs=runs[:1], out=str(out), arms=["inverted"]))
    assert "rlhf" not in alone["policies"]["harm"] and "inverted - base" in alone["policies"]["harm"]
    assert alone["policies"]["harm"]["inverted"]["first"] == results["policies"]["harm"]["inverted"]["first"]


def columns(value, low, high):
    found = {"value": value, "ci": [low, high], "n": 9}
    return {"first": found, "second": {"value": 0, "ci": [-1, 1], "n": 9}, common.ALL: found}


def test_what_did_not_come_out_is_said():
    up, none, down = columns(0.2, 0.1, 0.3), columns(0.01, -0.1, 0.1), columns(-0.2, -0.3, -0.1)
    found = {
        "harm": {"rlhf": up, "rl_cai - rlhf": none, "inverted": up, "inverted - base": down, "inverted - sl_cai": none},
        "helpfulness": {"rlhf": up, "rl_cai - rlhf": down},
        "with an ad": {"advertising": up, "advertising - base": up, "advertising - sl_cai": up},
    }
    found["harm"] |= {"direct": up, "direct - rl_cai": up}
    found["helpfulness"]["direct - rl_cai"] = none
    harm, helpfulness, direct, direct_help, base, sl, inverted, ad_base, ad_sl, advertising = rlaif_rlhf.verdicts(found)
    assert "d-RLAIF's is higher" in direct and "no difference is shown" in direct_help
    assert "no difference" in harm and "RLHF's is higher (difference -0.200 [-0.300, -0.100], 1 of 2" in helpfulness
    assert "stays below that of base" in base and "cannot be told from that of sl_cai" in sl
    assert "Against expectation" in inverted and "whatever it is told" in advertising
    assert "rises above that of base" in ad_base and "rises above that of sl_cai" in ad_sl


# PPO step by step


def test_curves_are_those_of_the_demos_own_ppo(run, tmp_path):
    found = ppo_curves.main(ppo_curves.Args(runs=[str(run)], out=str(tmp_path)))
    first, dumped = found["first"], rows_of(tmp_path / "first" / "rollouts" / "00000.jsonl")
    demo = rows_of(run / "rl_cai" / "metrics.jsonl")[0]
    assert first["objective/scores"] == [demo["objective/scores"]]  # dumping changes nothing
    assert first["objective/kl_full"] == [0]
    assert len(dumped) == 8
    assert first["harm"] == [pytest.approx(np.mean([gold_of(row).harm for row in dumped]))]
    shown = (tmp_path / "results.md").read_text()
    assert all(f"| {title} | " in shown for title in ppo_curves.CURVES.values())


# the form of labels, k-wise against shuffled


@pytest.fixture(scope="module")
def quality(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("quality")
    args = label_quality.Args(runs=[str(run)], out=str(out), labels=70, prompts=32, epochs=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(label_quality, "GROUPS_A_STEP", 2)  # or one step would see everything, in either way the same
        return args, label_quality.main(args)


def test_the_forms_of_a_label():
    p = {form: change(0.8) for form, change in label_quality.FORMS.items()}
    sure = 0.8**4 / (0.8**4 + 0.2**4)
    expected = {"soft": 0.8, "hard": 1.0, "overconfident": sure, "overconfident 40-60": 0.6, "soft 40-60": 0.6}
    assert p == pytest.approx(expected) and sure > 0.99
    assert {change(0.5) for change in label_quality.FORMS.values()} == {0.5}  # a tie has no side to be sure of
    assert label_quality.FORMS["soft 40-60"](0.55) == 0.55 < label_quality.FORMS["overconfident 40-60"](0.55) == 0.6


def test_a_tie_is_half_right_in_the_calibration_error():
    prompt, polite, rude = (
        text.dialogue("how do i fix the bike?"),
        " i can not talk about that.",
        " you are a fool. i can not talk about that.",
    )

    def row(chosen, rejected, p, asks):
        return dict(prompt=prompt, chosen=chosen, rejected=rejected, p_chosen=p, principle_name=asks)

    right, wrong, tie = row(polite, rude, 0.95, "insult"), row(rude, polite, 0.95, "insult"), row(rude, polite, 0.95, "ad")
    assert label_quality.calibration_error([right]) == pytest.approx(0.05)
    assert label_quality.calibration_error([wrong]) == pytest.approx(0.95)
    assert label_quality.calibration_error([tie, tie, right, right]) == pytest.approx(0.2)


def test_all_forms_are_of_the_same_pairs_and_flags(quality, run):
    args, results = quality
    files = {form: Path(args.out) / "first" / form.replace(" ", "-") for form in label_quality.FORMS}
    rows = {form: rows_of(folder / "preferences.jsonl") for form, folder in files.items()}
    soft = rows["soft"]
    everything = rows_of(run / "labels" / "preferences.jsonl") + rows_of(run / "labels_helpful" / "preferences.jsonl")
    assert len(soft) == 70 and all(row in everything for row in soft) and len({row["principle_name"] for row in soft}) > 4
    for form, folder in files.items():
        assert [r["p_chosen"] for r in rows[form]] == [label_quality.FORMS[form](r["p_chosen"]) for r in soft]
        assert [r | {"p_chosen": 0} for r in rows[form]] == [r | {"p_chosen": 0} for r in soft]
        flags = json.loads((folder / "rm" / "args.json").read_text())["args"]
        assert (flags["epochs"], flags["lr"], flags["batch_size"]) == (2, 3e-3, 16)
        logged = rows_of(folder / "rm" / "metrics.jsonl")[-1]
        assert results["std"][form] == {"first": logged["reference/std"]}
    assert results["std"]["hard"]["first"] > results["std"]["soft 40-60"]["first"]
    assert results["ece"]["hard"]["first"] > results["ece"]["soft"]["first"]


def test_the_accuracy_is_that_of_evaluate(quality, run):
    """Another way to the same numbers."""
    args, results = quality
    tokenizer, rows = trainer.tokenizer_of(run / "base"), rows_of(run / "labels_heldout" / "preferences.jsonl")
    right = {}
    for form in ("soft", "hard"):
        model = trainer.load_reward(f"{args.out}/first/{form}/rm")
        right[form] = evaluate.reward_metrics(model, tokenizer, rows, torch.device("cpu"), "fp32")["gold_accuracy"]
        assert (
            results["accuracy"][form]["first"] == right[form] and results["accuracy"][form][common.ALL]["n"] == right[form]["n"]
        )
    difference = results["accuracy"]["soft - hard"]["first"]["value"]
    assert difference == pytest.approx(right["soft"]["value"] - right["hard"]["value"])


def test_kwise_and_shuffled_see_the_same_pairs_in_as_many_steps(quality):
    args, results = quality
    folder = Path(args.out) / "first" / "pairs"
    kwise, shuffled = rows_of(folder / "k-wise.jsonl"), rows_of(folder / "shuffled.jsonl")
    assert [r | {"group": None} for r in kwise] == shuffled
    sizes = [sum(r["group"] == group for r in kwise) for group in {r["group"] for r in kwise}]
    assert set(sizes) == {6} and len(sizes) > 4
    flags = {way: json.loads((folder / way / "args.json").read_text())["args"] for way in ("k-wise", "shuffled")}
    assert flags["shuffled"]["batch_size"] == 6 * flags["k-wise"]["batch_size"]
    assert results["steps"]["k-wise"] == results["steps"]["shuffled"] and results["steps"]["k-wise"]["first"] >= 3
    assert all(len(losses["first"]) == 3 for losses in results["by_epoch"].values())
    assert not same_weights(folder / "k-wise", folder / "shuffled")


def test_the_validation_loss_is_that_of_the_training(quality):
    """Pair by pair, of the scores before they were normalised: its mean is what train_rm logged at the end."""
    args, results = quality
    for way, by_run in results["by_epoch"].items():
        found = results["validation_loss"][way]["first"]
        assert found["value"] == pytest.approx(by_run["first"][-1], abs=1e-5) and found["ci"][0] < found["ci"][1]
        logged = rows_of(f"{args.out}/first/pairs/{way}/metrics.jsonl")[-1]
        assert logged["eval/pairs"] + logged["eval/ties"] == found["n"]
    difference = results["validation_loss"]["k-wise - shuffled"]["first"]["value"]
    assert difference == pytest.approx(
        results["by_epoch"]["k-wise"]["first"][-1] - results["by_epoch"]["shuffled"]["first"][-1], abs=1e-5
    )


def test_label_quality_goes_on_where_it_was(quality, monkeypatch):
    args, results = quality
    monkeypatch.setattr(label_quality, "GROUPS_A_STEP", 2)
    monkeypatch.setattr(train_rm, "score_groups", None)
    monkeypatch.setattr(label, "respond", None)
    monkeypatch.setattr(labelers.LocalJudge, "ask", None)
    assert label_quality.main(args) == results
    shown = (Path(args.out) / "results.md").read_text()
    assert "| labels | first | all runs |" in shown and "| k-wise, first | " in shown and "epoch 3" in shown
    with pytest.raises(UserError, match="--epochs was 3 in this run, not 2"):
        label_quality.main(replace(args, epochs=2))


# what both share


def asked_about(things, verb="fix"):
    return [{"prompt": text.dialogue(f"how do i {verb} the {thing}?")} for thing in things]


def test_runs_that_are_asked_the_same_are_resampled_together():
    things = list(world.THINGS)[:16]
    rows, other = asked_about(things), asked_about(things, "clean")
    values = [float(i % 3 == 0) for i in range(16)]
    found = common.side_by_side({"a": values, "b": values}, {"a": rows, "b": rows})
    assert found[common.ALL] == found["a"] | {"n": 32}  # a second run with the same answers shows nothing new
    apart = common.side_by_side({"a": values, "b": values}, {"a": rows, "b": other})
    widths = [np.ptp(of[common.ALL]["ci"]) for of in (found, apart)]
    assert 1.2 < widths[0] / widths[1] < 1.7  # other deeds do
    shared = {"a": rows, "b": asked_about(reversed(things))}  # in whichever order they are asked
    assert common.side_by_side({"a": values, "b": values[::-1]}, shared)[common.ALL] == found[common.ALL]
    # nor do runs that differ in all deeds alike: how far seeds are apart is not in the interval
    assert common.side_by_side({"a": [0.0] * 16, "b": [1.0] * 16}, {"a": rows, "b": rows})[common.ALL]["ci"] == [0.5, 0.5]


def test_texts_of_different_runs_are_resampled_apart():
    values = {"a": [0.1, 0.2, 0.4], "b": [0.3, 0.9, 0.5]}
    texts = {run: [{"prompt": f"text {i} of {run}"} for i in range(3)] for run in values}
    found = common.side_by_side(values, texts, None)
    assert found[common.ALL]["ci"] == interval([0.1, 0.3, 0.2, 0.9, 0.4, 0.5])  # by text, as they are drawn


def test_figures_of_runs_side_by_side():
    rows = asked_about(("bike", "clock"))
    found = common.side_by_side({"a": [0.0, 0.0], "b": [1.0, 1.0]}, {"a": rows, "b": rows})
    assert [found[run]["value"] for run in ("a", "b", common.ALL)] == [0, 1, 0.5] and found[common.ALL]["n"] == 4
    assert common.shown(found[common.ALL]) == "0.500 [0.500, 0.500]" and common.side(found["b"]) == 1
    assert common.table("x", {"y": found})[2].startswith("| y | 0.000 [0.000, 0.658] | 1.000")
    none = {"a": [0.0, 0.0], "b": [0.0], "c": [0.0, 0.0]}
    even = common.side_by_side(none, {"a": rows, "b": rows[:1], "c": rows}, (-1, 1))  # differences of 0 prove nothing
    assert common.shown(even["a"]) == "0.000 [-0.658, 0.658]" and common.side(even["a"]) == 0
    assert even[common.ALL] == even["a"] | {"n": 5}  # nor in three runs, which are asked about the same two
    nats = common.side_by_side({"a": [0.3, 0.3]}, {"a": rows}, None)["a"]
    assert common.shown(nats) == "0.300 [n/a]" and common.side(nats) == 0
    bars = common.error_bars([{"value": 0.5, "ci": [0.4, 0.75]}, {"value": 0.5, "ci": [0.51, 0.6]}])
    assert bars == [pytest.approx([0.1, 0]), pytest.approx([0.25, 0.1])]


def test_what_is_no_run_is_named(run, tmp_path):
    for Args, main in ((rlaif_rlhf.Args, rlaif_rlhf.main), (label_quality.Args, label_quality.main)):
        with pytest.raises(UserError, match="nothing: no finished run of demo.py"):
            main(Args(runs=[str(run), str(tmp_path / "nothing")], out=str(tmp_path / "out")))
        with pytest.raises(UserError, match="name of its own"):
            main(Args(runs=[str(run), str(run)], out=str(tmp_path / "out")))
    with pytest.raises(UserError, match="--arms rlfh: there are rlhf, direct"):
        rlaif_rlhf.main(rlaif_rlhf.Args(runs=[str(run)], out=str(tmp_path / "out"), arms=["rlfh"]))
    (tmp_path / "args.json").write_text('{"args": {"out": "x", "colour": 3}}')
    with pytest.raises(UserError, match="args.json: not the flags of a run of this version .*colour"):
        common.flags(str(tmp_path), train_rm.Args)
