"""experiments/distill_hhh.py, distill_topk.py and two_contexts.py from end to end in their quick form, and their figures by hand."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from small import CPU, rows_of

import distill
import evaluate
import pretrain
from experiments import common, distill_hhh, distill_topk, two_contexts
from minirlaif import constitution, corpus, data, examples, targets, text, trainer, world
from minirlaif.cli import UserError
from minirlaif.losses import token_kl
from minirlaif.metrics import gold_of

C = constitution.load("toy").preamble


@pytest.fixture(scope="module", autouse=True)
def few_requests():
    """For gold in distill.py: 48 of them, three times a run, would take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "ASKED", 2)
        yield


@pytest.fixture(scope="module")
def runs(home, tmp_path_factory):
    """Two demos, as far as the experiments read them: a base, its world, and the flags of an evaluation."""
    run = tmp_path_factory.mktemp("demos") / "first"
    shutil.copytree(home / "world", run / "world")
    shutil.copytree(home / "base", run / "base")
    prompts = f"{run}/world/heldout.jsonl"
    evaluate.main(
        evaluate.Args(policies=[f"base={run}/base"], prompts=prompts, limit=2, out=f"{run}/evaluate", max_new_tokens=32, **CPU)
    )
    # the flags with which the demo's stages were run, all of its requests
    args = json.loads((run / "evaluate" / "args.json").read_text())
    args["args"]["limit"] = None
    (run / "evaluate" / "args.json").write_text(json.dumps(args))
    shutil.copytree(run, run.parent / "second")
    return [str(run), str(run.parent / "second")]


@pytest.fixture(scope="module")
def hhh(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("hhh")
    args = distill_hhh.Args(runs=runs, out=str(out), quick=True)
    with pytest.raises(UserError, match="base: not trained yet; give the same command with --train first"):
        distill_hhh.main(args)
    assert distill_hhh.main(distill_hhh.Args(runs=runs, out=str(out), quick=True, train=True)) == {}
    return out, distill_hhh.main(args)


def test_a(hhh):
    pass


def test_b(runs, tmp_path):
    distill_topk.main(distill_topk.Args(runs=runs[:1], out=str(tmp_path), quick=True))


def test_c(runs, tmp_path):
    two_contexts.main(two_contexts.Args(runs=runs[:1], out=str(tmp_path), quick=True))
