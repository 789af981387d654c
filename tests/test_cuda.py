"""On a GPU: the numbers of the CPU, every trainer from end to end in bf16, and a decode loop that does not wait."""

import json
import warnings
from dataclasses import replace

import pytest
import torch

import distill
import pretrain
import train_ppo
import train_rm
from minirlaif import trainer
from minirlaif.model import GPT, GPTConfig, token_logprobs
from minirlaif.sampling import generate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
GPU, CPU = torch.device("cuda"), torch.device("cpu")
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]


def tiny():
    return GPT(GPTConfig(64, 50, n_layer=2, n_head=2, n_embd=32)).init_weights(trainer.rng(0)).eval()


def test_logprobs_and_greedy_samples_are_those_of_the_cpu():
    model = tiny()
    here = generate(model, PROMPTS, 8, eot=0, temperature=0)
    mask = torch.arange(here.tokens.shape[1]) >= here.prompt_len[:, None]
    expected, _ = token_logprobs(model, here.tokens, mask)
    model.to(GPU)
    there = generate(model, PROMPTS, 8, eot=0, temperature=0)
    assert torch.equal(here.tokens, there.tokens.cpu())
    found, _ = token_logprobs(model, there.tokens, mask.to(GPU))
    assert torch.allclose(found.cpu(), expected, atol=1e-4)


def test_the_decode_loop_asks_whether_all_is_done_every_fourth_token_and_nothing_else():
    """Whatever makes the CPU wait for the GPU warns in this mode."""
    model, waits = tiny().to(GPU), {}
    generate(model, PROMPTS, 4, eot=49)
    for n in (4, 24):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            generate(model, PROMPTS, n, eot=49)
            torch.cuda.set_sync_debug_mode("default")
        waits[n] = len(caught)
    assert waits[24] - waits[4] <= 2 * 20 // 4  # nonzero and, where rows are dropped, their number


def test_the_optimizer_is_fused():
    optimizer = trainer.configure_optimizer(tiny().to(GPU), 1e-3)
    assert all(group["fused"] for group in optimizer.param_groups)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_trainer_runs_and_its_model_loads_anywhere(home, base, prompts, labelled, tmp_path, dtype):
    gpu = dict(device="cuda", dtype=dtype)
    documents, preferences = str(home / "world" / "documents.jsonl"), str(labelled[0] / "preferences.jsonl")
    shape = dict(n_layer=2, n_head=2, n_embd=32, tokens_per_batch=4096)
    pretrain.main(pretrain.Args(data=[documents], out=str(tmp_path / "base"), **shape, **gpu))
    train_rm.main(train_rm.Args(init=base, data=[preferences], out=str(tmp_path / "rm"), **gpu))
    args = train_ppo.Args(
        init=base, reward_model=str(tmp_path / "rm"), data=prompts, out=str(tmp_path / "rl"), steps=3, batch_size=16,
        minibatch_size=8, max_new_tokens=16, lr=0.0, **gpu,
    )  # fmt: skip
    train_ppo.main(args)
    rows = [json.loads(line) for line in (tmp_path / "rl" / "metrics.jsonl").read_text().splitlines()]
    limit = 1e-5 if dtype == "fp32" else 0.05
    assert all(abs(row["policy/ratio"] - 1) < limit and abs(row["objective/kl"]) < limit for row in rows)
    train_ppo.main(replace(args, out=str(tmp_path / "moved"), lr=1e-3))
    distill.main(distill.Args(model=base, data=[prompts], out=str(tmp_path / "distilled"), max_new_tokens=24, **gpu))
    for name in ("base", "rl", "moved", "distilled"):
        assert torch.isfinite(trainer.load_gpt(tmp_path / name, CPU)(torch.ones(1, 4, dtype=torch.long))).all()
