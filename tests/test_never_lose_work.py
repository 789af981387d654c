"""Every trainer killed at every kind of moment and resumed ends as if never stopped; NaN stops it before it can be saved.

One program imports everything and forks a process for each attempt, which dies by os._exit: as with kill -9, nothing cleans up.
"""

import functools
import io
import json
import math
import os
import random
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from small import CPU, rows_of, write

import distill
import pretrain
import train_ppo
import train_rm
from minirlaif import lora, trainer
from minirlaif.cli import UserError
from minirlaif.heads import RewardModel
from minirlaif.model import GPT, GPTConfig
from minirlaif.text import dialogue
from minirlaif.tokenizer import load_tokenizer

SCRIPTS = {"pretrain": pretrain, "train_rm": train_rm, "train_ppo": train_ppo, "distill": distill}
DEAD = 77

# Where an attempt dies: after the n-th step of an optimizer, from the third step of the run on; or in its first save_state, or in
# lora.save, before the n-th of: fsync of the metrics, torch.save (half is written), fsync of the temporary file, the rename of
# the old file, that of the new one, fsync of the folder; or after it. lora.save has neither the first nor the fourth; args.json
# comes after it, which says that the run is finished: fsync, rename, fsync.
EVERYWHERE = [("step", 3), *(("save_state", n) for n in range(1, 8)), *(("save", n) for n in range(1, 8))]
SOME = [("step", 2), ("save_state", 5)]
CASES = {f"{script}-{dtype}": EVERYWHERE if script == "train_ppo" and dtype == "fp32" else SOME
         for script in SCRIPTS for dtype in ("fp32", "bf16")}
# What is left of the states by each death: state.pt (s), state.prev.pt (p), state.pt.tmp (t)
LEFT = {("save_state", n + 1): left for n, left in enumerate(("ps", "pst", "pst", "pst", "pt", "ps", "ps"))}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Script -> what its Args take: some six steps of every trainer, on made-up models and words."""
    here, noise = tmp_path_factory.mktemp("inputs"), random.Random(0)
    tokenizer = load_tokenizer("toy")

    def say(n):
        return " " + " ".join(noise.choices(["wood", "a bike", "glue", "no", "yes", "the boat"], k=n))

    asked = [dialogue(f"how{say(noise.randint(1, 6))}?") for _ in range(36)]
    documents = write(here / "documents.jsonl", [{"text": say(n)} for n in range(2, 40)])
    prompts = write(here / "prompts.jsonl", [{"prompt": prompt} for prompt in asked])
    pairs = write(here / "pairs.jsonl", [{"prompt": p, "chosen": say(4), "rejected": say(4), "p_chosen": 0.8} for p in asked])
    gpt = GPT(GPTConfig(128, tokenizer.n_vocab, 1, 2, 16)).init_weights(trainer.rng(0))
    with torch.no_grad():  # one token in ten is the end, whatever came before
        end = gpt.wte.weight[tokenizer.eot]
        gpt.ln_f.bias.copy_(end * math.log(tokenizer.n_vocab / 10) / end.square().sum())
    reward = RewardModel(gpt, generator=trainer.rng(0, "head"))
    base, scorer = str(here / "base.pt"), str(here / "reward.pt")
    trainer.save_model(base, gpt.config, gpt.state_dict(), "gpt", "toy")
    trainer.save_model(scorer, gpt.config, reward.state_dict(), "reward", "toy")
    return {
        "pretrain": dict(data=[documents], block_size=128, n_layer=1, n_head=2, n_embd=16, dropout=0.1, epochs=2,
                         eval_fraction=0.1, warmup=2, tokens_per_batch=512),
        "train_rm": dict(init=base, data=[pairs], batch_size=7, epochs=2),
        "train_ppo": dict(init=base, reward_model=scorer, data=prompts, steps=6, batch_size=4, minibatch_size=2,
                          max_new_tokens=6, lr=1e-3, kl_target=0.01, kl_horizon=50),
        "distill": dict(model=base, data=[prompts], preamble="be kind.", batch_size=5, max_new_tokens=32),
    }


def ending(folder):
    """(weights of model.pt, rows of metrics.jsonl but for the timings)"""
    rows = [{k: v for k, v in row.items() if "per_second" not in k} for row in rows_of(folder / "metrics.jsonl")]
    return torch.load(folder / "model.pt", weights_only=True)["model"], rows


def same_end(a, b):
    (weights, rows), (other, others) = ending(a), ending(b)
    return weights.keys() == other.keys() and all(torch.equal(weights[k], other[k]) for k in weights) and rows == others


# killed


def die_at(where, n):
    """In this process, exit at that point: see EVERYWHERE."""
    passed = 0

    def after(function, armed):  # count what happens from the call of `function` on
        def wrapper(*args, **kwargs):
            armed()
            result = function(*args, **kwargs)
            if where == "save_state" and passed == n - 1:
                os._exit(DEAD)
            return result
        return wrapper

    def arm():
        for module, name in ((os, "fsync"), (os, "replace"), (torch, "save")):
            setattr(module, name, counted(getattr(module, name)))

    def counted(function):
        def wrapper(*args, **kwargs):
            nonlocal passed
            passed += 1
            if passed == n:
                if function.__name__ == "save":
                    half = io.BytesIO()
                    function(args[0], half)
                    args[1].write(half.getvalue()[: half.tell() // 2])
                    args[1].flush()
                os._exit(DEAD)
            return function(*args, **kwargs)
        return wrapper

    if where == "step":
        step, load_state, runs = torch.optim.AdamW.step, trainer.Run.load_state, []

        def dying(self, *args):
            nonlocal passed
            step(self, *args)
            passed += runs[0].step >= 2
            if passed == n:
                os._exit(DEAD)

        torch.optim.AdamW.step = dying
        trainer.Run.load_state = lambda run: runs.append(run) or load_state(run)
    elif where == "save_state":
        trainer.Run.save_state = after(trainer.Run.save_state, arm)
    else:
        lora.save = after(lora.save, arm)


def attempt(script, args, point):
    """Run it in a forked process, which saves after every step and dies at `point` -> its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        trainer.Run.__init__ = functools.partialmethod(trainer.Run.__init__, save_every_s=0.0)
        torch.manual_seed(os.getpid())  # no matter
        if point:
            die_at(*point)
        SCRIPTS[script].main(SCRIPTS[script].Args(**args, resume=True))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def attempts(home, inputs):
    """What the program does: every case, whole and in pieces. Nothing is computed before the forks, which share no thread."""
    import torch._dynamo  # noqa: F401, what an optimizer's first step imports, and takes a second over: once for all forks

    load_tokenizer("toy")
    found = {}
    for case, points in CASES.items():
        script, dtype = case.split("-")
        args = inputs[script] | dict(device="cpu", dtype=dtype)
        codes = [attempt(script, args | {"out": f"{home}/{case}-whole"}, None)]
        left = []
        for point in [*points, None]:
            out = Path(home, case)
            codes.append(attempt(script, args | {"out": str(out)}, point))
            names = {"state.pt": "s", "state.prev.pt": "p", "state.pt.tmp": "t"}
            left.append("".join(sorted(names.get(f.name, "") for f in out.iterdir())))
        found[case] = codes, left
    Path(home, "found.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def killed(inputs, tmp_path_factory):
    home = tmp_path_factory.mktemp("killed")
    program = "import json, sys, test_never_lose_work as t; t.attempts(sys.argv[1], json.loads(sys.argv[2]))"
    tests = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", program, str(home), json.dumps(inputs)], cwd=tests, capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": str(tests.parent), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return home, json.loads((home / "found.json").read_text()), done.stderr


@pytest.mark.parametrize("case", CASES)
def test_dead_at_every_boundary_and_resumed_is_uninterrupted_bit_for_bit(killed, case):
    home, found, stderr = killed
    codes, left = found[case]
    assert codes == [0, *[DEAD] * len(CASES[case]), 0], stderr[-3000:]
    for point, names in zip(CASES[case], left, strict=False):
        assert names == LEFT.get(point, names), point
    assert same_end(home / case, home / f"{case}-whole")
    dtype = json.loads((home / case / "args.json").read_text())["dtype"]
    assert dtype == case.split("-")[1] and len(ending(home / case)[1]) > 2


# not finite


def spoil_weights(monkeypatch, runs, value):
    """After the third step, once it is saved, a weight is lost: the next loss shows it."""
    end_step = trainer.Run.end_step

    def spoiled(run, step, make_state):
        end_step(run, step, make_state)
        if step == 3:
            state = make_state()
            weights = next(state[name] for name in ("model", "student", "policy") if name in state)
            weights["gpt.h.0.mlp.c_fc.weight" if "gain" in weights else "h.0.mlp.c_fc.weight"].fill_(value)

    monkeypatch.setattr(trainer.Run, "end_step", spoiled)


def spoil_gradient(monkeypatch, runs, value):
    """In the fourth step a gradient overflows, and the loss does not."""
    clip = torch.nn.utils.clip_grad_norm_

    def spoiled(parameters, max_norm):
        parameters = list(parameters)
        if runs[-1].step == 3:
            parameters[-1].grad.fill_(value)
        return clip(parameters, max_norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spoiled)


def spoil_step(monkeypatch, runs, value):
    """Loss and gradient of the fourth step are fine, but not the weights after it: they must not get into the checkpoint."""
    step = torch.optim.AdamW.step

    def spoiled(self, *args):
        step(self, *args)
        if runs[-1].step == 3:
            self.param_groups[0]["params"][0].data.fill_(value)

    monkeypatch.setattr(torch.optim.AdamW, "step", spoiled)


@pytest.mark.parametrize("spoil, value, where", [
    (spoil_weights, math.nan, "(loss|logprobs) is nan"),
    (spoil_gradient, math.inf, "gradient( of the policy model)? is inf"),
    (spoil_step, math.nan, "(model|student|loss of the policy model).* is nan"),
])
@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_not_finite_stops_the_run_and_is_not_saved(inputs, tmp_path, monkeypatch, script, spoil, value, where):
    runs, begin = [], trainer.Run.__init__

    def save_always(run, *args):
        begin(run, *args, save_every_s=0.0)
        runs.append(run)

    monkeypatch.setattr(trainer.Run, "__init__", save_always)
    spoil(monkeypatch, runs, value)
    args = SCRIPTS[script].Args(**inputs[script], out=str(tmp_path / "run"), **CPU)
    with pytest.raises(UserError, match=rf"run: step 3: {where}; last good checkpoint: step 3; try a lower --lr") as error:
        SCRIPTS[script].main(args)
    assert "\n" not in str(error.value) and not (tmp_path / "run" / "model.pt").exists()
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)["state"]
    trainer.check_finite(state)
    assert state["step"] == 3


def test_a_model_that_is_not_finite_is_not_written(tmp_path):
    gpt = GPT(GPTConfig(block_size=8, vocab_size=17, n_layer=1, n_head=2, n_embd=8))
    trainer.save_model(tmp_path, gpt.config, gpt.state_dict())
    before = (tmp_path / "model.pt").read_bytes()
    gpt.wpe.weight.data[3, 3] = -float("inf")
    with pytest.raises(FloatingPointError, match="wpe.weight is -inf"):
        trainer.save_model(tmp_path, gpt.config, gpt.state_dict())
    assert (tmp_path / "model.pt").read_bytes() == before


def test_finite_is_finite_however_deep():
    trainer.check_finite({"a": [1.0, (torch.ones(2), {"b": None, "c": "nan"}), 3, torch.ones(0), torch.tensor([1, 2])]})
    with pytest.raises(FloatingPointError, match="^a 1 b is nan$"):
        trainer.check_finite({"a": [1.0, {"b": torch.tensor([1.0, float("nan")])}]})
    with pytest.raises(FloatingPointError, match="^b is -inf$"):
        trainer.check_finite({"b": -float("inf")})
