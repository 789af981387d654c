"""Rollouts on disk: what PPO made of single responses, token by token, for a reader who wants to follow one through."""

import json

from minirlaif.data import BadRow, atomic_write

COLUMNS = ("logprob", "ref_logprob", "kl", "reward", "value", "advantage", "return")  # nats, score units; advantages whitened
KEYS = dict.fromkeys(COLUMNS, list) | {"step": int, "row": int, "prompt": str, "score": float, "stopped": bool, "tokens": list}


def write(path, step, tokenizer, stopped, n, rollout, ref_logprobs, rewards, scores):
    """The first n rows of a ppo.Rollout, one JSON object a line; the file is replaced whole, so a repeated step repeats it.

    ref_logprobs, rewards (B, T): after whitening, where that is on; scores (B,): capped where end-of-text is missing.
    """
    x = rollout
    grids = (x.logprobs, ref_logprobs, x.logprobs - ref_logprobs, rewards, x.values, x.advantages, x.returns)
    path.parent.mkdir(exist_ok=True)
    with atomic_write(path) as f:
        for b in range(min(n, len(x.tokens))):
            where = x.mask[b]
            prompt, response = x.tokens[b, : int(where.int().argmax())].tolist(), x.tokens[b, where].tolist()
            row = {"step": step, "row": b, "prompt": tokenizer.decode(prompt), "score": float(scores[b])}
            row |= {"stopped": bool(stopped[b]), "response": tokenizer.decode([i for i in response if i != tokenizer.eot])}
            row["tokens"] = [tokenizer.decode([i]) if i != tokenizer.eot else "<|endoftext|>" for i in response]
            row |= {name: [float(f"{v:.6g}") for v in grid[b, where].tolist()] for name, grid in zip(COLUMNS, grids, strict=True)}
            f.write(json.dumps(row).encode() + b"\n")


def check(row):
    """A row of such a file, or BadRow."""
    for name in COLUMNS:
        if len(row[name]) != len(row["tokens"]) or not row[name] or not all(type(x) in (int, float) for x in row[name]):
            raise BadRow(f"'{name}' should be one number a token")
    return row


def table(row) -> str:
    """One row of such a file as a text table, a token a line; the sums are those of a response."""
    lines = [f"step {row['step']}, row {row['row']}: score {row['score']:.3f}, {'ended' if row['stopped'] else 'cut off'}"]
    lines += [row["prompt"].strip(), "", f"{'token':16}" + "".join(f"{name:>12}" for name in COLUMNS)]
    lines += [
        f"{json.dumps(token, ensure_ascii=False)[:15]:16}" + "".join(f"{row[name][t]:12.4f}" for name in COLUMNS)
        for t, token in enumerate(row["tokens"])
    ]
    sums = [f"{sum(row[name]):12.4f}" if name in ("logprob", "ref_logprob", "kl", "reward") else " " * 12 for name in COLUMNS]
    return "\n".join([*lines, f"{'sum':16}" + "".join(sums).rstrip()])
