"""What a student learns from: a teacher's next-token distributions, whole or cut to its k likeliest tokens, and their file.

A distribution is cut to k + 1 outcomes: the k likeliest tokens and 'any other token' (Askell et al. 2021: 50 and the rest).
The file holds log-probs in fp16 and ids in 2 bytes (4 above 65,536 tokens): 4k + 2 bytes a token, or 2V whole. fp16 rounds a
log-prob by at most 1 part in 2,048, and reading normalises again; bench/distill_targets.py measures what that does. The rest
is stored, not taken as 1 - sum, where the rounding of the others would drown it.
"""

import hashlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from minirlaif import data, prefix
from minirlaif.cli import UserError
from minirlaif.losses import token_kl, topk_rest
from minirlaif.model import GPT, KVCache, response_mask, rows_where, upcast
from minirlaif.trainer import DAMAGED, check_whole, file_hash

CHUNK = 1024  # predictions whose logits are held at once: 206 MB at GPT-2's vocabulary


class Targets(NamedTuple):
    """The teacher's predictions of N tokens. ids None: the whole vocabulary, logprobs (N, V)."""

    logprobs: torch.Tensor  # (N, k + 1), the last is any other token; normalised
    ids: torch.Tensor | None  # (N, k)

    def at(self, index: torch.Tensor, device) -> "Targets":
        """Some of the N, ready for the loss: fp32 and normalised."""
        ids = None if self.ids is None else self.ids[index].to(device).long()
        return Targets(F.log_softmax(self.logprobs[index].to(device).float(), dim=-1), ids)


def response_states(model: GPT, contexts, responses, eot: int, root: KVCache | None = None) -> torch.Tensor:
    """Hidden states (N', C) that predict the N response tokens of a batch, row after row, and copies up to N'.

    N does not depend on the contexts, so teacher and student, which differ in context alone, line up token by token.
    root: keys and values of what all contexts begin with (`prefix.root`), which is then not computed again.
    """
    held = root.used if root else 0
    rows = [(c + r)[held:] for c, r in zip(contexts, responses, strict=True)]
    if held:
        h, _ = prefix.follow(model, root, [0] * len(rows), rows, eot)
    else:
        h = model.hidden(data.pad(rows, eot, prefix.multiple(model.device), model.config.block_size)[0].to(model.device))
    starts, length = torch.tensor([len(c) - held for c in contexts]), torch.tensor(list(map(len, rows)))
    mask = response_mask(starts, length, h.shape[1])
    return rows_where(h[:, :-1], mask[:, 1:].to(model.device))  # token t is predicted at t - 1


def predict(model: GPT, h: torch.Tensor, top_k: int, temperature: float, chunk: int = CHUNK) -> Targets:
    """What hidden states (N, C) predict, in fp32; top_k 0: over the whole vocabulary, (N, V) at once."""
    parts = []
    for part in h.split(chunk):
        logprobs, ids = F.log_softmax(upcast(model.logits(part)) / temperature, dim=-1), None
        if top_k:
            ids = logprobs.topk(min(top_k, logprobs.shape[-1])).indices
            logprobs = topk_rest(logprobs, ids)
        parts.append((logprobs, ids))
    logprobs, ids = zip(*parts, strict=True)
    return Targets(torch.cat(logprobs), torch.cat(ids) if top_k else None)


def kl(student: GPT, h: torch.Tensor, target, direction="forward", temperature=1.0, chunk: int = CHUNK) -> torch.Tensor:
    """temperature² · KL between teacher and student, nats, at each of N hidden states (N, C) of the student.

    target: Targets at this temperature; or (teacher, its hidden states (N, C)), for the whole vocabulary. The heads run in
    chunks that backward recomputes, so that (N, V) is never held, not even once. With T², gradients keep their
    size whatever the temperature (Hinton et al. 2015, section 2.1).
    """

    def head(h, logprobs, ids):
        if ids is None and not isinstance(target, Targets):
            with torch.no_grad():
                logprobs = predict(target[0], logprobs, 0, temperature).logprobs  # they are hidden states still
        q = F.log_softmax(upcast(student.logits(h)) / temperature, dim=-1)
        return token_kl(logprobs, q if ids is None else topk_rest(q, ids), direction) * temperature**2

    logprobs, ids = target if isinstance(target, Targets) else (target[1], None)
    parts = []
    for i in range(0, len(h), chunk):
        part = h[i : i + chunk], logprobs[i : i + chunk], None if ids is None else ids[i : i + chunk]
        parts.append(checkpoint(head, *part, use_reentrant=False) if h.requires_grad else head(*part))
    return torch.cat(parts)


@torch.no_grad()
def predict_all(teacher: GPT, root, examples: list, top_k: int, temperature: float, eot: int, batch_size: int = 64) -> Targets:
    """The teacher's predictions of every response token of every example, as they are stored."""
    parts, ids = [], torch.uint16 if teacher.config.vocab_size <= 2**16 else torch.int32
    for batch in (examples[i : i + batch_size] for i in range(0, len(examples), batch_size)):
        h = response_states(teacher, [e.seen for e in batch], [e.response for e in batch], eot, root)
        found = predict(teacher, h[: sum(len(e.response) for e in batch)], top_k, temperature)
        parts.append((found.logprobs.half().cpu(), None if found.ids is None else found.ids.to(ids).cpu()))
    logprobs, ids = zip(*parts, strict=True)
    with torch.autocast("cpu", enabled=False):  # its cat knows no fp16
        return Targets(torch.cat(logprobs), torch.cat(ids) if top_k else None)


def made_of(teacher: str, context: str, rows: list, seed: int, max_new_tokens: int, temperature: float, top_k: int) -> dict:
    """What stored targets depend on, for `save` and `load`. teacher: its path; rows: the examples before they are answered."""
    origin = hashlib.sha256(repr((file_hash(teacher), context, seed, max_new_tokens)).encode())
    for e in rows:
        origin.update(repr((e.unseen, e.response)).encode())
    made = {"--temperature": temperature, "--top-k": top_k}
    return made | {"origin (teacher, C, data, --seed, --max-new-tokens)": origin.hexdigest()}


def save(path, targets: Targets, responses: list, made: dict):
    """Targets, the responses (ids; None: cut off) whose tokens they predict, one a row, and how both were made; atomically.

    made: {"--temperature": 1.0, ...}, what must be the same when they are used again.
    """
    with data.atomic_write(path) as f:
        torch.save({"distill_targets": made, "responses": responses, **targets._asdict()}, f)


def load(path, made: dict) -> tuple[Targets, list]:
    """What `save` wrote -> targets (mapped; read here for their checksums alone) and responses.

    UserError: no such file of ours, damaged, or made otherwise.
    """
    try:
        check_whole(path)
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        stored, responses = found["distill_targets"], found["responses"]
        targets = Targets(found["logprobs"], found["ids"])
        if sum(len(r) for r in responses if r) != len(targets.logprobs):
            raise ValueError
    except DAMAGED:
        another = "give another --store-targets, or delete it if it is one and damaged"
        raise UserError(f"{path}: not a complete file of stored targets; {another}") from None
    for name, value in made.items():
        if stored.get(name) != value:
            detail = f"{stored.get(name)}, not {value}" if len(str(value)) < 20 else "another"
            raise UserError(f"{path}: its {name} is {detail}; give the same again, or delete the file, and it is made again")
    return targets, responses
