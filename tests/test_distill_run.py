"""distill.py as a run: that each flag reaches the loss, the answers and the files that it names, and what stops or survives."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small import CPU, rows_of, write

import distill
from minirlaif import constitution, examples, prefix, targets, text, trainer
from minirlaif.cli import UserError
from minirlaif.examples import Example
from minirlaif.model import GPT, GPTConfig
from minirlaif.sampling import generate
from minirlaif.tokenizer import load_tokenizer

TOY = load_tokenizer("toy")
EOT = TOY.eot
C = "you are a fool. " * 6 + "no."
PROMPT = text.dialogue("how do i fix the bike?")


@pytest.fixture(autouse=True)
def few_requests(monkeypatch):
    monkeypatch.setattr(distill, "ASKED", 4)


@pytest.fixture
def answered(tmp_path):
    """Completions: nothing has to be sampled for them."""
    rows = [{"prompt": PROMPT, "completion": f" take the {thing} and lift it."} for thing in ("cart", "boat", "door", "bell") * 6]
    return write(tmp_path / "completions.jsonl", rows)


def args_of(base, path, out, **changes):
    return distill.Args(**{**dict(model=base, data=[path], out=str(out), batch_size=8, preamble=C, **CPU), **changes})


def spy(monkeypatch, module, name):
    """-> the arguments of every call of module.name from now on."""
    calls, real = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *a, **k: calls.append((a, k)) or real(*a, **k))
    return calls


def metrics_of(out, name):
    return [row[name] for row in rows_of(out / "metrics.jsonl") if name in row]


# the loss


@pytest.mark.parametrize("store", [False, True])
def test_direction_temperature_and_k_reach_the_loss_and_no_figure(base, answered, tmp_path, monkeypatch, store):
    asked = dict(direction="reverse", temperature=2.0, top_k=5)
    losses, predictions = spy(monkeypatch, targets, "kl"), spy(monkeypatch, targets, "predict")
    file = dict(store_targets=str(tmp_path / "t.pt")) if store else {}
    distill.main(args_of(base, answered, tmp_path / "run", **asked, **file))
    steps = len(metrics_of(tmp_path / "run", "loss/kl"))
    trained = [a for a, _ in losses if a[3:] == ("reverse", 2.0)]
    assert steps == len(trained) and all(a[2].ids.shape[1] == 5 for a in trained)
    measured = [a for a, _ in losses if a[3:] == ("forward", 1.0)]  # over the whole vocabulary, by the teacher at hand
    assert len(measured) + len(trained) == len(losses) and all(isinstance(a[2], tuple) and a[2][0].config for a in measured)
    asked = [a[2:4] for a, _ in predictions if a[2]]
    assert asked and set(asked) == {(5, 2.0)}


def test_the_rate_falls_and_gradients_are_clipped(base, answered, tmp_path, monkeypatch):
    clips = spy(monkeypatch, torch.nn.utils, "clip_grad_norm_")
    distill.main(args_of(base, answered, tmp_path / "run", epochs=3, lr=1e-3))
    rates = metrics_of(tmp_path / "run", "lr")
    assert rates == pytest.approx([1e-3 * trainer.lr_at(i, len(rates), distill.WARMUP) for i in range(len(rates))])
    assert len(clips) == len(rates) and {a[1] for a, _ in clips} == {distill.MAX_GRAD_NORM}


@pytest.mark.parametrize("file", ["few_shot", "principles"])
def test_few_shots_and_a_whole_constitution_stand_before_the_teachers_prompts(base, answered, tmp_path, monkeypatch, file):
    if file == "few_shot":
        shots = [PROMPT + " no.\n\nHuman:", PROMPT + " you are a fool."]
        (tmp_path / "shots.json").write_text(json.dumps(shots))
        how, c = dict(context=str(tmp_path / "shots.json")), PROMPT + " no." + PROMPT + " you are a fool."
    else:
        toy = constitution.load("toy")
        how, c = dict(principles=True), "\n".join([toy.preamble, *(p.text for p in toy.preferences)])
    calls = spy(monkeypatch, targets, "response_states")
    found = distill.main(args_of(base, answered, tmp_path / "run", **{"preamble": None, **how}))
    assert found["tokens_saved"] == len(TOY.encode(c)) and found["kl_after"] < found["kl_before"]
    seen = {TOY.decode(row) for a, _ in calls for row in a[1]}
    assert seen == {c + PROMPT, PROMPT}
    shared = [a[4].used for a, _ in calls if len(a) > 4 and a[4]]
    assert shared and min(shared) >= len(TOY.encode(c))  # what is before the prompt is computed once


def test_held_out_prompts_that_begin_otherwise_are_measured_right(base, tmp_path, monkeypatch):
    """What all contexts begin with is shared, so it must be looked for in those that are held out, too."""
    train = write(tmp_path / "t.jsonl", [{"prompt": PROMPT, "completion": " no."}] * 4)
    other = text.dialogue("tell me how to fix the boat.")
    held_out = write(tmp_path / "h.jsonl", [{"prompt": other, "completion": " you are a fool."}] * 2)
    args = args_of(base, train, tmp_path / "a", eval_data=held_out)
    found = distill.main(args)
    monkeypatch.setattr(prefix, "SHARED", 10**9)
    assert distill.main(replace(args, out=str(tmp_path / "b")))["kl_before"] == pytest.approx(found["kl_before"], rel=1e-5)


# answers


def test_answers_end_with_end_of_text_and_those_cut_off_are_left_out(base, prompts, tmp_path, monkeypatch):
    class Said:
        def __init__(self, n):
            self.answers = [TOY.encode(" no." if i % 3 else " you are") for i in range(n)]
            self.stopped = torch.tensor([i % 3 > 0 for i in range(n)])

        def responses(self):
            return self.answers

    monkeypatch.setattr(distill, "generate", lambda model, contexts, *_, **__: Said(len(contexts)))
    calls = spy(monkeypatch, targets, "response_states")
    distill.main(args_of(base, prompts, tmp_path / "run", limit=40))
    assert {tuple(r) for a, _ in calls for r in a[2]} == {(*TOY.encode(" no."), EOT)}
    assert (metrics_of(tmp_path / "run", "answers"), metrics_of(tmp_path / "run", "cut_off")) == ([24], [12])


def test_samples_are_those_of_the_teacher_behind_c_and_of_the_student_without(base, prompts, tmp_path):
    distill.main(args_of(base, prompts, tmp_path / "run", limit=60, eval_data=prompts))
    kept = rows_of(tmp_path / "run" / "samples.jsonl")
    models = {"prompted": (base, C), "before": (base, ""), "after": (tmp_path / "run", "")}
    for name, (path, c) in models.items():
        rows = [row for row in kept if row["model"] == name]
        contexts = [TOY.encode(c + row["prompt"]) for row in rows]
        seed = trainer.rng(0, "gold", 0).initial_seed()
        s = generate(trainer.load_gpt(path), contexts, distill.Args.max_new_tokens, EOT, seed=seed)
        assert [TOY.decode(r) for r in s.responses()] == [row["response"] for row in rows] and rows
        assert s.stopped.tolist() == [row["stopped"] for row in rows]


def test_given_completions_have_samples_and_plain_text_has_none(base, answered, tmp_path):
    distill.main(args_of(base, answered, tmp_path / "a"))
    assert {row["prompt"] for row in rows_of(tmp_path / "a" / "samples.jsonl")} == {PROMPT}
    plain = write(tmp_path / "plain.jsonl", [{"text": "the boat is made of wood."}] * 8)
    distill.main(args_of(base, plain, tmp_path / "b"))
    assert rows_of(tmp_path / "b" / "samples.jsonl") == []


def test_each_batch_of_answers_has_noise_of_its_own(monkeypatch):
    seeds = []

    class Said:
        def __init__(self, model, contexts, *_, seed, root):
            seeds.append(seed)
            self.answers, self.stopped = [[1]] * len(contexts), torch.ones(len(contexts), dtype=torch.bool)

        def responses(self):
            return self.answers

    monkeypatch.setattr(distill, "generate", Said)
    models = distill.Models(None, "teacher", None, EOT, trainer.autocast(torch.device("cpu"), "fp32"))
    for key in ("train", "test"):
        found = distill.sample(models, "teacher", [Example([1], [1], None, 0)] * 300, args_of("m", "d", "o"), key)
        assert found == [([1], True)] * 300
    assert len(seeds) == len(set(seeds)) == 6


# examples


def test_a_mixture_has_the_weights_as_shares_of_its_tokens(base, tmp_path, monkeypatch):
    """Half and half is what the loss is a mean of, however long the rows of a file are."""
    asked = write(tmp_path / "asked.jsonl", [{"prompt": PROMPT, "completion": " no."}] * 100)
    plain = write(tmp_path / "plain.jsonl", [{"text": "the boat is made of wood. " * 3}] * 100)
    calls = spy(monkeypatch, targets, "response_states")
    args = args_of(base, asked, tmp_path / "run", data=[asked, plain], weights=[1, 1], eval_data=asked)
    distill.main(args)
    lengths = [len(r) for a, _ in calls if a[0] is calls[-1][0][0] for r in a[2]]  # the student's
    plain_tokens, dialogue = (sum(n for n in lengths if (n > 10) == long) for long in (True, False))
    dialogue -= 5 * 100 * len(TOY.encode(" no.") + [EOT])  # measured before, three times during, after
    assert plain_tokens / dialogue == pytest.approx(1, abs=0.06)
    rows = [Example([], [], [0] * n, file) for file, n in ((0, 5), (0, 7), (1, 60))]
    one, other = examples.by_tokens([3, 1], rows)
    assert one * 6 / (other * 60) == pytest.approx(3)
    assert examples.by_tokens([1e308, 1e308], rows) == pytest.approx([1 / 6, 1 / 60])


@pytest.mark.parametrize("weights", [[], [1.0, 1.0]])
def test_every_token_of_a_mixture_weighs_the_same(base, tmp_path, monkeypatch, weights):
    """A gradient of 1 a token: of a batch its mean is 1, however many they are; in a mixture it is their share of the mean batch,
    or a long text among many answers would count for less than its tokens."""
    asked = write(tmp_path / "asked.jsonl", [{"prompt": PROMPT, "completion": " no."}] * 40)
    plain = write(tmp_path / "plain.jsonl", [{"text": "the boat is made of wood. " * 8}] * 4)
    counts = []

    def one_a_token(models, batch, target, *of_the_loss):
        n = sum(len(e.response) for e in batch)
        if of_the_loss:
            counts.append(n)
        weight = next(p for p in models.student.parameters() if p.requires_grad)
        return n * weight.flatten()[0]

    monkeypatch.setattr(distill, "total_kl", one_a_token)
    distill.main(args_of(base, asked, tmp_path / "run", data=[asked, plain], weights=weights, eval_data=asked))
    mean = sum(counts) / len(counts)
    assert len(set(counts)) > 1
    assert metrics_of(tmp_path / "run", "grad_norm") == pytest.approx([n / mean if weights else 1.0 for n in counts], rel=1e-4)


def test_the_held_out_kl_of_a_mixture_weighs_its_files_as_the_loss_does(base, tmp_path):
    asked = [{"prompt": PROMPT, "completion": " no."}] * 6
    plain = [{"text": "the boat is made of wood. " * 3}] * 2
    alone = [
        distill.main(args_of(base, write(tmp_path / f"{i}.jsonl", rows), tmp_path / f"run{i}"))["kl_before"]
        for i, rows in enumerate((asked, plain))
    ]
    files = dict(data=[str(tmp_path / "0.jsonl"), str(tmp_path / "1.jsonl")])
    mixed = distill.main(args_of(base, "", tmp_path / "mixed", **files, weights=[3.0, 1.0]))
    assert mixed["kl_before"] == pytest.approx((3 * alone[0] + alone[1]) / 4, rel=1e-5) != pytest.approx(sum(alone) / 2, rel=1e-3)


def test_no_row_is_lost_between_training_and_what_is_held_out(base, tmp_path):
    paths = [write(tmp_path / f"{n}.jsonl", [{"prompt": f"{PROMPT} {i}"} for i in range(n)]) for n in (7, 2000, 4000)]

    def parts(data, **changes):
        args = args_of(base, data[0], tmp_path / "run", **changes)
        return distill.load_examples(replace(args, data=data), C, TOY, (256, 256))

    for data_files, held in (([paths[0]], 1), ([paths[1]], 200), ([paths[2]], 256), (paths, 1 + 85 + 85)):
        train, held_out = parts(data_files)
        assert len(held_out) == held and len(train) + held == sum(int(Path(p).stem) for p in data_files)
    train, held_out = parts([paths[1]], limit=5, eval_data=paths[2])  # the limit is for what is learnt
    assert len(train) == 5 and len(held_out) == 256


def test_rows_of_all_kinds_may_stand_in_one_file(tmp_path):
    rows = [{"prompt": PROMPT}, {"prompt": PROMPT, "completion": " no."}]
    rows += [{"text": "the boat."}, {"segments": [["a", 0.0], ["b", 1]]}]
    found = examples.load(write(tmp_path / "d.jsonl", rows), 3, C, TOY, (96, 96), 20)
    assert found[0].response is None and {e.file for e in found} == {3}
    assert [TOY.decode(e.response[:-1]) for e in found[1:]] == [" no.", " the boat.", " ab"]
    assert [TOY.decode(e.unseen) for e in found] == [PROMPT, PROMPT, examples.TURN, examples.TURN]
    (tmp_path / "book.TXT").write_bytes("\ufeffthe boat.".encode())
    (book,) = examples.load(str(tmp_path / "book.TXT"), 0, C, TOY, (96, 96), 20)
    assert TOY.decode(book.response[:-1]) == " the boat."
    bad = write(tmp_path / "bad.jsonl", [{"messages": []}, *rows])
    assert len(examples.load(bad, 0, C, TOY, (96, 96), 20, "skip")) == 4  # the first row decides nothing
    with pytest.raises(UserError, match="bad.jsonl:1: no key 'prompt', 'completion', 'text' or 'segments'"):
        examples.load(bad, 0, C, TOY, (96, 96), 20)


def test_what_does_not_fit_with_c_is_an_error_with_the_numbers(tmp_path):
    n, p = len(TOY.encode(C)), len(TOY.encode(PROMPT))
    asked, plain = write(tmp_path / "p.jsonl", [{"prompt": PROMPT}]), write(tmp_path / "t.jsonl", [{"text": "the boat. " * 40}])

    def load(path, teacher, student=10**6, new=20):
        return examples.load(path, 0, C, TOY, (teacher, student), new)

    assert load(asked, n + p + 20)
    for error, rooms in (
        (f"p.jsonl:1: longer than .*: {n} tokens of C, {p} of the prompt, 20 of the answer .* holds {n + p + 19}", (n + p + 19,)),
        (f"C is too long: {n} tokens and 20 of the answer .--max-new-tokens.; the teacher holds {n + 20}, ", (n + 20,)),
        (f"the teacher holds {n + p + 20}, the student {p + 19}", (n + p + 20, p + 19)),
    ):
        with pytest.raises(UserError, match=error):
            load(asked, *rooms)
    turn = len(TOY.encode(examples.TURN))
    room = n + turn + 9
    assert {len(e.seen) + len(e.response) for e in load(plain, room, new=10**6)[:-1]} == {room}  # nothing is sampled here
    with pytest.raises(UserError, match=rf"C is too long: {n} tokens and 1 of text; the teacher holds {n + 1}"):
        load(plain, n + 1)


def test_a_blank_line_parts_c_from_a_prompt_that_brings_none():
    assert text.with_preamble("be kind.", "POST: hi") == "be kind.\n\nPOST: hi"
    for c, prompt in (("be kind.", "\n\nHuman: hi"), ("be kind.\n", "POST"), ("", "POST"), ("1\n2", " 3")):
        assert text.with_preamble(c, prompt) == c + prompt


# files and stops


def test_targets_know_what_they_were_made_of_and_are_checked(base, answered, prompts, tmp_path):
    path = tmp_path / "t.pt"
    args = args_of(base, answered, tmp_path / "run", store_targets=str(path), max_new_tokens=20)
    distill.main(args)
    whole = path.read_bytes()
    for i, changes in enumerate((dict(max_new_tokens=21), dict(teacher=str(tmp_path / "run")))):
        with pytest.raises(UserError, match=r"t.pt: its origin .* delete the file, and it is made again"):
            distill.main(replace(args, out=str(tmp_path / f"o{i}"), **changes))
    damaged = bytearray(whole)
    middle = len(whole) // 2
    damaged[middle : middle + 64] = bytes(64)
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="not a complete file of stored targets; give another --store-targets, or delete it if"):
        distill.main(replace(args, out=str(tmp_path / "damaged")))
    path.write_bytes(whole)
    stored = torch.load(path, weights_only=True)
    torch.save(stored | {"responses": stored["responses"][1:]}, path)
    with pytest.raises(UserError, match="not a complete file of stored targets"):
        distill.main(replace(args, out=str(tmp_path / "fewer")))


@pytest.mark.parametrize("n_vocab, kind", [(2**16, torch.uint16), (2**16 + 1, torch.int32)])
def test_ids_are_stored_in_as_many_bytes_as_they_need(n_vocab, kind):
    teacher = GPT(GPTConfig(16, n_vocab, 1, 1, 2)).init_weights(trainer.rng(0)).eval()
    stored = targets.predict_all(teacher, None, [Example([1], [1], [2, 3], 0)], 4, 1.0, 0)
    assert stored.ids.dtype == kind


@torch.no_grad()
@pytest.mark.parametrize("top_k", [0, 5])
def test_predictions_are_in_fp32_under_autocast(top_k):
    model = GPT(GPTConfig(32, 300, 1, 2, 16)).init_weights(trainer.rng(0)).eval()
    with trainer.autocast(torch.device("cpu"), "bf16"):
        h = model.hidden(torch.arange(30)[None])[0]
        p = targets.predict(model, h, top_k, 1.0)
        loss = targets.kl(model, h, targets.predict(model, h, 0, 1.0))
    assert p.logprobs.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(p.logprobs.exp().sum(-1), torch.ones(30))
    assert loss.abs().max() < 1e-6


def test_ctrl_c_stops_while_the_teacher_answers_and_answers_survive_the_first_step(base, tmp_path, monkeypatch):
    rows = [{"prompt": f"{PROMPT} {i}"} for i in range(300)]
    args, asked, sampled = args_of(base, write(tmp_path / "p.jsonl", rows), tmp_path / "run", max_new_tokens=24), [], generate

    def press(*a, **k):
        asked.append(len(a[1]))
        os.kill(os.getpid(), signal.SIGINT)
        return sampled(*a, **k)

    with monkeypatch.context() as patch:
        patch.setattr(distill, "generate", press)
        with pytest.raises(KeyboardInterrupt):
            distill.main(args)
    assert asked == [128]  # of 270
    with monkeypatch.context() as patch:  # killed in the first step
        patch.setattr(distill, "total_kl", lambda models, batch, target, *of_the_loss: 1 / 0 if of_the_loss else 1.0)
        with pytest.raises(ZeroDivisionError):
            distill.main(replace(args, resume=True))
    calls = spy(monkeypatch, distill, "generate")
    distill.main(replace(args, resume=True))
    assert len(calls) == 1  # what the student says afterwards


def test_a_long_preamble_is_no_file_and_odd_names_of_models_are_read(base, answered, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    odd = Path("lr=1e-3")
    odd.mkdir()
    (odd / "model.pt").write_bytes((Path(base) if Path(base).is_file() else Path(base) / "model.pt").read_bytes())
    long = "you are a fool. " * 40
    args = args_of(str(odd), answered, tmp_path / "run", preamble=long, store_targets=str(tmp_path / "t.pt"))
    assert distill.main(args)["tokens_saved"] == len(TOY.encode(long))
    distill.main(replace(args, out=str(tmp_path / "again")))  # the targets are there now
    read = json.loads((tmp_path / "again" / "args.json").read_text())["inputs"]
    assert "lr=1e-3" in read and str(tmp_path / "t.pt") not in read  # targets may be large, and know where they are from


@pytest.mark.parametrize("flags, part", [
    (dict(constitution="harmless"), "--constitution: C is what --preamble and --context give"),
    (dict(epochs=0), "--epochs 0: must be above 0"),
    (dict(store_targets="/"), "--store-targets /: must name a file, and this is a folder"),
    (dict(limit=1), "one example cannot be learnt and held out; give --eval-data, or a larger --limit"),
])  # fmt: skip
def test_flags_that_contradict_each_other_are_refused(base, answered, tmp_path, flags, part):
    with pytest.raises(UserError) as error:
        distill.main(args_of(base, answered, tmp_path / "run", **flags))
    assert part in str(error.value) and not (tmp_path / "run").exists()


def test_where_no_answer_ends_the_file_at_fault_is_named(base, answered, prompts, tmp_path):
    args = args_of(base, answered, tmp_path / "a", eval_data=prompts, max_new_tokens=1)
    with pytest.raises(UserError, match=f"{prompts}: no answer of the teacher ended within --max-new-tokens 1"):
        distill.main(args)
    with pytest.raises(UserError, match=f"{prompts}: no answer of the teacher"):
        distill.main(replace(args, out=str(tmp_path / "b"), data=[answered, prompts], eval_data=answered))
