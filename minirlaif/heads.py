"""A GPT with a scalar head: the reward model reads it at the last token, the value model before every token.

One number per position, gain * (w . h + b) + bias, in fp32 whatever the autocast. `gain` and `bias` are buffers,
not weights: they fix the scale of the reward (mean 0, std 1 on reference samples) so that a KL coefficient means
the same for every reward model. (Ziegler et al. 2019, section 2.2; Huang et al. 2023, details 8 to 12.)
"""

import copy

import torch
from torch import nn

from minirlaif.model import upcast


class ScalarModel(nn.Module):
    """A trunk, a linear head and an affine scale. `zero_head`: start at 0 everywhere instead of at N(0, 1/(d+1))."""

    def __init__(self, gpt, zero_head=False, generator=None):
        super().__init__()
        self.gpt = gpt
        self.head = nn.Linear(gpt.config.n_embd, 1)
        std = 0.0 if zero_head else (gpt.config.n_embd + 1) ** -0.5
        nn.init.normal_(self.head.weight, std=std, generator=generator)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("gain", torch.ones(()))
        self.register_buffer("bias", torch.zeros(()))
        self.to(next(gpt.parameters()).device)

    def scalars(self, tokens):
        """[B, T] ids -> [B, T] numbers; position t has seen tokens 0..t."""
        h = self.gpt.hidden(tokens)  # [B, T, C]
        with torch.autocast(h.device.type, enabled=False):  # a bf16 score has three digits
            raw = self.head(upcast(h)).squeeze(-1)
        return self.gain * raw + self.bias


class RewardModel(ScalarModel):
    """r(prompt, response): one score a row, read at the last real token, never at a pad."""

    def forward(self, tokens, length):
        """tokens [B, T] right-padded, length [B] = prompt + response -> scores [B]."""
        return self.scalars(tokens).gather(1, (length - 1)[:, None]).squeeze(1)

    @torch.no_grad()
    def normalise(self, scores):
        """Given this model's present scores of reference samples, rescale so that they have mean 0 and std 1.

        ValueError where there is no spread to divide by (fewer than two samples, or all the same).
        """
        if len(scores) < 2 or not scores.std() > 0:
            raise ValueError(f"cannot normalise: {len(scores)} reference scores without any spread")
        std, mean = torch.std_mean(scores.float())
        self.gain /= std.to(self.gain.device)
        self.bias.copy_((self.bias - mean.to(self.bias.device)) / std.to(self.bias.device))


class ValueModel(ScalarModel):
    """V(state): the return expected before each response token is chosen.

    From a reward model it takes a copy of everything, gain and bias included, so it starts in the reward's units;
    from a GPT it takes the trunk and starts at 0. gpt: the trunk, where it shall be no copy (an adapter on the source's).
    """

    def __init__(self, source, gpt=None):
        from_reward = isinstance(source, ScalarModel)
        super().__init__(gpt or copy.deepcopy(source.gpt if from_reward else source), zero_head=True)
        if from_reward:  # the trunk has its weights already
            own = {name: w for name, w in source.state_dict().items() if not name.startswith("gpt.")}
            self.load_state_dict(own, strict=False)
        self.requires_grad_(True)  # the source may have been frozen

    def forward(self, tokens, mask):
        """tokens, mask [B, T] -> values [B, T]: values[b, t] has seen tokens[b, :t] only; 0 where mask is False."""
        scalars = self.scalars(tokens)
        before = torch.cat([torch.zeros_like(scalars[:, :1]), scalars[:, :-1]], dim=1)
        return torch.where(mask, before, 0.0)
