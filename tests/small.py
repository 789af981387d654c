"""A world and a model small enough for seconds, and what the tests of several scripts do with them; the fixtures are in
conftest.py."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minirlaif import data, trainer

CPU = dict(device="cpu", dtype="fp32")
SHAPE = dict(n_layer=2, n_head=2, n_embd=32, lr=1e-2, warmup=10, tokens_per_batch=1024)


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def write(path, rows):
    data.write_jsonl(path, rows)
    return str(path)


def interrupted(monkeypatch, main, args, after):
    """Run main until Ctrl-C comes after so many steps, then resume it: steps that are done are not done again."""
    end_step = trainer.Run.end_step

    def stop(run, step, make_state):
        if step == after:
            run.save_state({"step": step, **make_state()})
            raise KeyboardInterrupt

    def go_on(run, step, make_state):
        assert step > after
        end_step(run, step, make_state)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Run, "end_step", stop)
        with pytest.raises(KeyboardInterrupt):
            main(args)
        torch.manual_seed(987)  # no matter
        patch.setattr(trainer.Run, "end_step", go_on)
        return main(replace(args, resume=True))
