"""The losses of the preference model and of context distillation, as pure functions on tensors.

Bradley-Terry with soft labels, its k-wise form, and KL between two language models, whole or cut to the
teacher's top k tokens. Every log-prob is in nats and should come in fp32. Left out: margins, label smoothing
(a soft label is one already) and any weight per pair.
"""

import torch
import torch.nn.functional as F


def _pair_losses(delta, p):
    """Cross-entropy of P(first is better) = sigmoid(delta) against p, elementwise and without overflow."""
    return -(p * F.logsigmoid(delta) + (1 - p) * F.logsigmoid(-delta))


def preference_loss(chosen_scores, rejected_scores, p_chosen):
    """Mean of -[p log s(d) + (1-p) log s(-d)] with d = chosen - rejected and s the sigmoid: a scalar.

    All three are [N]; `p_chosen` in [0, 1] is the labeler's probability that 'chosen' is better, 1 for a hard
    label, where this is Bradley-Terry exactly. Its minimum is at d = logit(p), so a label clamped to 0.6 asks
    for a margin of 0.405 and no more. (Bai et al. 2022, Constitutional AI, section 4.1: soft labels.)
    """
    return _pair_losses(chosen_scores - rejected_scores, p_chosen).mean()


def kwise_loss(scores, p):
    """All pairs of k responses to one prompt as one batch element: a scalar, the mean over the N prompts.

    scores [N, k]; p [N, k, k] with p[n, i, j] = P(response i is better than j). Only i < j is read. NaN marks a
    pair without a label, so groups of unequal size can be padded; a prompt's loss is divided by its number of
    labelled pairs, C(k, 2) where all are. Each response costs one forward, not k - 1, and no response is seen in
    k - 1 separate updates, which overfits in one pass. (Ouyang et al. 2022, equation 1.)
    """
    k = scores.shape[1]
    i, j = torch.triu_indices(k, k, offset=1, device=scores.device)
    p = p[:, i, j]  # [N, C(k,2)]
    labelled = ~p.isnan()
    # fill before multiplying: 0 * NaN is NaN, in the loss and in its gradient
    losses = _pair_losses(scores[:, i] - scores[:, j], p.masked_fill(~labelled, 0.5)) * labelled
    return (losses.sum(1) / labelled.sum(1).clamp(min=1)).mean()


def token_kl(teacher_logprobs, student_logprobs, direction="forward"):
    """KL between teacher and student over the last dimension, [..., V] -> [...], nats. ValueError for another direction.

    "forward" is KL(teacher || student): mass-covering. Whatever the teacher may say, the student must be able to say, even where
    it then says things in between (Askell et al. 2021: context distillation). "reverse" is KL(student || teacher): mode-seeking.
    The student pays only for what it says itself, so it may settle on one of the teacher's ways and lose the others.
    """
    if direction not in ("forward", "reverse"):
        raise ValueError(f"direction {direction!r}: use 'forward' or 'reverse'")
    p, q = teacher_logprobs, student_logprobs
    if direction == "reverse":
        p, q = q, p
    # a token that p never takes adds 0, where exp(-inf) * (-inf - q) would be NaN; a NaN stays one
    return torch.where(p != float("-inf"), p.exp() * (p - q), 0.0).sum(-1)


def topk_rest(logprobs, ids):
    """logprobs [..., V] over k + 1 outcomes: the tokens ids [..., k], and last 'any other token' (none when k is V)."""
    if ids.shape[-1] == logprobs.shape[-1]:
        return logprobs.gather(-1, ids)
    rest = logprobs.scatter(-1, ids, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.cat([logprobs.gather(-1, ids), rest], dim=-1)


def distill_kl(teacher_logprobs, student_logprobs, mask, direction="forward"):
    """token_kl averaged over the True positions of `mask` [...]; both log-probs [..., V] are of the same answer token."""
    return _mean_over(token_kl(teacher_logprobs, student_logprobs, direction), mask)


def topk_rest_kl(teacher_logprobs, topk_ids, student_logprobs, mask, direction="forward"):
    """The same over k + 1 outcomes: the teacher's k best tokens, and 'any other token'.

    teacher_logprobs [..., k + 1] (`topk_rest`); topk_ids [..., k]; student_logprobs [..., V]. Never more than the full KL in
    either direction, by the log-sum inequality: only the split of the mass inside the tail is left free. Without the bucket for
    the rest the loss would drive the student's tail to zero.
    """
    return distill_kl(teacher_logprobs, topk_rest(student_logprobs, topk_ids), mask, direction)


def _mean_over(x, mask):
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)
