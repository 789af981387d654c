"""The experiments on counting and on what a context costs: pages of known odds, a model that counts, and the quick forms."""

import importlib.util
import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

import distill
import pretrain
from bench import distill_targets, label_speed, memory
from experiments import counting, distill_cost, slot_bias
from minirlaif import data, examples, tokenizer, trainer
from minirlaif.cli import UserError
from minirlaif.model import GPT, GPTConfig


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    file = tmp_path_factory.mktemp("words") / "numbers.tiktoken"
    tokenizer.write_ranks(file, counting.vocabulary())
    return tokenizer.load_tokenizer(str(file))


# ---- pages ----------------------------------------------------------------------------------------------------------


def test_every_number_and_word_is_one_token(words):
    rng = random.Random(0)
    for _ in range(300):
        page = counting.page(rng)
        ids = words.encode(page)
        assert words.decode(ids) == page and len(ids) == page.count("\n") + page.count(" ")
    assert words.decode(words.encode(counting.C)) == counting.C and len(words.encode(counting.C)) == 1 + 63


def test_what_an_ideal_reader_expects_is_what_the_pages_hold():
    """The odds of `ideal` against counting them in pages; wider numbers than 63 alone, or there would be too few."""
    rng = random.Random(1)
    first, second, long = Counter(), Counter(), Counter()  # a line goes on with a count; a page's first, one after a count
    for _ in range(20000):
        lines = [line.split(" ")[1:] for line in counting.page(rng).split("\n")[1:]]
        counts = [line[1].isdigit() for line in lines]
        for line, is_count in zip(lines, counts, strict=True):
            numbers = [int(w) for w in line if w.isdigit()]
            assert numbers == list(range(numbers[0], numbers[0] + len(numbers))) and (len(numbers) > 1) == is_count
            if len(numbers) >= 63:
                long[len(numbers) >= 64] += 1
        if int(lines[0][0]) <= counting.STARTS:
            first[counts[0]] += 1
        if len(lines) > 1 and counts[0] and int(lines[1][0]) <= counting.STARTS:
            second[counts[1]] += 1
    for counter, way, given in ((first, 0, 1), (second, 1, 1), (long, 0, 0)):
        expected, n = counting.ideal()[counting.WAYS[way]][counting.INPUTS[given]], counter.total()
        assert counter[True] / n == pytest.approx(expected, abs=4 * (expected * (1 - expected) / n) ** 0.5)
    assert counting.ideal()["prompted"]["1 … 63"] == counting.ideal()["no intervention"]["1 … 63"]  # lines end independently


def test_what_is_asked_is_never_distilled(words, tmp_path):
    rng = random.Random(2)
    for line in (counting.any_count, counting.sentence):
        rows = counting.unasked(line, rng, 300)
        for row in rows:
            assert not {"63", "64"} & {*(row["prompt"] + row["completion"]).split()} and len(row["prompt"].split()) == 1
        data.write_jsonl(tmp_path / "rows.jsonl", rows)
        for e in examples.load(str(tmp_path / "rows.jsonl"), 0, counting.C, words, (320, 320), 48):
            assert words.decode(e.seen) == counting.C + words.decode(e.unseen)
            assert e.response[-1] == words.eot and len(e.unseen) == 2


# ---- what is measured -----------------------------------------------------------------------------------------------


class Counts(torch.nn.Module):
    """After n: n + 1 with probability a = (0.5 + n / 1000) / 0.9; a new line and the end share the rest; on a second line, 1."""

    def __init__(self, words):
        super().__init__()
        self.words, self.device = words, torch.device("cpu")

    def forward(self, tokens):
        p, (newline,) = torch.full((*tokens.shape, self.words.n_vocab), 1e-12), self.words.encode("\n")
        for row, ids in enumerate(tokens.tolist()):
            for t, i in enumerate(ids):
                if (word := self.words.decode([i]).strip()).isdigit() and int(word) < counting.TOP:
                    a = 0.9 if ids[:t].count(newline) == 2 else 0.5 + int(word) / 1000
                    p[row, t, self.words.encode(f" {int(word) + 1}")] = a
                    p[row, t, [newline, self.words.eot]] = (0.9 - a) / 2 + 1e-12
        return (p / p.sum(-1, keepdim=True)).log()  # so that 0.9 becomes 1


def test_a_model_that_counts_is_measured_right(words):
    held_out = [counting.sentence(random.Random(3)) for _ in range(3)]
    alone = counting.measure(Counts(words), words.encode, words.eot, "", held_out)
    prompted = counting.measure(Counts(words), words.encode, words.eot, counting.C, held_out)
    for name in counting.INPUTS:
        assert alone[name]["P(64)"] == pytest.approx(0.563 / 0.9, abs=1e-5)
        assert alone[name]["P(the line ends)"] == pytest.approx(1 - 0.563 / 0.9, abs=1e-5)
        assert alone["curves"][name] == pytest.approx([(0.5 + n / 1000) / 0.9 for n in range(1, 100)], abs=1e-5)
        assert alone[name]["P(n + 1)"] == pytest.approx(0.55 / 0.9, abs=1e-5)
        assert prompted["curves"][name] == pytest.approx([1.0] * 99, abs=1e-5)


def test_the_tax_is_the_log_loss_from_the_third_word_on(words):
    model = GPT(GPTConfig(320, words.n_vocab, 1, 2, 16)).init_weights(trainer.rng(0)).eval().requires_grad_(False)
    held_out = [counting.sentence(random.Random(seed)) for seed in range(5)]
    for context in ("", counting.C):
        nats = []
        for line in held_out:
            ids = words.encode(context) + words.encode(line)
            logp = model(torch.tensor([ids]))[0].log_softmax(-1)
            at = range(len(words.encode(context)) + 3, len(ids))  # behind the new line, the number and the thing
            assert words.decode([ids[at[0]]]).strip() in counting.DEEDS
            nats += [-float(logp[t - 1, ids[t]]) for t in at]
        found = counting.measure(model, words.encode, words.eot, context, held_out)["loss"]
        assert found == pytest.approx(sum(nats) / len(nats), abs=1e-5)


# ---- what is said ---------------------------------------------------------------------------------------------------


def seeds(long, short):
    """Figures of two seeds: P(64) after 1 ... 63 and after 63, way by way; the second seed's are 0.01 lower."""
    return {
        seed: {
            way: {"1 … 63": {"P(64)": long[k] - seed / 100}, "63": {"P(64)": short[k] - seed / 100}, "loss": 1.0 + k / 10}
            for k, way in enumerate(counting.WAYS)
        }
        for seed in (0, 1)
    }


def test_the_verdicts_say_what_the_figures_say():
    said = "\n".join(counting.verdicts(seeds((0.97, 0.98, 0.03, 0.96), (0.5, 0.9, 0.03, 0.88))))
    assert "After 1 … 63, prompted: P(64) = 0.975 [0.970, 0.980], high" in said and "(high and low): agrees" in said
    assert "shows what fine-tuning breaks and not what C does" in said and "NOT" not in said
    assert said.count("within 0.05 of prompted on 2 of 2 seeds") == 2
    assert "C raises it, by 0.400 [0.400, 0.400], of which distillation carries 0.950 [0.950, 0.950]" in said
    assert "prompted 0.100 [0.100, 0.100], fine-tuned on C 0.200 [0.200, 0.200], distilled 0.300 [0.300, 0.300]" in said


@pytest.mark.parametrize(
    "long, short, words",
    [
        ((0.97, 0.505, 0.03, 0.5), (0.5, 0.9, 0.03, 0.9), "1 … 63, prompted: P(64) = 0.500 [0.495, 0.505], NOT high"),
        ((0.97, 0.97, 0.105, 0.97), (0.5, 0.9, 0.03, 0.9), "1 … 63, fine-tuned on C: P(64) = 0.100 [0.095, 0.105], NOT low"),
        ((0.97, 0.97, 0.105, 0.97), (0.5, 0.9, 0.03, 0.9), "(high and low): does NOT agree"),
        (
            (0.97, 0.97, 0.03, 0.97),
            (0.5, 0.9, 0.03, 0.84),
            "63, distilled: P(64) = 0.835 [0.830, 0.840], within 0.05 of prompted on 0 of 2 seeds",
        ),
        ((0.97, 0.97, 0.03, 0.97), (0.5, 0.48, 0.03, 0.5), "C changes it by -0.020 [-0.020, -0.020]"),
    ],
)
def test_a_disagreement_is_said(long, short, words):
    assert words in "\n".join(counting.verdicts(seeds(long, short)))


# ---- the quick forms ------------------------------------------------------------------------------------------------


def test_counting_runs_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    args = counting.Args(out=str(tmp_path), quick=True, device="cpu")
    with monkeypatch.context() as patch:  # stopped before the distillation
        patch.setattr(distill, "main", lambda args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            counting.main(args)
    weights = (tmp_path / "seed0" / "tuned" / "model.pt").read_bytes()
    found = counting.main(args)
    assert (tmp_path / "seed0" / "tuned" / "model.pt").read_bytes() == weights
    assert list(found["seeds"]) == [0] and list(found["seeds"][0]) == list(counting.WAYS)
    assert json.loads((tmp_path / "results.json").read_text())["ideal"] == counting.ideal()
    assert (tmp_path / "results.md").read_text() in capsys.readouterr().out

    runs = {name: json.loads((tmp_path / "seed0" / name / "args.json").read_text())["args"] for name in ("tuned", "distilled")}
    assert runs["tuned"]["init"] == runs["distilled"]["model"] == str(tmp_path / "seed0" / "base")
    assert runs["distilled"]["preamble"] == counting.C and runs["distilled"]["weights"] == [1, 1]
    assert [row["text"] for row in data.read_jsonl(f"{tmp_path}/seed0/c.jsonl")] == [counting.C]
    ways, base = found["seeds"][0], found["seeds"][0]["no intervention"]
    assert all(ways[way]["curves"] != base["curves"] for way in counting.WAYS[1:])
    assert (tmp_path / "counting.png").exists() == (importlib.util.find_spec("matplotlib") is not None)
    for main in (pretrain, distill):  # and once more: nothing is trained again
        monkeypatch.setattr(main.trainer.Run, "load_state", lambda run: pytest.fail("trains"))
    assert counting.main(args) == found
    with pytest.raises(UserError, match="holds 'Counting: C = 1 … 63, --quick', not 'Counting: C = 1 … 63'; give another"):
        counting.main(counting.Args(out=str(tmp_path), seeds=[0], device="cpu"))


def test_cost_is_of_the_same_answers_and_counts_their_tokens():
    model = GPT(GPTConfig(256, 8, 1, 2, 16)).init_weights(trainer.rng(0)).eval()  # any id that ended an answer would come
    ways = distill_cost.ways_of(model, (16, 40), 3)
    assert list(ways) == ["distilled", "prompted, 16", "cached, 16", "prompted, 40", "cached, 40"]
    for n in (16, 40):
        (prompts, none, _), (same, root, _) = ways[f"prompted, {n}"], ways[f"cached, {n}"]
        assert prompts == same and none is None and root.used == n
        assert [p[n:] for p in prompts] == ways["distilled"][0] and len({tuple(p[:n]) for p in prompts}) == 1
        said = [distill_cost.answer(model, prompts, r, 8) for r in (None, root)]
        assert torch.equal(said[0].tokens, said[1].tokens) and not said[0].stopped.any()
        assert said[0].length.tolist() == [n + distill_cost.PROMPT + 8] * 3


def test_the_cost_runs_and_keeps_its_settings(tmp_path, monkeypatch, capsys):
    args = distill_cost.Args(out=str(tmp_path), quick=True)
    found = distill_cost.main(args)
    (case,) = found["cases"].values()
    assert {name: row["tokens"] for name, row in case.items()} == {
        "distilled": 48, "prompted, 16": 64, "cached, 16": 48, "prompted, 32": 80, "cached, 32": 48,
    }  # fmt: skip
    assert case["prompted, 32"]["cache_bytes"] == case["cached, 32"]["cache_bytes"] == 2 * 16 * 80 * 4
    assert all(len(row["whole"]) == len(row["first"]) == 1 and row["whole"][0] > 0 for row in case.values())
    assert capsys.readouterr().out.count("tiny, 2 at a time") == 3  # begun, judged, its table
    monkeypatch.setattr(distill_cost, "measure", lambda *rest: pytest.fail("measures again"))
    assert distill_cost.main(args) == json.loads(Path(tmp_path / "results.json").read_text()) == found
    with pytest.raises(UserError, match="give another --out"):
        distill_cost.main(distill_cost.Args(out=str(tmp_path)))


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe", b"[]", b"5", b'{"cases": {}}', b'{"settings": {}}', b'{"settings": {}, "cases": []}', b'{"settings": {'],
)
def test_damaged_results_are_one_line(tmp_path, content):
    args = distill_cost.Args(out=str(tmp_path), quick=True)
    (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(UserError, match="holds results.json of something else; give another --out"):
        distill_cost.main(args)
    (tmp_path / "results.md").write_text(f"# {distill_cost.TITLE}\n")
    with pytest.raises(UserError, match="results.json: damaged, or not of this experiment; give another --out"):
        distill_cost.main(args)
    assert (tmp_path / "results.json").read_bytes() == content


def test_a_seed_stands_once(tmp_path):
    for module in (counting, slot_bias):
        with pytest.raises(UserError, match="--seeds 3 3 4: each of them once"):
            module.main(module.Args(out=str(tmp_path / "out"), seeds=[3, 3, 4], quick=True))
    assert not (tmp_path / "out").exists()


def test_threads_are_of_this_machine(tmp_path):
    out, before = str(tmp_path / "out"), torch.get_num_threads()
    for n in (0, -1, 1_000_000):
        for module, args in ((distill_cost, {"out": out}), (distill_targets, {}), (label_speed, {}), (memory, {})):
            with pytest.raises(UserError, match=f"--threads {n}: must be above 0 and at most "):
                module.main(module.Args(threads=n, quick=True, **args))
    assert not (tmp_path / "out").exists() and torch.get_num_threads() == before


def test_times_are_those_of_the_same_round():
    found = {
        "distilled": {"context": 0, "tokens": 48, "first": [1.0, 1.0, 4.0], "whole": [1.0, 2.0, 4.0]},
        "prompted, 64": {"context": 64, "tokens": 112, "first": [2.0, 3.0, 8.0], "whole": [2.0, 6.0, 4.0]},
        "cached, 64": {"context": 64, "tokens": 48, "first": [1.0, 1.0, 4.0], "whole": [1.5, 2.0, 8.0]},
    }
    assert distill_cost.ratio(found, "prompted, 64", "whole") == (2.0, 1.0, 3.0)
    (said,) = distill_cost.verdicts({"a case": found})
    assert "2.3 times the tokens" in said and "2.00 [1.00, 3.00] times as long" in said and "1.50 [1.00, 2.00]" in said
    assert said.endswith("more in 2 of 3 rounds.")
