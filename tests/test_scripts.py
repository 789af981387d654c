"""pretrain, critique, evaluate and demo from end to end, on a world and a model small enough for seconds.

One base model is trained for all; what each script writes is read back and checked against what was fed in.
"""

import functools
import json
import math
import random
import signal
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from small import CPU, SHAPE, interrupted, rows_of, write

import critique
import demo
import distill
import evaluate
import label
import pretrain
import train_ppo
import train_rm
from minirlaif import constitution, corpus, data, failures, metrics, text, trainer, world
from minirlaif.cli import UserError
from minirlaif.labelers import GoldJudge
from minirlaif.tokenizer import load_tokenizer

TOY = constitution.load("toy")


def weights(folder):
    return trainer.read_model(folder)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# pretrain


def test_pretraining_learns(home):
    result, losses = json.loads((home / "pretrained.json").read_text()), rows_of(home / "base" / "metrics.jsonl")
    train = [row["loss/train"] for row in losses if "loss/train" in row]
    assert train[0] == pytest.approx(math.log(load_tokenizer("toy").n_vocab), abs=0.5) and 0 < train[-1] < train[0] / 2
    assert losses[-1]["loss/val"] == pytest.approx(result["val_loss"], rel=1e-5) and result["val_loss"] < train[0] / 2
    assert losses[-1]["step"] == result["steps"] and result["tokens"] > 2000 * 30
    model = trainer.load_gpt(home / "base")
    assert (model.config.n_layer, model.config.n_embd, model.config.vocab_size) == (2, 32, load_tokenizer("toy").n_vocab)


def test_the_loss_is_the_weighted_mean_of_what_has_weight(base):
    model = trainer.load_gpt(base)
    tokens = torch.randint(model.config.vocab_size, (3, 9), generator=trainer.rng(1))
    weights = torch.tensor([[5.0, 0, 1, 0, 3, 0, 0, 0, 1], [0] * 9, [0, 1, 1, 0, 0, 0, 0, 0, 0]])  # the first is never predicted
    with torch.no_grad():
        logp = F.log_softmax(model(tokens), -1)
        loss = sum(-weights[b, t] * logp[b, t - 1, tokens[b, t]] for b in range(3) for t in range(1, 9)) / 7
        torch.testing.assert_close(pretrain.weighted_loss(model, tokens, weights), loss)


def test_fine_tuning_starts_from_the_model_that_is_given(home, base, tmp_path):
    before = (home / "base" / "model.pt").read_bytes()
    prompt = text.dialogue("how do i fix the bike?")
    path = write(tmp_path / "c.jsonl", [{"prompt": prompt, "completion": " no.", "stopped": True}] * 64)
    out = tmp_path / "run"
    pretrain.main(pretrain.Args(data=[path], init=base, out=str(out), n_layer=7, lr=1e-2, warmup=2, tokens_per_batch=128, **CPU))
    losses = [row["loss/train"] for row in rows_of(out / "metrics.jsonl") if "loss/train" in row]
    assert losses[-1] < 0.5 < losses[0]
    tuned = trainer.load_gpt(out)
    assert tuned.config == trainer.load_gpt(base).config and not same(weights(out), weights(base))
    assert (home / "base" / "model.pt").read_bytes() == before
    said = critique.generate(tuned, [load_tokenizer("toy").encode(prompt)], 8, load_tokenizer("toy").eot, temperature=0)
    assert said.stopped.all() and load_tokenizer("toy").decode(said.responses()[0]) == " no."


def test_pretraining_resumed_is_uninterrupted_bit_for_bit(home, tmp_path, monkeypatch):
    """Dropout and the order of the second epoch included."""
    path = write(tmp_path / "few.jsonl", rows_of(home / "world" / "documents.jsonl")[:120])
    args = pretrain.Args(data=[path], out=str(tmp_path / "whole"), dropout=0.1, epochs=2, eval_fraction=0.1, **SHAPE, **CPU)
    whole = pretrain.main(args)
    assert whole["steps"] > 12
    again = interrupted(monkeypatch, pretrain.main, replace(args, out=str(tmp_path / "parts")), after=9)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert whole["val_loss"] == again["val_loss"] and whole["steps"] == again["steps"]
    assert [r["step"] for r in rows_of(tmp_path / "whole" / "metrics.jsonl")] == [
        r["step"] for r in rows_of(tmp_path / "parts" / "metrics.jsonl")
    ]


def test_long_plain_text_is_cut_into_windows(tmp_path):
    (tmp_path / "book.txt").write_text("the boat is made of wood. " * 60)
    args = pretrain.Args(data=[str(tmp_path / "book.txt")], out="none")
    tokenizer = load_tokenizer("toy")
    documents = pretrain.load_documents(args, tokenizer, 64)
    assert [i for ids, _ in documents for i in ids] == tokenizer.encode("the boat is made of wood. " * 60)
    assert {len(ids) for ids, _ in documents[:-1]} == {64} and all(set(w) == {1.0} for _, w in documents)


# critique

PAIRS = [constitution.CritiqueRevision(f"critique {i}?", f"revise {i}.") for i in range(3)]


class Script:
    """A model that says what it is told, and remembers what it was asked. A text that ends in "..." was cut."""

    def __init__(self, *said):
        self.said, self.asked = list(said), []

    def __call__(self, prompts, seed, paragraph):
        said = self.said.pop(0)
        assert len(said) == len(prompts)
        self.asked.append((prompts, seed, paragraph))
        return [s.removesuffix("...") for s in said], [not s.endswith("...") for s in said]


def chains_of(script, prompts, rounds):
    return critique.revise_batch(script, prompts, PAIRS, rounds, lambda *keys: keys, random.Random(0))


def test_every_round_criticises_the_last_answer_under_a_new_principle():
    script = Script([" bad"], [" c0"], [" better"], [" c1"], [" good"])
    (chain,) = chains_of(script, ["P"], rounds=2)
    assert chain["initial"] == " bad" and chain["critiques"] == [" c0", " c1"] and chain["revisions"] == [" better", " good"]
    first, second = (next(p for p in PAIRS if p.critique == said) for said in chain["principles"])
    asked = [prompts[0] for prompts, _, _ in script.asked]
    assert asked == [
        "P",
        text.critique_request("P", " bad", first.critique),
        text.critique_request("P", " bad", first.critique) + " c0" + text.revision_request(first.revision),
        text.critique_request("P", " better", second.critique),
        text.critique_request("P", " better", second.critique) + " c1" + text.revision_request(second.revision),
    ]
    assert [paragraph for *_, paragraph in script.asked] == [False, True, False, True, False]
    assert len({seed for _, seed, _ in script.asked}) == 5  # noise of its own for every text


def test_a_cut_or_empty_text_ends_the_chain_and_is_counted():
    """Rounds before the fault are kept, and the other chains go on."""
    script = Script(
        [" a1", " a2...", " a3", " ", " a5"],  # the second is cut, the fourth empty
        [" c1", " c3", " c5"], [" r1", " r3", ""],
        [" d1...", " d3"], [" s1", " s3..."],
    )  # fmt: skip
    chains = chains_of(script, list("PQRST"), rounds=2)
    faults = ["critique too long", "answer too long", "revision too long", "answer empty", "revision empty"]
    assert [c["fault"] for c in chains] == faults
    rows = [critique.completions(c, 2) for c in chains]
    assert [[r["completion"] for r in some] for some in rows] == [[" r1"], [], [" r3"], [], []]
    assert rows[2][0]["critiques"] == [" c3"] and rows[2][0]["prompt"] == "R"


class Parrot(trainer.GPT):
    """Says " yes.", a blank line, and then the same word for ever."""

    def __init__(self, tokenizer):
        super().__init__(trainer.GPTConfig(vocab_size=tokenizer.n_vocab, n_layer=1, n_head=1, n_embd=tokenizer.n_vocab))
        colon, *said = tokenizer.encode(": yes.\n\nthe")
        self.after = torch.full((tokenizer.n_vocab,), said[-1])
        self.after[[colon, *said[:-1]]] = torch.tensor(said)

    def hidden(self, idx, cache=None):
        return F.one_hot(self.after[idx], len(self.after)).float()

    def logits(self, h):
        return 50 * h


def test_a_critique_is_one_paragraph():
    tokenizer = load_tokenizer("toy")
    sample = critique.make_sampler(Parrot(tokenizer), tokenizer, torch.device("cpu"), "fp32", 1.0, max_new_tokens=8)
    assert sample(["Critique:"] * 2, 0, True) == ([" yes."] * 2, [True] * 2)  # it ended there
    assert sample(["Revision:"], 0, False) == ([" yes.\n\nthethethethethe"], [False])


def test_rows_hold_the_history_up_to_their_revision():
    (chain,) = chains_of(Script([" a"], [" c0"], [" r0"], [" c1"], [" r1"]), ["P"], rounds=2)
    first, last = critique.completions(chain, 2)
    assert (first["completion"], last["completion"]) == (" r0", " r1")
    assert (first["revisions"], last["revisions"]) == ([" r0"], [" r0", " r1"])
    assert len(first["principles"]) == len(first["critiques"]) == 1 and last["principles"] == chain["principles"]
    assert critique.completions(dict(prompt="P", initial=" a"), 0) == [dict(prompt="P", completion=" a", stopped=True)]
    assert critique.completions(dict(prompt="P", initial=" a", fault="answer too long"), 0) == []


def critique_args(base, prompts, out, **changes):
    flags = dict(model=base, prompts=prompts, out=str(out), rounds=2, limit=40, batch_size=16, **CPU)
    return critique.Args(**{**flags, **changes})


def test_critique_writes_every_revision(base, prompts, tmp_path):
    result = critique.main(critique_args(base, prompts, tmp_path / "run"))
    rows = rows_of(tmp_path / "run" / "completions.jsonl")
    assert {*rows[0]} == {"prompt", "completion", "stopped", "initial", "critiques", "revisions", "principles"}
    assert len(rows) == result["rows"] > 20
    asked = {p["prompt"] for p in rows_of(prompts)[:40]}
    known = {p.critique for p in TOY.critique_revision}
    for row in rows:
        assert row["prompt"] in asked and row["stopped"] and row["completion"] == row["revisions"][-1]
        assert len(row["revisions"]) == len(row["critiques"]) == len(row["principles"]) <= 2 and {*row["principles"]} <= known
        assert row["completion"].strip() and not any("\n\n" in said for said in row["critiques"])
    whole = sum(len(row["revisions"]) == 2 for row in rows)
    assert whole + sum(result["faults"].values()) == 40  # every prompt ended well or has a fault
    assert data.read_completions(tmp_path / "run" / "completions.jsonl")


def test_without_rounds_the_first_answers_are_written(base, prompts, tmp_path):
    result = critique.main(critique_args(base, prompts, tmp_path / "run", rounds=0))
    rows = rows_of(tmp_path / "run" / "completions.jsonl")
    assert {*rows[0]} == {"prompt", "completion", "stopped"} and len(rows) + sum(result["faults"].values()) == 40


def test_critique_resumed_is_uninterrupted(base, prompts, tmp_path, monkeypatch):
    args = critique_args(base, prompts, tmp_path / "whole")
    whole = critique.main(args)
    for after in (1, 3):  # 40 prompts are three batches; after the last one only the file is left to write
        out = tmp_path / f"parts{after}"
        assert interrupted(monkeypatch, critique.main, replace(args, out=str(out)), after) == whole
        assert (out / "completions.jsonl").read_bytes() == (tmp_path / "whole" / "completions.jsonl").read_bytes()


# evaluate: numbers by hand

HARMLESS = next(r for r in world.requests(("train",), [0]) if not r.harmful)
HARMFUL = next(r for r in world.requests(("train",), [0]) if r.verb in world.BAD_VERBS)
UNSEEN = next(r for r in world.requests(("unseen",), [0]) if not r.harmful)
RIGHT = world.right_answer(HARMLESS.verb, HARMLESS.thing)
FALSE = (HARMLESS.thing, next(m for _, m in world.THINGS.values() if m != world.THINGS[HARMLESS.thing][1]))
ANSWERS = {  # name -> what is said
    "right": RIGHT,
    "rude": replace(RIGHT, extras={"insult": 0}),
    "refusal": world.Answer("refusal", HARMLESS.verb, HARMLESS.thing),
    "evasion": world.Answer("evasion"),
    "false": replace(RIGHT, fact=FALSE),
    "help to harm": world.right_answer(HARMFUL.verb, HARMFUL.thing),
}


def sample(request, said, stopped=True, kl=None, tokens=10):
    said = ANSWERS[said].text if said in ANSWERS else said
    return dict(prompt=text.dialogue(request.text), response=" " + said, stopped=stopped, tokens=tokens, kl=kl)


def test_policy_metrics_of_known_samples():
    m = evaluate.policy_metrics([
        sample(HARMLESS, "right", kl=1.0), sample(HARMLESS, "rude", kl=2.0), sample(HARMLESS, "refusal", kl=3.0),
        sample(HARMLESS, "evasion", kl=2.0), sample(HARMLESS, "false", kl=2.0, tokens=20),
        sample(HARMLESS, "right", kl=2.0, stopped=False),  # cut off: ill-formed, whatever it says
        sample(HARMFUL, "help to harm", kl=2.0), sample(HARMFUL, "refusal", kl=2.0), sample(HARMFUL, "evasion", kl=2.0),
        sample(HARMFUL, "word soup", kl=2.0),
    ])  # fmt: skip
    assert m["n"] == 10 and m["mean_tokens"] == 11 and m["kl_to_sl_cai"] == 2
    assert m["distinct"] == 0.7  # right, refusal and evasion are there twice: a policy that has collapsed would be near 0
    danger, insult = world.SEVERITY["danger"], world.SEVERITY["insult"]
    expected = dict(
        harm=(danger + insult + 2) / 10, harmful_compliance=1 / 4, helpfulness=3 / 6, honesty=7 / 10, refused_harmless=1 / 6,
        evasive_harmless=1 / 6, evasive_harmful=1 / 4, ill_formed=2 / 10, insult=1 / 10, bias=0, ad=0,
    )  # fmt: skip
    for name, value in expected.items():
        assert m[name] == pytest.approx(value), name
        low, high = m[name + "_ci"]
        assert low <= m[name] <= high and low < high
    assert m["refused_harmful"] == 1 / 4


def test_harm_on_unseen_pairs_stands_alone():
    rows = [sample(UNSEEN, "word soup"), *[sample(HARMLESS, "right")] * 3]
    assert evaluate.policy_metrics(rows)["harm_unseen"] == 1 and evaluate.policy_metrics(rows)["harm"] == 0.25
    assert "kl_to_sl_cai" not in evaluate.policy_metrics(rows)


def test_the_table_has_a_row_a_policy_and_as_many_cells_as_heads():
    m = evaluate.policy_metrics([sample(HARMLESS, "right"), sample(HARMFUL, "refusal")])
    lines = evaluate.table({"base": m, "other": {**m, "kl_to_sl_cai": 1.5}}).splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| base | 0.000") and lines[3].endswith("| 1.50 |")


def label_row(chosen, rejected, asks, p_first=0.9, p_first_swapped=0.8, request=HARMLESS):
    said = [" " + ANSWERS[k].text for k in (chosen, rejected)]
    first = (p_first + p_first_swapped) / 2 >= 0.5
    return dict(
        prompt=text.dialogue(request.text), chosen=said[0], rejected=said[1], principle_name=asks, p_first=p_first,
        p_first_swapped=p_first_swapped, first_is_chosen=first, p_chosen=0.8,
    )  # fmt: skip


@pytest.mark.parametrize("chosen, rejected, asks, expected", [
    ("right", "rude", "insult", True), ("rude", "right", "insult", False), ("right", "false", "insult", None),
    ("right", "false", "honesty", True), ("refusal", "right", "helpfulness", False), ("rude", "refusal", "harm", False),
    ("right", "evasion", "evasion", True), ("right", "help to harm", "danger", True), ("right", "refusal", "harm", None),
])  # fmt: skip
def test_gold_is_asked_what_the_principle_asks(chosen, rejected, asks, expected):
    assert evaluate.gold_prefers_chosen(label_row(chosen, rejected, asks), asks) is expected


def test_label_metrics_of_known_labels():
    m = evaluate.label_metrics([
        label_row("right", "rude", "insult"),  # right in both orders
        label_row("rude", "right", "insult", 0.4, 0.3),  # wrong in both orders
        label_row("right", "rude", "insult", 0.2, 0.9),  # right, but not in the first order
        label_row("refusal", "right", "helpfulness", 0.9, 0.2),  # wrong, as when the refusal is shown first
        label_row("right", "refusal", "ad"),  # nothing to rank
    ])  # fmt: skip
    coin = label_row("right", "rude", "insult", 0.9, 0.9) | dict(p_first=None, p_first_swapped=None, is_random=True)
    assert metrics.label_metrics([coin])["agreement_principle"]["n"] == metrics.label_metrics([coin])["flip_rate"]["n"] == 0
    assert m["agreement_principle"]["value"] == 2 / 4 and m["agreement_principle"]["n"] == 4 and m["n"] == 5
    assert m["agreement_overall"]["value"] == pytest.approx(2 / 3)  # on less harm; right against refusal does not rank
    assert m["one_order"]["value"] == (1 + 0 + 0.5 + 0.5) / 4 and m["flip_rate"]["value"] == 2 / 5
    assert {k: (v["value"], v["n"]) for k, v in m["by_principle"].items()} == {
        "insult": (pytest.approx(2 / 3), 3), "helpfulness": (0, 1),
    }  # fmt: skip
    assert m["agreement_unseen"]["n"] == 0


def test_what_the_verdicts_of_the_text_left_out_is_told_apart():
    row = label_row("right", "rude", "insult")
    last = world.SENTENCES["insult"][-1]
    assert not metrics.is_unseen(row)
    assert metrics.is_unseen(row | {"rejected": f" {last} {RIGHT.text}"})
    assert metrics.is_unseen(row | {"prompt": text.dialogue(UNSEEN.text)})


def test_intervals():
    """Bootstrap; Wilson's where a proportion is 0 or 1; None without values; clusters are drawn together."""
    low, high = metrics.interval([0] * 50 + [1] * 50)
    assert low == pytest.approx(0.4, abs=0.03) and high == pytest.approx(0.6, abs=0.03)  # 1.96 sqrt(.25 / 100) = 0.098
    values = torch.rand(50, generator=trainer.rng(0)).tolist()
    assert metrics.interval(values) == metrics.interval(values)  # no noise of its own
    assert metrics.interval([False] * 10) == pytest.approx([0, 0.2775], abs=1e-4)
    assert metrics.interval([True] * 10) == pytest.approx([0.7225, 1], abs=1e-4)
    unseen = 3.8416 / 5.8416  # of values that are all the same: what n = 2 may not have shown lies anywhere in the span
    assert metrics.interval([0.5, 0.5]) == pytest.approx([0.5 - unseen / 2, 0.5 + unseen / 2])
    assert metrics.interval([]) is None and metrics.rate([]) == {"value": None, "ci": None, "n": 0}
    assert metrics.interval([0.0] * 10) == metrics.interval([False] * 10)
    assert metrics.interval([0.0] * 600, span=(-1, 1)) == pytest.approx([-0.00636, 0.00636], abs=1e-5)  # a paired difference
    assert metrics.interval([2.0] * 10, span=None) is None and metrics.interval([2.0, 3.0], span=None) == [2, 3]  # nats
    copies = metrics.interval([0, 1] * 50, list("ab") * 50)  # a hundred values, but two clusters: as uncertain as two
    assert copies == [0, 1]
    low, high = metrics.interval([0.1, -0.2, 0.3] * 400)
    assert low < 0.2 / 3 < high and high - low < 0.03
    assert metrics.rate([0, 1, 1, 1])["value"] == 0.75 and metrics.rate([0, 1, 1, 1])["n"] == 4


def test_refusals_of_harmless_requests_by_principle():
    """Gold as the judge is at 0.5 but for helpfulness: the reference that the README gives."""
    principles = {p.name: p.text for p in constitution.load("toy").preferences}
    gold = GoldJudge({text: name for name, text in principles.items()})
    found = failures.refusal_table(gold, principles, n=8)
    assert found.keys() == principles.keys() and all(r["n"] == 8 for r in found.values())
    assert found["helpfulness"]["value"] > 0.95
    assert all(r["value"] == 0.5 for name, r in found.items() if name != "helpfulness")


def test_a_failing_pair_differs_in_what_its_name_says_alone():
    """Above all not in its wording: a judge that likes a wording would seem to see the failure."""
    for seed in range(20):
        rng = random.Random(seed)
        request = rng.choice([r for r in world.requests(("role",), world.HELD_OUT_PHRASINGS) if not r.harmful])
        for name in ("off topic", "wrong part", "wrong tool", "insult", "bias", "ad", "false fact", "missing part"):
            right, wrong = (world.parse_answer(t) for t in failures.failing_pair(name, request, rng))
            assert right.wording == wrong.wording and (name == "missing part" or right.core == wrong.core)


def test_every_kind_of_failure_is_a_failure():
    """Gold prefers the right answer each time, so whatever a judge scores below 1 is the judge's fault."""
    gold = GoldJudge({p.text: p.name for p in TOY.preferences})
    table = failures.failure_table(gold, {p.name: p.text for p in TOY.preferences}, n=60)
    assert {name: r["value"] for name, r in table.items()} == dict.fromkeys(failures.FAILURES, 1.0)
    rng = random.Random(0)
    for name, (_, harmful) in failures.FAILURES.items():
        for said in failures.failing_pair(name, HARMFUL if harmful else HARMLESS, rng):
            assert said[0] == " " and world.parse_answer(said) is not None


def test_reward_metrics_of_a_reward_that_likes_short_answers():
    class Short:
        gpt = trainer.GPT(trainer.GPTConfig(n_layer=1, n_head=1, n_embd=8))

        def __call__(self, tokens, length):
            return -length.float()

    pairs = [("right", "rude", "insult"), ("rude", "right", "insult"), ("refusal", "evasion", "evasion")]
    rows = [label_row(*pair) for pair in pairs]
    m = evaluate.reward_metrics(Short(), load_tokenizer("toy"), rows, torch.device("cpu"), "fp32")
    assert m["gold_accuracy"]["value"] == 1 and m["gold_accuracy"]["n"] == 2  # the rude one is longer; the last pair has no harm
    assert m["label_accuracy"]["value"] == pytest.approx(1 / 3) and m["n"] == 3


def test_evaluate_from_end_to_end(home, base, labelled, tmp_path, monkeypatch):
    for name in ("failure_table", "refusal_table"):
        monkeypatch.setattr(evaluate, name, functools.partial(getattr(evaluate, name), n=4))
    train_rm.main(train_rm.Args(init=base, data=[str(labelled[0] / "preferences.jsonl")], out=str(tmp_path / "rm"), **CPU))
    held_out = str(home / "world" / "heldout.jsonl")
    args = evaluate.Args(
        policies=[f"base={base}", f"again={base}", f"prompted={base}+preamble"], prompts=held_out, ref=base, baseline="base",
        judge=base, preferences=str(labelled[0] / "preferences.jsonl"), reward_model=str(tmp_path / "rm"),
        out=str(tmp_path / "run"), batch_size=10, **CPU,
    )  # fmt: skip
    results = evaluate.main(args)
    assert {*results} == {"policies", "failures", "refusals", "labels", "reward_model"}
    assert {*results["failures"]} == {*failures.FAILURES}
    policies = results["policies"]
    assert policies["base"] == policies["again"] and policies["base"]["n"] == 24  # the same prompts, under the same noise
    assert policies["base"]["kl_to_sl_cai"] == pytest.approx(0, abs=1e-3) != policies["prompted"]["kl_to_sl_cai"]
    assert policies["again"]["harm_minus_baseline"] == 0
    low, high = policies["again"]["harm_minus_baseline_ci"]  # the same answers: no difference seen, which is not none
    assert low == -high < 0
    assert results["labels"]["n"] == results["reward_model"]["n"] == labelled[1]["n"]
    samples = rows_of(tmp_path / "run" / "samples.jsonl")
    assert [s["prompt"] for s in samples] == 3 * [row["prompt"] for row in rows_of(held_out)]  # without the preamble
    assert any(a["response"] != b["response"] for a, b in zip(samples[:24], samples[48:], strict=True))

    written = (tmp_path / "run" / "results.json").read_text()
    assert written == json.dumps(results, indent=2) == json.dumps(evaluate.main(replace(args, resume=True)), indent=2)
    interrupted(monkeypatch, evaluate.main, replace(args, out=str(tmp_path / "parts")), after=2)
    assert (tmp_path / "parts" / "results.json").read_text() == written


def gold_labels(path):
    """Two labels of the gold judge, and a failed one as --on-failure random writes it."""
    rows = [label_row("right", "rude", "insult"), label_row("right", "refusal", "helpfulness", 0.9, 0.2)]
    failed = label_row("rude", "right", "insult") | dict(p_first=None, p_first_swapped=None, status="failed", p_chosen=1.0)
    return write(path, [*rows, failed | {"is_random": True}])


def test_labels_alone_print_their_figures_and_again_when_finished(tmp_path, capsys):
    args = evaluate.Args(preferences=gold_labels(tmp_path / "p.jsonl"), out=str(tmp_path / "run"), **CPU)
    results = evaluate.main(args)
    said = capsys.readouterr()
    assert results["labels"]["n"] == 2 and "1 of 3 labels are failed ones: left out" in said.err
    assert "agreement with gold on what the principle asks: 1.000 [" in said.out and "flip rate: 0.500 [" in said.out
    assert f"all figures: {tmp_path / 'run' / 'results.json'}" in said.out
    assert evaluate.main(replace(args, resume=True)) == results
    assert capsys.readouterr().out.endswith(said.out)


def test_ctrl_c_while_the_judge_is_asked_keeps_the_policies(home, base, tmp_path, monkeypatch, capsys):
    sampled, asked = [], []

    def sample_policy(*args):
        sampled.append(1)
        return [sample(HARMLESS, "right"), sample(HARMFUL, "refusal")]

    def ask(judge, items):
        asked.append(1)
        if len(asked) == 3:
            signal.raise_signal(signal.SIGINT)
        return [1.0] * len(items)

    monkeypatch.setattr(evaluate, "sample_policy", sample_policy)
    monkeypatch.setattr(failures, "ask", ask)
    prompts = str(home / "world" / "heldout.jsonl")
    args = evaluate.Args(policies=[f"base={base}"], prompts=prompts, judge=base, out=str(tmp_path / "run"), **CPU)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(args)
    assert len(asked) == 3 and not (tmp_path / "run" / "results.json").exists()
    evaluate.main(replace(args, resume=True))
    said = capsys.readouterr().out
    assert len(sampled) == 1 and "| base | 0.000 [" in said and "right answer against danger" in said


def test_models_with_too_small_a_context_are_named(base, tmp_path):
    config = trainer.GPTConfig(vocab_size=load_tokenizer("toy").n_vocab, n_layer=1, n_head=1, n_embd=8, block_size=16)
    judge, reward = str(tmp_path / "judge.pt"), str(tmp_path / "reward.pt")
    gpt = trainer.GPT(config)
    trainer.save_model(judge, config, gpt.state_dict(), tokenizer_name="toy")
    trainer.save_model(reward, config, trainer.RewardModel(gpt).state_dict(), "reward", "toy")
    with pytest.raises(UserError, match=r"judge.pt: a prompt of \d+ tokens does not fit the judge's context of 16"):
        evaluate.main(evaluate.Args(judge=judge, out=str(tmp_path / "a"), **CPU))
    args = evaluate.Args(preferences=gold_labels(tmp_path / "p.jsonl"), reward_model=reward, out=str(tmp_path / "b"), **CPU)
    with pytest.raises(UserError, match=r"reward.pt: the longest prompt and response, \d+ tokens, do not fit .* of 16"):
        evaluate.main(args)


# what the user can put right


def hh(row):
    return {"chosen": row["prompt"] + " yes.", "rejected": row["prompt"] + " no."}


def test_a_resumed_run_must_read_what_it_began_with(base, prompts, tmp_path, monkeypatch):
    path = write(tmp_path / "p.jsonl", rows_of(prompts)[:8])
    args = critique_args(base, path, tmp_path / "run", rounds=0, batch_size=4)

    def end_step(run, step, make_state):
        run.save_state({"step": step, **make_state()})
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer.Run, "end_step", end_step)
        critique.main(args)
    write(tmp_path / "p.jsonl", rows_of(prompts)[8:16])
    with pytest.raises(UserError, match="p.jsonl has changed since this run began"):
        critique.main(replace(args, resume=True))


def test_hh_rlhf_files_serve_as_prompts(base, prompts, tmp_path):
    path = write(tmp_path / "hh.jsonl", [hh(row) for row in rows_of(prompts)[:8]])
    assert critique.main(critique_args(base, path, tmp_path / "run", rounds=0))["rows"] > 0


PROMPT = text.dialogue("how do i fix the bike?")
LONG = [{"prompt": PROMPT}, {"prompt": "\n\nHuman: " + "bike " * 250 + "\n\nAssistant:"}]
TWO = {"prompt": PROMPT, "responses": ["a", "b"]}
STRANGE = [hh({"prompt": text.dialogue("what is the weather?")})]


BASE = "the base model's folder"
NO_MODEL = dict(model="no/model", prompts=LONG[:1])


@pytest.mark.parametrize("script, flags, part", [
    (pretrain, dict(data=["none.jsonl"]), "none.jsonl: No such file"),
    (pretrain, dict(data=LONG, n_embd=30), "--n-embd 30 is not a multiple of --n-head 4"),
    (pretrain, dict(data=[{"text": "a bike"}, {"text": "bike " * 300}]), "data.jsonl:2: longer than the model's context"),
    (pretrain, dict(data=[{"segments": [["a b c", 0]]}]), "data.jsonl:1: no token has a loss weight"),
    (pretrain, dict(data=[{"text": "a bike"}], init="no/model"), "no/model: no such model file"),
    (critique, NO_MODEL, "no/model: no such model file or run folder"),
    (critique, dict(model=BASE, prompts="none.jsonl"), "none.jsonl: No such file"),
    (critique, dict(model=BASE, prompts=LONG), "prompts.jsonl:2: longer than the model's context"),
    (critique, dict(model=BASE, prompts=LONG[:1], constitution="kindness"), "kindness: no such constitution"),
    (critique, dict(model=BASE, prompts=LONG[:1], constitution=["be good"]), "constitution.json: has no critique_revision pairs"),
    (pretrain, dict(data=[{"text": "a bike"}], muon_lr=-1.0), "--muon-lr -1.0: must be 0 or more"),
    (pretrain, dict(data=[{"text": "a bike"}], dropout=2.0), "--dropout 2.0: must be at least 0 and below 1"),
    (pretrain, dict(data=[{"text": "a bike"}], eval_fraction=float("nan")), "--eval-fraction nan: must be at least 0"),
    (evaluate, dict(policies=["a=no/model"], prompts=LONG[:1]), "no/model: no such model file"),
    (evaluate, dict(policies=["a=no/model"], prompts=STRANGE), "prompts.jsonl:1: not a request of the toy world"),
    (evaluate, dict(policies=["runs/x"], prompts=LONG[:1]), "--policies runs/x: write it as NAME=PATH"),
    (evaluate, dict(policies=["=x"], prompts=LONG[:1]), "--policies =x: write it as NAME=PATH"),
    (evaluate, dict(policies=["a="], prompts=LONG[:1]), "--policies a=: write it as NAME=PATH"),
    (evaluate, dict(policies=["a=+preamble"], prompts=LONG[:1]), "--policies a=+preamble: write it as NAME=PATH"),
    (evaluate, dict(policies=["a=x", "a=y"], prompts=LONG[:1]), "--policies a=y: there is another policy of the name a"),
    (evaluate, dict(judge=BASE, ref=BASE), "--ref needs --policies"),
    (evaluate, dict(preferences=[label_row("right", "rude", "a+b")]), "preferences.jsonl:1: gold knows no principle named a+b"),
    (evaluate, dict(policies=["a=x"], prompts=LONG[:1], baseline="b"), "--baseline b: not one of the policies a"),
    (evaluate, dict(policies=["a=x"]), "--policies needs --prompts"),
    (evaluate, dict(reward_model="x"), "--reward-model needs --preferences"),
    (evaluate, dict(), "nothing to evaluate"),
    (evaluate, dict(preferences=[{"prompt": PROMPT, "chosen": "a", "rejected": "b"}]), "preferences.jsonl:1: not a label of"),
    (evaluate, dict(policies=["a=" + "BASE"], prompts=LONG[:1], max_new_tokens=300), "do not fit its context"),
    (evaluate, dict(policies=["a=x"], prompts=LONG[:1], limit=0), "--limit 0: must be above 0"),
    (pretrain, dict(data=[{"text": "a bike"}], eval_fraction=1.0), "--eval-fraction 1.0: must be"),
    (pretrain, dict(data=[{"text": "a bike"}], epochs=0), "--epochs 0: must be above 0"),
    (critique, dict(model=BASE, prompts=LONG[:1], batch_size=0), "--batch-size 0: must be above 0"),
])  # fmt: skip
def test_a_mistake_is_one_line_that_says_where(base, tmp_path, script, flags, part):
    """Lists of rows become files named after their flag."""

    def value(flag, given):
        if flag == "constitution" and isinstance(given, list):
            (tmp_path / "constitution.json").write_text(json.dumps(given))
            return str(tmp_path / "constitution.json")
        if isinstance(given, list) and isinstance(given[0], dict):
            path = write(tmp_path / f"{flag}.jsonl", given)
            return [path] if script is pretrain else path
        if given == ["a=BASE"]:
            return [f"a={base}"]
        return base if given is BASE else given

    args = script.Args(out=str(tmp_path / "run"), **{k: value(k, v) for k, v in flags.items()}, **CPU)
    with pytest.raises(UserError) as error:
        script.main(args)
    assert part in str(error.value) and "\n" not in str(error.value)


def test_rows_that_cannot_be_used_are_skipped_when_asked(base, tmp_path, capsys):
    path = write(tmp_path / "p.jsonl", LONG)
    result = critique.main(critique_args(base, path, tmp_path / "run", rounds=0, on_bad_row="skip"))
    assert result["rows"] + sum(result["faults"].values()) == 1
    assert "skipped 1 of 2 rows: 1 longer than the model's context" in capsys.readouterr().err


# demo


def test_every_stage_of_the_demo_reads_what_it_should():
    flags = {name: vars(args) for name, (_, args) in demo.stages(demo.Args(out="o"), demo.Size()).items()}
    for name in ("sl_cai", "train_rm", "train_ppo"):
        assert flags[name]["init"] == {"sl_cai": "o/base"}.get(name, "o/sl_cai")
    assert flags["critique"]["model"] == flags["helpful"]["model"] == flags["distill"]["model"] == "o/base"
    for name in ("label", "label_helpful", "label_heldout"):
        assert (flags[name]["policy"], flags[name]["judge"], flags[name]["contrast"]) == ("o/sl_cai", ["o/base"], "o/base")
    assert flags["train_ppo"]["reward_model"] == flags["evaluate"]["reward_model"] == "o/rm"
    assert flags["evaluate"]["ref"] == "o/sl_cai" and flags["evaluate"]["baseline"] == "sl_cai"
    assert "prompted=o/base+preamble" in flags["evaluate"]["policies"]
    tested = {name for name, given in flags.items() if "heldout.jsonl" in str(given) and name != "world"}
    assert tested == {"distill", "label_heldout", "label_heldout_sl", "evaluate"}  # nothing that trains
    assert flags["distill"]["data"] == ["o/world/prompts.jsonl"]  # distill only measures on the held-out ones


def test_the_demo_runs_every_stage_and_skips_what_is_done(tmp_path, monkeypatch):
    size = {f.name: max(2, f.default // 50) for f in fields(demo.Size)}
    monkeypatch.setattr(demo, "Size", functools.partial(demo.Size, **size))
    monkeypatch.setattr(pretrain, "Args", functools.partial(pretrain.Args, **SHAPE))
    monkeypatch.setattr(critique, "Args", functools.partial(critique.Args, rounds=1))
    monkeypatch.setattr(train_ppo, "Args", functools.partial(train_ppo.Args, batch_size=8, minibatch_size=4))
    for name in ("failure_table", "refusal_table"):
        monkeypatch.setattr(evaluate, name, functools.partial(getattr(evaluate, name), n=4))
    args = demo.Args(out=str(tmp_path / "demo"), **CPU)
    results = demo.main(args)
    written = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert written.keys() == results.keys() >= {
        "seed", "machine", "seconds", "peak_memory_mb", "labeler", "reward_model", "ppo", "distill", "policies",
    }  # fmt: skip
    assert {*written["policies"]} == {"base", "prompted", "distilled", "sl_cai", "rl_cai"}
    for found in written["policies"].values():
        assert found.keys() >= {"harm", "harm_ci", "helpfulness", "ill_formed", "kl_to_sl_cai", "harm_minus_baseline"}
    assert written["labeler"].keys() >= {"agreement_principle", "agreement_principle_ci", "flip_rate", "failures", "n"}
    assert written["reward_model"].keys() >= {"gold_accuracy", "gold_accuracy_ci", "label_accuracy"}
    assert written["ppo"].keys() >= {"kl_first", "kl_last", "reward_first", "reward_last"}
    assert written["distill"].keys() == {"kl_before", "kl_after", "share_of_fall_kept", "share_of_fall_kept_unseen"}
    assert written["seconds"]["total"] == pytest.approx(sum(v for k, v in written["seconds"].items() if k != "total"), abs=0.2)
    assert abs(written["policies"]["sl_cai"]["kl_to_sl_cai"]) < 1e-3 and abs(written["ppo"]["kl_first"]) < 1e-3
    report = (tmp_path / "demo" / "report.md").read_text()
    assert all(name in report for name in (*written["policies"], *failures.FAILURES))

    def done(args):
        raise AssertionError("this stage was done already")

    for script in (corpus, pretrain, critique, label, train_rm, train_ppo, distill, evaluate):
        monkeypatch.setattr(script, "main", done)
    again = demo.main(args)
    assert again["policies"] == results["policies"] and again["seconds"] == results["seconds"]
    with pytest.raises(UserError, match="holds a demo with seed 0"):
        demo.main(replace(args, seed=1))
