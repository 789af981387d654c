"""distill.py: what is learnt, from which examples, against which targets; and that a run can be stopped and its targets kept."""

from dataclasses import replace

import pytest
import torch
from small import CPU, interrupted, rows_of, write

import distill
from bench import distill_targets
from minirlaif import constitution, examples, prefix, targets, text, trainer
from minirlaif.cli import UserError
from minirlaif.examples import Example
from minirlaif.losses import distill_kl, topk_rest
from minirlaif.model import GPT, GPTConfig
from minirlaif.sampling import generate
from minirlaif.tokenizer import load_tokenizer

TOY = load_tokenizer("toy")
FOOL = "you are a fool. " * 6 + "no."
PROMPT = text.dialogue("how do i fix the bike?")


@pytest.fixture(autouse=True)
def few_requests(monkeypatch):
    """For gold: 48 of them, three times a run, would take most of the time."""
    monkeypatch.setattr(distill, "ASKED", 8)


def distill_args(base, prompts, out, **changes):
    return distill.Args(**{**dict(model=base, data=[prompts], out=str(out), batch_size=8, **CPU), **changes})


def weights(folder):
    return trainer.read_model(folder)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def metrics_of(folder, name):
    return [row[name] for row in rows_of(folder / "metrics.jsonl") if name in row]


def small(seed, n_vocab=50, block_size=96):
    """A model with opinions: random weights, but large."""
    model = GPT(GPTConfig(block_size, n_vocab, n_layer=2, n_head=2, n_embd=16)).init_weights(trainer.rng(seed))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(10 if p.dim() == 2 else 1)
    return model.eval()


def ids(n, seed, n_vocab=50):
    return torch.randint(n_vocab, (n,), generator=trainer.rng(seed)).tolist()


# the loss


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("top_k", [0, 3, 50])
def test_the_chunked_loss_is_the_plain_formula_and_so_is_its_gradient(direction, top_k):
    """With temperature 2: softened on both sides, times 4."""
    teacher, student = small(0).requires_grad_(False), small(1)
    seen, unseen = torch.randn(2, 10, 16, generator=trainer.rng(2))
    h = unseen.clone().requires_grad_()
    target = targets.predict(teacher, seen, top_k, 2.0, chunk=4) if top_k else (teacher, seen)
    found = targets.kl(student, h, target, direction, 2.0, chunk=3)

    plain_h = unseen.clone().requires_grad_()
    p, q = ((m.logits(x) / 2).log_softmax(-1) for m, x in ((teacher, seen), (student, plain_h)))
    if top_k:
        best = p.topk(top_k).indices
        p, q = topk_rest(p, best), topk_rest(q, best)
    a, b = (p, q) if direction == "forward" else (q, p)
    plain = 4 * (a.exp() * (a - b)).sum(-1)
    torch.testing.assert_close(found, plain)
    inputs = lambda x: [x, student.lm_head.weight]  # noqa: E731
    for mine, right in zip(
        torch.autograd.grad(found.sum(), inputs(h)), torch.autograd.grad(plain.sum(), inputs(plain_h)), strict=True
    ):
        torch.testing.assert_close(mine, right)


def test_the_logits_of_all_tokens_are_never_held():
    """What backward keeps does not hold one number a token and word of the vocabulary."""
    teacher, student = small(0, n_vocab=500).requires_grad_(False), small(1, n_vocab=500)
    kept, seen, h = [], torch.randn(64, 16), torch.randn(64, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        loss = targets.kl(student, h, (teacher, seen), chunk=16).mean()
    assert max(kept, default=0) <= 64 * 16
    loss.backward()
    assert h.grad.abs().sum() > 0


@torch.no_grad()
def test_answers_line_up_whatever_stands_before_them():
    model, contexts, responses = small(0), [[5] * 9, [7, 8], [9] * 4], [[1, 2], [3, 4, 5, 6], [7]]
    found = model.logits(targets.response_states(model, contexts, responses, 0))
    alone = [model(torch.tensor([c + r]))[0, len(c) - 1 : -1] for c, r in zip(contexts, responses, strict=True)]
    torch.testing.assert_close(found[:7], torch.cat(alone), atol=1e-5, rtol=0)


# the context, once


@torch.no_grad()
def test_behind_a_shared_context_states_and_samples_are_those_of_the_whole(monkeypatch):
    model, context = small(0), ids(40, 0)
    contexts, responses = [context + ids(n, n) for n in (1, 7, 3, 12)], [ids(n, n + 50) for n in (5, 1, 9, 20)]
    root = prefix.root(model, contexts, 49)
    assert root.used == 40
    whole = targets.response_states(model, contexts, responses, 49)
    plain = generate(model, contexts, 20, 49, seed=3)
    fed, hidden = [], GPT.hidden
    monkeypatch.setattr(GPT, "hidden", lambda self, idx, cache=None: fed.append(idx.shape[1]) or hidden(self, idx, cache))
    shared = targets.response_states(model, contexts, responses, 49, root)
    torch.testing.assert_close(shared[:35], whole[:35], atol=1e-5, rtol=0)  # what follows fills up the shape
    assert max(fed) == 32  # 12 + 20 tokens; without what is shared, 72
    behind = generate(model, contexts, 20, 49, seed=3, root=root)
    assert fed[1] == 12 and torch.equal(behind.tokens, plain.tokens) and torch.equal(behind.length, plain.length)


# targets in a file


@pytest.mark.parametrize("top_k", [0, 10])
def test_targets_can_be_stored_in_bf16(top_k):
    """Under autocast, as distill.py does it: what is stored is in fp16 all the same."""
    rows = [Example(ids(6, i), ids(2, i), ids(9, i + 99), 0) for i in range(70)]
    with trainer.autocast(torch.device("cpu"), "bf16"):
        stored = targets.predict_all(small(0), None, rows, top_k, 1.0, 0)
    plain = targets.predict_all(small(0), None, rows, top_k, 1.0, 0)
    assert stored.logprobs.dtype == torch.float16 and len(stored.logprobs) == 630
    assert (stored.logprobs.float().exp() - plain.logprobs.float().exp()).abs().mean() < 0.02


def test_stored_targets_are_the_teachers_but_for_rounding_and_as_small_as_is_said(tmp_path):
    teacher = small(0, n_vocab=400)
    rows = [Example(ids(6, i, 400), ids(2, i, 400), ids(30, i + 99, 400), 0) for i in range(70)]
    h = targets.response_states(teacher, [e.seen for e in rows], [e.response for e in rows], 0)[:2100]
    for top_k, size in ((0, 800), (10, 42)):
        exact = targets.predict(teacher, h, top_k, 1.5)
        responses = [*(e.response for e in rows), None]  # the last was cut off
        targets.save(tmp_path / "t.pt", targets.predict_all(teacher, None, rows, top_k, 1.5, 0), responses, {})
        stored, read = targets.load(tmp_path / "t.pt", {})
        assert read == responses
        assert sum(x.nbytes for x in stored if x is not None) == 2100 * size
        index = torch.randperm(2100, generator=trainer.rng(0))
        found = stored.at(index, "cpu")
        if top_k:
            assert torch.equal(found.ids, exact.ids[index])
        assert abs(distill_kl(exact.logprobs[index], found.logprobs, torch.ones(2100, dtype=torch.bool))) < 2e-6
        torch.testing.assert_close(found.logprobs.exp().sum(-1), torch.ones(2100))


@pytest.mark.parametrize("top_k", [0, 5])
def test_stored_targets_teach_what_the_teacher_does_and_serve_again(base, prompts, tmp_path, monkeypatch, top_k):
    args = distill_args(base, prompts, tmp_path / "on_the_fly", top_k=top_k, limit=40, max_new_tokens=32)
    plain = distill.main(args)
    stored = replace(args, store_targets=str(tmp_path / "targets.pt"), out=str(tmp_path / "stored"))
    found = distill.main(stored)
    assert found["kl_after"] == pytest.approx(plain["kl_after"], rel=0.02) and found["kl_before"] == plain["kl_before"]
    monkeypatch.setattr(targets, "predict_all", lambda *_: pytest.fail("the targets were there"))
    assert distill.main(replace(stored, out=str(tmp_path / "again"), lr=stored.lr)) == found
    assert same(weights(tmp_path / "again"), weights(tmp_path / "stored"))


def test_targets_of_others_and_half_files_are_refused(base, prompts, tmp_path):
    path, args = tmp_path / "t.pt", distill_args(base, prompts, tmp_path / "run", limit=10, batch_size=5)
    distill.main(replace(args, store_targets=str(path), temperature=2.0, top_k=5))
    whole = path.read_bytes()
    for number, (changes, content, part) in enumerate([
        (dict(temperature=1.0, top_k=5), whole, "its --temperature is 2.0, not 1.0"),
        (dict(temperature=2.0, top_k=4), whole, "its --top-k is 5, not 4"),
        (dict(temperature=2.0, top_k=5, preamble=FOOL), whole, "its origin (teacher, C, data, --seed, --max-new-tokens) is"),
        (dict(temperature=2.0, top_k=5, limit=9), whole, "its origin"),
        (dict(temperature=2.0, top_k=5, seed=1), whole, "its origin"),
        (dict(temperature=2.0, top_k=5), whole[: len(whole) // 2], "not a complete file of stored targets"),
        (dict(temperature=2.0, top_k=5), b"something else", "not a complete file of stored targets"),
        (dict(temperature=2.0, top_k=5), (tmp_path / "run" / "model.pt").read_bytes(), "not a complete file of stored targets"),
    ]):  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(UserError) as error:
            distill.main(replace(args, out=str(tmp_path / f"other{number}"), store_targets=str(path), **changes))
        assert str(error.value).startswith(f"{path}: {part}") and "\n" not in str(error.value)
    with pytest.raises(UserError, match="there is no folder"):
        distill.main(replace(args, out=str(tmp_path / "none"), store_targets=str(tmp_path / "no" / "t.pt")))


# what is distilled on


def test_every_kind_of_file_gives_examples_that_differ_in_c_alone(tmp_path):
    rows = {
        "prompts": [{"prompt": PROMPT}, {"prompt": PROMPT + " no.\n\nHuman: why?\n\nAssistant:"}],
        "completions": [{"prompt": PROMPT, "completion": " no."}, {"prompt": PROMPT, "completion": " take a", "stopped": False}],
        "texts": [{"text": "the bike is made of steel."}, {"text": PROMPT + " no."}, {"text": "the boat is made of wood. " * 40}],
        "documents": [{"segments": [[PROMPT, 0], [" no.", 1]]}],
        "hh": [{"chosen": PROMPT + " yes.", "rejected": PROMPT + " no."}],
    }
    (tmp_path / "book.txt").write_text("the bike is made of steel.")
    context = "be kind."
    found = {
        name: examples.load(write(tmp_path / f"{name}.jsonl", given), 2, context, TOY, (128, 96), 16)
        for name, given in rows.items()
    }
    found["txt"] = examples.load(str(tmp_path / "book.txt"), 2, context, TOY, (128, 96), 16)
    for e in sum(found.values(), []):
        assert TOY.decode(e.seen) == context + TOY.decode(e.unseen) and e.file == 2
        assert len(e.seen) + len(e.response or [0] * 16) <= 128 and len(e.unseen) + len(e.response or [0] * 16) <= 96

    def said(name):
        return [(TOY.decode(e.unseen), e.response and TOY.decode([i for i in e.response if i != TOY.eot])) for e in found[name]]

    assert said("prompts") == [(row["prompt"], None) for row in rows["prompts"]]
    assert said("completions") == [(PROMPT, " no."), (PROMPT, " take a")]
    assert [e.response[-1] == TOY.eot for e in found["completions"]] == [True, False]
    turn, dialogue = "\n\nHuman:", PROMPT.removeprefix("\n\nHuman:") + " no."
    assert said("texts")[:2] == [(turn, " the bike is made of steel."), (turn, dialogue)]
    pieces = said("texts")[2:]
    assert len(pieces) > 2 and {p for p, _ in pieces} == {turn}
    assert "".join(r for _, r in pieces) == " " + rows["texts"][2]["text"]
    assert said("documents") == [(turn, dialogue)] and said("txt") == said("texts")[:1]
    assert said("hh") == [(PROMPT, None)]


def test_each_file_has_its_weights_share_of_the_examples():
    files = [0] * 30 + [1] * 90
    assert sorted(examples.epoch_order(files, [], 0, 0)) == list(range(120))
    order = examples.epoch_order(files, [3, 1], 0, 0)
    first = [i for i in order if i < 30]
    assert len(order) == 120 and len(first) == 90 and {first.count(i) for i in range(30)} == {3}
    second = [i for i in order if i >= 30]
    assert len(set(second)) == 30 and order != sorted(order) and any(a < 30 < b for a, b in zip(order, order[1:], strict=False))
    other = examples.epoch_order(files, [3, 1], 0, 1)
    assert other != order and set(other) != set(order)  # the next epoch draws others of the large file
    assert len([i for i in examples.epoch_order(files, [1, 5], 0, 0) if i < 30]) == 20


def test_a_mixture_trains_on_all_of_its_files(base, prompts, tmp_path, monkeypatch):
    plain = write(
        tmp_path / "plain.jsonl", [{"text": f"the {thing} is made of wood."} for thing in ("boat", "door", "bike", "bell")]
    )
    batches, states = [], targets.response_states
    spy = lambda model, contexts, responses, *rest: batches.append(responses) or states(model, contexts, responses, *rest)  # noqa: E731
    monkeypatch.setattr(targets, "response_states", spy)
    result = distill.main(distill_args(base, prompts, tmp_path / "run", data=[prompts, plain], weights=[1, 1], limit=16))
    texts = [TOY.decode(r) for batch in batches for r in batch]
    assert any("made of wood" in t for t in texts) and any("made of wood" not in t for t in texts)
    assert result["kl_after"] < result["kl_before"] and metrics_of(tmp_path / "run", "answers")[0] <= 15 + 3


# C


def test_what_c_may_be(tmp_path):
    def c(**changes):
        return distill.context_of(distill_args("m", "p", "o", **changes))

    toy = constitution.load("toy")
    shots = tmp_path / "shots.txt"
    shots.write_text("\n\nHuman: what is a bike?\n\nAssistant: a thing.\n\nHuman:")
    dialogue = "\n\nHuman: what is a bike?\n\nAssistant: a thing."
    assert c() == toy.preamble and c(preamble="be kind.") == "be kind."
    assert c(context=str(shots)) == dialogue and c(preamble="be kind.", context=str(shots)) == "be kind." + dialogue
    assert c(principles=True) == "\n".join([toy.preamble, *(p.text for p in toy.preferences)])
    assert c(preamble="", teacher="other") == ""
    with pytest.raises(UserError, match="--principles shows the whole"):
        c(principles=True, preamble="be kind.")


def test_another_teacher_teaches_with_or_without_a_context(home, base, judge, prompts, tmp_path, monkeypatch):
    args = distill_args(base, prompts, tmp_path / "run", teacher=judge, preamble="", data=[], epochs=4)
    rows = [{"prompt": row["prompt"], "completion": " take a key and turn."} for row in rows_of(prompts)]
    result = distill.main(replace(args, data=[write(tmp_path / "c.jsonl", rows)]))
    assert result["kl_after"] < 0.8 * result["kl_before"] and result["tokens_saved"] == 0
    assert metrics_of(tmp_path / "run", "answers") == [64 - 6]  # a tenth is held out
    other = trainer.read_model(judge) | {"tokenizer": "gpt2", "tokenizer_hash": "of gpt2"}
    torch.save(other, tmp_path / "other.pt")
    with pytest.raises(UserError, match="its tokenizer gpt2 is not toy"):
        distill.main(replace(args, out=str(tmp_path / "bad"), teacher=str(tmp_path / "other.pt"), data=[prompts]))


# whole runs


def test_distillation_moves_the_preamble_into_the_weights(home, base, prompts, tmp_path, monkeypatch, capsys):
    """Teacher and student see the same answers, the student never sees the preamble; the teacher stays as it was."""
    before, seen, measure = (home / "base" / "model.pt").read_bytes(), {}, targets.response_states

    def spy(model, contexts, responses, *rest):
        seen.setdefault(id(model), []).append((model, contexts, responses))
        return measure(model, contexts, responses, *rest)

    monkeypatch.setattr(targets, "response_states", spy)
    result = distill.main(distill_args(base, prompts, tmp_path / "run", epochs=4, preamble=FOOL))
    assert result["kl_after"] < 0.8 * result["kl_before"] and result["tokens_saved"] == len(TOY.encode(FOOL))
    last = rows_of(tmp_path / "run" / "metrics.jsonl")[-1]
    assert {k: last[f"val/{k}"] for k in result} == pytest.approx(result, rel=1e-4)
    assert result.keys() >= {f"{what}_{n}" for what in ("harm", "helpfulness") for n in ("prompted", "before", "after")}
    printed = capsys.readouterr().out
    assert "harm on" in printed and "prompted:" in printed and "after:" in printed
    kept = rows_of(tmp_path / "run" / "samples.jsonl")
    assert {row["model"] for row in kept} == {"prompted", "before", "after"}
    assert all(row["response"] in printed for row in kept if row["prompt"] == kept[0]["prompt"])

    val = metrics_of(tmp_path / "run", "val/kl")  # before, three times during, after
    assert len(val) == 5 and (val[0], val[-1]) == (last["val/kl_before"], last["val/kl_after"])
    assert len(metrics_of(tmp_path / "run", "loss/kl")) == last["step"]

    teacher, student = seen.values()  # the teacher is asked first
    assert len(teacher) == len(student)
    known = {row["prompt"] for row in rows_of(prompts)}
    for (_, shown, answers), (_, bare, same_answers) in zip(teacher, student, strict=True):
        assert answers == same_answers
        for a, b in zip(shown, bare, strict=True):
            assert TOY.decode(b) in known and TOY.decode(a) == FOOL + TOY.decode(b)
    assert same(teacher[0][0].state_dict(), weights(base)) and (home / "base" / "model.pt").read_bytes() == before
    assert same(student[0][0].state_dict(), weights(tmp_path / "run")) and not same(weights(tmp_path / "run"), weights(base))


def test_where_both_see_the_same_there_is_nothing_to_learn(base, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(examples.text, "with_preamble", lambda preamble, prompt: prompt)
    result = distill.main(distill_args(base, prompts, tmp_path / "run", lr=0.0))
    losses = metrics_of(tmp_path / "run", "loss/kl")
    assert abs(result["kl_before"]) < 1e-6 and max(map(abs, losses)) < 1e-6
    assert result["harm_prompted"] == result["harm_before"] == result["harm_after"]


@pytest.mark.parametrize("changes", [dict(direction="reverse"), dict(direction="reverse", top_k=5, temperature=2.0)])
def test_other_losses_bring_the_student_to_the_teacher_too(base, prompts, tmp_path, changes):
    result = distill.main(distill_args(base, prompts, tmp_path / "run", epochs=4, preamble=FOOL, **changes))
    assert result["kl_after"] < 0.85 * result["kl_before"]


@pytest.mark.parametrize("store", [False, True])
def test_distillation_resumed_is_uninterrupted_bit_for_bit(base, prompts, tmp_path, monkeypatch, store):
    args = distill_args(
        base, prompts, tmp_path / "whole", limit=48, max_new_tokens=32, store_targets=str(tmp_path / "a.pt") if store else None
    )
    whole = distill.main(args)
    parts = replace(args, out=str(tmp_path / "parts"), store_targets=str(tmp_path / "b.pt") if store else None)
    assert interrupted(monkeypatch, distill.main, parts, after=3) == whole
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    for name in ("loss/kl", "val/kl"):
        assert metrics_of(tmp_path / "parts", name) == metrics_of(tmp_path / "whole", name)


def test_large_vocabularies_are_cut_to_fifty_tokens_and_small_ones_are_not(base, prompts, tmp_path, monkeypatch):
    asked, predict = [], targets.predict
    monkeypatch.setattr(targets, "predict", lambda m, h, top_k, *rest: asked.append(top_k) or predict(m, h, top_k, *rest))
    for most in (TOY.n_vocab + 1, TOY.n_vocab):
        monkeypatch.setattr(distill, "MANY_TOKENS", most)
        distill.main(distill_args(base, prompts, tmp_path / str(most), limit=12))
        assert (50 in asked) == (most == TOY.n_vocab)


LONG = [{"prompt": PROMPT}, {"prompt": "\n\nHuman: " + "bike " * 250 + "\n\nAssistant:"}]


@pytest.mark.parametrize("rows, flags, part", [
    (LONG[:1], dict(model="no/model"), "no/model: no such model file or run folder"),
    (LONG, {}, "data.jsonl:2: longer than the model's context"),
    (LONG[:1], {}, "data.jsonl: one example cannot be learnt and held out; give --eval-data"),
    ([{"prompt": PROMPT, "completion": "", "stopped": False}], {}, "data.jsonl:1: empty completion"),
    (LONG[:1], dict(preamble=""), "--preamble: is empty"),
    (LONG[:1], dict(lr=float("nan")), "--lr nan: must be 0 or more"),
    (LONG[:1], dict(temperature=0.0), "--temperature 0.0: must be above 0"),
    (LONG[:1], dict(top_k=-1), "--top-k -1: must be 0 or more"),
    (LONG[:1], dict(weights=[1.0, 2.0]), "--weights: 1 files need as many numbers above 0"),
    (LONG[:1], dict(weights=[-1.0]), "--weights: 1 files need as many numbers above 0"),
    (LONG[:1], dict(max_new_tokens=10**6), "--max-new-tokens 1000000: the model's context holds"),
    (LONG[:1], dict(preamble="bike " * 210), "C is too long: 21"),
])  # fmt: skip
def test_a_mistake_is_one_line_that_says_where(base, tmp_path, rows, flags, part):
    path = write(tmp_path / "data.jsonl", rows)
    with pytest.raises(UserError) as error:
        distill.main(replace(distill_args(base, path, tmp_path / "run"), **flags))
    assert part in str(error.value) and "\n" not in str(error.value)


def test_temperature_softens_both_sides_and_its_square_keeps_the_gradient(base):
    """At a high temperature the gradient of T² KL tends to (z_student - z_teacher) / V (Hinton et al., section 2.1)."""
    teacher, student = small(0).requires_grad_(False), small(1)
    seen, unseen = torch.randn(2, 6, 16, generator=trainer.rng(4)).double()
    teacher, student, gradients = teacher.double(), student.double(), []
    for temperature in (1e3, 1e4):
        h = unseen.clone().requires_grad_()
        gradients.append(torch.autograd.grad(targets.kl(student, h, (teacher, seen), temperature=temperature).sum(), h)[0])
    z = student.logits(unseen) - teacher.logits(seen)
    expected = ((z - z.mean(-1, keepdim=True)) @ student.lm_head.weight / 50).detach()
    torch.testing.assert_close(gradients[0], expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))
    torch.testing.assert_close(gradients[1], expected, rtol=0.002, atol=0.002 * float(expected.abs().max()))


def test_the_bench_of_targets_runs_through(capsys):
    found = distill_targets.main(distill_targets.Args(quick=True, threads=1))
    for context in (16, 128):
        assert found["tiny", context, 0]["tensors"] == 600 and found["tiny", context, 50]["tensors"] == 202
    assert 0 <= found["rounding", 0]["mean"] < 1e-6 and 0 <= found["rounding", 50]["mean"] < 1e-6
    assert "top 50 and the rest" in capsys.readouterr().out
    with pytest.raises(UserError, match="--prompt 125: with C and an answer there is room for 124 tokens"):
        distill_targets.main(distill_targets.Args(quick=True, threads=1, prompt=125))
    assert not capsys.readouterr().out
    assert distill_targets.main(distill_targets.Args(quick=True, threads=1, prompt=124))
