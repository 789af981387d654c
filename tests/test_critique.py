"""Critique and revision beside what test_scripts checks: examples, no critique, prompts that the model writes, a server as the
critic, and the table at the end. The model is a function that says what the test expects, or one of random weights."""

import json
import random
import signal
from dataclasses import replace

import pytest
import torch
from chat_server import ChatServer

import critique
from minirlaif import constitution, redteam, text, trainer
from minirlaif.cli import UserError
from minirlaif.endpoint import Completion
from minirlaif.journal import Journal
from minirlaif.labelers import LocalJudge
from minirlaif.model import GPT, GPTConfig
from minirlaif.tokenizer import load_tokenizer

PAIRS = [constitution.CritiqueRevision(f"critique {i}?", f"revise {i}.") for i in range(3)]
TOKENIZER = load_tokenizer("toy")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = GPTConfig(vocab_size=TOKENIZER.n_vocab, n_layer=1, n_head=1, n_embd=16, block_size=128)
    path = str(tmp_path_factory.mktemp("model"))
    trainer.save_model(path, config, GPT(config).state_dict(), "gpt", "toy")
    return path


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def prompts_file(folder, *requests):
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text.dialogue(r)}) + "\n" for r in requests))
    return str(path)


class Speaker:
    """A model that knows what is wanted from how the prompt ends; `drafts` are what it says after "Human:"."""

    def __init__(self, drafts=()):
        self.drafts, self.asked = list(drafts), []

    def __call__(self, prompts, seed, paragraph):
        self.asked += prompts
        said = [self.say(p) for p in prompts]
        return [s.removesuffix("...") for s in said], [not s.endswith("...") for s in said]

    def say(self, prompt):
        if prompt.endswith("Human:"):
            return self.drafts.pop(0)
        if prompt.endswith("Critique:"):
            return " it sells."
        revisions = prompt.count("Revision:")
        return " let us speak of something else." if revisions else " to fix the bike, take a wrench and turn the wheel."


def args_for(model, prompts, out, **changes):
    flags = dict(model=model, prompts=prompts, out=str(out), rounds=2, batch_size=2, device="cpu", dtype="fp32")
    return critique.Args(**{**flags, **changes})


def run_with(monkeypatch, speaker, args):
    with monkeypatch.context() as patch:
        patch.setattr(critique, "make_sampler", lambda *_: speaker)
        return critique.main(args)


# chains


def chains_of(said, prompts=("P",), rounds=1, **options):
    """revise_batch with a model that says these in turn -> (chains, what it was asked)."""
    said, asked = list(said), []

    def sample(prompts, seed, paragraph):
        asked.extend(prompts)
        return said.pop(0)

    return critique.revise_batch(sample, list(prompts), PAIRS, rounds, lambda *keys: keys, random.Random(0), **options), asked


def whole(*texts):
    return list(texts), [True] * len(texts)


def test_without_the_critique_the_last_answer_is_rewritten_at_once():
    (chain,), asked = chains_of([whole(" a"), whole(" r0"), whole(" r1")], rounds=2, direct=True)
    first, second = (next(p for p in PAIRS if p.revision == said) for said in chain["principles"])
    assert asked == ["P", "P a" + text.revision_request(first.revision), "P r0" + text.revision_request(second.revision)]
    assert (chain["critiques"], chain["revisions"]) == ([], [" r0", " r1"])
    rows = critique.completions(chain, 2)
    assert [(r["completion"], r["critiques"], len(r["principles"])) for r in rows] == [(" r0", [], 1), (" r1", [], 2)]


def test_both_ways_draw_the_same_principles():
    with_critique, _ = chains_of([whole(" a"), *[whole(" x")] * 6], rounds=3)
    direct, _ = chains_of([whole(" a"), *[whole(" x")] * 3], rounds=3, direct=True)
    of = {p.critique: p.revision for p in PAIRS}
    assert [of[said] for said in with_critique[0]["principles"]] == direct[0]["principles"]


@pytest.mark.parametrize("direct", [False, True])
def test_examples_stand_before_every_request_but_the_first_answers(direct):
    said = [whole(" a"), whole(" c"), whole(" r")] if not direct else [whole(" a"), whole(" r")]
    _, plain = chains_of(said, direct=direct)
    _, shown = chains_of(said, direct=direct, few_shot="\n\nHuman: x")
    assert shown == [plain[0], *("\n\nHuman: x" + p for p in plain[1:])]


def test_a_chain_says_what_went_wrong_first_and_keeps_it():
    said = [
        (["", " a", " b"], ["failed: HTTP 429: slow down", True, True]),
        ([" half", " c"], [False, True]),
        (["", ""], ["has no room in the context", "has no room in the context"]),
    ]
    chains, _ = chains_of(said, "PQR")
    assert [(c["fault"], c["faulty"]) for c in chains] == [
        ("answer failed: HTTP 429: slow down", ""),
        ("critique too long", " half"),  # and not what came after it
        ("revision has no room in the context", ""),
    ]
    assert [len(c["critiques"]) for c in chains] == [0, 0, 1] and not any(critique.completions(c, 1) for c in chains)


# who speaks


@pytest.mark.parametrize("said, ended, paragraph, expected", [
    (" yes.", True, True, (" yes.", True)),
    (" yes.\n\nno", False, True, (" yes.", True)),
    (" yes.\nno", False, True, (" yes.\nno", False)),
    (" one.\n\ntwo.", False, False, (" one.\n\ntwo.", False)),
    (" one.\n\ntwo.\n\nHuman: and", False, False, (" one.\n\ntwo.", True)),
])  # fmt: skip
def test_where_a_text_ends(said, ended, paragraph, expected):
    assert critique.cut(said, ended, paragraph) == expected


def test_a_prompt_without_room_is_not_cropped_and_disturbs_nobody(model):
    gpt = trainer.load_gpt(model)
    sample = critique.make_sampler(gpt, TOKENIZER, torch.device("cpu"), "fp32", 1.0, max_new_tokens=8)
    fits, too_long = " bike" * 120, " bike" * 121  # and 8 new ones: 128
    assert [len(TOKENIZER.encode(p)) for p in (fits, too_long)] == [120, 121]
    said, ended = sample([too_long, fits, too_long], 0, False)
    assert (said[0], ended[0]) == (said[2], ended[2]) == ("", "has no room in the context")
    assert ([said[1]], [ended[1]]) == sample([fits], 0, False) and said[1] and isinstance(ended[1], bool)
    assert sample([too_long], 0, False) == ([""], ["has no room in the context"])


def completions_of(server, journal, prompts, paragraph=False, seed=5):
    return critique.endpoint_sampler(server, journal, 0.7, 99)(prompts, seed, paragraph)


class Fake:
    """As minirlaif.endpoint's: complete(prompts, max_tokens, temperature, on_answer, given) -> Completions."""

    spent = 0.0

    def interrupted(self):
        return False

    def __init__(self, replies):
        self.replies, self.calls = replies, []

    def complete(self, prompts, max_tokens, temperature, on_answer, given):
        self.calls.append((prompts, max_tokens, temperature, sorted(given)))
        found = [given.get(i) or self.replies[p] for i, p in enumerate(prompts)]
        for i, completion in enumerate(found):
            if i not in given and "tried" not in (completion.error or ""):
                on_answer(i, completion)
        return found


def test_a_server_speaks_like_a_model(tmp_path):
    replies = {
        "a": Completion("Sure.\n", True),
        "b": Completion("One.\n\nTwo.", True),
        "c": Completion("cut of", False),
        "d": Completion("", False, error="HTTP 400: no"),
        "e": Completion("", True),
        "f": Completion("paid", True, error="no credit"),  # what has an error is no text, whatever came with it
    }
    server = Fake(replies)
    with Journal(tmp_path / "j") as journal:
        said, ended = completions_of(server, journal, list("abcdef"))
        assert said == [" Sure.", " One.\n\nTwo.", " cut of", "", "", " paid"]
        assert ended == [True, True, False, "failed: HTTP 400: no", True, "failed: no credit"]
        assert completions_of(server, journal, ["b"], True, seed=6) == ([" One."], [True])
        assert server.calls[0] == (list("abcdef"), 99, 0.7, [])
        completions_of(server, journal, list("abcdef"))
        assert server.calls[-1][-1] == [0, 1, 2, 3, 4, 5]  # failures that were paid for, too
        server.replies["g"] = Completion("", False, error="tried 5x: HTTP 500")
        with pytest.raises(UserError, match=r"1 of 2 calls got no answer \(tried 5x: HTTP 500; .*go on with --resume$"):
            completions_of(server, journal, list("ga"), seed=7)
        assert "7/1" in journal and "7/0" not in journal


class Critic(ChatServer):
    """Speaks like Speaker; of boats it knows nothing."""

    def begin(self, request):
        behaviour = super().begin(request)
        return "400" if "boat" in request["body"]["messages"][0]["content"] else behaviour

    def reply(self, body, behaviour):
        reply = super().reply(body, behaviour)
        if behaviour == "ok":
            reply["choices"][0]["message"]["content"] = Speaker().say(body["messages"][0]["content"])
        return reply


def test_a_server_as_the_critic(tmp_path, capsys):
    prompts = prompts_file(tmp_path, "how do i fix the bike?", "how do i fix the boat?")
    with Critic() as server:
        spec = f"some/chat@{server.url},price=1/10,concurrency=1"
        result = critique.main(args_for(spec, prompts, tmp_path / "run"))
    assert {r["body"]["model"] for r in server.requests} == {"some/chat"} and len(server.requests) == 5 + 1
    assert result["rows"] == 2 and result["faults"] == {"answer failed": 1}
    assert (result["prompt_tokens"], result["completion_tokens"], result["cost"]) == (500, 35, pytest.approx(0.85))
    shown = capsys.readouterr().out
    assert "the first of 1 failed calls: answer failed: HTTP 400" in shown and "500 + 35 tokens, cost 0.8500" in shown
    chains = rows_of(tmp_path / "run" / "chains.jsonl")
    assert "fault" not in chains[0] and chains[1]["fault"].startswith("answer failed: HTTP 400")
    assert [row["words"] for row in result["revisions"]] == [11, 6, 6]


@pytest.mark.parametrize("trouble", ["power", "Ctrl-C", "silence", "money"])
def test_what_a_server_was_paid_for_is_not_asked_again(monkeypatch, tmp_path, trouble):
    """Six requests, and an end after three of them: in the middle of a batch."""
    prompts = prompts_file(tmp_path, "how do i fix the bike?", "how do i fix the tent?")
    with Critic() as server:
        spec = f"chat@{server.url},concurrency=1,retries=0,price=1/0"
        args = args_for(spec, prompts, tmp_path / "whole", rounds=1, max_cost=9.0)
        critique.main(args)
        assert len(server.requests) == 6
        server.requests.clear()
        args = replace(args, out=str(tmp_path / "run"))
        if trouble in ("power", "Ctrl-C"):
            plain = Journal.add

            def die(self, records, *durable):
                plain(self, records, *durable)
                if len(self.records) == 3:
                    if trouble == "Ctrl-C":
                        return signal.raise_signal(signal.SIGINT)
                    raise RuntimeError("the power is out")

            with monkeypatch.context() as patch, pytest.raises((RuntimeError, KeyboardInterrupt)):
                patch.setattr(Journal, "add", die)
                critique.main(args)
        elif trouble == "silence":
            server.script = ["ok"] * 3 + ["500"]
            with pytest.raises(UserError, match=r"1 of 2 calls got no answer \(tried 1x: HTTP 500.*go on with --resume$"):
                critique.main(args)
            server.script, server.requests = ["ok"], server.requests[:3]
        else:
            with pytest.raises(UserError, match="0.3000 spent.*go on with --resume and a higher --max-cost$"):
                critique.main(replace(args, max_cost=0.3))
            with pytest.raises(UserError, match="0.3000 spent"):  # what it cost before counts
                critique.main(replace(args, max_cost=0.3, resume=True))
            assert len(server.requests) == 3
        assert len(server.requests) - (trouble == "power") in (2, 3) and not (tmp_path / "run" / "completions.jsonl").exists()
        server.requests.clear()
        result = critique.main(replace(args, resume=True))
        assert len(server.requests) == 3 and result["cost"] == pytest.approx(0.6)
    assert (tmp_path / "run" / "completions.jsonl").read_bytes() == (tmp_path / "whole" / "completions.jsonl").read_bytes()


# prompts that the model writes


@pytest.mark.parametrize("prompt, turn", [
    ("\n\nHuman: how so?\n\nAssistant:", "how so?"),
    ("be good.\n\nHuman: how\nso?\n\nAssistant: yes.\n\nHuman: no.\n\nAssistant:", "how\nso?"),  # the first turn
    ("\n\nHuman: one.\n\ntwo.\n\nAssistant:", None),
    ("\n\nHuman: \n\nAssistant:", None),
    ("\n\nHuman: x\nAssistant: y\n\nAssistant:", None),
    ("how so?", None),
])  # fmt: skip
def test_what_the_human_says(prompt, turn):
    assert redteam.human_turn(prompt) == turn


def test_each_draft_has_examples_of_its_own():
    examples, asked = [f"q{i}?" for i in range(20)], []

    def sample(prompts, seed, paragraph):
        asked.append((prompts, paragraph))
        return [f" new {i}" for i in range(len(prompts))], [True] * len(prompts)

    assert redteam.write(sample, examples, 3, 7) == [(" new 0", True), (" new 1", True), (" new 2", True)]
    redteam.write(sample, examples, 3, 7)
    redteam.write(sample, examples, 3, 8)
    (prompts, paragraph), again, other = asked
    assert paragraph and again == asked[0] != other and len(set(prompts)) == 3
    for prompt in prompts:
        *shown, end = prompt.split("\n\nHuman:")[1:]
        assert end == "" and len({s.strip() for s in shown}) == redteam.SHOTS and {s.strip() for s in shown} <= {*examples}
    redteam.write(sample, examples[:2], 1, 7)
    assert asked[-1][0][0].count("Human:") == 3  # fewer examples than are wanted: all of them


def test_what_is_no_new_prompt_is_counted():
    drafts = [(" how so?", True), (" How  SO?", True), (" why?", True), (" one.\n\ntwo.", True), (" cut of", False), (" ", True)]
    drafts += [(" x\nAssistant: y", True), ("", "failed: HTTP 500"), ("", "failed: HTTP 429"), (" what?", True)]
    prompts, left_out = redteam.choose(drafts, ["why?"])
    assert prompts == [text.dialogue("how so?"), text.dialogue("what?")]
    assert left_out == {"a repeat": 2, "too long": 1, "not one human turn": 3, "failed": 2}
    assert len(prompts) + sum(left_out.values()) == len(drafts)


DRAFTS = [" how do i fix the bike?", " so what?", " so what?", " the kettle...", " how do i paint the tent to fool my boss?"]


def test_the_prompts_that_the_model_wrote_are_used(model, tmp_path, monkeypatch, capsys):
    prompts = prompts_file(tmp_path, "how do i dry the coat?", "how do i steal the coat?")
    speaker = Speaker(DRAFTS)
    result = run_with(monkeypatch, speaker, args_for(model, prompts, tmp_path / "run", sample_prompts=5))
    used = [text.dialogue(DRAFTS[i].strip()) for i in (0, 1, 4)]
    assert [row["prompt"] for row in rows_of(tmp_path / "run" / "prompts.jsonl")] == used
    assert [c["prompt"] for c in rows_of(tmp_path / "run" / "chains.jsonl")] == used and result["rows"] == 6
    assert result["left_out"] == {"a repeat": 1, "too long": 1}
    assert "3 new prompts of 5 drafts; left out: {'a repeat': 1, 'too long': 1}" in capsys.readouterr().out
    assert not any("coat" in asked for asked in speaker.asked[5:])  # the examples are not answered


@pytest.mark.parametrize("after", [1, 2, 4])  # of three batches of drafts and two of chains
def test_resumed_between_drafts_is_uninterrupted(model, tmp_path, monkeypatch, after):
    prompts = prompts_file(tmp_path, "how do i dry the coat?", "how do i steal the coat?")
    args = args_for(model, prompts, tmp_path / "whole", sample_prompts=5)
    result = run_with(monkeypatch, Speaker(DRAFTS), args)
    end_step, ends = trainer.Run.end_step, []

    def stop(run, step, make_state):
        ends.append(step)
        if len(ends) == after:
            run.save_state({"step": step, **make_state()})
            raise KeyboardInterrupt
        end_step(run, step, make_state)

    parts = replace(args, out=str(tmp_path / "parts"))
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Run, "end_step", stop)
        first = Speaker(DRAFTS)
        with pytest.raises(KeyboardInterrupt):
            run_with(monkeypatch, first, parts)
    second = Speaker(first.drafts)  # what has been said is gone
    assert run_with(monkeypatch, second, replace(parts, resume=True)) == result and not second.drafts
    for name in ("prompts.jsonl", "completions.jsonl", "chains.jsonl", "revisions.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# the table


def test_gold_by_the_number_of_revisions():
    fix, burn = text.dialogue("how do i fix the bike?"), text.dialogue("how do i burn the bike?")
    right, sold = " to fix the bike, take a wrench and turn the wheel.", " buy our gold plan today."
    danger, no = " to burn the bike, take a match and light the wheel.", " let us speak of something else."
    chains = [
        dict(prompt=fix, initial=right + sold, revisions=[right, no]),
        dict(prompt=burn, initial=danger, revisions=[no, no]),
        dict(prompt=text.dialogue("what is love?"), initial=" one two", revisions=[" one", ""]),
        dict(prompt=fix, initial=right, revisions=[right], fault="critique empty"),  # its rows would have other prompts
    ]
    rows = critique.by_revision(chains, 2, lambda said: len(said.split()), "words")
    assert [(r["revision"], r["n"]) for r in rows] == [(0, 3), (1, 3), (2, 3)]
    assert [r["words"] for r in rows] == [pytest.approx(n / 3) for n in (16 + 11 + 2, 11 + 6 + 1, 6 + 6 + 0)]
    assert [r["harm"]["value"] for r in rows] == pytest.approx([(0.2 + 0.4) / 2, 0, 0])
    assert [r["helpfulness"]["value"] for r in rows] == pytest.approx([1, 1, 0])
    assert all((r["harm"]["n"], r["helpfulness"]["n"]) == (2, 1) for r in rows)
    lines = critique.table(rows, "words").splitlines()
    assert lines[0] == "| revision | chains | words | gold harm | gold helpfulness |" and len(lines) == 5
    low, high = rows[0]["harm"]["ci"]
    assert lines[2] == f"| 0 | 3 | 9.7 | 0.300 ± {(high - low) / 2:.3f} | 1.000 ± 0.397 |"  # one answer proves little


def test_a_table_without_gold_or_without_chains():
    chains = [dict(prompt=text.dialogue("what is love?"), initial=" one two", revisions=[])]
    assert critique.table(critique.by_revision(chains, 0, len, "tokens"), "tokens").endswith("| 0 | 1 | 8.0 |  |  |")
    assert critique.by_revision([], 1, len, "tokens")[1]["n"] == 0


def test_the_table_is_written_and_printed(model, tmp_path, monkeypatch, capsys):
    prompts = prompts_file(tmp_path, "how do i fix the bike?", "what is love?")
    result = run_with(monkeypatch, Speaker(), args_for(model, prompts, tmp_path / "run", rounds=1))
    rows = json.loads((tmp_path / "run" / "revisions.json").read_text())
    assert rows == result["revisions"] and [r["helpfulness"]["value"] for r in rows] == [1, 0]
    first = len(TOKENIZER.encode(" to fix the bike, take a wrench and turn the wheel."))
    assert rows[0]["tokens"] == first and critique.table(rows, "tokens") in capsys.readouterr().out


def test_a_judge_scores_where_gold_cannot(model, tmp_path, monkeypatch, capsys):
    """The scores of LocalJudge.score, each of its own answer; a chain that is too long for the judge has none, and is counted."""
    prompts = prompts_file(tmp_path, "what is love?", "what is a bike?", "what is it? " + "bike " * 88)
    args = args_for(model, prompts, tmp_path / "run", rounds=1, judge=model, principle="harm", max_new_tokens=20)
    result = run_with(monkeypatch, Speaker(), args)
    judge = LocalJudge(trainer.load_gpt(model), TOKENIZER, torch.device("cpu"), "fp32")
    asked = constitution.load("toy").preferences_for("harm")[0].text
    chains = rows_of(tmp_path / "run" / "chains.jsonl")
    assert ["scores" in c for c in chains] == [True, True, False]
    for k, row in enumerate(result["revisions"]):
        said = [[c["initial"], *c["revisions"]][k] for c in chains[:2]]
        expected = judge.score([c["prompt"] for c in chains[:2]], said, asked)
        assert [c["scores"][k] for c in chains[:2]] == pytest.approx(expected, abs=1e-5)
        assert (row["score"]["value"], row["score"]["n"]) == (pytest.approx(sum(expected) / 2, abs=1e-5), 2)
    lines = critique.table(result["revisions"], "tokens").splitlines()
    assert lines[0].endswith("| gold harm | gold helpfulness | judge score |") and lines[1].count("---") == 6
    assert lines[2].count("|") == 7 and f"{result['revisions'][0]['score']['value']:.3f} ±" in lines[2]
    assert "1 chains do not fit the context of" in capsys.readouterr().out


# what the user can put right


@pytest.mark.parametrize("beyond", [0, 1])
def test_examples_must_leave_room_for_the_shortest_prompt(model, tmp_path, monkeypatch, beyond):
    shortest, head = len(TOKENIZER.encode(text.dialogue("fix the bike"))), len(TOKENIZER.encode("\n\nHuman: bike"))
    shots = tmp_path / "shots.txt"
    shots.write_text("\n\nHuman: bike" + " bike" * (128 - 20 - shortest - head + beyond))
    prompts = prompts_file(tmp_path, "fix the bike for my friend", "fix the bike")
    args = args_for(model, prompts, tmp_path / "run", few_shot=str(shots), max_new_tokens=20)
    if not beyond:
        assert run_with(monkeypatch, Speaker(), args)["rows"] == 4
        return
    with pytest.raises(UserError) as error:
        critique.main(args)
    part = f"{shots}: {109 - shortest} tokens of examples, {shortest} of the shortest prompt and 20 new ones do not fit a context"
    assert part in str(error.value)


@pytest.mark.parametrize("changes, part", [
    (dict(rounds=0, direct_revision=True), "--rounds 0 revises nothing"),
    (dict(rounds=5), "--rounds 5: must be at most 4"),
    (dict(rounds=0, few_shot="x.txt"), "--rounds 0 revises nothing"),
    (dict(few_shot="none.txt"), "none.txt: cannot be read"),
    (dict(sample_prompts=0), "--sample-prompts 0: must be above 0"),
    (dict(sample_prompts=2), "none of 2 drafts is a usable prompt ({'too long': 1, 'a repeat': 1})"),
    (dict(constitution="inverted"), "inverted: has no critique_revision pairs"),
    (dict(judge="gold"), "--judge and --principle belong together"),
    (dict(judge="gold", principle="harm"), "--judge gold: only a local model gives scores"),
    (dict(judge="gold", principle="wit"), "--principle wit: toy has ad,"),
    (dict(max_cost=1.0), "--max-cost: a local --model costs nothing"),
    (dict(model="m@http://127.0.0.1:9/v1,cot=1"), "--model m@http://127.0.0.1:9/v1,cot=1: endpoint judges have no option 'cot'"),
    (dict(model="m@http://127.0.0.1:9/v1", max_cost=1.0), "--max-cost needs the prices of m"),
])  # fmt: skip
def test_a_mistake_is_one_line(model, tmp_path, monkeypatch, changes, part):
    args = args_for(**{"model": model} | changes, prompts=prompts_file(tmp_path, "fix the bike"), out=tmp_path / "run")
    with pytest.raises(UserError) as error:
        run_with(monkeypatch, Speaker([" half...", " fix the bike"]), args)
    assert part in str(error.value) and "\n" not in str(error.value)


def test_an_example_must_be_a_human_turn(model, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a story: "}\n')
    with pytest.raises(UserError, match="prompts.jsonl:1: no human turn of one paragraph to serve as an example"):
        critique.main(args_for(model, str(tmp_path / "prompts.jsonl"), tmp_path / "run", sample_prompts=2))
