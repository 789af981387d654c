"""Stored targets against a teacher at hand: bytes a token, seconds a step, what writing costs, and what fp16 does.

    python -m bench.distill_targets

Weights are random, which costs what trained ones cost; only the rounding is measured on a trained model, if --model names one.
The ways take turns in every round, so that what else the machine does hits them alike; seconds are medians. A step is the loss
and its gradient, without the optimizer, which costs all of them the same.
"""

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from experiments import common
from minirlaif import cli, prefix, targets, trainer
from minirlaif.examples import Example
from minirlaif.losses import token_kl
from minirlaif.model import GPT, GPTConfig

# name: layers, heads, width, vocabulary, block size; examples, their response tokens
SHAPES = {"the demo's, 0.9 M": (4, 4, 128, 768, 1024, 64, 24), "GPT-2's, 124 M": (12, 12, 768, 50257, 1024, 4, 48)}


@dataclass
class Args:
    rounds: int = cli.arg(3, "how often each way takes its turn, 3-15")
    batch_size: int = cli.arg(4, "examples a step, 4-64")
    prompt: int = cli.arg(16, "tokens of each prompt, 8-64")
    threads: int = cli.arg(1, "threads of torch")
    model: str | None = cli.arg(None, "trained model for the rounding, run folder or model file; none: the random ones")
    quick: bool = cli.arg(False, "a tiny model, 1 round: shows that it runs")


def student_step(student, batch, target):
    h = targets.response_states(student, [e.unseen for e in batch], [e.response for e in batch], 0)
    targets.kl(student, h, target)[: sum(len(e.response) for e in batch)].mean().backward()
    student.zero_grad(set_to_none=True)


def measure(shape, context: int, top_k: int, args: Args) -> dict:
    """One line of the table."""
    *model_shape, n_vocab, block, n, length = shape
    config = GPTConfig(block, n_vocab, *model_shape)
    teacher, student = (GPT(config).init_weights(trainer.rng(i)).eval() for i in range(2))
    teacher.requires_grad_(False)
    draw = trainer.rng(2)

    def ids(n):
        return torch.randint(n_vocab, (n,), generator=draw).tolist()

    c = ids(context)
    rows = [Example(c + p, p, ids(length), 0) for p in (ids(args.prompt) for _ in range(n))]
    root, empty = prefix.root(teacher, [e.seen for e in rows], 0), None
    batch = rows[: args.batch_size]

    def fly(root):
        with torch.no_grad():
            h = targets.response_states(teacher, [e.seen for e in batch], [e.response for e in batch], 0, root)
            target = targets.predict(teacher, h, top_k, 1.0) if top_k else (teacher, h)
        student_step(student, batch, target)

    began = time.perf_counter()
    found = targets.predict_all(teacher, root, rows, top_k, 1.0, 0, args.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "targets.pt"
        targets.save(path, found, [e.response for e in rows], {})
        written = time.perf_counter() - began
        stored, _ = targets.load(path, {})
        size = path.stat().st_size / len(found.logprobs)
        index = torch.arange(length * len(batch))
        index = torch.nn.functional.pad(index, (0, -len(index) % 128))
        ways = {
            "stored": lambda: student_step(student, batch, stored.at(index, "cpu")),
            "shared": lambda: fly(root),
            "whole": lambda: fly(empty),
        }
        seconds = {name: [] for name in ways}
        for turn in range(args.rounds + 1):
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                if turn:  # the first round warms up
                    seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    return {
        **medians,
        "write": written / n * args.batch_size,
        "file": size,
        "tensors": sum(x.nbytes for x in stored if x is not None) / len(stored.logprobs),
    }


@torch.no_grad()
def rounding(model, top_k: int, n: int = 2048) -> dict:
    """Mean and largest KL (nats) of predictions before random tokens to the same in the file, in fp16."""
    tokens = torch.randint(model.config.vocab_size, (n // 64, 65), generator=trainer.rng(3))
    exact = targets.predict(model, model.hidden(tokens)[:, :-1].flatten(0, 1), top_k, 1.0)
    stored = targets.Targets(exact.logprobs.half(), exact.ids).at(torch.arange(n), "cpu")
    kl = token_kl(*(x.logprobs.double().log_softmax(-1) for x in (exact, stored)))
    return {"mean": float(kl.mean()), "max": float(kl.max())}


def main(args: Args) -> dict:
    cli.require_positive(args, "rounds", "batch_size", "prompt")
    common.use_threads(args.threads)
    shapes, contexts = ({"tiny": (1, 2, 16, 300, 256, 8, 4)}, (16, 128)) if args.quick else (SHAPES, (16, 512))
    if args.quick:
        args.rounds = 1
    room = min(block - length for *_, block, _, length in shapes.values()) - max(contexts)
    if args.prompt > room:
        raise cli.UserError(f"--prompt {args.prompt}: with C and an answer there is room for {room} tokens")
    ways = "stored | on the fly, C cached | on the fly, C read again | writing them"
    print(f"| model | C | targets | bytes a token (file) | s a step: {ways} |\n|{' --- |' * 8}", flush=True)
    found = {}
    for name, shape in shapes.items():
        for context in contexts:
            for top_k in (0, 50) if shape[3] < 10_000 else (50,):
                f = found[name, context, top_k] = measure(shape, context, top_k, args)
                kind = f"top {top_k} and the rest" if top_k else f"all {shape[3]}"
                times = " | ".join(f"{f[way]:.3f}" for way in ("stored", "shared", "whole", "write"))
                print(f"| {name} | {context} | {kind} | {f['tensors']:.0f} ({f['file']:.0f}) | {times} |", flush=True)
    model = trainer.load_gpt(args.model) if args.model else GPT(GPTConfig(256, 300, 1, 2, 16)).init_weights(trainer.rng(0))
    for top_k in (0, 50):
        r = found["rounding", top_k] = rounding(model, top_k)
        print(f"fp16, {f'top {top_k}' if top_k else 'all'}: {r['mean']:.1e} nats a token on average, {r['max']:.1e} at most")
    return found


if __name__ == "__main__":
    cli.run(main, Args)
