"""Peak memory and trainable weights of one PPO step: full fine-tuning (four models) against adapters on one base.

    python -m bench.memory

The step is train_ppo.ppo_step as it stands, with random weights and rollouts: 32 rows of 112 tokens, 32 of them the response,
minibatches of 8, one epoch, so that four steps of both optimizers are taken and Adam has its moments. Full: policy, reference,
reward and value model. LoRA: the frozen base, which is the reference, and three adapters. Each case is a process of its own;
its memory is the most that it held, less what a step with a model of next to nothing takes (PyTorch itself).
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import train_ppo
from experiments import common
from minirlaif import cli, lora, trainer
from minirlaif.heads import RewardModel, ValueModel
from minirlaif.model import GPT, GPTConfig
from minirlaif.sampling import Samples
from minirlaif.tokenizer import load_tokenizer

SHAPES = {
    "the demo's, 4 x 128": GPTConfig(vocab_size=load_tokenizer("toy").n_vocab),
    "GPT-2 124M, 12 x 768": GPTConfig(block_size=1024, vocab_size=50257, n_layer=12, n_head=12, n_embd=768),
}


@dataclass
class Args:
    rank: int = cli.arg(8, "of the adapters, 4-64")
    threads: int = cli.arg(2, "threads of torch")
    quick: bool = cli.arg(False, "the demo's shape in fp32 alone: shows that it runs")


def peak() -> float:
    """MB that this process has held at most. Linux: of this program (ru_maxrss knows that of the parent, before exec)."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024**2 if sys.platform == "darwin" else 1024)


def make_models(config: GPTConfig, rank: int) -> train_ppo.Models:
    """As train_ppo.load_models makes them; rank 0 is full fine-tuning."""
    base = GPT(config).init_weights(trainer.rng(0)).eval().requires_grad_(False)
    policy = lora.trainable(base, rank, trainer.rng(0, "policy"))
    trunk = lora.trainable(base, rank, trainer.rng(0, "reward"))
    reward_model = RewardModel(trunk, generator=trainer.rng(0)).requires_grad_(False)
    value_model = ValueModel(reward_model, lora.trainable(reward_model.gpt, rank, trainer.rng(0, "value")))
    optimizers = [trainer.configure_optimizer(model, 1e-5) for model in (policy, value_model)]
    return train_ppo.Models(policy.eval(), base, reward_model.eval(), value_model.eval(), *optimizers)


def child(shape: str, rank: int, dtype: str, threads: int):
    """One case, in this process: its figures as JSON on stdout."""
    torch.set_num_threads(threads)
    step(GPTConfig(block_size=112, vocab_size=32, n_layer=1, n_head=1, n_embd=8), rank, dtype)
    before = peak()
    trainable = step(SHAPES[shape], rank, dtype)
    print(json.dumps({"peak": peak() - before, "trainable": trainable}))


def step(config: GPTConfig, rank: int, dtype: str) -> int:
    """One PPO step of new models; how many weights it trained."""
    models = make_models(config, rank)
    tokens = torch.randint(config.vocab_size, (32, 112), generator=trainer.rng(0, "tokens"))
    samples = Samples(tokens, torch.full((32,), 80), torch.full((32,), 112), torch.ones(32, dtype=torch.bool))
    args = train_ppo.Args(out="", init="", reward_model="", data="", minibatch_size=8, ppo_epochs=1)
    train_ppo.ppo_step(models, samples, args, args.kl_coef, 0, trainer.autocast(torch.device("cpu"), dtype))
    return sum(p.numel() for m in (models.policy, models.value_model) for p in m.parameters())


def main(args: Args) -> list[dict]:
    cli.require_positive(args, "rank")
    common.use_threads(args.threads)  # here only to be checked: a child of its own measures
    found = []
    print(
        f"32 rows of 112 tokens, minibatches of 8, rank {args.rank}, {args.threads} threads, torch {torch.__version__}\n\n"
        "| shape | dtype | weights trained, full | LoRA | peak, full | LoRA | share |\n" + "| --- " * 7 + "|",
        flush=True,
    )
    for shape in list(SHAPES)[: 1 if args.quick else None]:
        for dtype in ("fp32",) if args.quick else ("fp32", "bf16"):
            ways = []
            for rank in (0, args.rank):
                root = Path(__file__).parent.parent
                call = f"from bench.memory import child; child({shape!r}, {rank}, {dtype!r}, {args.threads})"
                done = subprocess.run([sys.executable, "-c", call], cwd=root, stdout=subprocess.PIPE, text=True, check=True)
                ways.append(json.loads(done.stdout))
            full, adapters = ways
            share = adapters["peak"] / full["peak"]
            found.append({"shape": shape, "dtype": dtype, "full": full, "lora": adapters, "share": share})
            print(
                f"| {shape} | {dtype} | {full['trainable'] / 1e6:.2f} M | {adapters['trainable'] / 1e6:.2f} M "
                f"| {full['peak']:,.0f} MB | {adapters['peak']:,.0f} MB | {share:.0%} |",
                flush=True,
            )
    return found


if __name__ == "__main__":
    cli.run(main, Args)
