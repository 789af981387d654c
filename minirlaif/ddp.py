"""Several processes as one (torchrun): each takes its share of every batch, and sums make the result that of one process.

    torchrun --nproc-per-node 2 train_ppo.py ...

Started without torchrun there is one process, and every function here returns what it was given. All processes hold the same
weights and take the same steps: gradients are summed by hand before each of them, divided by counts of the whole batch, so
that nothing depends on how it was shared out. torch's DistributedDataParallel would average means of unequal shares, and
wants one forward and one backward a step. Process 0 alone writes files (trainer.Run).
"""

import io
import os
import sys

import torch
import torch.distributed as dist

from minirlaif.cli import UserError


def rank() -> int:
    return int(os.environ.get("RANK", 0)) if world() > 1 else 0


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def start(device: torch.device) -> torch.device:
    """Join the other processes, once; the device of this one. gloo between CPUs, NCCL between GPUs."""
    if world() == 1:
        return device
    if rank() > 0:
        sys.stdout = io.StringIO()  # every process says the same
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise UserError(f"torchrun: process {device.index} of this machine has no GPU; start fewer, or --device cpu")
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def share(items, of=None):
    """The part of a list or tensor of rows that is this process's (or that of process `of`): every world-th; may be empty."""
    return items[rank() if of is None else of :: world()]


def total(x: torch.Tensor) -> torch.Tensor:
    """The sum of x over the processes, on each of them."""
    if world() > 1:
        x = x.detach().clone()
        dist.all_reduce(x)
    return x


def agree(value):
    """Process 0's value (plain data), on each."""
    values = [value]
    if world() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def gather(value) -> list:
    """[the value of each process], on each; plain data or tensors on the CPU."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values


def sum_gradients(model: torch.nn.Module):
    """Each gradient becomes its sum over the processes; one that saw no row counts as 0. One message for all of them."""
    if world() > 1:
        parameters = [p for p in model.parameters() if p.requires_grad]
        flat = total(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]))
        for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad = grad.view_as(p)
