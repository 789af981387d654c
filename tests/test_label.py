"""label.py from end to end: responses, pairs, labels of every kind of judge, and a process that dies at chosen points."""

import functools
import json
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chat_server import ChatServer
from small import CPU, interrupted, rows_of, write

import evaluate
import evaluate_words
import label
import train_rm
from minirlaif import constitution, data, text, trainer, world
from minirlaif.cli import UserError
from minirlaif.journal import Journal
from minirlaif.labelers import Answer, Call, GoldJudge, Label, LocalJudge, combine
from minirlaif.model import GPT, GPTConfig
from minirlaif.tokenizer import load_tokenizer

TOY = constitution.load("toy")
ROOT = Path(label.__file__).parent
REQUEST = next(r for r in world.requests(("train",), [0]) if not r.harmful)
PROMPT = text.dialogue(REQUEST.text)
RIGHT = " " + world.right_answer(REQUEST.verb, REQUEST.thing).text


def label_args(judge, out, candidates=None, **changes):
    judge = [judge] if isinstance(judge, str) else judge
    return label.Args(**{**dict(judge=judge, out=str(out), candidates=candidates, batch_size=4, **CPU), **changes})


def sampled_args(judge, base, prompts, out, **changes):
    flags = dict(policy=base, contrast=base, data=prompts, limit=40, batch_size=16)
    return label_args(judge, out, **{**flags, **changes})


def candidates(path, n=6, k=2):
    """Prompts with k responses each, of different lengths, so that the server's judge likes one more than the other."""
    return write(path, [{"prompt": f"prompt {i}", "responses": [f"{i}" + "x" * j for j in range(k)]} for i in range(n)])


def preferences(out):
    return rows_of(Path(out) / "preferences.jsonl")


def fails(args, part):
    with pytest.raises(UserError) as error:
        label.main(args)
    assert part in str(error.value) and "\n" not in str(error.value), error.value
    return str(error.value)


# responses, and a local judge


def test_labels_have_the_fields_of_the_design(labelled, prompts, judge):
    out, result = labelled
    rows = preferences(out)
    assert {*rows[0]} >= {
        "prompt", "chosen", "rejected", "p_chosen", "group", "status", "labeler", "principle", "principle_name", "source",
        "p_first", "p_first_swapped", "disagreement", "first_is_chosen", "is_random", "error", "prompt_tokens",
        "completion_tokens", "cost",
    }  # fmt: skip
    assert len(rows) == result["n"] > 10 and len(rows) + sum(result["left_out"].values()) == 40
    asked = [p["prompt"] for p in rows_of(prompts)[:40]]
    for row in rows:
        p_first = (row["p_first"] + row["p_first_swapped"]) / 2
        assert row["prompt"] == asked[row["group"]] and row["chosen"] != row["rejected"] and row["labeler"] == judge
        assert 0.5 <= row["p_chosen"] <= 1
        assert row["status"] == "tie" or row["first_is_chosen"] == (p_first > 0.5)
        assert row["p_chosen"] == pytest.approx(max(p_first, 1 - p_first), abs=2e-6)
        assert row["status"] == ("tie" if row["p_chosen"] == 0.5 else "ok") and row["prompt_tokens"] > 0
        assert row["disagreement"] == 0
    assert {row["principle"] for row in rows} <= {p.text for p in TOY.preferences} and len({r["principle"] for r in rows}) > 3
    assert max(row["p_chosen"] for row in rows) > 0.6  # there is something to tell
    flips = [Label(0, r["p_first"], r["p_first_swapped"]).flipped for r in rows]
    assert result["flip_rate"] == pytest.approx(sum(flips) / len(rows))
    assert len(data.read_preferences(out / "preferences.jsonl")) == len(rows)
    found = rows_of(out / "candidates.jsonl")
    assert [row["prompt"] for row in found] == asked and {len(row["responses"]) for row in found} == {2}


def test_principles_are_drawn_by_name(judge, base, prompts, tmp_path):
    label.main(sampled_args(judge, base, prompts, tmp_path / "run", principles=["ad", "bias"]))
    rows = preferences(tmp_path / "run")
    assert {r["principle_name"] for r in rows} == {"ad", "bias"}
    assert {r["principle"] for r in rows} == {p.text for p in TOY.preferences_for("ad", "bias")}


def test_candidates_are_labelled_as_the_judge_sees_them(judge, tmp_path):
    """What the judge cannot read is a failed label, not a trainable pair; what cannot be compared is counted."""
    pairs = [
        (" take a wrench.", " you are a fool."), (" no.", " i can not talk about that."), (" " + "word " * 300, " no."),
        (" no.", " no."), (" ", " no."),
    ]  # fmt: skip
    path = write(tmp_path / "c.jsonl", [{"prompt": PROMPT, "responses": pair} for pair in pairs])
    result = label.main(label_args(judge, tmp_path / "run", path, principles=["insult"], batch_size=16))
    rows = preferences(tmp_path / "run")
    assert result["n"] == 2 and result["failed"] == 1 and len(rows) == 3
    assert result["left_out"] == {"same response twice": 1, "empty": 1}
    assert rows[2]["p_chosen"] is None and rows[2]["status"] == "failed"
    assert "does not fit the judge's context" in rows[2]["error"]
    assert len(data.read_preferences(tmp_path / "run" / "preferences.jsonl")) == 2
    alone = LocalJudge(trainer.load_gpt(judge), load_tokenizer("toy"), torch.device("cpu"), "fp32")
    for row, pair in zip(rows[:2], pairs, strict=False):
        asked = TOY.preferences_for("insult")[0].text
        expected = combine(*alone.ask([Call(PROMPT, pair, asked), Call(PROMPT, pair[::-1], asked)]))
        assert row["p_first"] == pytest.approx(expected.p_first, abs=1e-4)
        assert row["p_first_swapped"] == pytest.approx(expected.p_first_swapped, abs=1e-4)
        assert (row["chosen"], row["rejected"]) == (pair if expected.p >= 0.5 else pair[::-1])


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_where_the_second_responses_come_from(base, prompts, monkeypatch, share):
    """Share 0: both are the policy's. Share 1: the contrast, the policy run hot, and answers to other prompts."""
    calls, generate = [], label.generate

    def spy(model, shown, *args, **kwargs):
        calls.append((model, args[-1], len(shown)))
        return generate(model, shown, *args, **kwargs)

    monkeypatch.setattr(label, "generate", spy)
    policy, contrast, tokenizer = trainer.load_gpt(base), trainer.load_gpt(base), load_tokenizer("toy")
    asked = [row["prompt"] for row in rows_of(prompts)[:32]]
    args = sampled_args("none", base, prompts, "none", contrast_share=share, temperature=0.9)
    run = functools.partial(label.respond, args, asked, asked, policy, contrast, tokenizer, torch.device("cpu"), "fp32", 0)
    (first, second), (sources, later) = run()
    assert len(first) == len(second) == len(later) == 32 and calls[0] == (policy, 0.9, 32) and {*sources} == {"policy"}
    if share == 0:
        assert calls[1:] == [(policy, 0.9, 32)] and first != second and {*later} == {"policy"}
    else:
        counts = [later.count(way) for way in ("contrast", "hot", "elsewhere")]
        assert min(counts) > 3 and sum(counts) == 32
        models = zip((contrast, policy, policy), (0.9, label.HOT, 0.9), counts, strict=True)
        assert calls[1:] == list(models)
    assert run() == ([first, second], [sources, later])


def test_more_responses_are_further_samples(base, prompts):
    """k = 4 begins with the two of k = 2, and the others are noise of their own."""
    policy, asked = trainer.load_gpt(base), [row["prompt"] for row in rows_of(prompts)[:16]]

    def run(k):
        args = sampled_args("none", base, prompts, "none", contrast_share=0.0, responses=k)
        return label.respond(args, asked, asked, policy, None, load_tokenizer("toy"), torch.device("cpu"), "fp32", 0)[0]

    two, four = run(2), run(4)
    assert four[:2] == two and len({tuple(said) for said in four}) == 4


def test_labelling_interrupted_and_resumed_is_uninterrupted(judge, base, prompts, labelled, tmp_path, monkeypatch):
    for after in (1, 3, 4):  # 40 prompts are three batches, which are first answered, then labelled
        out = tmp_path / f"parts{after}"
        assert interrupted(monkeypatch, label.main, sampled_args(judge, base, prompts, out), after) == labelled[1]
        assert (out / "preferences.jsonl").read_bytes() == (labelled[0] / "preferences.jsonl").read_bytes()


# a process that dies

DYING = """
import json, os, sys
import label
from minirlaif import cli, journal, trainer

point, n, argv = sys.argv[1], int(sys.argv[2]), sys.argv[3:]

def die_after(function, die=lambda *args: None):
    def wrapper(*args, **kwargs):
        global n
        n -= 1
        if n < 0:
            die(*args)
            os._exit(9)
        return function(*args, **kwargs)
    return wrapper

def half_a_line(self, records, *durable):
    whole = b"".join(json.dumps({"key": k, "record": r}).encode() + b"\\n" for k, r in records.items())
    self.file.write(whole[: len(whole) * 2 // 3])
    self.file.flush()

if point == "sampling":
    label.respond = die_after(label.respond)
if point == "answer":
    journal.Journal.add = die_after(journal.Journal.add)
if point == "half":
    journal.Journal.add = die_after(journal.Journal.add, half_a_line)
if point == "state":
    label.record = die_after(label.record)
cli.run(label.main, label.Args, argv)
"""


def dies(point, n, *argv):
    """Run label.py until it dies at a point that it passes for the n-th time (counted from 0), and make sure that it does."""
    command = [sys.executable, "-c", DYING, point, n, *argv]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 9, done.stderr


def flags(args):
    given = {k: v for k, v in vars(args).items() if v is not None and v is not False and v != []}
    return [part for k, v in given.items() for part in ("--" + k.replace("_", "-"), *(v if isinstance(v, list) else [v]))]


@pytest.mark.parametrize("point, n", [("sampling", 2), ("half", 20), ("state", 20)])
def test_a_local_run_that_died_ends_with_the_same_bytes(judge, base, prompts, labelled, tmp_path, point, n):
    """While it samples; with a line of the second batch half-written; between the journal and the state."""
    args = sampled_args(judge, base, prompts, tmp_path / "run")
    dies(point, n, *flags(args))
    assert not (tmp_path / "run" / "preferences.jsonl").exists()
    label.main(replace(args, resume=True))
    for name in ("candidates.jsonl", "preferences.jsonl", "journal.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (labelled[0] / name).read_bytes(), name


def test_no_answer_of_an_endpoint_is_asked_for_again(tmp_path):
    """Killed twice between answers, and once more after the journal and before the state: every question was sent once."""
    rows = candidates(tmp_path / "c.jsonl", n=6, k=3)  # 6 x 3 pairs x 2 orders = 36 questions
    with ChatServer() as server:
        args = label_args(f"any@{server.url},concurrency=1,price=1/2", tmp_path / "whole", rows)
        label.main(args)
        whole = [r["body"]["messages"] for r in server.requests]
        assert len(whole) == 36
        server.requests.clear()
        args = replace(args, out=str(tmp_path / "parts"))
        # it dies *before* the next answer is written, so each of these deaths loses the one that was in flight
        dies("answer", 5, *flags(args))
        dies("answer", 9, *flags(args), "--resume")
        assert len(rows_of(tmp_path / "parts" / "journal.jsonl")) == 14 and len(server.requests) == 16
        dies("state", 1, *flags(args), "--resume")
        label.main(replace(args, resume=True))
        assert len(server.requests) == 36 + 2
    assert (tmp_path / "parts" / "preferences.jsonl").read_bytes() == (tmp_path / "whole" / "preferences.jsonl").read_bytes()
    keys = [row["key"] for row in rows_of(tmp_path / "parts" / "journal.jsonl")]
    assert len(keys) == len({*keys}) == 36
    assert sum(r["cost"] for r in preferences(tmp_path / "parts")) == pytest.approx(36 * (100 * 1 + 7 * 2) / 1000)


def stops_after(monkeypatch, args, n, add=Journal.add):
    """Run label.py until n answers are in the journal."""

    def die(self, records, *durable):
        add(self, records, *durable)
        if len(self.records) >= n:
            raise RuntimeError("the power is out")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(Journal, "add", die)
        label.main(args)


def test_a_run_without_logprobs_goes_on_as_it_was(tmp_path, monkeypatch):
    """It knows from its journal that letters are asked for in vain, and writes what an uninterrupted run does."""
    rows = candidates(tmp_path / "c.jsonl", n=12)  # 24 questions, and 3 letters
    with ChatServer("no logprobs") as server:
        args = label_args(f"any@{server.url},concurrency=1", tmp_path / "whole", rows)
        label.main(args)
        assert len(server.requests) == 27
        server.requests.clear()
        args = replace(args, out=str(tmp_path / "parts"))
        for n in (2, 10, 20):
            stops_after(monkeypatch, replace(args, resume=True), n)
        label.main(replace(args, resume=True))
        assert 27 <= len(server.requests) <= 27 + 3  # what was in flight
    assert (tmp_path / "parts" / "preferences.jsonl").read_bytes() == (tmp_path / "whole" / "preferences.jsonl").read_bytes()


def test_a_server_that_falls_silent_is_asked_the_rest_later(tmp_path):
    """No reply is no failed label, and no coin flip; the run is not finished, and goes on with what is missing."""
    rows = candidates(tmp_path / "c.jsonl", n=12)
    with ChatServer() as server:
        args = label_args(f"any@{server.url},concurrency=1,retries=0", tmp_path / "whole", rows, on_failure="random")
        label.main(args)
        server.script = ["ok"] * 7 + ["429"] + ["ok"] * 2 + ["500"]
        server.requests.clear()
        args = replace(args, out=str(tmp_path / "run"))
        line = fails(args, f"{tmp_path}/run: 15 of 24 answers are missing, the first because tried 1x: HTTP 429")
        assert "run it again with --resume, which asks for these alone" in line
        assert len(server.requests) == 10 + 3 and not (tmp_path / "run" / "preferences.jsonl").exists()
        assert all(row["record"]["p"] is not None for row in rows_of(tmp_path / "run" / "journal.jsonl"))
        fails(replace(args, resume=True), "15 of 24 answers are missing")
        server.script = ["ok"]
        server.requests.clear()
        assert label.main(replace(args, resume=True))["failed"] == 0 and len(server.requests) == 15
    assert (tmp_path / "run" / "preferences.jsonl").read_bytes() == (tmp_path / "whole" / "preferences.jsonl").read_bytes()


def test_a_wrong_address_is_put_right(tmp_path):
    """As long as there is no answer, all may be; later on, what does not change the answers."""
    rows = candidates(tmp_path / "c.jsonl", n=4)
    with ChatServer("404", *["ok"] * 5, "500", "ok") as server:
        args = label_args(f"mistyped@{server.url},concurrency=1", tmp_path / "run", rows)
        fails(args, "no such model")
        assert not (tmp_path / "run").exists()
        args = replace(args, judge=[f"any@{server.url},concurrency=1,retries=0"])
        fails(args, "1 of 8 answers are missing")
        elsewhere = server.url.replace("127.0.0.1", "localhost")
        fails(replace(args, resume=True, judge=[f"other@{elsewhere}"]), "--judge was ['any@")
        fails(replace(args, resume=True, judge=[f"any@{elsewhere},logprobs=0"]), "--judge was ['any@")
        judge = f"any@{elsewhere},concurrency=2,timeout=9,retries=2,price=1/1"
        assert label.main(replace(args, resume=True, judge=[judge]))["n"] == 4
        assert len(server.requests) == 1 + 8 + 1


def test_failures_that_are_paid_for_are_kept_and_grouped(tmp_path, capsys):
    rows = candidates(tmp_path / "c.jsonl", n=3)
    with ChatServer("empty") as server:
        args = label_args(f"any@{server.url},concurrency=1", tmp_path / "run", rows)
        why = "no pair could be labelled (3 x empty reply (finish_reason length)); its journal keeps failures too"
        fails(args, why)
        fails(replace(args, resume=True), why)
        assert len(server.requests) == 6
    with ChatServer(*["ok"] * 3, "empty", "ok") as server:
        label.main(label_args(f"any@{server.url},concurrency=1", tmp_path / "some", rows))
    assert "failed: 1 x empty reply (finish_reason length)\n" in capsys.readouterr().out


def test_a_journal_of_something_else_is_one_line(tmp_path, monkeypatch):
    rows = write(tmp_path / "c.jsonl", [{"prompt": PROMPT, "responses": [" no.", RIGHT]}] * 2)
    args = label_args("gold", tmp_path / "run", rows, principles=["helpfulness"])
    stops_after(monkeypatch, args, 2)
    with open(tmp_path / "run" / "journal.jsonl", "a") as f:
        f.write('{"key": "1/0/1/0/0/0", "record": {"said": "no answer"}}\n')
    fails(replace(args, resume=True), "journal.jsonl: a record is no Answer; give another --out")


def test_an_odd_reply_is_a_hard_verdict_and_is_said(tmp_path, capsys):
    rows = candidates(tmp_path / "c.jsonl", n=6)
    with ChatServer(*["ok"] * 5, "no logprobs", "ok") as server:
        result = label.main(label_args(f"any@{server.url},concurrency=1", tmp_path / "run", rows))
    found = preferences(tmp_path / "run")
    assert sorted(r["kind"] for r in found) == ["mixed"] + ["soft"] * 5 and result["hard"] == 1
    assert "1 from hard verdicts" in capsys.readouterr().out
    with ChatServer("no logprobs") as server:
        result = label.main(label_args(f"any@{server.url},logprobs=0", tmp_path / "hard", rows))
    assert {r["kind"] for r in preferences(tmp_path / "hard")} == {"verdict"} and result["hard"] == 6


def test_a_judge_that_is_free_stands_beside_one_with_a_price(tmp_path):
    rows = candidates(tmp_path / "c.jsonl", n=2)
    with ChatServer() as server:
        two = [f"dear@{server.url},price=1/2", f"own@{server.url},price=0/0"]
        label.main(label_args(two, tmp_path / "run", rows, max_cost=5.0))
        fails(label_args([two[0], f"own@{server.url}"], tmp_path / "no", rows, max_cost=5.0), "needs the prices of own")
    assert sum(r["cost"] for r in preferences(tmp_path / "run")) == pytest.approx(4 * 0.114)


def test_the_speed_is_that_of_what_this_run_has_asked(tmp_path, monkeypatch):
    """Ten seconds for six labels; then again ten seconds, for the two that were missing."""

    class Clock:
        ticks = -1

        def monotonic(self):
            self.ticks += 1
            return 10.0 * (self.ticks > 0)

    def speeds(out):
        return [row["labels_per_second"] for row in rows_of(out / "metrics.jsonl")]

    rows = write(tmp_path / "c.jsonl", [{"prompt": PROMPT, "responses": [" no.", RIGHT]}] * 6)
    args = label_args("gold", tmp_path / "whole", rows, batch_size=3)
    monkeypatch.setattr(label, "time", Clock())
    label.main(args)
    assert speeds(tmp_path / "whole") == [pytest.approx(0.3), pytest.approx(0.6)]
    args = replace(args, out=str(tmp_path / "run"))
    monkeypatch.setattr(label, "time", Clock())
    stops_after(monkeypatch, args, 8)
    monkeypatch.setattr(label, "time", Clock())
    label.main(replace(args, resume=True))
    assert speeds(tmp_path / "run")[-1] == pytest.approx(0.2)


def test_the_bar_moves_with_every_answer(tmp_path, monkeypatch):
    """It begins where the journal stands, and shows failures and cost as they come."""
    bars = []

    class Bar:
        def __init__(self, **options):
            self.options, self.shown = options, []
            bars.append(self)

        def set_postfix(self, refresh, **shown):
            self.shown.append(shown)

        def update(self):
            self.shown[-1]["moved"] = True

        def close(self):
            pass

    monkeypatch.setattr(label, "tqdm", Bar)
    rows = candidates(tmp_path / "c.jsonl", n=3)
    with ChatServer("ok", "ok", "empty", "ok") as server:
        args = label_args(f"any@{server.url},concurrency=1,price=1/0", tmp_path / "run", rows)
        stops_after(monkeypatch, args, 2)
        label.main(replace(args, resume=True))
    assert [(bar.options["total"], bar.options["initial"]) for bar in bars] == [(6, 0), (6, 2)]
    assert bars[1].shown == [{"failed": 1, "cost": f"0.{n}000", "moved": True} for n in (3, 4, 5, 6)]


def test_when_one_judge_stops_the_others_do_not_go_on_alone(tmp_path):
    rows = candidates(tmp_path / "c.jsonl", n=6)
    with ChatServer() as server:
        judges = [f"any@{server.url},concurrency=1,price=1/0", "gold"]
        fails(label_args(judges, tmp_path / "run", rows, batch_size=2, max_cost=0.1), "--max-cost 0.1 is reached")
    keys = [row["key"].split("/") for row in rows_of(tmp_path / "run" / "journal.jsonl")]
    assert {(number, judge) for number, _, _, judge, *_ in keys} == {("0", "0"), ("0", "1"), ("1", "1")}


def test_two_processes_do_not_share_a_run(tmp_path):
    args = label_args("ranks", tmp_path / "run", write(tmp_path / "c.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}]))
    (tmp_path / "run").mkdir()
    with Journal(tmp_path / "run" / "journal.jsonl"):
        fails(args, "journal.jsonl: another process is writing it")
    assert label.main(args)["n"] == 1


def test_max_cost_stops_with_one_line_and_a_higher_one_goes_on(tmp_path):
    rows = candidates(tmp_path / "c.jsonl", n=6)
    with ChatServer() as server:
        judge = f"any@{server.url},concurrency=1,price=1/2"  # 0.114 an answer
        label.main(label_args(judge, tmp_path / "whole", rows))
        server.requests.clear()
        args = label_args(judge, tmp_path / "run", rows, max_cost=0.5)
        assert "--resume and a higher --max-cost" in fails(args, "--max-cost 0.5 is reached (0.5700 spent, ")
        assert len(server.requests) == 5
        fails(replace(args, resume=True), "--max-cost 0.5 is reached")
        assert len(server.requests) == 5  # what it cost before counts
        label.main(replace(args, resume=True, max_cost=5.0))
        assert len(server.requests) == 12
    assert (tmp_path / "run" / "preferences.jsonl").read_bytes() == (tmp_path / "whole" / "preferences.jsonl").read_bytes()


@pytest.mark.parametrize("n", [1, 2])
def test_after_ctrl_c_nothing_more_is_sent_and_what_was_in_flight_is_kept(tmp_path, monkeypatch, n):
    rows, fill = candidates(tmp_path / "c.jsonl", n=20), Journal.fill

    def interrupting(self, keys, ask, kind, durable, on_answer):
        def press(answer):
            on_answer(answer)
            if len(self.records) == 5:
                signal.raise_signal(signal.SIGINT)

        return fill(self, keys, ask, kind, durable, press)

    with ChatServer() as server:
        args = label_args(f"any@{server.url},concurrency={n}", tmp_path / "run", rows, batch_size=16)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Journal, "fill", interrupting)
            label.main(args)
        assert 5 <= len(server.requests) == len(rows_of(tmp_path / "run" / "journal.jsonl")) < 5 + n
        label.main(replace(args, resume=True))
        assert len(server.requests) == 40


# k responses, ranks, several judges and principles, failures


def test_three_responses_are_one_batch_element_of_three_pairs(tmp_path):
    rows = [{"prompt": PROMPT, "responses": [" no.", " yes.", RIGHT]}, {"prompt": PROMPT, "responses": [" a.", " b.", " no."]}]
    path = write(tmp_path / "c.jsonl", rows)
    label.main(label_args("gold", tmp_path / "run", path, principles=["helpfulness"]))
    tokenizer = load_tokenizer("toy")
    groups = train_rm.load_groups(str(tmp_path / "run" / "preferences.jsonl"), tokenizer, GPTConfig(), "error")
    assert [sorted(g.p) for g in groups] == [[(0, 1), (0, 2), (1, 2)]] * 2  # one prompt, but not one group
    found = {frozenset((r["chosen"], r["rejected"])): r for r in preferences(tmp_path / "run")[:3]}
    assert len(found) == 3
    assert found[frozenset((" no.", RIGHT))]["chosen"] == RIGHT and found[frozenset((" no.", RIGHT))]["p_chosen"] > 0.9


def test_ranks_become_pairs_without_a_judge(tmp_path):
    path = write(tmp_path / "c.jsonl", [{"prompt": "p", "responses": ["a", "b", "c"], "ranks": [2, 1, 2]}])
    label.main(label_args("ranks", tmp_path / "run", path))
    rows = preferences(tmp_path / "run")
    assert [(r["chosen"], r["rejected"], r["p_chosen"], r["status"]) for r in rows] == [
        ("b", "a", 1.0, "ok"), ("a", "c", 0.5, "tie"), ("b", "c", 1.0, "ok"),
    ]  # fmt: skip
    assert {r["labeler"] for r in rows} == {"ranks"} and all(r["cost"] == 0 and "human_p" not in r for r in rows)


def test_ranks_need_no_constitution_and_name_no_principle(tmp_path):
    """Gold compares them with less harm, and with nothing that people were not asked."""
    insulting = f" {world.SENTENCES['insult'][0]}{RIGHT}"
    path = write(tmp_path / "c.jsonl", [{"prompt": PROMPT, "responses": [insulting, RIGHT], "ranks": [2, 1]}] * 3)
    label.main(label_args("ranks", tmp_path / "run", path, constitution=str(tmp_path / "none.json")))
    assert {(r["principle"], r["principle_name"]) for r in preferences(tmp_path / "run")} == {("", "")}
    found = str(tmp_path / "run" / "preferences.jsonl")
    assert len(data.read_preferences(found)) == 3
    results = evaluate.main(evaluate.Args(out=str(tmp_path / "eval"), preferences=found, **CPU))["labels"]
    assert results["agreement_overall"]["n"] == 3 and results["agreement_overall"]["value"] == 1
    assert results["agreement_principle"]["n"] == 0 and results["by_principle"] == {}
    report = evaluate_words.labels(evaluate_words.LabelsArgs(files=[found]))[found]
    assert report["labels"] == 3 and report["agreement"]["n"] == 0


def test_ranks_stand_beside_the_labels_of_a_judge(tmp_path):
    path = write(tmp_path / "c.jsonl", [{"prompt": PROMPT, "responses": [" no.", RIGHT], "ranks": [1, 2]}])
    label.main(label_args("gold", tmp_path / "run", path, principles=["helpfulness"]))
    (row,) = preferences(tmp_path / "run")
    assert row["chosen"] == RIGHT and row["human_p"] == 1.0  # P(the first is better), by the human


def test_two_judges_give_their_mean_and_disagreement(tmp_path):
    path = write(tmp_path / "c.jsonl", [{"prompt": PROMPT, "responses": [" no.", RIGHT]}])
    specs = ["gold,sharpness=2", "gold,sharpness=1,noise=1"]  # the second is always wrong
    label.main(label_args(specs, tmp_path / "run", path, principles=["helpfulness"]))
    (row,) = preferences(tmp_path / "run")
    p, q = 1 / (1 + 2.718281828**2), 1 / (1 + 2.718281828**-1)  # P(the first is better)
    assert row["chosen"] == RIGHT and row["labeler"] == "+".join(specs)
    assert row["p_chosen"] == pytest.approx(1 - (p + q) / 2, abs=1e-5)
    assert row["disagreement"] == pytest.approx((q - p) / 2, abs=1e-5)


def test_several_principles_a_pair(tmp_path):
    path = write(tmp_path / "c.jsonl", [{"prompt": PROMPT, "responses": [" no.", RIGHT]}])
    label.main(label_args("gold", tmp_path / "run", path, per_pair=2, principles=["helpfulness", "insult"]))
    (row,) = preferences(tmp_path / "run")
    keys = [r["key"] for r in rows_of(tmp_path / "run" / "journal.jsonl")]
    assert len(keys) == len({*keys}) == 4  # two principles, two orders
    assert len(row["principle"].split(" / ")) == 2 and len(row["principle_name"].split("+")) == 2


def test_a_label_is_the_mean_of_what_could_be_asked():
    """A failed call costs nothing but itself, and its error is kept; tokens and cost count all."""
    pair = label.Pair({"prompt": "p", "responses": ["a", "b"]}, 3, 0, 1, TOY.preferences[:2])
    labels = [Label(None, None, None, 10, 1, 0.5, "HTTP 500"), Label(0.2, 0.3, 0.1, 20, 2, 0.25)]
    row = label.record(pair, labels, "j")
    assert (row["p_chosen"], row["chosen"], row["status"], row["error"]) == (0.8, "b", "ok", "HTTP 500")
    assert (row["prompt_tokens"], row["completion_tokens"], row["cost"], row["disagreement"]) == (30, 3, 0.75, 0)


@pytest.mark.parametrize("what", ["drop", "random"])
def test_what_fails_is_dropped_or_a_marked_coin_flip(tmp_path, what):
    """One answer cannot be read: its pair fails. It is paid for all the same."""
    rows = candidates(tmp_path / "c.jsonl", n=20)
    with ChatServer(*["ok"] * 3, "empty", "ok") as server:
        args = label_args(f"any@{server.url},concurrency=1,price=1/0", tmp_path / "run", rows, on_failure=what)
        result = label.main(args)
    found = preferences(tmp_path / "run")
    (failed,) = [r for r in found if r["status"] == "failed"]
    assert result["failed"] == 1 and failed["error"] == "empty reply (finish_reason length)"
    assert failed["prompt_tokens"] == 200 and failed["cost"] == pytest.approx(0.2)
    assert failed["is_random"] == (what == "random") and failed["p_chosen"] == (1.0 if what == "random" else None)
    assert not any(r["is_random"] for r in found if r is not failed) and "p_first" in failed and failed["p_first"] is None
    kept = data.read_preferences(tmp_path / "run" / "preferences.jsonl")
    assert len(kept) == (20 if what == "random" else 19)


def test_a_flip_needs_a_side_in_both_orders():
    rows = [dict(p_first=p, p_first_swapped=q) for p, q in ((0.9, 0.2), (0.4, 0.6), (0.9, 0.8), (0.5, 0.7), (0.5, 0.3))]
    assert label.flip_rate([*rows, dict(p_first=None, p_first_swapped=None)]) == 2 / 5
    assert label.flip_rate([rows[2] | dict(each=[[0.9, 0.2], [0.9, 0.9]])]) == 1 / 2  # of each judge, which their mean hides


def test_the_coin_is_fair_and_its_own():
    pair = label.Pair({"prompt": "p", "responses": ["a", "b"]}, 0, 0, 1, TOY.preferences[:1])
    failed = [Label(None, None, None, error="x")]
    flips = [label.record(pair, failed, "j", "random", random.Random(f"coin {i}"))["chosen"] for i in range(400)]
    assert 150 < flips.count("a") < 250


def test_gold_from_end_to_end(labelled, base, prompts, tmp_path):
    """RLHF on the pairs that a model labelled: the same pairs, in the same order, with the scorer's verdicts."""
    label.main(label_args("gold", tmp_path / "run", str(labelled[0] / "candidates.jsonl"), principles=["helpfulness"]))
    rows, others = preferences(tmp_path / "run"), preferences(labelled[0])
    assert [(r["group"], {r["chosen"], r["rejected"]}, r["source"]) for r in rows] == [
        (r["group"], {r["chosen"], r["rejected"]}, r["source"]) for r in others
    ]
    judge = GoldJudge({p.text: p.name for p in TOY.preferences})
    for row in rows:
        answer = judge.answer(Call(row["prompt"], (row["chosen"], row["rejected"]), row["principle"]))
        assert row["p_chosen"] == pytest.approx(max(answer.p, 0.5), abs=1e-6) and row["labeler"] == "gold"


@pytest.mark.parametrize("clamp, high", [("20-80", 0.8), ("40-60", 0.6)])
def test_labels_can_be_clamped(tmp_path, clamp, high):
    path = write(tmp_path / "c.jsonl", [{"prompt": PROMPT, "responses": [" no.", RIGHT]}])
    label.main(label_args("gold", tmp_path / "run", path, principles=["helpfulness"], clamp=clamp))
    assert [r["p_chosen"] for r in preferences(tmp_path / "run")] == [high]


# what the user can put right

LONG = [{"prompt": PROMPT}, {"prompt": "\n\nHuman: " + "bike " * 250 + "\n\nAssistant:"}]
TWO = {"prompt": PROMPT, "responses": ["a", "b"]}
BASE, GOLD = "the base model's folder", ["gold"]
NAN = float("nan")
MISTAKES = [
    (dict(judge=GOLD, policy=BASE, data=LONG), "data.jsonl:2: longer than the model's context"),
    (dict(judge=GOLD, policy=BASE, data=LONG[:1], others=LONG), "others.jsonl:2: longer than the model's context"),
    (dict(judge=GOLD, policy=BASE, data=LONG[:1], max_new_tokens=10**6), "--max-new-tokens 1000000: the model's context holds"),
    (dict(judge=GOLD, policy=BASE, data=LONG[:1], principles=["ad", "kindness"]), "--principles kindness: toy has ad,"),
    (dict(judge=GOLD, policy=BASE, data=LONG[:1], contrast_share=1.5), "--contrast-share 1.5: must be in 0-1"),
    (dict(judge=GOLD, policy=BASE, data=LONG[:1], contrast_share=NAN), "--contrast-share nan: must be in 0-1"),
    (dict(judge=GOLD, policy=BASE, data=LONG[:1], responses=1), "--responses 1: it takes two"),
    (dict(judge=GOLD, data=LONG), "--data needs --policy"),
    (dict(judge=GOLD), "give either --data (with --policy) or --candidates"),
    (dict(judge=GOLD, policy=BASE, data=LONG, candidates=[TWO]), "give either --data"),
    (dict(judge=GOLD, contrast=BASE, candidates=[TWO]), "--candidates brings its own responses"),
    (dict(judge=GOLD, others=LONG[:1], candidates=[TWO]), "--policy, --contrast and --others need --data"),
    (dict(judge=GOLD, candidates=[TWO, {**TWO, "responses": ["a"]}]), "candidates.jsonl:2: 'responses' should be"),
    (
        dict(judge=[BASE], candidates=[{**TWO, "responses": ["a", "bike " * n]} for n in (300, 301)]),
        "no pair could be labelled (2 x a prompt of N tokens does not fit the judge's context of N)",
    ),
    (dict(judge=GOLD, candidates=""), "--candidates: names no file"),
    (dict(judge=GOLD, policy=BASE, data=""), "--data: names no file"),
    (dict(judge=GOLD, candidates=[TWO], per_pair=17), "--per-pair 17: must be at most 16"),
    (dict(judge=GOLD, policy=BASE, data=LONG[:1], responses=9), "--responses 9: must be at most 8"),
    (dict(judge=GOLD, candidates=[{**TWO, "responses": ["a", "a"]}]), "could be labelled (left out: {'same response twice': 1})"),
    (dict(judge=GOLD, candidates=[TWO], principles=["danger"], constitution=["be good"]), "principles without names: leave"),
    (dict(judge=["ranks"], candidates=[TWO]), "candidates.jsonl:1: no key 'ranks'"),
    (dict(judge=["ranks", "gold"], candidates=[TWO]), "--judge ranks takes the ranks"),
    (dict(judge=[], candidates=[TWO]), "name at least one judge"),
    (dict(judge=["no/model"], candidates=[TWO]), "no/model: no such model file"),
    (dict(judge=["gold,nose=1"], candidates=[TWO]), "gold judges have no option 'nose'"),
    (dict(judge=["m@http://127.0.0.1:1/v1"], candidates=[TWO], max_cost=1.0), "--max-cost needs the prices of m"),
    (dict(judge=GOLD, candidates=[TWO], max_cost=1.0), "--max-cost: no --judge is an endpoint"),
    (dict(judge=["m@http://me:hush@host/v1"], candidates=[TWO]), "with no password or query in the URL"),
    (dict(judge=GOLD, candidates=[TWO], max_cost=NAN), "--max-cost nan: must be above 0"),
]


@pytest.mark.parametrize("given, part", MISTAKES)
def test_a_mistake_is_one_line_that_says_where(base, tmp_path, given, part):
    """Lists of rows become files named after their flag."""

    def value(flag, given):
        if flag == "constitution":
            (tmp_path / "constitution.json").write_text(json.dumps(given))
            return str(tmp_path / "constitution.json")
        if isinstance(given, list) and given and isinstance(given[0], dict):
            return write(tmp_path / f"{flag}.jsonl", given)
        return [base] if given == [BASE] else base if given is BASE else given

    error = fails(label.Args(out=str(tmp_path / "run"), **{k: value(k, v) for k, v in given.items()}, **CPU), part)
    assert "hush" not in error and "journal" not in error
    assert not (tmp_path / "run").exists()  # found before there was anything to keep


def test_the_answers_of_another_run_are_not_taken_over(tmp_path):
    """A journal that lies in a folder without a run is of one that never began."""
    path = write(tmp_path / "c.jsonl", [{"prompt": PROMPT, "responses": [" no.", RIGHT]}])
    (tmp_path / "run").mkdir()
    lines = [{"key": f"0/0/1/0/0/{order}", "record": vars(Answer(0.5))} for order in (0, 1)]
    write(tmp_path / "run" / "journal.jsonl", lines)
    label.main(label_args("gold", tmp_path / "run", path, principles=["helpfulness"]))
    assert preferences(tmp_path / "run")[0]["p_chosen"] > 0.9


def test_a_policy_that_is_no_language_model(tmp_path, base):
    config = GPTConfig(vocab_size=load_tokenizer("toy").n_vocab, n_layer=1, n_head=1, n_embd=8)
    trainer.save_model(tmp_path / "rm.pt", config, GPT(config).state_dict(), "reward", "toy")
    args = sampled_args("gold", str(tmp_path / "rm.pt"), write(tmp_path / "p.jsonl", LONG[:1]), tmp_path / "run", contrast=None)
    fails(args, "holds a model of kind 'reward', where 'gpt' is needed")
