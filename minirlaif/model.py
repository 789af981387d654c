"""GPT-2, exactly: learned positions, pre-LayerNorm, tanh-GELU, tied head (Radford et al. 2019, §2.3).

Batches are right-padded and the model is causal, so a real token never sees a pad: no attention mask, no position ids.
The names follow nanoGPT and shapes are B (rows), T (time), C (n_embd), H (heads), V (vocabulary).

Left out: dropout by default (RL needs it off: the policy that is scored must be the policy that sampled), torch.compile.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTConfig:
    block_size: int = 256  # tokens of context
    vocab_size: int = 1024
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    dropout: float = 0.0


class KVCache:
    """Keys and values of up to `size` tokens for each row; every row writes at its own `length`."""

    def __init__(self, config: GPTConfig, rows: int, size: int, device, dtype):
        shape = (config.n_layer, rows, config.n_head, size, config.n_embd // config.n_head)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.length = torch.zeros(rows, dtype=torch.long, device=device)  # tokens held, one count per row
        self.used = 0  # no row holds more than this: known without asking the device

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor, pos: torch.Tensor):
        """Put k, v (B, H, T, C/H) at slots pos (B, T); return all slots in use (B, H, used, C/H)."""
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        # mixed advanced indexing puts (B, T) first, hence the transpose of H and T
        self.k[layer][rows, :, pos] = k.transpose(1, 2).to(self.k.dtype)
        self.v[layer][rows, :, pos] = v.transpose(1, 2).to(self.v.dtype)
        return self.k[layer][:, :, : self.used], self.v[layer][:, :, : self.used]

    def begin_with(self, other: "KVCache", owner: list[int]):
        """Into this cache, a new one: row i takes over what row owner[i] of another holds, all rows there `other.used` tokens."""
        held = other.used
        self.k[:, :, :, :held], self.v[:, :, :, :held] = other.k[:, owner, :, :held], other.v[:, owner, :, :held]
        self.length += held
        self.used = held

    def keep(self, rows: torch.Tensor):
        """Drop all rows but these (finished rows cost time)."""
        self.k, self.v, self.length = self.k[:, rows], self.v[:, rows], self.length[rows]


def attend(q, k, v, mask=None):
    """softmax(q kᵀ / √d) v. Without a mask, token t sees tokens ≤ t; mask (B, 1, T, S) is True where a key is seen."""
    if mask is None and q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # The bf16 backward of torch's fused CPU kernel is 7x slower than fp32's (31.6 ms against 4.4 at 8 x 112 tokens),
        # this one is not. Scoring takes it too, so that old and new log-probs come from one and the same computation.
        future = torch.full((q.shape[-2], k.shape[-2]), float("-inf"), dtype=q.dtype).triu(1)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + future
        return F.softmax(scores, dim=-1, dtype=q.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


def project(linear, x, adapter):
    """linear(x), and what an adapter (lora.Adapter) adds to it."""
    y = linear(x)
    return y if adapter is None else y.add_(adapter.delta(linear, x))  # in place: no backward needs y


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, layer=0, cache=None, pos=None, mask=None, adapter=None):
        B, T, C = x.shape
        q, k, v = project(self.c_attn, x, adapter).split(C, dim=2)
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in (q, k, v))  # (B, H, T, C/H)
        if cache is not None:
            k, v = cache.write(layer, k, v, pos)
            q = q.to(k.dtype)
        y = attend(q, k, v, mask)
        return project(self.c_proj, y.transpose(1, 2).reshape(B, T, C), adapter)


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = nn.ModuleDict(
            dict(c_fc=nn.Linear(config.n_embd, 4 * config.n_embd), c_proj=nn.Linear(4 * config.n_embd, config.n_embd))
        )
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, layer=0, cache=None, pos=None, mask=None, adapter=None):
        x = x + self.drop(self.attn(self.ln_1(x), layer, cache, pos, mask, adapter))
        h = F.gelu(project(self.mlp.c_fc, self.ln_2(x), adapter), approximate="tanh")
        return x + self.drop(project(self.mlp.c_proj, h, adapter))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight  # tied: one matrix reads and writes tokens

    def init_weights(self, generator: torch.Generator) -> "GPT":
        """GPT-2's initialisation: N(0, 0.02), residual projections scaled down by √(2 n_layer), biases zero."""
        for name, p in self.named_parameters():
            if p.dim() >= 2:
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj.weight") else 0.02
                with torch.no_grad():
                    p.copy_(torch.randn(p.shape, generator=generator) * std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        return self

    @property
    def device(self) -> torch.device:
        return self.wte.weight.device

    def hidden(self, idx: torch.Tensor, cache: KVCache | None = None, adapter=None) -> torch.Tensor:
        """Last hidden states (B, T, C) of tokens idx (B, T), after ln_f.

        With a cache, the T tokens of each row follow the tokens that the row holds; the caller then moves
        `cache.length` on by as many of them as are real (the slots of pads are simply written again).
        adapter: a lora.Adapter of this model; None is the model itself.
        Raises ValueError when a row would pass block_size.
        """
        B, T = idx.shape
        mask = pos = None
        if cache is None:
            if self.config.block_size < T:
                raise ValueError(f"{T} tokens do not fit a context of {self.config.block_size}")
            x = self.wte(idx) + self.wpe.weight[:T]
        else:
            cache.used += T
            if cache.used > min(self.config.block_size, cache.k.shape[3]):
                raise ValueError(f"{cache.used} tokens do not fit a context of {self.config.block_size}")
            pos = cache.length[:, None] + torch.arange(T, device=idx.device)  # (B, T)
            # a query sees every slot up to its own; SDPA's is_causal would align the corner top-left, wrong behind a prefix
            mask = torch.arange(cache.used, device=idx.device) <= pos[:, None, :, None]  # (B, 1, T, used)
            x = self.wte(idx) + self.wpe(pos)
        x = self.drop(x)
        for layer, block in enumerate(self.h):
            x = block(x, layer, cache, pos, mask, adapter)
        return self.ln_f(x)

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        """Next-token logits (..., V) of hidden states (..., C)."""
        return self.lm_head(h)

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        return self.logits(self.hidden(idx))


def upcast(x: torch.Tensor) -> torch.Tensor:
    """bf16 to fp32, for what must not be rounded; fp64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def response_mask(prompt_len: torch.Tensor, length: torch.Tensor, T: int) -> torch.Tensor:
    """(B, T) bool: True where a token belongs to the response, prompt_len ≤ t < length (end-of-text included)."""
    t = torch.arange(T, device=length.device)
    return (t >= prompt_len[:, None]) & (t < length[:, None])


def rows_where(h: torch.Tensor, where: torch.Tensor, multiple: int = 128) -> torch.Tensor:
    """The rows of h (B, T, C) where `where` (B, T) is True, N of them in order, and then copies up to a multiple: (N', C).

    The copies keep the number of distinct shapes small. A CPU compiles a bf16 product anew for every shape it meets,
    which costs more time than the copies, and memory that grows with the run.
    """
    index = where.flatten().nonzero().squeeze(-1)
    index = F.pad(index, (0, -len(index) % multiple))
    return h.flatten(0, 1)[index]


def token_logprobs(model: GPT, tokens: torch.Tensor, mask: torch.Tensor, temperature: float = 1.0, chunk: int = 4096):
    """log π(tokens[b, t] | tokens[b, :t]) in nats, and the entropy of that prediction; both (B, T) fp32, 0 where mask is False.

    The one place where predictions are shifted: token t is predicted from hidden state t-1. `temperature` is the one that
    sampled (Huang et al. 2023): the policy that is scored is the policy that acted. The head runs only where mask is True,
    in chunks that backward recomputes, so that (B, T, V) logits are never held.
    """
    where = mask[:, 1:]  # the first token has no prediction
    N = int(where.sum())
    h = rows_where(model.hidden(tokens)[:, :-1], where)  # (N', C), N' a little more than N
    targets = rows_where(tokens[:, 1:, None], where).squeeze(-1)  # (N',)

    def head(h, targets):
        logits = upcast(model.logits(h)) / temperature
        logp = F.log_softmax(logits, dim=-1)
        with torch.no_grad():  # a metric; an entropy bonus is not part of these recipes
            entropy = -(logp.exp() * logp).sum(-1)
        return logp.gather(-1, targets[:, None]).squeeze(-1), entropy

    parts = [
        checkpoint(head, h_, t_, use_reentrant=False) if h.requires_grad else head(h_, t_)
        for h_, t_ in zip(h.split(chunk), targets.split(chunk), strict=True)
    ]
    logprobs, entropy = (torch.cat(p)[:N] for p in zip(*parts, strict=True))
    out = torch.zeros(2, *tokens.shape, device=tokens.device, dtype=logprobs.dtype)
    where = torch.cat([torch.zeros_like(mask[:, :1]), mask[:, 1:]], dim=1)
    return out[0].masked_scatter(where, logprobs), out[1].masked_scatter(where, entropy)
