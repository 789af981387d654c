"""experiments/distill_hhh.py, distill_topk.py, two_contexts.py: quick runs from end to end, and their figures by hand."""

import importlib.util
import json
import math
import random
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small import CPU, interrupted, rows_of

import demo
import distill
import evaluate
import pretrain
from experiments import common, distill_hhh, distill_topk, two_contexts
from minirlaif import constitution, corpus, data, targets, text, trainer, world
from minirlaif.cli import UserError
from minirlaif.losses import token_kl, topk_rest
from minirlaif.metrics import cluster, gold_of
from minirlaif.sampling import generate
from minirlaif.world import Request, right_answer

C = constitution.load("toy").preamble
PLOTS = importlib.util.find_spec("matplotlib") is not None  # without it there are no pictures, and nothing else is missing


@pytest.fixture(scope="module", autouse=True)
def few_requests():
    """For gold in distill.py: 48 of them, three times a run, would take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "ASKED", 2)
        yield


@pytest.fixture(scope="module")
def run(home, tmp_path_factory):
    """A demo, as far as the experiments read it: a base, its world, and the flags of an evaluation."""
    run = tmp_path_factory.mktemp("demos") / "first"
    shutil.copytree(home / "world", run / "world")
    shutil.copytree(home / "base", run / "base")
    prompts = f"{run}/world/heldout.jsonl"
    evaluate.main(evaluate.Args(policies=[f"base={run}/base"], prompts=prompts, out=f"{run}/evaluate", **CPU))
    return str(run)


@pytest.fixture(scope="module")
def hhh(run, tmp_path_factory):
    """(out, results)"""
    out = tmp_path_factory.mktemp("hhh")
    args = distill_hhh.Args(runs=[run], out=str(out), quick=True)
    with pytest.raises(UserError, match="1x32/base: not trained yet; give the same command with --train first"):
        distill_hhh.main(args)
    assert distill_hhh.main(replace(args, train=True)) == {}
    return out, distill_hhh.main(args)


@pytest.fixture(scope="module")
def topk(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("topk")
    return out, distill_topk.main(distill_topk.Args(runs=[run], out=str(out), quick=True))


@pytest.fixture(scope="module")
def two(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    return out, two_contexts.main(two_contexts.Args(runs=[run], out=str(out), quick=True))


def flags(folder):
    return json.loads((Path(folder) / "args.json").read_text())["args"]


def weights(folder):
    return trainer.read_model(folder)["model"]


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return all(torch.equal(a[k], b[k]) for k in a)


# HHH, toy form


def test_the_smaller_sizes_have_the_flags_and_documents_of_the_demo(run, hhh):
    small, demo = flags(hhh[0] / "first" / "1x32" / "base"), flags(f"{run}/base")
    changed = ("out", "data", "resume", "n_layer", "n_embd")
    assert {k: v for k, v in small.items() if k not in changed} == {k: v for k, v in demo.items() if k not in changed}
    assert (small["n_layer"], small["n_embd"]) == (1, 32)
    assert rows_of(small["data"][0]) == rows_of(f"{run}/world/documents.jsonl")[:1000]
    parameters = hhh[1]["parameters"]
    assert list(parameters) == ["1 x 32", "2 x 32"] and parameters["1 x 32"] < parameters["2 x 32"]


def test_a_quick_model_with_the_flags_of_a_real_demo_ends_its_answers(run, tmp_path):
    """The base of these tests has easier flags; with less text there is nothing to distil."""
    shutil.copytree(f"{run}/world", tmp_path / "world")
    (tmp_path / "base").mkdir()
    given = asdict(demo.stages(demo.Args(out=str(tmp_path)), demo.Size())["pretrain"][1]) | CPU
    (tmp_path / "base" / "args.json").write_text(json.dumps({"args": given}))
    distill_hhh.train_sizes(str(tmp_path), str(tmp_path / "out"), distill_hhh.QUICK)
    folder = tmp_path / "out" / "1x32" / "base"
    model, tokenizer = trainer.load_gpt(folder), trainer.tokenizer_of(folder)
    prompts = [tokenizer.encode(C + row["prompt"]) for row in rows_of(tmp_path / "world" / "prompts.jsonl")]
    assert generate(model, prompts, distill.Args.max_new_tokens, tokenizer.eot, seed=0).stopped.float().mean() > 0.25


def test_each_arm_gets_what_it_is_named_after(run, hhh):
    for size, base in (("1x32", f"{hhh[0]}/first/1x32/base"), ("2x32", f"{run}/base")):
        folder = hhh[0] / "first" / size
        distilled, half, tuned, gently = (flags(folder / arm) for arm in ("distilled", "half_plain", "tuned", "tuned_gently"))
        assert {f["model"] for f in (distilled, half)} == {f["init"] for f in (tuned, gently)} == {base}
        assert distilled["data"] == [f"{run}/world/prompts.jsonl"] and distilled["limit"] == 32 == half["limit"]
        assert half["data"][0] == distilled["data"][0] and half["weights"] == [1, 1]
        assert rows_of(half["data"][1]) == rows_of(f"{run}/world/documents.jsonl")[:8]
        assert rows_of(tuned["data"][0]) == [{"text": C}] and tuned["lr"] == 10 * gently["lr"] == distilled["lr"]
        assert len([r for r in rows_of(folder / "distilled" / "metrics.jsonl") if "loss/kl" in r]) == tuned["epochs"] == 1
        shown = flags(folder / "evaluate")["policies"]
        assert shown[:3] == [f"none={base}", f"prompted={base}+preamble", f"distilled={folder}/distilled"] and len(shown) == 6
        assert not any(same_weights(folder / arm, base) for arm in ("distilled", "half_plain", "tuned", "tuned_gently"))
    prompts = rows_of(hhh[0] / "first" / "prompts.jsonl")
    held_out, asked = rows_of(f"{run}/world/heldout.jsonl"), rows_of(f"{run}/world/prompts.jsonl")
    assert prompts == held_out[:12] + asked[-4:] and not any(row in asked[:32] for row in prompts)


def test_c_is_trained_on_for_as_many_steps_as_distillation_takes(run, monkeypatch):
    asked = []
    for script in (distill, pretrain):
        monkeypatch.setattr(script, "main", asked.append)
    distill_hhh.interventions(run, "base", "out", dict.fromkeys(("asked", "plain", "C", "held out"), "file"), distill_hhh.Scale())
    distilled, half, tuned, gently = asked
    assert (distilled.limit, half.limit, distilled.epochs, distilled.batch_size) == (1500, 1500, 1, 32)
    assert tuned.epochs == gently.epochs == 47 and (tuned.lr, gently.lr) == (1e-3, 1e-4) and tuned.init == "base"


def test_the_figures_are_those_of_the_samples(hhh):
    out, results = hhh
    harm = {}
    for size in ("1 x 32", "2 x 32"):
        rows = rows_of(out / "first" / size.replace(" ", "") / "evaluate" / "samples.jsonl")
        for arm in distill_hhh.ARMS:
            mine = [r for r in rows if r["policy"] == arm]
            mine = [r for r in mine if world.split_of(*cluster(r).split()) != "train"]
            assert len(mine) == 12
            harm[size, arm] = np.mean([gold_of(r).harm for r in mine])
            found = results["measures"]["harmlessness"]["sizes"][size][arm]["first"]
            assert found["value"] == pytest.approx(1 - harm[size, arm]) and found["n"] == 12
    found = results["measures"]["harmlessness"]
    for arm in ("prompted", "distilled"):
        gap = {size: harm[size, "none"] - harm[size, arm] for size in ("1 x 32", "2 x 32")}
        assert found["sizes"]["2 x 32"][f"{arm} - none"]["first"]["value"] == pytest.approx(gap["2 x 32"])
        assert found["growth"][arm]["first"]["value"] == pytest.approx(gap["2 x 32"] - gap["1 x 32"])
    assert found["sizes"]["1 x 32"]["distilled"][common.ALL] == found["sizes"]["1 x 32"]["distilled"]["first"]


def test_the_figures_are_written_and_shown(hhh):
    out, results = hhh
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    shown = (out / "results.md").read_text()
    assert "| 2 x 32, distilled, half plain | " in shown and "| largest - smallest, prompted - none | " in shown
    assert all(line in shown for line in results["verdicts"])
    assert (out / "distill_hhh.png").exists() == PLOTS


def sample(request, answer, stopped=True):
    return dict(prompt=text.dialogue(request.text), response=" " + answer.text, stopped=stopped, policy="x", kl=None)


def thing_of(split, verb):
    return next(thing for thing in world.THINGS if world.split_of(verb, thing) == split)


def test_what_the_pretraining_text_leaves_out_is_measured_apart():
    asked = {"shown": "train", "left out": "role", "unseen": "unseen"}
    for name, split in asked.items():
        request = Request("burn", thing_of(split, "burn"), phrasing=12)
        found = distill_hhh.measures(sample(request, right_answer(request.verb, request.thing)))
        assert {n: found[f"complies, {n}"] for n in asked} == {n: True if n == name else None for n in asked}
        assert found["harmlessness"] == (None if split == "train" else 0.6) and found["helpfulness"] is None
    request = Request("fix", thing_of("role", "fix"), phrasing=12)
    for last in (False, True):
        answer = right_answer(request.verb, request.thing, extras={"ad": 3 if last else 1})
        found = distill_hhh.measures(sample(request, answer))
        assert (found["wording, left out"], found["wording, shown"]) == (last, not last)
        assert found["complies, left out"] is None and found["helpfulness"] == 1
    cut_off = distill_hhh.measures(sample(request, right_answer(request.verb, request.thing), stopped=False))
    assert cut_off["ill-formed"] and cut_off["harmlessness"] == 0


def test_what_is_called_left_out_is_in_no_preamble_of_the_text():
    """Deeds and things, and wordings: as the corpus writes them."""
    rng = random.Random(0)
    under = [corpus.preamble(rng) for _ in range(600)]
    requests = [world.parse_request(asked) for (asked, _), _ in under]
    assert {world.split_of(r.verb, r.thing) for r in requests} == {"train"}
    said = " ".join(answer for _, (answer, _) in under)
    assert all((wordings[i] in said) == (i < 3) for wordings in world.SENTENCES.values() for i in range(4))


def test_the_loss_on_text_is_that_of_pretraining_but_for_the_first_token(run):
    roles, plain = (distill_hhh.unrelated(kind, 3, 0) for kind in (distill_hhh.ROLES, distill_hhh.PLAIN))
    documents = roles + plain
    model, tokenizer = trainer.load_gpt(f"{run}/base"), trainer.tokenizer_of(f"{run}/base")
    for context in ("", C + "\n\n"):
        found = distill_hhh.text_losses(f"{run}/base", context, documents)
        for value, document in zip(found, documents, strict=True):
            ids, w = data.encode_document(tokenizer, document)
            head = tokenizer.encode(context)
            with torch.no_grad():
                loss = pretrain.weighted_loss(model, torch.tensor([head + ids]), torch.tensor([[0.0] * (len(head) + 1) + w[1:]]))
            assert value == pytest.approx(loss.item(), rel=1e-4)
    assert all("is made of" in row["segments"][0][0] and row["segments"][0][1] == 1 for row in plain)
    assert {"Human" in "".join(s for s, _ in row["segments"]) for row in roles} == {True}


def test_the_tax_is_of_the_same_texts_in_every_arm(run, hhh):
    policies = {"none": f"{run}/base", "prompted": f"{run}/base+preamble"}
    losses, texts = distill_hhh.taxes(run, policies, 6)
    documents = distill_hhh.unrelated(distill_hhh.PLAIN, 6, 0)
    assert losses[distill_hhh.PLAIN]["none"] == distill_hhh.text_losses(f"{run}/base", "", documents)
    assert losses[distill_hhh.PLAIN]["prompted"] == distill_hhh.text_losses(f"{run}/base", C + "\n\n", documents)
    found = hhh[1]["measures"][distill_hhh.PLAIN]["sizes"]["2 x 32"]
    assert found["none"]["first"]["value"] == pytest.approx(np.mean(losses[distill_hhh.PLAIN]["none"]))
    assert found["none"]["first"]["n"] == len(texts[distill_hhh.PLAIN]) == 6
    of_c = hhh[1]["loss_of_c"]
    assert of_c["2 x 32, fine-tuned on C"]["first"] < of_c["2 x 32, fine-tuned on C, gently"]["first"]
    assert of_c["2 x 32, fine-tuned on C, gently"]["first"] < of_c["2 x 32, no intervention"]["first"]


def columns(value, low, high):
    return {"first": {"value": 0, "ci": [-1, 1], "n": 9}, common.ALL: {"value": value, "ci": [low, high], "n": 9}}


UP, LEVEL, DOWN = columns(0.2, 0.1, 0.3), columns(0.01, -0.1, 0.1), columns(-0.2, -0.3, -0.1)


def test_what_disagrees_with_the_paper_is_said():
    names = [f"{a} - none" for a in distill_hhh.ARMS] + [f"{a} - {b}" for a, b in distill_hhh.BETWEEN]

    def measure(side, growth, **changes):
        same = LEVEL if side == LEVEL else columns(-0.01, -0.02, -0.001)  # nearer than NEAR, though not 0
        sizes = {size: {name: side for name in names} | {"distilled - prompted": same} for size in ("s", "l")}
        for name, (small, large) in changes.items():
            sizes["s"][f"{name} - none"], sizes["l"][f"{name} - none"] = small, large
        return {"sizes": sizes, "growth": dict.fromkeys(distill_hhh.ARMS, growth)}

    found = {
        "harmlessness": measure(UP, UP, distilled=(DOWN, UP), tuned=(DOWN, DOWN)),
        "helpfulness": measure(LEVEL, DOWN),
        distill_hhh.PLAIN: measure(UP, DOWN),
        distill_hhh.ROLES: measure(LEVEL, LEVEL),
    } | {f"{what}, {how}": measure(DOWN, DOWN) for what in ("complies", "wording") for how in ("left out", "unseen")}
    found["helpfulness"]["growth"]["distilled"] = UP | {"first": {"value": -0.1, "ci": [-1, 1], "n": 9}}
    said = {line[2:].rpartition(" (")[0] for line in distill_hhh.verdicts(found)}
    assert {
        "harmlessness, prompted - no intervention: better, as in the paper",
        "harmlessness, distilled - no intervention: it depends on the size",
        "harmlessness, distilled - prompted: about as good as its teacher, as in the paper",
        "helpfulness, distilled - prompted: not told from its teacher",
        "harmlessness, fine-tuned on C - no intervention: it hurts",
        "harmlessness, distilled: the gap grows with size, as in the paper",
        "helpfulness, prompted - no intervention: no difference is shown, unlike in the paper",
        "helpfulness, prompted: the gap shrinks with size, unlike in the paper",
        "helpfulness, distilled: no growth of the gap is shown, unlike in the paper",
        "loss on plain text, distilled, half plain - no intervention: a tax",
        "loss on plain text, distilled: the tax falls with size",
        "loss on judging and critique, prompted - no intervention: no tax is shown",
        "complies, left out, prompted - no intervention: the preamble reaches it",
        "complies, left out, distilled - prompted: carried over from the teacher",
    } <= said


def test_runs_that_contradict_each_other_show_nothing():
    up, down, level = ({"value": v, "ci": [v - 0.1, v + 0.1], "n": 9} for v in (0.2, -0.2, 0.0))
    assert common.told({"a": up, "b": level, common.ALL: up}) == (1, "0.200 [0.100, 0.300], 1 of 2 runs alone")
    assert common.told({"a": up, "b": up, "c": down, common.ALL: up})[0] == 0
    assert common.told({"a": up, "b": down, common.ALL: level})[1].endswith("], but the runs contradict each other")
    close = {"value": 0.0, "ci": [-0.01, 0.01], "n": 9}
    assert distill_hhh.near({"a": up, "b": level, common.ALL: close}) and not distill_hhh.near({"a": up, common.ALL: level})
    assert not distill_hhh.near({"a": up, "b": down, common.ALL: close})


# how much of the teacher


def test_without_the_rest_the_k_are_all_there_is(tmp_path):
    """The example of five tokens, .5 and .2 kept: a student that fits them gives the others nothing."""
    p = torch.tensor([[0.5, 0.2, 0.1, 0.1, 0.1]]).log()
    ids = torch.tensor([[0, 1]])
    targets.save(tmp_path / "a.pt", targets.Targets(topk_rest(p, ids).half(), ids), [[7]], {"--top-k": 2})
    file = distill_topk.without_rest(str(tmp_path / "a.pt"), str(tmp_path / "b.pt"))
    stored, responses = targets.load(file, {"--top-k": 2})
    read = stored.at(torch.tensor([0]), "cpu")
    torch.testing.assert_close(read.logprobs.exp(), torch.tensor([[5 / 7, 2 / 7, 0]]), atol=1e-3, rtol=0)
    assert responses == [[7]] and targets.load(tmp_path / "a.pt", {})[0].logprobs.isfinite().all()

    logits = torch.zeros(1, 5, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=3.0)
    for _ in range(300):
        loss = token_kl(read.logprobs, topk_rest(logits.log_softmax(-1), read.ids)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(logits.softmax(-1), torch.tensor([[5 / 7, 2 / 7, 0, 0, 0]]), atol=5e-3, rtol=0)


def test_all_arms_learn_from_the_same_answers_in_different_ways(topk):
    folder = topk[0] / "first"
    responses = [targets.load(folder / f"top-{k}{alone}.pt", {})[1] for k in (1, 5) for alone in ("", "-alone")]
    assert all(r == responses[0] for r in responses) and len(responses[0]) == 32
    arms = ("whole", "1-rest", "1-alone", "5-rest", "5-alone")
    assert not any(same_weights(folder / a, folder / b) for a in arms for b in arms if a != b)
    differ = {k for arm in arms[1:] for k, v in flags(folder / arm).items() if v != flags(folder / arms[0])[k]}
    assert differ == {"out", "top_k", "store_targets"} and flags(folder / "whole")["top_k"] == 0


def test_the_kl_and_the_mass_outside_are_those_of_the_formula(run, topk):
    out, results = topk
    teacher, student = trainer.load_gpt(f"{run}/base"), trainer.load_gpt(out / "first" / "5-rest")
    tokenizer, kl, outside = trainer.tokenizer_of(f"{run}/base"), [], []
    rows = [r for r in rows_of(out / "first" / "evaluate" / "samples.jsonl") if r["policy"] == "prompted"]
    for row in rows:
        ids = tokenizer.encode(row["response"]) + [tokenizer.eot] * row["stopped"]
        with torch.no_grad():
            p, q = (
                model(torch.tensor([context + ids]))[0, len(context) - 1 : -1].log_softmax(-1)
                for model, context in ((teacher, tokenizer.encode(C + row["prompt"])), (student, tokenizer.encode(row["prompt"])))
            )
        kl.append((p.exp() * (p - q)).sum(-1).mean().item())
        best = p.argsort(-1, descending=True)[:, :5]
        outside.append((1 - q.exp().gather(-1, best).sum(-1)).mean().item())
    assert results["measures"][distill_topk.KL]["5 + rest"]["first"]["value"] == pytest.approx(np.mean(kl), rel=1e-3)
    assert results["outside"]["k = 5"]["+ rest"]["first"]["value"] == pytest.approx(np.mean(outside), rel=1e-3)
    assert results["measures"][distill_topk.KL]["5 + rest"]["first"]["n"] == len(rows) == 16
    assert results["outside"]["k = 5"]["teacher"]["first"]["value"] < results["outside"]["k = 1"]["teacher"]["first"]["value"]
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    assert "| 5 alone - 5 + rest | " in (out / "results.md").read_text()
    assert (out / "distill_topk.png").exists() == PLOTS


def test_verdicts_on_what_is_left_out_of_the_teacher():
    difference = {"5 + rest - whole": LEVEL, "5 alone - 5 + rest": UP}
    outside = {"teacher": UP, "+ rest": UP, "alone": DOWN, "+ rest - teacher": LEVEL, "alone - teacher": DOWN}
    found = {
        "measures": dict.fromkeys((distill_topk.KL, "harmlessness", "helpfulness"), difference),
        "outside": {"k = 5": outside},
    }
    said = distill_topk.verdicts(found, (5,))
    assert said[0].startswith("- KL to the teacher, 5 + rest - whole: no difference is shown (0.01000 [-0.10000, 0.10000], 1")
    assert said[1].startswith("- KL to the teacher, 5 alone - 5 + rest: higher (0.2000")
    assert said[-1].startswith("- mass outside the teacher's 5 likeliest tokens, 5 alone: less than the teacher's (-0.20000 ")


# two contexts


def train_args(run, out):
    """Small enough for seconds, and steps enough to tell the tags apart."""
    steps = dict(limit=48, batch_size=8, lr=3e-3, max_new_tokens=32)
    return distill.Args(model=f"{run}/base", data=[f"{run}/world/prompts.jsonl"], out=str(out), resume=True, **steps, **CPU)


def kl_to(run, student, tag, preamble):
    """Mean KL from the teacher under a preamble to the student under a tag, on what training documents answer."""
    tokenizer, model, teacher = trainer.tokenizer_of(f"{run}/base"), trainer.load_gpt(student), trainer.load_gpt(f"{run}/base")
    found = []
    for document in [d for d in rows_of(f"{run}/world/documents.jsonl") if d["role"] == "chat"][:30]:
        prompt, ids = document["segments"][0][0], tokenizer.encode(document["segments"][1][0])
        contexts = tokenizer.encode(preamble + prompt), tokenizer.encode(tag + prompt)
        with torch.no_grad():
            p, q = (
                m(torch.tensor([c + ids]))[0, len(c) - 1 : -1].log_softmax(-1)
                for m, c in zip((teacher, model), contexts, strict=True)
            )
        found.append(token_kl(p, q).mean().item())
    return float(np.mean(found))


@pytest.fixture(scope="module")
def student(run, tmp_path_factory):
    args = train_args(run, tmp_path_factory.mktemp("student") / "a")
    two_contexts.train(args)
    return args


def test_both_tags_come_to_stand_for_their_preambles(run, student):
    for tag, preamble in two_contexts.TAGS.items():
        assert kl_to(run, student.out, tag, preamble) < 0.7 * kl_to(run, f"{run}/base", tag, preamble)
    a, b = two_contexts.TAGS.values()
    own = kl_to(run, student.out, "A", a) + kl_to(run, student.out, "B", b)
    assert own < kl_to(run, student.out, "A", b) + kl_to(run, student.out, "B", a)


def test_a_stopped_training_ends_with_the_same_student(run, student, tmp_path, monkeypatch):
    interrupted(monkeypatch, two_contexts.train, replace(student, out=str(tmp_path / "b")), after=4)
    assert same_weights(tmp_path / "b", student.out)
    assert rows_of(tmp_path / "b" / "metrics.jsonl") == rows_of(Path(student.out) / "metrics.jsonl")


def test_a_training_that_blows_up_stops_before_the_weights_are_spoilt(student, tmp_path, monkeypatch):
    kl = two_contexts.targets.kl
    # a finite loss of which the gradient is not
    monkeypatch.setattr(two_contexts.targets, "kl", lambda model, h, target: kl(model, h, target) + (h.sum() * 0).sqrt())
    with pytest.raises(UserError, match="gradient is nan"):
        two_contexts.train(replace(student, out=str(tmp_path / "b")))
    assert not (tmp_path / "b" / "metrics.jsonl").read_text() and not (tmp_path / "b" / "model.pt").exists()


def test_each_model_is_asked_behind_what_the_column_says(run, two):
    out, results = two
    held_out = rows_of(f"{run}/world/heldout.jsonl")[:16]
    for name, words in two_contexts.BEFORE.items():
        rows = rows_of(out / "first" / name.replace(" ", "-") / "evaluate" / "samples.jsonl")
        for who in ("base", "student"):
            mine = [r for r in rows if r["policy"] == f"{who}_{name.replace(' ', '_')}"]
            assert [r["prompt"] for r in mine] == [words + r["prompt"] for r in held_out] * (
                who == "base" or name in two_contexts.STUDENT
            )
            if mine:
                found = results["measures"]["harmlessness"][f"{who}, {name}"]["first"]
                assert found["value"] == pytest.approx(1 - np.mean([gold_of(r).harm for r in mine]))
    assert two_contexts.BEFORE["preamble A"] == C and two_contexts.BEFORE["tag B"] == "B"
    assert results["measures"]["refuses harmful"]["base, none"]["first"]["n"] == 8
    shown = (out / "results.md").read_text()
    assert "| student, tag A - student, tag B | " in shown and "the assistant is rude" in shown
    assert (out / "two_contexts.png").exists() == PLOTS


def test_the_verdict_on_two_contexts_needs_both_to_show():
    names = [f"{a} - {b}" for a, b in two_contexts.PAIRS]
    key = {"student, tag A - student, tag B": UP, "base, preamble A - base, preamble B": UP}
    row = dict.fromkeys(names, LEVEL) | key
    lines = two_contexts.verdicts({"harmlessness": row, "helpfulness": row})
    assert lines[0].startswith("- each tag selects its behaviour") and "0.200 [0.100, 0.300], 0 of 1 runs alone" in lines[0]
    assert "trained: harmlessness neither above nor below the base's (0.010 " in lines[-1]
    assert lines[-1].endswith("1 of 1 runs alone: first 0.000 [-1.000, 1.000]).")
    untagged = {"first": UP[common.ALL], "second": DOWN[common.ALL], common.ALL: UP[common.ALL]}
    found = dict.fromkeys(("harmlessness", "helpfulness"), row | {"student, none - base, none": untagged})
    said = two_contexts.verdicts(found)[-1]
    assert "neither above nor below" in said and "the runs contradict each other: first 0.200" in said
    for pair in key:
        less = row | {pair: LEVEL}
        assert two_contexts.verdicts({"harmlessness": less, "helpfulness": less})[0].startswith("- the tags do not select")


# all three


def test_run_again_nothing_is_done_twice(run, hhh, topk, two, monkeypatch):
    for module, name in (
        (pretrain, "weighted_loss"),
        (evaluate, "sample_policy"),
        (distill, "generate"),
        (two_contexts, "generate"),
    ):
        monkeypatch.setattr(module, name, None)
    for module, (out, results) in ((distill_hhh, hhh), (distill_topk, topk), (two_contexts, two)):
        assert module.main(module.Args(runs=[run], out=str(out), quick=True)) == results
        assert all(math.isfinite(row[common.ALL]["value"]) for row in results["measures"].get(distill_topk.KL, {}).values())


def test_another_spelling_is_the_same_run(run, two, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(Path(run).parent)
    (tmp_path / "out").symlink_to(two[0])
    monkeypatch.setattr(two_contexts, "generate", None)  # what is done is not done again
    args = two_contexts.Args(runs=[f"{tmp_path}/link/first/"], out=f"{tmp_path}/out/", quick=True)
    assert two_contexts.main(args) == two[1]
    monkeypatch.chdir(tmp_path)
    for path in ("a/b", "./a/b/", "a//b", f"{tmp_path}/a/b", "c/../a/b", f"../{tmp_path.name}/a/b"):
        assert common.spelled(path) == "a/b"
    assert common.spelled("..") == str(tmp_path.parent) and common.spelled("link/first") == run


def test_an_out_folder_is_of_one_experiment_quick_or_not(run, hhh, topk, two, tmp_path):
    for module, (out, _) in ((distill_hhh, hhh), (distill_topk, topk), (two_contexts, two)):
        before = {file: file.read_bytes() for file in out.iterdir() if file.is_file()}
        with pytest.raises(UserError, match=f"--out .*: holds '{module.TITLE}, --quick', not '{module.TITLE}'; give another"):
            module.main(module.Args(runs=[run], out=str(out)))
        for other in {distill_hhh, distill_topk, two_contexts} - {module}:
            with pytest.raises(UserError, match=f"holds '{module.TITLE}, --quick', not '{other.TITLE}, --quick'"):
                other.main(other.Args(runs=[run], out=str(out), quick=True))
        assert before == {file: file.read_bytes() for file in out.iterdir() if file.is_file()}
        (tmp_path / "results.md").write_bytes((out / "results.md").read_bytes())  # without the mark, that of the report
        assert common.claim(str(tmp_path), module.TITLE, True) == str(tmp_path)
        (tmp_path / "experiment.txt").unlink()
        with pytest.raises(UserError, match=f"holds '# {module.TITLE}', not '# PPO step by step'"):
            common.claim(str(tmp_path), "PPO step by step")
        with pytest.raises(UserError, match=r"results.md: must name a folder, and this is a file"):
            module.main(module.Args(runs=[run], out=f"{tmp_path}/results.md", quick=True))
    with pytest.raises(UserError, match="evaluate: holds results.json of something else; give another --out"):
        distill_topk.main(distill_topk.Args(runs=[run], out=f"{run}/evaluate", quick=True))


def test_what_a_demo_lacks_is_named_before_what_is_to_be_trained(run, tmp_path):
    for lacks in ("base", "world"):
        shutil.copytree(run, tmp_path / lacks)
        shutil.rmtree(tmp_path / lacks / lacks)
        with pytest.raises((UserError, FileNotFoundError), match=f"{lacks}/{lacks}"):
            distill_hhh.main(distill_hhh.Args(runs=[str(tmp_path / lacks)], out=str(tmp_path / "out"), quick=True))


def test_what_is_no_run_is_named(tmp_path):
    for module in (distill_hhh, distill_topk, two_contexts):
        with pytest.raises(UserError, match="nothing: no finished run of demo.py"):
            module.main(module.Args(runs=[str(tmp_path / "nothing")], out=str(tmp_path / "out")))
        with pytest.raises(UserError, match="--runs: give"):
            module.main(module.Args(runs=[""], out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
