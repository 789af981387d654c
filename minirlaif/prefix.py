"""What many prompts begin with, computed once: hidden states at the end of prompts, behind a shared KV cache.

Two beginnings are shared. `root`: that of all prompts (a judge's preamble and exemplars), computed once for any number of
batches. In each batch `last_hidden` adds what the prompts of one group go on with (a long conversation, of which a judge reads
both orders, and all pairs of k responses), where that is worth it. The result is that of a plain forward but for rounding.
"""

import torch

from minirlaif import data
from minirlaif.model import GPT, KVCache

SHARED = 16  # tokens: a shorter common beginning is not worth a forward pass of its own


def common(rows: list[list[int]]) -> int:
    """How many tokens all rows begin with, at most all but the last of the shortest row; 0 if there are fewer than two."""
    if len(rows) < 2:
        return 0
    low, high, most = min(rows), max(rows), min(map(len, rows)) - 1  # what these two share, all between them share
    return next((i for i in range(most) if low[i] != high[i]), most)


def batches(rows: list[int], prompts: list[list[int]], groups: list, size: int, held=0) -> list[list[int]]:
    """Cut rows (indices of prompts) into batches of about one length each, which begin with the same `held` tokens. Where
    sharing pays, equal groups stand together."""
    members = {}
    for i in rows:
        members.setdefault(groups[i], []).append(prompts[i])
    spared = sum((common(m) - held) * (len(m) - 1) for m in members.values() if len(m) > 1)
    if spared > sum(len(prompts[i]) - held for i in rows) / 3:  # as in last_hidden
        longest = {group: max(map(len, m)) for group, m in members.items()}
        order = sorted(rows, key=lambda i: (longest[groups[i]], groups[i]))
    else:
        order = sorted(rows, key=lambda i: len(prompts[i]))
    return [order[k : k + size] for k in range(0, len(order), size)]


@torch.no_grad()
def root(model: GPT, prompts: list[list[int]], pad_id: int) -> KVCache:
    """One cached row: the beginning that all prompts share, or nothing where it is shorter than SHARED."""
    n, empty = common(prompts), KVCache(model.config, 1, 0, model.device, torch.float32)
    return empty if n < SHARED else follow(model, empty, [0], [prompts[0][:n]], pad_id)[1]


@torch.no_grad()
def last_hidden(model: GPT, prompts: list[list[int]], groups: list, root: KVCache, pad_id: int) -> torch.Tensor:
    """Hidden state after each prompt of one batch (B, C). groups: a key a prompt; all prompts begin with what root holds.

    Raises ValueError when a prompt does not fit the context.
    """
    members = {}
    for ids, group in zip(prompts, groups, strict=True):
        members.setdefault(group, []).append(ids)
    cache, owner = root, [0] * len(prompts)
    # the same depth in all groups, so that no pad stands between a row's tokens and takes room
    stem = min(map(common, members.values())) - root.used
    spared, tokens = stem * (len(prompts) - len(members)), sum(map(len, prompts)) - root.used * len(prompts)
    if stem >= SHARED and spared > tokens / 3:  # else the cache costs what it spares (a quarter spared: no faster, on a CPU)
        _, cache = follow(model, root, [0] * len(members), [m[0][root.used :][:stem] for m in members.values()], pad_id)
        owner = [list(members).index(group) for group in groups]
    if cache.used:
        h, _ = follow(model, cache, owner, [ids[cache.used :] for ids in prompts], pad_id)
    else:
        tokens, _ = data.pad(prompts, pad_id, multiple(model.device), model.config.block_size)
        h = model.hidden(data.to_device(tokens, model.device))
    return h[torch.arange(len(prompts)), torch.tensor(list(map(len, prompts))) - cache.used - 1]


def follow(model: GPT, cache: KVCache, owner: list[int], rows: list[list[int]], pad_id: int) -> tuple[torch.Tensor, KVCache]:
    """Forward rows of tokens, row i behind row owner[i] of a cache whose rows all hold `cache.used` tokens.

    -> hidden states of the rows, pads included (B, T, C), and a new cache of it all; `cache` stays as it was.
    """
    device, held = model.device, cache.used
    tokens, length = data.pad(rows, pad_id, multiple(device), model.config.block_size - held)
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else model.wte.weight.dtype
    grown = KVCache(model.config, len(rows), held + tokens.shape[1], device, dtype)
    grown.begin_with(cache, owner)
    h = model.hidden(data.to_device(tokens, device), grown)
    grown.used = held + int(length.max())
    return h, grown


def multiple(device) -> int:
    """What lengths are padded to: 16 where kernels are compiled for a shape (bf16, GPUs), else 1, since pads cost time."""
    return 1 if device.type == "cpu" and not torch.is_autocast_enabled("cpu") else 16
