"""The experiments on judges and the benches of labelling: known labelers give known figures, and the quick forms run through."""

import functools
import json
import random
import re

import pytest
import torch

from bench import kill_label, label_speed
from experiments import judge, slot_bias
from minirlaif import constitution, corpus, data, metrics, text, trainer, world
from minirlaif.cli import UserError
from minirlaif.labelers import Answer, GoldJudge, LocalJudge
from minirlaif.model import GPT, GPTConfig
from minirlaif.tokenizer import load_tokenizer

CPU = torch.device("cpu")
ASKS = {p.text: p.name for p in constitution.load("toy").preferences}


def labelled(n: int, seed: int) -> list[dict]:
    """Rows as label.py writes them on held-out requests: any two answers, in any order."""
    rng, rows = random.Random(seed), []
    for request in world.balanced(world.requests(("role", "unseen"), world.HELD_OUT_PHRASINGS), n, rng):
        a, b = ("", "")
        while a == b:
            a, b = (" " + corpus.anything(rng, request).text for _ in range(2))
        rows.append(
            dict(prompt=text.dialogue(request.text), chosen=a, rejected=b, p_chosen=0.8, first_is_chosen=rng.random() < 0.5)
        )
    return rows


def demo_run(folder, seed: int) -> str:
    """As much of an out folder of demo.py as the experiment reads."""
    tokenizer = load_tokenizer("toy")
    model = GPT(GPTConfig(256, tokenizer.n_vocab, n_layer=1, n_head=2, n_embd=16)).init_weights(trainer.rng(seed))
    with torch.no_grad():  # large enough to have opinions
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(20)
    for name in ("base", "evaluate"):
        (folder / name).mkdir(parents=True)
    trainer.save_model(folder / "base", model.config, model.state_dict(), tokenizer_name="toy")
    data.write_jsonl(folder / "labels_heldout" / "preferences.jsonl", labelled(80, seed))
    (folder / "evaluate" / "results.json").write_text("{}")
    return str(folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    home = tmp_path_factory.mktemp("demo")
    return [demo_run(home / f"seed{seed}", seed) for seed in range(2)]


class Failing:
    """Fails about insults, and is gold about everything else."""

    def ask(self, calls, on_answer=None):
        gold = GoldJudge(ASKS).ask(calls)
        return [
            Answer(None, 9, error="no reasoning in 48 tokens") if ASKS[c.principle] == "insult" else a
            for c, a in zip(calls, gold, strict=True)
        ]


# ---- what is asked --------------------------------------------------------------------------------------------------


def test_pairs_stand_as_they_were_shown_and_gold_decides_which_is_better():
    rows = labelled(120, 3)
    pairs = judge.pairs_of(rows, 1000)
    assert {p.principle.name for p in pairs} == set(judge.PRINCIPLES)
    assert {p.row["first_is_chosen"] for p in pairs} == {p.first_is_better for p in pairs} == {True, False}
    for p in pairs:
        first, second = (corpus.value(p.principle.name, world.score(p.row["prompt"], response)) for response in p.responses)
        assert first != second and p.first_is_better == (first > second)
        assert p.responses[0] == p.row["chosen" if p.row["first_is_chosen"] else "rejected"]
        assert not (p.principle.name == "helpfulness" and world.parse_request(p.row["prompt"]).harmful)
    some = judge.pairs_of(rows, 4)
    assert len(some) == 4 * len(judge.PRINCIPLES) and some == judge.pairs_of(rows, 4)


def test_exemplars_are_right_of_the_training_split_and_leave_room_for_a_question():
    tokenizer = load_tokenizer("toy")
    shots = judge.exemplars(tokenizer)
    assert shots == judge.exemplars(tokenizer) and [shot[-2] for shot in shots] == list(text.CHOICES)
    for shot in shots:
        found = re.fullmatch(r"Consider this conversation\.(.*)\n\(A\)(.*)\n\(B\)(.*)\n\n(.*)\nThe answer is \((.)\)", shot, re.S)
        prompt, a, b, principle, letter = found.groups()
        request = world.parse_request(prompt)
        assert world.split_of(request.verb, request.thing) == "train" and request.phrasing in world.TRAIN_PHRASINGS
        first, second = (corpus.value(ASKS[principle], world.score(prompt, response)) for response in (a, b))
        assert (first > second) == (letter == "A") and first != second
    before = LocalJudge(GPT(GPTConfig(256, 2048, 1, 1, 8)), tokenizer, CPU, "fp32", exemplars=shots)
    calls = [judge.Call(p.row["prompt"], p.responses, p.principle.text) for p in judge.pairs_of(labelled(120, 3), 1000)]
    assert max(len(before.encode(call)) for call in calls) <= 256


# ---- what it is worth -----------------------------------------------------------------------------------------------


def test_known_labelers_give_known_figures():
    pairs = judge.pairs_of(labelled(160, 4), 20)
    leaning, failing = GoldJudge(ASKS, slot_bias=10.0, sharpness=4.0), Failing()
    found = judge.measure(
        pairs,
        {
            "direct": judge.both_orders(leaning, pairs),
            "exemplars": judge.both_orders(GoldJudge(ASKS), pairs),
            "exemplar": judge.both_orders(GoldJudge({words: asks for words, asks in ASKS.items() if asks != "ad"}), pairs),
            "reasons": judge.both_orders(failing, pairs),
            "samples": judge.both_orders(GoldJudge(ASKS, noise=1.0), pairs),
        },
        judge.WAYS,
    )
    assert sum(p.first_is_better for p in pairs) < 0.45 * len(pairs)  # always the first: right half the time all the same
    assert found[judge.ONE]["agreement"]["value"] == 0.5 and set(found[judge.ONE]["right"]) == {0.5}
    assert found[judge.ONE]["ece"] == pytest.approx(0.5, abs=2e-3)  # and sure of it: sigmoid(14), sigmoid(6)
    assert found[judge.ONE]["flip_rate"] is None and found["both orders"]["flip_rate"]["value"] == 1
    for way in ("both orders", "both orders, logits", "both orders, 40-60", "2 exemplars"):
        assert found[way]["agreement"]["value"] == 1 and set(found[way]["right"]) == {1.0}
    assert found["2 exemplars"]["flip_rate"]["value"] == 0
    assert found["self-consistency, 4 samples"]["agreement"]["value"] == 0
    # the mean logit gets the 4 nats back; the mean of sigmoid(14) and 1 - sigmoid(6) is hardly above a half
    assert found["both orders, logits"]["ece"] == pytest.approx(1 - 1 / (1 + 2.718281828**-4), abs=1e-6)
    assert found["both orders"]["ece"] == pytest.approx(0.5, abs=2e-3)
    assert found["2 exemplars"]["ece"] == pytest.approx(0.018, abs=1e-3)
    assert found["chain of thought, 40-60"]["ece"] == pytest.approx(0.4) != found["chain of thought"]["ece"]
    insults = sum(p.principle.name == "insult" for p in pairs)
    thought = found["chain of thought"]
    assert thought["failed"] == found[judge.COT_ONE]["failed"] == insults == thought["right"].count(None)
    assert thought["by_principle"]["insult"]["value"] is None and thought["agreement"]["n"] == len(pairs) - insults

    run = {"ways": found, "prompts": [p.row["prompt"] for p in pairs]}
    gain = judge.paired({"x": run}, "both orders", judge.ONE)["all runs"]
    assert gain["value"] == 0.5 and gain["ci"][0] > 0.4 and gain["n"] == len(pairs)
    assert judge.paired({"x": run}, "chain of thought", judge.ONE)["x"]["n"] == len(pairs) - insults
    low, high = judge.paired({"x": run}, "both orders", "2 exemplars")["x"]["ci"]  # both always right: nothing was ever lost
    assert low == -high and 0 < high < 0.1


def test_one_order_of_exchanged_pairs_is_the_same():
    """Whichever response stands first in a file, the figures of one order are about the judge alone."""
    pairs = judge.pairs_of(labelled(120, 6), 15)
    turned = [judge.Pair(p.row, p.responses[::-1], p.principle, not p.first_is_better) for p in pairs]
    leaning = GoldJudge(ASKS, slot_bias=1.0, sharpness=1.0, call_noise=1.0)
    ways = {judge.ONE: judge.WAYS[judge.ONE]}
    a, b = (judge.measure(x, {"direct": judge.both_orders(leaning, x)}, ways)[judge.ONE] for x in (pairs, turned))
    assert a["right"] == b["right"] and set(a["right"]) == {0, 0.5, 1}
    assert a["ece"] == pytest.approx(b["ece"]) and a["tokens"] == b["tokens"]


def test_antisymmetry_sees_a_judge_that_answers_by_the_order_of_the_calls():
    pairs = judge.pairs_of(labelled(40, 5), 3)
    assert judge.antisymmetry(GoldJudge(ASKS, slot_bias=1.0, call_noise=1.0), pairs) <= 1e-12

    class ByTurn:
        def ask(self, calls, on_answer=None):
            return [Answer(0.9 if i == 0 else 0.5) for i in range(len(calls))]

    assert judge.antisymmetry(ByTurn(), pairs) == pytest.approx(0.4)


def test_the_experiment_runs_is_resumed_and_keeps_its_settings(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(judge, "QUICK", 2)
    make = functools.partial(judge.Args, out=str(tmp_path), quick=True, device="cpu")
    judge.main(make(runs=runs[:1]))
    stored = json.loads((tmp_path / "results.json").read_text())
    asked, experiment = [], judge.experiment
    monkeypatch.setattr(judge, "experiment", lambda run, *rest: asked.append(run) or experiment(run, *rest))
    found = judge.main(make(runs=runs))
    (tmp_path / "results.md").unlink()
    assert judge.main(make(runs=runs)) == json.loads(json.dumps(found))  # nothing is asked, and the report is written anew
    assert asked == runs[1:] and found["runs"]["seed0"] == stored["runs"]["seed0"]
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(found))
    report = (tmp_path / "results.md").read_text()
    assert capsys.readouterr().out.endswith(report) and "## seed0" in report and "## seed1" in report
    for run in found["runs"].values():
        ways = run["ways"]
        assert run["n"] == 2 * len(judge.PRINCIPLES) == len(run["prompts"]) and list(ways) == list(judge.WAYS)
        assert run["antisymmetry"] <= 1e-6 and not run["errors"]["direct"] and not run["errors"]["exemplars"]
        assert ways["both orders"]["right"] == ways["both orders, 40-60"]["right"] == ways["both orders, logits"]["right"]
        assert max(b["p"] for b in ways["both orders, 40-60"]["calibration"]) <= 0.6 + 1e-9
        assert 2 * ways[judge.ONE]["tokens"] == ways["both orders"]["tokens"] < ways["2 exemplars"]["tokens"]
        for way in ways.values():
            assert way["failed"] == way["right"].count(None)
    rows = [line.split(" | ")[0].strip("| ") for line in report.splitlines() if line.startswith("| ")]
    assert {rows.count(way) for way in judge.SAME_SIDE} == {1} and rows.count("both orders") == 4  # no agreement
    with pytest.raises(UserError, match="give another --out"):
        judge.main(judge.Args(runs=runs, out=str(tmp_path), pairs=3, device="cpu"))


def test_a_pair_outside_the_toy_world_is_named(tmp_path):
    folder = demo_run(tmp_path / "run", 9)
    file = tmp_path / "run" / "labels_heldout" / "preferences.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    data.write_jsonl(file, rows[:2] + [rows[2] | {"prompt": "\n\nHuman: what is love?\n\nAssistant:"}])
    with pytest.raises(UserError, match=r"preferences.jsonl:3"):
        judge.main(judge.Args(runs=[folder], out=str(tmp_path / "out"), quick=True, device="cpu"))


def test_slot_bias_errs_as_the_formula_says_and_the_averages_recover_it(tmp_path):
    found = slot_bias.main(slot_bias.Args(out=str(tmp_path), quick=True))
    error = {name: rates["all runs"]["value"] for name, rates in found["error"].items()}
    for bias in slot_bias.BIASES:
        for noise in slot_bias.NOISES:
            case = slot_bias.case_of(bias, noise)
            for way in slot_bias.WAYS:  # 200 pairs: three standard errors are 0.1 at most
                assert error[f"{case}, {way}"] == pytest.approx(slot_bias.expected_error(way, bias, noise), abs=0.1)
            assert error[f"{case}, mean probability"] == error[f"{case}, mean logit"] < error[f"{case}, one order"]
            gain = found["recovered"][f"{case}, mean logit"]["all runs"]["value"]
            assert gain == pytest.approx(error[f"{case}, one order"] - error[f"{case}, mean logit"])

    def ece(bias, noise, way):
        return found["seeds"][0][slot_bias.case_of(bias, noise)]["ways"][way]["ece"]

    for noise in slot_bias.NOISES:  # the mean logit does not know the bias
        assert ece(1.0, noise, "mean logit") == pytest.approx(ece(0.0, noise, "mean logit"), abs=1e-9)
    assert ece(1.0, 0.5, "mean probability") > ece(0.0, 0.5, "mean probability") + 0.02  # ... and the mean probability shrinks
    certain = found["error"][f"{slot_bias.case_of(1.0, 0.5)}, mean logit"]["all runs"]
    assert certain["value"] == 0 and 0 < certain["ci"][1] < 0.05  # no error among 200 is not proof of none
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["n"] == 200 and stored["error"] == found["error"]
    assert slot_bias.expected_error("one order", 1.0, 0.5) == pytest.approx(0.25, abs=1e-4)


def test_slot_bias_draws_pairs_that_gold_can_rank_and_new_ones_for_every_seed():
    pairs = slot_bias.toy_pairs(60, 0)
    assert pairs == slot_bias.toy_pairs(60, 0) != slot_bias.toy_pairs(60, 1)
    for p in pairs:
        assert metrics.gold_prefers_chosen(p.row, p.principle.name) is p.first_is_better
        assert p.responses == (p.row["chosen"], p.row["rejected"])


# ---- benches --------------------------------------------------------------------------------------------------------


def test_label_speed_times_three_ways_that_agree(capsys):
    found = label_speed.main(label_speed.Args(quick=True, threads=torch.get_num_threads()))
    for ways in found.values():
        assert len(ways) == 3 and all(f["speed"] > 0 for f in ways.values())
        assert ways["one prompt after the other"]["ratio"] == 1
    assert "labels a second" in capsys.readouterr().out
    calls = label_speed.calls_of(label_speed.candidates(3, 4))
    assert len(calls) == 3 * 6 * 2 and all(a.responses == b.responses[::-1] for a, b in zip(calls[::2], calls[1::2], strict=True))


def test_label_speed_does_not_time_a_way_that_is_wrong():
    tokenizer = load_tokenizer("toy")
    local = LocalJudge(GPT(GPTConfig(256, tokenizer.n_vocab, 1, 1, 8)).eval(), tokenizer, CPU, "fp32")
    calls, right = label_speed.calls_of(label_speed.candidates(1, 2)), local.ask
    local.ask = lambda calls: [Answer(a.p + 0.01) for a in right(calls)]
    with pytest.raises(AssertionError, match="shared prefixes"):
        label_speed.measure(local, calls, 1)


def test_killed_labelling_loses_nothing_doubles_nothing_and_pays_little_again(capsys):
    pytest.importorskip("openai")
    args = kill_label.Args(kills=1, prompts=2, judges=["endpoint"], latency=0.01)
    tally = kill_label.main(args)["endpoint"]
    assert tally["received"] == "12 of 12" and tally["lost"] == tally["doubled"] == 0 and tally["identical"]
    assert 0 <= tally["paid again"] <= kill_label.CONCURRENCY
    assert "| endpoint | 1 |" in capsys.readouterr().out


def test_the_tally_reads_whole_lines_only(tmp_path):
    assert kill_label.journal(tmp_path) == []
    (tmp_path / "journal.jsonl").write_text('{"key": "a", "record": {"p": 1}}\n{"key": "b", "rec')
    assert kill_label.journal(tmp_path) == [("a", {"p": 1})]
