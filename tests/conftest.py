"""Fixtures that several test files share: made once."""

import json

import pytest
import torch
from small import CPU, SHAPE

import label
import pretrain
from minirlaif import corpus, trainer

THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def same_threads():
    """What a test sets (a bench on one thread) is not the next one's: how many there are decides the last bits."""
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """world/ (documents and prompts) and base/ (a model that has the words, if little sense)."""
    home = tmp_path_factory.mktemp("scripts")
    corpus.main(corpus.Args(out=str(home / "world"), documents=2000, prompts=64, held_out=24))
    documents = str(home / "world" / "documents.jsonl")
    args = pretrain.Args(data=[documents], out=str(home / "base"), eval_fraction=0.05, **SHAPE, **CPU)
    (home / "pretrained.json").write_text(json.dumps(pretrain.main(args)))
    return home


@pytest.fixture(scope="session")
def base(home):
    return str(home / "base")


@pytest.fixture(scope="session")
def prompts(home):
    return str(home / "world" / "prompts.jsonl")


@pytest.fixture(scope="session")
def judge(home, base):
    """Random weights, but large: a judge with opinions, which the base is too small to have."""
    model = trainer.load_gpt(base).init_weights(trainer.rng(0))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(40 if p.dim() == 2 else 1)
    trainer.save_model(home / "judge.pt", model.config, model.state_dict(), "gpt", "toy")
    return str(home / "judge.pt")


@pytest.fixture(scope="session")
def labelled(home, judge, base, prompts):
    args = label.Args(
        judge=[judge], policy=base, contrast=base, data=prompts, out=str(home / "labels"), limit=40, batch_size=16, **CPU
    )
    return home / "labels", label.main(args)
