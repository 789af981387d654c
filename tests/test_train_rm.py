"""train_rm.py end to end on a tiny model and made-up preferences: what it learns, what it reports, what resume keeps."""

import gzip
import json
import random
from dataclasses import replace

import pytest
import torch

import train_rm
from minirlaif import cli, trainer
from minirlaif.cli import UserError
from minirlaif.losses import kwise_loss, preference_loss
from minirlaif.model import GPT, GPTConfig
from minirlaif.tokenizer import load_tokenizer, write_ranks

FP32 = trainer.autocast(torch.device("cpu"), "fp32")


def pair(i, rng):
    """A rule that can be learned: the response with the exclamation mark is better. Lengths are ragged."""
    word = "".join(rng.choices("abcdefgh", k=rng.randint(1, 9)))
    good, bad = (f" {''.join(rng.choices('abcdefgh', k=rng.randint(1, 9)))}{sign}" for sign in "!.")
    return {"prompt": f"\n\nHuman: {word}{i}?\n\nAssistant:", "chosen": good, "rejected": bad}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("rm")
    write_ranks(home / "bytes.tiktoken", {bytes([i]): i for i in range(256)})
    config = GPTConfig(block_size=64, vocab_size=257, n_layer=1, n_head=2, n_embd=32)
    gpt = GPT(config).init_weights(trainer.rng(0, "base"))
    trainer.save_model(home / "base.pt", config, gpt.state_dict(), "gpt", str(home / "bytes.tiktoken"))
    rng = random.Random(0)
    write(home / "pairs.jsonl", [pair(i, rng) for i in range(200)])
    return home


def make_args(home, out, **changes):
    args = train_rm.Args(
        out=str(out), init=str(home / "base.pt"), data=[str(home / "pairs.jsonl")], epochs=3, batch_size=16, lr=3e-3,
        eval_fraction=0.2, device="cpu", dtype="fp32",
    )
    return replace(args, **changes)


def metrics(out):
    """All but the speed, which no two runs share."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: x for name, x in row.items() if name != "tokens_per_second"} for row in rows]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def finished(home, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "rm"
    return out, train_rm.main(make_args(home, out))


def load_groups(home, path):
    tokenizer = load_tokenizer(str(home / "bytes.tiktoken"))
    return train_rm.load_groups(path, tokenizer, GPTConfig(block_size=64, vocab_size=257), "error")


def test_it_learns_the_rule_and_says_how_sure_it_is(finished, capsys):
    out, result = finished
    assert result["eval/accuracy"] >= 0.9 and result["eval/pairs"] == 40 and result["eval/ties"] == 0
    assert result["eval/accuracy_low"] < result["eval/accuracy"] <= result["eval/accuracy_high"] <= 1
    losses = [row["loss/preference"] for row in metrics(out) if "loss/preference" in row]
    assert len(losses) == 3 * 10 and losses[-1] < losses[0] / 2  # ceil(160 / 16) steps an epoch


def test_scores_of_the_reference_samples_have_mean_zero_and_std_one(home, finished):
    out, _ = finished
    model = trainer.load_reward(out)
    train, held_out = train_rm.split(load_groups(home, str(home / "pairs.jsonl")), 0.2, seed=0)
    scores = torch.cat([s.flatten() for s, _ in train_rm.score_all(model, train, 256, FP32)])
    assert scores.mean().abs() < 1e-4 and scores.std().item() == pytest.approx(1, abs=1e-4)
    assert model.gain != 1 and model.bias != 0  # and they were stored
    after = train_rm.evaluate(model, held_out, 256, FP32)
    assert after["eval/accuracy"] == finished[1]["eval/accuracy"]  # an increasing map changes no order


@pytest.mark.parametrize("kind", ["completions", "preferences"])
def test_other_reference_samples_may_be_named(home, tmp_path, kind):
    rng = random.Random(1)
    rows = [pair(i, rng) for i in range(30)]
    texts = [(r["prompt"], r[k]) for r in rows for k in ("chosen", "rejected")]
    if kind == "completions":
        rows = [{"prompt": p, "completion": c, "stopped": True} for p, c in texts]
    path = write(tmp_path / "reference.jsonl", rows)
    train_rm.main(make_args(home, tmp_path / "run", epochs=1, normalise_on=path))
    model, encode = trainer.load_reward(tmp_path / "run"), load_tokenizer(str(home / "bytes.tiktoken")).encode
    with torch.no_grad():
        ids = [encode(p) + encode(c) + [256] for p, c in texts]
        scores = torch.cat([model(torch.tensor([x]), torch.tensor([len(x)])) for x in ids])
    assert scores.mean().abs() < 1e-4 and scores.std().item() == pytest.approx(1, abs=1e-4)


class Killed(BaseException):
    """Like kill -9: nothing gets to clean up."""


@pytest.mark.parametrize("kill_at", [4, 10])
def test_killed_and_resumed_is_uninterrupted_bit_for_bit(home, finished, tmp_path, monkeypatch, kill_at):
    out, args = tmp_path / "run", make_args(home, tmp_path / "run")
    log, end_step = trainer.Run.log, trainer.Run.end_step

    def killed(run, step, **row):
        if step == kill_at:
            raise Killed
        log(run, step, **row)

    monkeypatch.setattr(trainer.Run, "end_step", lambda run, *a: setattr(run, "save_every_s", 0.0) or end_step(run, *a))
    monkeypatch.setattr(trainer.Run, "log", killed)
    with pytest.raises(Killed):
        train_rm.main(args)
    monkeypatch.setattr(trainer.Run, "log", log)
    torch.manual_seed(12345)  # nothing may depend on the global generator
    result = train_rm.main(replace(args, resume=True))
    assert same(trainer.load_reward(out).state_dict(), trainer.load_reward(finished[0]).state_dict())
    assert metrics(out) == metrics(finished[0]) and result == finished[1]


def test_soft_labels_cap_the_margin(home, tmp_path):
    """Trained to the end on labels of 0.6, the raw margin is logit(0.6) = 0.405, and normalising makes it matter again."""
    rng = random.Random(0)
    path = write(tmp_path / "soft.jsonl", [pair(i, rng) | {"p_chosen": 0.6} for i in range(100)])
    args = make_args(home, tmp_path / "run", data=[path], epochs=12, eval_fraction=0.0, weight_decay=0.0)
    result = train_rm.main(args)
    model = trainer.load_reward(tmp_path / "run")
    margins = [s[:, 0] - s[:, 1] for s, _ in train_rm.score_all(model, load_groups(home, path), 256, FP32)]
    margin = torch.cat(margins).mean().item()
    assert margin * result["reference/std"] == pytest.approx(0.405, abs=0.05)
    assert margin > 1.5


def test_a_group_is_one_element_with_every_response_once(home, tmp_path):
    prompt = "\n\nHuman: x?\n\nAssistant:"
    rows = [
        {"prompt": prompt, "chosen": " a", "rejected": " b", "p_chosen": 0.9, "group": 1},
        {"prompt": prompt, "chosen": " c", "rejected": " a", "p_chosen": 0.8, "group": 1},
        {"prompt": prompt, "chosen": " b", "rejected": " a", "p_chosen": 0.7, "group": 1},  # labelled again, the other way
        {"prompt": prompt, "chosen": " a", "rejected": " b", "p_chosen": 1.0},
    ]
    group, alone = load_groups(home, write(tmp_path / "k.jsonl", rows))
    assert group.texts == [" a", " b", " c"] and alone.texts == [" a", " b"]
    assert group.p == {(0, 1): [0.9, pytest.approx(0.3)], (0, 2): [pytest.approx(0.2)]}
    assert group.ids[1] == [*prompt.encode(), *b" b", 256]  # end-of-text is where the score is read

    model = trainer.load_gpt(home / "base.pt")
    reward = train_rm.RewardModel(model, generator=trainer.rng(0)).eval()
    scores, p = train_rm.score_groups(reward, [group, alone], 256, FP32)
    assert scores.shape == (2, 3) and p[0, 0, 1].item() == pytest.approx(0.6) and p[0, 1, 2].isnan() and p[1, :, 2].isnan().all()
    two = preference_loss(scores[0, [0, 0]], scores[0, [1, 2]], torch.tensor([0.6, 0.2]))
    one = preference_loss(scores[1, :1], scores[1, 1:2], torch.ones(1))
    torch.testing.assert_close(kwise_loss(scores, p), (two + one) / 2)


def test_parts_and_the_whole_give_the_same_weights(home, finished, tmp_path, monkeypatch):
    """However a batch is cut into forwards, the step is that of the batch."""
    monkeypatch.setitem(train_rm.TOKENS_PER_FORWARD, "cpu", 200)
    train_rm.main(make_args(home, tmp_path / "run"))
    whole, parts = metrics(finished[0])[:5], metrics(tmp_path / "run")[:5]
    for a, b in zip(whole, parts, strict=True):
        assert a == pytest.approx(b, rel=1e-3)


def test_no_prompt_is_on_both_sides_of_the_split(home):
    groups = load_groups(home, str(home / "pairs.jsonl"))
    groups += [replace(g, p=dict(g.p)) for g in groups]  # every prompt twice
    train, held_out = train_rm.split(groups, 0.25, seed=3)
    assert len(held_out) == 100 and len(train) == 300
    assert not {g.prompt for g in train} & {g.prompt for g in held_out}


def test_ties_are_left_out_of_accuracy_but_not_of_the_loss(home, finished):
    model = trainer.load_reward(finished[0])
    groups = load_groups(home, str(home / "pairs.jsonl"))[:4]
    for group, p in zip(groups, (1.0, 0.5, 0.5, 0.9), strict=True):
        group.p = {(0, 1): [p]}
    result = train_rm.evaluate(model, groups, 256, FP32)
    assert result["eval/pairs"] == 2 and result["eval/ties"] == 2
    scores = torch.cat([train_rm.score_groups(model, [g], 256, FP32)[0] for g in groups]).detach()
    loss = preference_loss(scores[:, 0], scores[:, 1], torch.tensor([1.0, 0.5, 0.5, 0.9]))
    assert result["eval/loss"] == pytest.approx(loss.item(), rel=1e-4)


def test_a_label_for_the_second_response_is_read_the_right_way_round(home, finished, tmp_path):
    """'chosen' came second in an earlier pair of the group: P(first is better) must be turned over."""
    rows = [json.loads(line) for line in (home / "pairs.jsonl").read_text().splitlines()[:30]]
    turned = [r | {"group": i, "chosen": r["rejected"], "rejected": r["chosen"], "p_chosen": 0.5} for i, r in enumerate(rows)]
    real = [r | {"group": i} for i, r in enumerate(rows)]
    interleaved = [row for two in zip(turned, real, strict=True) for row in two]
    groups = load_groups(home, write(tmp_path / "t.jsonl", interleaved))
    result = train_rm.evaluate(trainer.load_reward(finished[0]), groups, 256, FP32)
    assert result["eval/accuracy"] >= 0.9


def test_hh_rlhf_files_are_read_as_published(home, tmp_path):
    rng = random.Random(0)
    rows = [{k: row["prompt"] + row[k] for k in ("chosen", "rejected")} for row in (pair(i, rng) for i in range(40))]
    with gzip.open(tmp_path / "hh.jsonl.gz", "wt") as f:
        f.writelines(json.dumps(row) + "\n" for row in [*rows, {"chosen": "no dialogue", "rejected": "none"}])
    args = make_args(home, tmp_path / "run", data=[str(tmp_path / "hh.jsonl.gz")], epochs=1)
    with pytest.raises(UserError, match="hh.jsonl.gz:41: .*do not share a prompt"):
        train_rm.main(args)
    result = train_rm.main(replace(args, on_bad_row="skip", eval_data=[str(home / "pairs.jsonl")]))
    assert result["eval/pairs"] == 200 and result["reference/samples"] == 80


def test_a_pair_that_is_too_long_is_named_or_skipped(home, tmp_path, capsys):
    rng = random.Random(0)
    rows = [pair(i, rng) for i in range(20)]
    rows[6]["rejected"] = " " + "x" * 60
    args = make_args(home, tmp_path / "run", data=[write(tmp_path / "long.jsonl", rows)], epochs=1)
    with pytest.raises(UserError, match=r"long.jsonl:7: longer than the model's context: \d+ prompt \+ 62 response"):
        train_rm.main(args)
    train_rm.main(replace(args, on_bad_row="skip"))
    assert "skipped 1 of 20" in capsys.readouterr().err


def test_nan_stops_with_one_line(home, tmp_path, monkeypatch):
    monkeypatch.setattr(train_rm, "kwise_loss", lambda scores, p: scores.sum() * float("nan"))
    with pytest.raises(UserError, match="step 0: loss is nan; last good checkpoint: none yet") as error:
        train_rm.main(make_args(home, tmp_path / "run"))
    assert "\n" not in str(error.value)


def test_wilson_interval():
    assert train_rm.wilson(81, 100) == pytest.approx((0.7222, 0.8749), abs=1e-4)
    assert train_rm.wilson(10, 10)[1] == pytest.approx(1) and train_rm.wilson(10, 10)[0] == pytest.approx(0.7225, abs=1e-4)
    assert train_rm.wilson(0, 0) == (0.0, 1.0)


def test_help_and_the_number_of_flags(capsys):
    with pytest.raises(SystemExit):
        cli.parse(train_rm.Args, ["--help"])
    assert "--normalise-on" in capsys.readouterr().out
    assert len(train_rm.Args.__dataclass_fields__) <= 25


def test_length_heuristics_count_the_longer_and_the_shorter():
    def group(lengths, p):
        return train_rm.Group("", ids=[[0] * n for n in lengths], p={(0, 1): [p]})

    groups = [group((3, 2), 0.9), group((2, 3), 0.9), group((5, 1), 0.2), group((2, 2), 1.0), group((9, 1), 0.5)]
    assert train_rm.length_heuristics(groups) == {"eval/longer_is_better": 1 / 4, "eval/shorter_is_better": 2 / 4}
