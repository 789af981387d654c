"""kill -9 during training: each trainer is killed at random moments and resumed, until it is done.

    python -m bench.kill

The moments are drawn evenly over the time that an uninterrupted run takes, start and end included, and are measured in steps
and parts of a step; where the broken run goes on beyond one, that kill comes as soon as it has resumed. Instead of
every 60 seconds it saves after every step, or twice a second: each start draws one, so that kills meet saves, and work that was
not saved. Counted:

    resumes       starts that found a checkpoint to go on from
    steps         steps of the uninterrupted run
    redone        steps that the broken run took beyond these
    in a save     kills that left a checkpoint half written, or one that was not yet in its place
    damaged       checkpoints that were refused on resume
    identical     all weights of model.pt, bit for bit, and all metrics but the timings are those of the uninterrupted run
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from minirlaif import cli, corpus, data, trainer
from minirlaif.heads import RewardModel
from minirlaif.model import GPT, GPTConfig
from minirlaif.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
TRAINERS = ["pretrain", "train_rm", "train_ppo", "distill"]
# The script as it is, but for how often it saves and a line for where it begins and for every step
PROGRAM = """
import {script}
from minirlaif import cli, trainer

class Run(trainer.Run):
    def __init__(self, *args):
        super().__init__(*args, save_every_s={save_every})

    def load_state(self):
        state = super().load_state()
        print("from", self.step, flush=True)
        return state

    def end_step(self, step, make_state):
        super().end_step(step, make_state)
        print("done", step, flush=True)

    def finish(self):
        super().finish()
        print("finished", self.step, flush=True)

trainer.Run = Run
cli.run({script}.main, {script}.Args)
"""


@dataclass
class Args:
    kills: int = cli.arg(20, "how often each run is killed, 1-100")
    trainers: list[str] = cli.arg(TRAINERS, "which trainers")
    dtype: str = cli.arg("fp32", "precision of the runs", choices=["fp32", "bf16"])
    seed: int = cli.arg(0, "seed of the moments")


def make_inputs(home: Path) -> dict[str, list]:
    """Trainer -> the flags of a run of a few seconds. The models have random weights, but end their answers."""
    corpus.main(corpus.Args(out=str(home / "world"), documents=1500, prompts=300, held_out=8))
    tokenizer = load_tokenizer("toy")
    gpt = GPT(GPTConfig(128, tokenizer.n_vocab, 2, 2, 32)).init_weights(trainer.rng(0))
    with torch.no_grad():  # after every token, one in about ten answers ends
        end = gpt.wte.weight[tokenizer.eot]
        gpt.ln_f.bias.copy_(end * torch.log(torch.tensor(tokenizer.n_vocab / 10)) / end.square().sum())
    trainer.save_model(home / "base.pt", gpt.config, gpt.state_dict(), "gpt", "toy")
    reward = RewardModel(gpt, generator=trainer.rng(0, "head"))
    trainer.save_model(home / "reward.pt", gpt.config, reward.state_dict(), "reward", "toy")
    prompts = home / "world" / "prompts.jsonl"
    asked = [row["prompt"] for row in data.read_jsonl(prompts)]
    pairs = [{"prompt": p, "chosen": f" {i}.", "rejected": f" no {i}.", "p_chosen": 0.8} for i, p in enumerate(asked)]
    data.write_jsonl(home / "pairs.jsonl", pairs)
    shape = ["--n-layer", 2, "--n-head", 2, "--n-embd", 32, "--block-size", 128, "--dropout", 0.1]
    init = ["--init", home / "base.pt"]
    return {
        "pretrain": ["--data", home / "world" / "documents.jsonl", *shape, "--tokens-per-batch", 1024, "--epochs", 4,
                     "--on-bad-row", "skip"],
        "train_rm": [*init, "--data", home / "pairs.jsonl", "--batch-size", 8, "--epochs", 12],
        "train_ppo": [*init, "--reward-model", home / "reward.pt", "--data", prompts, "--steps", 60, "--batch-size", 16,
                      "--minibatch-size", 8, "--max-new-tokens", 16, "--kl-target", 0.01],
        "distill": ["--model", home / "base.pt", "--data", prompts, "--preamble", "be kind.", "--batch-size", 8,
                    "--epochs", 4],
    }


def start(script: str, flags: list, out: Path, dtype: str, save_every: float = 0.5) -> subprocess.Popen:
    """The trainer, started and not waited for."""
    out.mkdir(exist_ok=True)
    program = PROGRAM.format(script=script, save_every=save_every)
    command = [sys.executable, "-c", program, *flags, "--out", out / "run", "--device", "cpu", "--dtype", dtype, "--resume"]
    with open(out / "steps.txt", "ab") as steps, open(out / "log.txt", "ab") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment, stdout=steps, stderr=log)


def must_end_well(process: subprocess.Popen, out: Path):
    if process.wait() != 0:
        raise RuntimeError(f"{out.name} ended with {process.returncode}:\n{(out / 'log.txt').read_text()[-2000:]}")


def said(out: Path) -> list[tuple[str, int]]:
    """What the trainer said so far: ("from", step), ("done", step), ("finished", step)."""
    lines = (out / "steps.txt").read_text().split("\n")[:-1] if out.exists() else []
    words = [line.split() for line in lines]
    return [(w[0], int(w[1])) for w in words if len(w) == 2 and w[0] in ("from", "done", "finished") and w[1].isdigit()]


def ending(run: Path):
    """(weights of model.pt, rows of metrics.jsonl but for the timings)"""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return trainer.read_model(run)["model"], [{k: v for k, v in row.items() if "per_second" not in k} for row in rows]


def same(a: Path, b: Path) -> bool:
    (weights, rows), (other, others) = ending(a), ending(b)
    return weights.keys() == other.keys() and all(torch.equal(w, other[name]) for name, w in weights.items()) and rows == others


def trial(script: str, flags: list, folder: Path, args: Args) -> dict:
    """One run that is killed so often, against one that is not -> the tally."""
    whole, broken, rng = folder / "whole", folder / "broken", random.Random(f"kill {args.seed} {script}")
    began, times, lines = time.monotonic(), [], []  # seconds to each line of what it says
    process = start(script, flags, whole, args.dtype)
    while not lines or lines[-1][0] != "finished":
        lines = said(whole)
        times += [time.monotonic() - began] * (len(lines) - len(times))
        if process.poll() is not None:
            must_end_well(process, whole)
        time.sleep(0.001)
    must_end_well(process, whole)
    steps, landed, in_save, found = lines[-1][1], 0, 0, {}
    for moment in tqdm(sorted(rng.uniform(0, times[-1]) for _ in range(args.kills)), desc=script, dynamic_ncols=True):
        passed = sum(t <= moment for t in times)  # 0: it dies while it starts
        target, rest = (lines[passed - 1][1], moment - times[passed - 1]) if passed else (None, moment)
        before = len(said(broken))
        process = start(script, flags, broken, args.dtype, rng.choice([0.0, 0.5]))
        while passed and process.poll() is None and max([n for _, n in said(broken)[before:]], default=-1) < target:
            time.sleep(0.001)
        until, now = time.monotonic() + rest, len(said(broken))
        while time.monotonic() < until and len(said(broken)) == now:  # a faster moment of the machine must not take it further
            time.sleep(0.001)
        process.kill()
        landed += process.wait() == -9
        left, found = found, {f.name: f.stat().st_mtime_ns for f in (broken / "run").glob("state*")}
        halfway = "state.pt.tmp" in found or ("state.prev.pt" in found and "state.pt" not in found)
        in_save += halfway and left != found  # else it is an earlier kill's
    must_end_well(start(script, flags, broken, args.dtype), broken)
    lines = said(broken)
    return {
        "kills": landed,
        "resumes": sum(word == "from" and n > 0 for word, n in lines),
        "steps": steps,
        "redone": sum(word == "done" for word, _ in lines) - steps,
        "in a save": in_save,
        "damaged": (broken / "log.txt").read_text().count("damaged ("),
        "identical": same(whole / "run", broken / "run"),
    }


def main(args: Args) -> dict:
    cli.require_positive(args, "kills")
    if unknown := set(args.trainers) - set(TRAINERS):
        raise cli.UserError(f"--trainers {unknown.pop()}: there are {', '.join(TRAINERS)}")
    found = {}
    with tempfile.TemporaryDirectory() as home:
        flags = make_inputs(Path(home))
        for script in args.trainers:
            folder = Path(home, script)
            folder.mkdir()
            found[script] = tally = trial(script, flags[script], folder, args)
            if len(found) == 1:
                print(f"| trainer | {' | '.join(tally)} |\n|" + " --- |" * (len(tally) + 1))
            print(f"| {' | '.join([script, *map(str, tally.values())])} |", flush=True)
    return found


if __name__ == "__main__":
    cli.run(main, Args)
