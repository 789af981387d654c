"""A judge from one line of text: what it becomes, and what a mistake in it says."""

import json

import pytest
import torch

from minirlaif import constitution, judges, text, trainer
from minirlaif.cli import UserError
from minirlaif.endpoint import Endpoint
from minirlaif.labelers import Call, GoldJudge, LocalJudge
from minirlaif.model import GPT, GPTConfig
from minirlaif.tokenizer import load_tokenizer

URL = "http://127.0.0.1:9/v1"


def load(spec, name="toy", **options):
    return judges.load(spec, name, torch.device("cpu"), lambda model: "fp32", **options)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("judges") / "model.pt"
    config = GPTConfig(vocab_size=load_tokenizer("toy").n_vocab, n_layer=1, n_head=1, n_embd=8)
    trainer.save_model(path, config, GPT(config).state_dict(), tokenizer_name="toy")
    return str(path)


def test_an_endpoint_with_its_options():
    judge = load(f"org/m@{URL},concurrency=7,retries=2,timeout=9,price=0.5/2,logprobs=0", "summarization", max_cost=3.0)
    assert isinstance(judge, Endpoint) and (judge.name, judge.base_url) == ("org/m", URL)
    assert (judge.concurrency, judge.retries, judge.soft, judge.max_cost) == (7, 2, False, 3.0)
    assert (judge.price_prompt, judge.price_completion) == (0.5, 2.0) and judge.client.timeout == 9
    assert judge.system == constitution.load("summarization").judge_preamble
    assert load(f"m@{URL}", "harmless").system == constitution.load("harmless").preamble and load(f"m@{URL}").soft is None
    assert load(f"m@{URL},price=0/0", max_cost=3.0).max_cost == 3.0


def test_gold_with_its_faults():
    judge = load("gold,noise=0.25,slot_bias=-1,call_noise=2,sharpness=3", seed=5)
    assert isinstance(judge, GoldJudge) and "insult" in judge.asks_of.values()
    assert (judge.noise, judge.slot_bias, judge.call_noise, judge.sharpness, judge.seed) == (0.25, -1, 2, 3, 5)


def test_a_local_model_with_its_options(model, tmp_path):
    (tmp_path / "shots.txt").write_text("one shot\n---\nanother\n")
    (tmp_path / "words.txt").write_text("be fair\n")
    judge = load(f"{model},cot=3,exemplars={tmp_path}/shots.txt,preamble={tmp_path}/words.txt", seed=4)
    assert isinstance(judge, LocalJudge) and (judge.cot, judge.samples, judge.seed, judge.name) == (True, 3, 4, model)
    asked = judge.tokenizer.decode(judge.encode(Call("p", ("a", "b"), "which?")))
    assert asked.index("be fair") < asked.index("one shot") < asked.index("another") < asked.index("which?")
    assert "---" not in asked
    plain = load(model)
    assert (plain.cot, plain.samples, plain.before, plain.dtype) == (False, 1, "", "fp32")


@pytest.mark.parametrize("spec, part", [
    ("", "--judge '': names no judge"),
    (",noise=1", "names no judge"),
    ("gold,nois=1", "gold judges have no option 'nois', but noise, slot_bias"),
    ("gold,noise=much", "'much' is no value for noise"),
    ("gold,noise=2", "noise must be in 0-1"),
    ("gold,sharpness=nan", "sharpness must be in 0-100"),
    ("gold,noise", "'' is no value for noise"),
    ("gold,noise=0.1,noise=0.2", "gold,noise=0.1,noise=0.2: noise is given twice"),
    ("Gold", "--judge Gold: gold and ranks are written so"),
    ("Ranks", "gold and ranks are written so; ranks is for label.py --candidates, alone"),
    ("ranks", "ranks is for label.py --candidates, alone"),
    ("m@127.0.0.1:8000/v1", "an endpoint is written NAME@http://127.0.0.1:8000/v1: this has no http://"),
    ("no/model", "no/model: no such model file"),
    ("no/model,cot=-1", "cot must be in 0-64"),
    ("no/model,price=1/2", "local judges have no option 'price'"),
    (f"m@{URL},concurrency=0", "concurrency must be in 1-256"),
    (f"m@{URL},timeout=nan", "timeout must be in"),
    (f"m@{URL},price=1", "price is two numbers, prompt/completion"),
    (f"m@{URL},price=-1/1", "price is two numbers"),
    (f"m@{URL},price=nan/1", "price is two numbers"),
    ("m@http://:0/v1", "the URL of an endpoint must look like"),
    (URL, "an endpoint is written NAME@"),
    (f"@{URL}", "an endpoint is written NAME@"),
    ("m@ftp://host/v1", "an endpoint is written NAME@"),
])  # fmt: skip
def test_a_mistake_is_one_line(spec, part):
    with pytest.raises(UserError) as error:
        load(spec)
    assert part in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("option, part", [
    ("preamble=plan", "preamble=plan: cannot be read as text ([Errno 2] No such file or directory: 'plan'); or give one"),
    ("preamble=", "preamble=: cannot be read"),
    ("exemplars=", "exemplars=: cannot be read"),
    ("preamble=EMPTY", "empty.txt: the file is empty"),
    ("exemplars=EMPTY", "empty.txt: the file is empty"),
])  # fmt: skip
def test_a_file_that_says_nothing_is_named_with_its_option(model, tmp_path, option, part):
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(UserError) as error:
        load(f"{model},{option.replace('EMPTY', str(tmp_path / 'empty.txt'))}")
    assert part in str(error.value) and option.partition("=")[0] in str(error.value)


def test_a_critic_is_written_as_a_judge_is():
    critic = judges.load_endpoint(f"m@{URL},price=0.1/0.4,concurrency=2", 3.0, flag="--model")
    assert (critic.price_completion, critic.concurrency, critic.max_cost, critic.system) == (0.4, 2, 3.0, "")
    with pytest.raises(UserError, match="--model m@.*: endpoint judges have no option 'cot'"):
        judges.load_endpoint(f"m@{URL},cot=1", flag="--model")


def test_what_a_constitution_tells_a_judge_stands_before_every_question(model, tmp_path):
    """Unless there are other words; and a preamble that gives the assistant its character is nothing to a judge."""
    assert load(model, "summarization").before == constitution.load("summarization").judge_preamble + "\n\n"
    assert load(f"{model},preamble=none", "summarization").before == ""
    assert load(f"{model},preamble=plain", "summarization").before == text.PREAMBLES["plain"] + "\n\n"
    assert load(model, "toy").before == load(model, "harmless").before == ""


@pytest.mark.parametrize("cot", [0, 1])
def test_the_papers_lists_of_judged_pairs_are_exemplars(model, tmp_path, cot):
    """Under the first principle of the constitution; with the reasoning, where it has one and the judge reasons."""
    why = "Assistant: Let's think step by step: it is rude.\n\nHuman:\nSo the answer is: (B)"
    talk = "\n\nHuman: Consider this talk:\n\nH: hello.\n\n{}\n (A) [[[no.]]]\n (B) [[[ok.]]]\n\n" + why
    shots = [{"prompt": "P", "corrects": ["good"], "incorrects": ["bad"]}, {"prompt": talk}]
    (tmp_path / "shots.json").write_text(json.dumps(shots))
    asked = constitution.load("toy").preferences[0].text
    plain = text.worked("P", [" bad", " good"], asked, "B")
    reasoned = text.worked("\n\nHuman: hello.\n\nAssistant:", [" no.", " ok."], asked, "B", " it is rude." if cot else None)
    assert load(f"{model},cot={cot},exemplars={tmp_path}/shots.json").before == text.before("", [plain, reasoned])


def test_a_file_of_exemplars_that_is_not_there(model):
    with pytest.raises(UserError, match="none.txt: cannot be read as text"):
        load(f"{model},exemplars=none.txt")


@pytest.mark.parametrize("spec", [
    "m@http://me:hush@host/v1", "m@http://me:hu,hush@host/v1", "http://me:hush@host/v1", "m@http://host/v1?key=hush",
    "m@http://me:hush@host/v1,nonsense=1", "m@HTTP://me:hush@host/v1",
])  # fmt: skip
def test_a_password_is_not_repeated(spec):
    with pytest.raises(UserError) as error:
        load(spec)
    assert "hush" not in str(error.value) and "no password" in str(error.value)


@pytest.mark.parametrize("name", ["plain", "detailed"])
def test_a_preamble_may_be_named(model, name):
    assert load(f"{model},preamble={name}").before == text.PREAMBLES[name] + "\n\n"
    assert load(str(model)).before == ""
