"""Muon against its definition: the singular value decomposition."""

import copy
import json
from dataclasses import replace

import pytest
import torch

import pretrain
from minirlaif import trainer
from minirlaif.model import GPT, GPTConfig
from minirlaif.muon import Muon, orthogonalise


@pytest.mark.parametrize("shape", [(16, 16), (48, 16), (16, 64), (3, 24, 8)])
def test_orthogonalise_keeps_the_directions_and_evens_the_sizes(shape):
    g = torch.randn(shape, generator=trainer.rng(0))
    x = orthogonalise(g)
    assert x.shape == g.shape and x.dtype == g.dtype
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    inside = u.mT @ x @ vh.mT  # diagonal, if x has the singular vectors of g
    diagonal = torch.diagonal(inside, dim1=-2, dim2=-1)
    assert (inside - torch.diag_embed(diagonal)).abs().max() < 1e-4
    keep = s / s.norm(dim=-1, keepdim=True) > 0.02  # five products cannot lift what is all but zero
    assert keep.float().mean() > 0.9 and diagonal[keep].min() > 0.6 and diagonal[keep].max() < 1.25


def test_orthogonalise_does_not_see_the_scale_and_survives_zero():
    g = torch.randn(8, 16, generator=trainer.rng(1))
    assert torch.allclose(orthogonalise(g), orthogonalise(1e-3 * g), atol=1e-3)
    assert torch.equal(orthogonalise(torch.zeros(4, 6)), torch.zeros(4, 6))
    assert orthogonalise(g, torch.bfloat16).dtype == torch.float32


def test_two_steps_by_hand():
    """Nesterov momentum, the factor of tall matrices, decay that is decoupled from the gradient."""
    w = torch.nn.Parameter(torch.randn(12, 3, generator=trainer.rng(2)))
    want, m = w.detach().clone(), torch.zeros(12, 3)
    optimizer = Muon([w], lr=0.1, momentum=0.9, weight_decay=0.5)
    for step in range(2):
        w.grad = torch.randn(12, 3, generator=trainer.rng(3, step))
        optimizer.step()
        m = 0.9 * m + 0.1 * w.grad
        want = want * (1 - 0.1 * 0.5) - 0.1 * 2 * orthogonalise(0.1 * w.grad + 0.9 * m)  # sqrt(12 / 3) = 2
        assert torch.allclose(w, want, atol=1e-6)


def test_matrices_of_one_shape_together_are_as_each_alone():
    def train(split):
        ws = [torch.nn.Parameter(torch.randn(4, 6, generator=trainer.rng(i))) for i in range(3)]
        optimizers = [Muon([w], 0.1) for w in ws] if split else [Muon(ws, 0.1)]
        for w in ws:
            w.grad = w.detach().sin()
        for optimizer in optimizers:
            optimizer.step()
        return ws

    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(train(True), train(False), strict=True))


def test_each_weight_of_a_new_gpt_has_one_optimizer_and_its_rate(tmp_path):
    model = GPT(GPTConfig(16, 11, n_layer=2, n_head=2, n_embd=8))
    args = pretrain.Args(data=["a.txt"], out="a", lr=1e-3, muon_lr=1e-2)
    adamw, muon = pretrain.make_optimizers(model, args, torch.float32)
    held = [{id(p) for group in o.param_groups for p in group["params"]} for o in (adamw, muon)]
    assert not held[0] & held[1] and held[0] | held[1] == {id(p) for p in model.parameters()}
    assert held[1] == {id(p) for name, p in model.named_parameters() if name.startswith("h.") and p.dim() == 2}
    assert [o.param_groups[0]["lr"] for o in (adamw, muon)] == [1e-3, 1e-2]
    for other in (replace(args, init="base"), replace(args, muon_lr=0.0)):
        (alone,) = pretrain.make_optimizers(model, other, torch.float32)
        assert isinstance(alone, torch.optim.AdamW)
        assert sum(len(g["params"]) for g in alone.param_groups) == len(held[0] | held[1])


def test_both_rates_follow_the_schedule(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("to fix the bike, take a wrench and turn the wheel. " * 40)
    rates, make = [], pretrain.make_optimizers

    def watched(*args):
        optimizers = make(*args)
        for optimizer in optimizers:
            optimizer.register_step_pre_hook(lambda o, *_: rates.append((type(o).__name__, o.param_groups[0]["lr"])))
        return optimizers

    monkeypatch.setattr(pretrain, "make_optimizers", watched)
    pretrain.main(pretrain.Args(
        data=[str(tmp_path / "a.txt")], out=str(tmp_path / "run"), lr=1e-3, muon_lr=1e-2, warmup=2, schedule="constant",
        n_layer=1, n_head=1, n_embd=8, block_size=32, tokens_per_batch=128, device="cpu", dtype="fp32",
    ))
    assert rates[:6] == [("AdamW", 5e-4), ("Muon", 5e-3), ("AdamW", 1e-3), ("Muon", 1e-2), ("AdamW", 1e-3), ("Muon", 1e-2)]
    logged = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert (logged["lr"], logged["lr/muon"]) == (5e-4, 5e-3)


def test_state_dict_continues_where_it_was():
    def step(w, optimizer, i):
        w.grad = torch.randn(5, 5, generator=trainer.rng(i))
        optimizer.step()

    w = torch.nn.Parameter(torch.eye(5))
    optimizer = Muon([w], 0.1)
    step(w, optimizer, 0)
    again = torch.nn.Parameter(w.detach().clone())
    other = Muon([again], 0.7)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # as a file would be
    step(w, optimizer, 1), step(again, other, 1)
    assert torch.equal(w, again)
