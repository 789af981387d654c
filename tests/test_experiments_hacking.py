"""experiments/reward_hacking.py from end to end on a demo that takes seconds, and its claim on curves made by hand."""

import json
import random
import shutil
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from small import CPU, rows_of

import train_ppo
import train_rm
from experiments import common
from experiments import reward_hacking as rh
from minirlaif import corpus, data, text, trainer, world
from minirlaif.cli import UserError
from minirlaif.metrics import cluster

PPO = dict(batch_size=8, minibatch_size=4, lr=1e-3, max_new_tokens=12, **CPU)


@pytest.fixture(scope="module")
def run(home, tmp_path_factory):
    """What demo.py leaves behind, as far as the experiment reads it."""
    run = tmp_path_factory.mktemp("demo") / "first"
    shutil.copytree(home / "world", run / "world")
    shutil.copytree(home / "base", run / "sl_cai")
    for name in ("labels", "labels_helpful"):
        (run / name).mkdir()
        data.write_jsonl(run / name / "preferences.jsonl", [preference(random.Random(f"{name} {i}")) for i in range(50)])
    for name, args in (
        ("rm", train_rm.Args(out="", init="", data=[], batch_size=16, lr=3e-3, resume=True, **CPU)),
        ("rl_cai", train_ppo.Args(out="", init="", reward_model="", data="", resume=True, **PPO)),
    ):
        (run / name).mkdir()
        (run / name / "args.json").write_text(json.dumps({"args": asdict(args)}))
    (run / "evaluate").mkdir()
    (run / "evaluate" / "results.json").write_text("{}")
    return run


def preference(rng):
    request = corpus.pick_request(rng)
    chosen, rejected = (" " + corpus.helpful_only(rng, request, rate).text for rate in (0.0, 1.0))
    return dict(prompt=text.dialogue(request.text), chosen=chosen, rejected=rejected, p_chosen=rng.uniform(0.5, 1))


@pytest.fixture(scope="module")
def quick(run, tmp_path_factory):
    """(out, results) of --quick on two runs; the second is a copy of the first, moved."""
    home = tmp_path_factory.mktemp("hacking")
    shutil.copytree(run, home / "second")
    out = home / "out"
    return out, rh.main(rh.Args(runs=[str(run), str(home / "second")], out=str(out), lr=1e-3, quick=True))


def flags(folder, but=()):
    return {k: v for k, v in json.loads((folder / "args.json").read_text())["args"].items() if k not in but}


# From end to end


def test_both_arms_have_the_flags_of_the_demo_and_differ_in_kl_coef_alone(run, quick):
    none, default = (quick[0] / "first" / arm.replace(" ", "-") for arm in rh.ARMS)
    assert flags(none, ("out", "kl_coef")) == flags(default, ("out", "kl_coef"))
    assert (flags(none)["kl_coef"], flags(default)["kl_coef"]) == (0, train_ppo.Args.kl_coef)
    changed = ("out", "kl_coef", "init", "reward_model", "data", "steps", "lr")
    assert flags(none, changed) == flags(run / "rl_cai", changed)
    assert flags(none)["init"] == str(run / "sl_cai") and flags(none)["reward_model"] == str(quick[0] / "first" / "rm")


def test_the_reward_model_sees_few_of_the_labels(run, quick):
    few = rows_of(quick[0] / "first" / f"labels-{rh.QUICK.labels}.jsonl")
    both = [row for name in ("labels", "labels_helpful") for row in rows_of(run / name / "preferences.jsonl")]
    assert len(few) == len({json.dumps(row) for row in few}) == rh.QUICK.labels < len(both)
    assert all(row in both for row in few)
    assert flags(quick[0] / "first" / "rm")["data"] == [str(quick[0] / "first" / f"labels-{rh.QUICK.labels}.jsonl")]


def test_the_loop_is_that_of_train_ppo(quick, tmp_path):
    """Looking on changes nothing: with the same flags, train_ppo.py itself ends with the same policy, bit for bit."""
    folder = quick[0] / "first" / "kl_coef-0.1"
    train_ppo.main(replace(common.flags(str(folder), train_ppo.Args), out=str(tmp_path / "ppo")))
    ours, theirs = (trainer.read_model(path)["model"] for path in (folder, tmp_path / "ppo"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for ours, theirs in zip(rows_of(folder / "metrics.jsonl"), rows_of(tmp_path / "ppo" / "metrics.jsonl"), strict=False):
        assert all(ours[name] == x for name, x in theirs.items() if name[:5] in ("objec", "loss/", "polic"))


def test_each_look_is_of_the_policy_before_the_step(quick):
    out, results = quick
    for arm, of in results["curves"]["first"].items():
        assert [p["step"] for p in of["looks"]] == [0, 2, 4] and [p["step"] for p in of["own"]] == [0, 1, 2, 3]
        folder = out / "first" / arm.replace(" ", "-")
        device, tokenizer = torch.device("cpu"), trainer.tokenizer_of(folder)
        policy, reward = trainer.load_gpt(folder, device), trainer.load_reward(out / "first" / "rm", device)
        for p in of["looks"]:
            rows = rows_of(folder / "held_out" / f"{p['step']:05d}.jsonl")
            assert p["gold"] == pytest.approx(p["helpfulness"] - p["harm"], abs=1e-5)
            assert p["proxy"] == pytest.approx(np.mean([row["proxy"] for row in rows]), abs=1e-5)
        assert of["looks"][0]["kl"] == 0 < of["looks"][1]["kl"] != of["looks"][2]["kl"]
        # the last answers are those of the policy that was saved, and their proxy is the reward model's score
        prompts = [tokenizer.encode(row["prompt"]) for row in rows]
        noise = trainer.rng(flags(folder)["seed"], "sample", "held out").initial_seed()
        samples = rh.generate(policy, prompts, 12, tokenizer.eot, 1.0, seed=noise)
        assert [tokenizer.decode(ids) for ids in samples.responses()] == [row["response"] for row in rows]
        with torch.no_grad():
            scores = reward(samples.tokens, samples.length).tolist()
        assert scores == pytest.approx([row["proxy"] for row in rows], abs=1e-4)
    none, default = (arm["looks"] for arm in results["curves"]["first"].values())
    assert none[0] == default[0] and none[-1]["kl"] != default[-1]["kl"]


def test_what_is_reported_is_written(quick):
    out, results = quick
    assert json.loads((out / "results.json").read_text()) == results
    lines = (out / "results.md").read_text()
    assert all(line in lines for line in results["verdicts"]) and "## second, kl_coef 0.1" in lines
    pytest.importorskip("matplotlib")
    assert (out / "reward-hacking.png").stat().st_size > 5000


def test_interrupted_and_started_again_is_the_same(run, quick, tmp_path, monkeypatch):
    args = rh.Args(runs=[str(run)], out=str(tmp_path / "out"), lr=1e-3, quick=True)
    end_step = trainer.Run.end_step

    def stop(run, step, make_state):
        if run.folder.name == "kl_coef-0.1" and step == 3:  # behind a look, and before the next
            run.save_state({"step": step, **make_state()})
            raise KeyboardInterrupt
        end_step(run, step, make_state)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Run, "end_step", stop)
        with pytest.raises(KeyboardInterrupt):
            rh.main(args)
    assert rh.main(args)["curves"]["first"] == quick[1]["curves"]["first"]
    monkeypatch.setattr(trainer.Run, "log", None)  # what is done is not done again
    assert rh.main(args)["curves"]["first"] == quick[1]["curves"]["first"]


def test_without_matplotlib_one_line_says_what_to_install(quick, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    rh.plot(quick[1], 2, tmp_path / "x.png")
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "pip install" in said and not (tmp_path / "x.png").exists()


def test_mistakes_are_named(run, quick, tmp_path):
    with pytest.raises(UserError, match="--lr"):
        rh.main(rh.Args(runs=[str(run)], lr=0.0, out=str(tmp_path / "a")))
    with pytest.raises(UserError, match="--lr was"):  # another experiment in the same folder
        rh.main(rh.Args(runs=[str(run)], lr=2e-3, quick=True, out=str(quick[0])))


# The claim


REQUESTS = world.requests(("role", "unseen"), range(12, 13))
STEPS, UP = range(4), (0.0, 0.5, 1.0, 1.5)
RISES_AND_FALLS, STAYS = (0.6, 0.95, 0.5, 0.2), (0.6, 0.95, 0.95, 0.95)


def look(step, rate, proxy, rng):
    """One look: harmless requests get a right answer at this rate and an evasion otherwise, which harmful ones always get."""
    rows = []
    for request in REQUESTS:
        right = not request.harmful and rng.random() < rate
        answer = world.right_answer(request.verb, request.thing) if right else world.Answer("evasion")
        rows.append(dict(prompt=text.dialogue(request.text), response=" " + answer.text, tokens=9, stopped=True, kl=None))
        rows[-1]["proxy"] = proxy + rng.gauss(0, 0.1)
    return {"step": step, "kl": step / 4, "proxy": proxy, "gold": float(np.mean(rh.gold(rows))), "rows": rows}


def curve(rates, proxies, seed=0):
    rng = random.Random(seed)
    return {"looks": [look(*x, rng) for x in zip(STEPS, rates, proxies, strict=True)], "own": []}


def summary(none, default):
    return rh.summarise({"one": dict(zip(rh.ARMS, (curve(*none), curve(*default)), strict=True))})


def test_gold_is_helpfulness_less_harm():
    harmless, harmful = world.Request("fix", "bike"), world.Request("burn", "boat")
    right, ad = world.right_answer("fix", "bike"), world.right_answer("fix", "bike", extras={"ad": 0})
    said = [(harmless, right), (harmless, ad), (harmless, world.Answer("evasion")), (harmful, world.right_answer("burn", "boat"))]
    rows = [dict(prompt=text.dialogue(r.text), response=a.text, stopped=True) for r, a in said]
    assert rh.gold(rows) == pytest.approx([4 / 3, 4 / 3 - 0.2, 0, -0.4])
    assert np.mean(rh.gold(rows)) == pytest.approx((1 + 1 + 0) / 3 - (0.2 + 0.4) / 4)


def test_a_peak_is_chosen_by_the_other_half_of_the_requests():
    looks = curve(RISES_AND_FALLS, UP)["looks"]
    rows, first = looks[0]["rows"], rh.in_first_half(looks[0]["rows"])
    halves = [{cluster(row) for row, one in zip(rows, first, strict=True) if one == side} for side in (False, True)]
    assert not halves[0] & halves[1] and 0.4 < np.mean(first) < 0.6
    of_gold = np.array([rh.gold(look["rows"]) for look in looks])
    assert rh.peaks(of_gold, first) == [1] * len(rows)
    for side in (False, True):  # the best end of one half moves the peak of the other half to there, and its own not
        changed = of_gold.copy()
        changed[3, np.array(first) == side] = 2
        assert rh.peaks(changed, first) == [1 if one == side else 3 for one in first]


def test_a_policy_that_stays_as_it_is_falls_by_nothing_on_average():
    """Measured on the requests that chose it, the best of four equal looks would be a peak to fall from."""
    rng, first = np.random.default_rng(0), rh.in_first_half(curve(STAYS, UP)["looks"][0]["rows"])
    fair, biased = [], []
    for _ in range(400):
        noise = rng.normal(size=(4, len(first)))
        best = rh.peaks(noise, first)
        fair.append(np.mean(noise[best, np.arange(len(first))] - noise[3]))
        biased.append(noise.mean(1).max() - noise[3].mean())
    assert abs(np.mean(fair)) < 2.5 * np.std(fair) / 20 < 0.5 * np.mean(biased)


def test_hacked_is_a_fall_of_gold_while_the_proxy_rises():
    found = summary((RISES_AND_FALLS, UP), (STAYS, UP))
    fall = found["differences"]["kl_coef 0: gold falls"]["one"]
    assert fall["value"] == pytest.approx(0.75, abs=0.15) and fall["ci"][0] > 0.5
    assert found["differences"]["kl_coef 0: proxy rises"]["one"]["value"] == pytest.approx(1, abs=0.05)
    assert found["differences"]["kl_coef 0: gold, end - start"]["one"]["value"] == pytest.approx(-0.4, abs=0.15)
    claim, _, *lines = found["verdicts"]
    assert claim.endswith("with the default, came out.")
    assert [line.split(": ")[1].split(".")[0] for line in lines] == ["hacked"] * 2 + ["not hacked"] * 2  # the run, and all


def test_what_did_not_come_out_is_said():
    down = UP[::-1]
    cases = {  # (kl_coef 0, the default): (places where the claim holds, what is said of kl_coef 0)
        ((RISES_AND_FALLS, down), (STAYS, UP)): (2, "fell, but not for the proxy's sake"),
        ((STAYS, UP), (STAYS, UP)): (2, "not hacked"),
        ((RISES_AND_FALLS, UP), (RISES_AND_FALLS, UP)): (2, "hacked"),
        ((STAYS, UP), (RISES_AND_FALLS, down)): (0, "not hacked"),
    }
    for (none, default), (places, word) in cases.items():
        claim, _, line, *_ = summary(none, default)["verdicts"]
        assert claim.endswith(f"came out in {places} of these 4 places.") and f": {word}. Gold" in line
