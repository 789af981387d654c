"""Two processes against one: the same samples and steps from unequal shares, one writer, one end."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from small import CPU

import distill
import pretrain
import train_ppo
import train_rm
from minirlaif import trainer
from minirlaif.heads import RewardModel, ValueModel

# Runs trainers one after the other in fp64, each until 3 steps are done; the last process of several gets Ctrl-C in a fourth run.
CHILD = """
import json, sys
import torch
from minirlaif import ddp, trainer
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
load_gpt, load_reward, end_step = trainer.load_gpt, trainer.load_reward, trainer.Run.end_step
trainer.load_gpt = lambda *a: load_gpt(*a).double()
trainer.load_reward = lambda *a: load_reward(*a).double()
def stop(run, step, make_state):
    if step == 3:
        run.save_state({"step": step, **make_state()})
        raise EOFError
    if "interrupted" in str(run.folder) and step == 1:
        run.interrupted = ddp.rank() == 1
    end_step(run, step, make_state)
trainer.Run.end_step = stop
for name, args in json.loads(sys.argv[1]):
    module = __import__(name)
    try:
        module.main(module.Args(**args))
    except (EOFError, KeyboardInterrupt) as e:
        print(name, type(e).__name__)
"""


def launch(runs, processes):
    """What each process has printed."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}  # as torchrun sets them
    folder = runs[0][1].out.rpartition("/")[0].rpartition("/")[0]  # where the reward function is
    command = [sys.executable, "-c", CHILD, json.dumps([(module.__name__, asdict(args)) for module, args in runs])]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    children = [subprocess.Popen(command, cwd=folder, env=env | {"RANK": str(rank)}, **pipes) for rank in range(processes)]
    said = [child.communicate() for child in children]
    assert [child.returncode for child in children] == [0] * processes, said
    return [out for out, _ in said]


@pytest.fixture(scope="module")
def runs(home, base, prompts, labelled, tmp_path_factory):
    """{module: (vector of the trained weights at the start, {processes: its run folder})}, after three steps each."""
    out = tmp_path_factory.mktemp("ddp")
    model = RewardModel(trainer.load_gpt(base), generator=trainer.rng(1))
    trainer.save_model(out / "rm.pt", model.gpt.config, model.state_dict(), "reward", "toy")
    answers = [f" so{' so' * (n % 5)}" for n in range(11)]
    rows = [{"prompt": f"\n\nHuman: {a}\n\nAssistant:", "completion": a, "stopped": True} for a in answers]
    (out / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cases = {
        pretrain: dict(data=[str(out / "completions.jsonl")], init=base, tokens_per_batch=256, lr=1e-3, warmup=1, epochs=3),
        train_rm: dict(init=base, data=[str(labelled[0] / "preferences.jsonl")], batch_size=5, lr=1e-3),
        distill: dict(
            model=base, data=[str(out / "completions.jsonl")], eval_data=prompts, batch_size=3, max_new_tokens=8, lr=1e-3
        ),
        train_ppo: dict(
            init=base, reward_model=str(out / "rm.pt"), data=prompts, steps=5, batch_size=9, minibatch_size=4, ppo_epochs=2,
            max_new_tokens=12, lr=1e-3, value_lr=1e-3, whiten_rewards=True, max_approx_kl=10.0, kl_target=1.0,
        ),
    }  # fmt: skip
    (out / "lengths.py").write_text("def longer(prompts, responses):\n    return [len(r) for r in responses]\n")
    adapters = cases[train_ppo] | dict(reward_model="lengths:longer", lora_rank=4, lr=1e-2, value_lr=1e-2)
    said = {}
    for n in (1, 2):
        jobs = [(module, module.Args(out=str(out / module.__name__ / str(n)), **args, **CPU)) for module, args in cases.items()]
        jobs += [(train_ppo, train_ppo.Args(out=str(out / "adapters" / str(n)), **adapters, **CPU))]
        if n == 2:
            jobs += [(train_ppo, train_ppo.Args(out=str(out / "interrupted"), **cases[train_ppo], **CPU))]
        said[n] = launch(jobs, n)
    starts = {
        distill: [trainer.load_gpt(base)],
        pretrain: [trainer.load_gpt(base)],
        train_rm: [RewardModel(trainer.load_gpt(base), generator=trainer.rng(0, "head"))],
        train_ppo: [trainer.load_gpt(base), ValueModel(model)],
    }
    return out, said, {module: vector([m.state_dict() for m in models]) for module, models in starts.items()}


def vector(state_dicts):
    return torch.cat([x.double().flatten() for weights in state_dicts for x in weights.values()])


@pytest.mark.parametrize("module", [pretrain, train_rm, train_ppo, distill], ids=lambda m: m.__name__)
def test_two_processes_make_the_steps_of_one(module, runs):
    """The change of all weights. Shares are unequal: 9 rows on two processes, minibatches of one row that leave one with none."""
    out, _, starts = runs
    folders = [out / module.__name__ / n for n in "12"]
    states = [torch.load(folder / "state.pt", weights_only=True)["state"] for folder in folders]
    one, two = (vector([s[name] for name in ("model", "policy", "value_model", "student") if name in s]) for s in states)
    change = one - starts[module]
    assert change.norm() > 1e-2
    assert (one - two).norm() <= 1e-4 * change.norm()
    a, b = ([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in folders)
    assert len(a) == len(b) == (1 if module is pretrain else 3)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for name in x.keys() - {"tokens_per_second", "speed/tokens_per_second"}:
            assert x[name] == pytest.approx(y[name], rel=1e-3, abs=1e-6), name


def test_adapters_and_a_reward_function_too(runs):
    out, _, _ = runs
    states = [torch.load(out / "adapters" / n / "state.pt", weights_only=True)["state"] for n in "12"]
    one, two = (vector([s["policy"], s["value_model"]]) for s in states)
    b = vector([{k: v for k, v in states[0]["policy"].items() if k.startswith("B.")}])  # started at 0
    assert b.norm() > 1e-2
    assert (one - two).norm() <= 1e-4 * b.norm()
    assert states[0]["scale"] == pytest.approx(states[1]["scale"])


def test_ctrl_c_at_one_process_stops_all_after_the_same_step(runs):
    out, said, _ = runs
    assert torch.load(out / "interrupted" / "state.pt", weights_only=True)["state"]["step"] == 1
    assert said[2][0].splitlines()[-1] == "train_ppo KeyboardInterrupt"
    assert not said[2][1]  # what all would say is said once
