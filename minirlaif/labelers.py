"""AI labels: how likely each of two responses is the better one, under a principle, as a language model sees it.

The recipe of Lee et al. 2023 (RLAIF, §3.1) and Bai et al. 2022 (§4.1): a multiple-choice prompt, the log-probabilities of the
two answer letters, both orders of the responses, averaged. The judge reads text only; the toy world's gold scorer is not
imported here.
"""

from dataclasses import dataclass

import torch

from minirlaif import data, text, trainer


@dataclass(frozen=True)
class Label:
    """p_first: P(response 1 is better) when it is shown first; p_first_swapped: the same when it is shown second."""

    p_first: float
    p_first_swapped: float
    prompt_tokens: int

    @property
    def p(self) -> float:
        """Both orders averaged: exactly antisymmetric when the responses are exchanged, so a fixed bias for one letter
        shrinks the label towards 0.5 but does not turn it round."""
        return (self.p_first + self.p_first_swapped) / 2

    @property
    def flipped(self) -> bool:
        """The same position wins in both orders: the judge looked at the letter, not at the response."""
        return (self.p_first > 0.5) != (self.p_first_swapped > 0.5)


class LocalJudge:
    """A local GPT as the judge."""

    def __init__(self, model, tokenizer, device, dtype: str, batch_size: int = 64):
        self.model, self.tokenizer, self.device, self.dtype, self.batch_size = (model, tokenizer, device, dtype, batch_size)
        ids = [tokenizer.encode(letter) for letter in text.CHOICES]
        assert all(len(i) == 1 for i in ids), f"an answer letter is not one token of {tokenizer.name}"
        self.letters = [i[0] for i in ids]

    def encode(self, prompt: str, responses: tuple[str, str], principle: str) -> list[int]:
        return self.tokenizer.encode(text.options(prompt, list(responses)) + text.question(principle))

    @torch.no_grad()
    def p_of_first_letter(self, prompts: list[list[int]]) -> list[float]:
        """P(A) / (P(A) + P(B)) after each encoded prompt; rows of about one length share a batch."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        out = [0.0] * len(prompts)
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            tokens, length = data.pad([prompts[i] for i in rows], self.tokenizer.eot, 16, self.model.config.block_size)
            with trainer.autocast(self.device, self.dtype):
                h = self.model.hidden(tokens.to(self.device))[torch.arange(len(rows)), length - 1]  # (B, C)
            # only two rows of the head, in fp32: bf16 logits are so coarse that close calls would come out as ties
            logits = h.float() @ self.model.lm_head.weight[self.letters].float().T  # (B, 2)
            for i, p in zip(rows, logits.softmax(-1)[:, 0].tolist(), strict=True):
                out[i] = p
        return out

    def label(self, items: list[tuple[str, tuple[str, str], str]]) -> list[Label]:
        """items: (prompt, (response 1, response 2), principle) -> one Label each."""
        shown = [self.encode(p, pair, principle) for p, pair, principle in items]
        swapped = [self.encode(p, pair[::-1], principle) for p, pair, principle in items]
        p = self.p_of_first_letter(shown + swapped)
        n = len(items)
        return [Label(p[i], 1 - p[n + i], len(shown[i]) + len(swapped[i])) for i in range(n)]
