"""LoRA: many roles on one frozen base (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", §4.1).

An adapter adds (α / r) B A x to the output W x of a projection, with A (r, in) and B (out, r). A starts at random and B at 0,
so that a new adapter changes nothing, bit for bit. Policy, value and reward adapters share one base, which on its own is the
reference. Which of them acts is an argument of the forward and not a switch on the base, so that no role can be mistaken for
another, also where backward computes a part of a forward again.

Left out: dropout (RL needs it off), adapters on embeddings and biases, a rank for each layer.
"""

import copy
import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from minirlaif import ddp
from minirlaif.cli import UserError
from minirlaif.heads import RewardModel
from minirlaif.model import GPT, KVCache
from minirlaif.trainer import read_model, save_model

TARGETS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")  # all matrices of a block


class Adapter(nn.Module):
    """The A and B of every targeted projection of `base`, which is frozen here and shared. Stands wherever a GPT does.

    rank: 1-64; alpha: the weight of the adapter is alpha / rank. It is 1 by default: Hu et al. too set alpha to the rank they
    try first, since tuning it is tuning the learning rate. targets: a part of TARGETS. generator: of A, N(0, 1 / in).
    """

    def __init__(self, base: GPT, rank: int, generator=None, alpha=None, targets=TARGETS):
        super().__init__()
        if rank > 4 * base.config.n_embd:
            raise UserError(f"--lora-rank {rank}: more than its widest matrix has, {4 * base.config.n_embd}; 4-64 are usual")
        self.rank, self.alpha, self.targets = rank, rank if alpha is None else alpha, tuple(targets)
        # not registered: parameters(), state_dict(), train() and deepcopy are the adapter's alone
        for name, value in (("base", base), ("h", base.h), ("wte", base.wte), ("lm_head", base.lm_head)):
            object.__setattr__(self, name, value)
        base.requires_grad_(False).eval()
        self.config, self.A, self.B, self.linears = base.config, nn.ParameterDict(), nn.ParameterDict(), {}
        for name, linear in base.named_modules():
            if name.endswith(self.targets):
                (out, into), key = linear.weight.shape, name.replace(".", "/")  # a parameter's name holds no dot
                self.linears[linear] = key
                self.A[key] = nn.Parameter(torch.randn(rank, into, generator=generator).to(linear.weight) * into**-0.5)
                self.B[key] = nn.Parameter(linear.weight.new_zeros(out, rank))

    @property
    def device(self) -> torch.device:
        return self.wte.weight.device

    def delta(self, linear: nn.Linear, x: torch.Tensor):
        """What is added to linear(x): (..., out), or 0 where this projection is no target."""
        key = self.linears.get(linear)
        return 0 if key is None else F.linear(F.linear(x, self.A[key]) * (self.alpha / self.rank), self.B[key])

    def hidden(self, idx: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        return self.base.hidden(idx, cache, adapter=self)

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        return self.base.logits(h)

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        return self.logits(self.hidden(idx))

    def weight(self, linear: nn.Linear) -> torch.Tensor:
        """The adapter as a matrix like linear.weight (out, in)."""
        key = self.linears[linear]
        return self.alpha / self.rank * self.B[key] @ self.A[key]

    @torch.no_grad()
    def merge(self, sign=1):
        """Fold the adapter into the base's weights: base.hidden is then what self.hidden was, but for rounding."""
        for linear in self.linears:
            linear.weight += sign * self.weight(linear)

    def unmerge(self):
        """Take `merge` back, but for rounding."""
        self.merge(-1)

    @torch.no_grad()
    def merged_state_dict(self) -> dict:
        """The weights of a GPT that is base and adapter in one; the base stays as it is, bit for bit."""
        merged = {key.replace("/", ".") + ".weight": lin.weight + self.weight(lin) for lin, key in self.linears.items()}
        return self.base.state_dict() | merged

    def __deepcopy__(self, memo):
        """An adapter of its own with the same A and B, on the same base."""
        twin = Adapter(self.base, self.rank, alpha=self.alpha, targets=self.targets)
        twin.load_state_dict(self.state_dict())
        return twin


def trainable(gpt, rank: int, generator):
    """What starts as `gpt` and can be trained without touching it: a copy, or with a rank a new Adapter on it (frozen then).

    Of an Adapter, a copy on the same base, whatever its rank.
    """
    return Adapter(gpt, rank, generator) if rank and isinstance(gpt, GPT) else copy.deepcopy(gpt).requires_grad_()


def base_hash(gpt: GPT) -> str:
    """SHA-256 over names and bytes of all weights: whose adapter this is."""
    digest = hashlib.sha256()
    for name, w in gpt.state_dict().items():
        digest.update(name.encode())
        digest.update(w.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def save(folder, model, kind: str, tokenizer_name: str):
    """Write model.pt, what the next stage reads, of a GPT (kind "gpt") or RewardModel ("reward").

    Of one with an adapter, it holds the merged weights, and adapter.pt beside it the adapter (and head, gain, bias) alone, with
    its rank, alpha and targets and the hash of its base.
    """
    adapter, weights = getattr(model, "gpt", model), model.state_dict()
    if isinstance(adapter, Adapter):
        about = {name: getattr(adapter, name) for name in ("rank", "alpha", "targets")} | {"base": base_hash(adapter.base)}
        save_model(Path(folder) / "adapter.pt", adapter.config, weights, f"{kind} adapter", tokenizer_name, about)
        prefix = "" if adapter is model else "gpt."
        weights = {name: w for name, w in weights.items() if not name.startswith((prefix + "A.", prefix + "B."))}
        weights |= {prefix + name: w for name, w in adapter.merged_state_dict().items()}
    elif ddp.rank() == 0:
        (Path(folder) / "adapter.pt").unlink(missing_ok=True)  # of an earlier run, it would be taken for this one's
    save_model(folder, adapter.config, weights, kind, tokenizer_name)


def load(folder, base: GPT, kind: str):
    """The Adapter (kind "gpt") or RewardModel on one (kind "reward") of a run folder, on `base`, in eval mode.

    UserError as in trainer.read_model, and where the adapter was trained on other weights than those of `base`.
    """
    content, found = read_model(Path(folder) / "adapter.pt", f"{kind} adapter"), base_hash(base)
    if content["base"] != found:
        its, this = content["base"][:12], found[:12]
        raise UserError(f"{folder}: its adapter belongs to other weights ({its}) than those given ({this}); give its --init")
    adapter = Adapter(base, content["rank"], alpha=content["alpha"], targets=content["targets"])
    model = adapter if kind == "gpt" else RewardModel(adapter)
    model.load_state_dict(content["model"])
    return model.eval()
