"""Next-token training: a GPT from scratch, or fine-tuning (--init) on prompt/completion data.

    python -m minirlaif.corpus --out runs/my/world                     # the toy world's pretraining text
    python pretrain.py --data runs/my/world/documents.jsonl --out runs/my/base
    python pretrain.py --init runs/my/base --data completions.jsonl --out runs/my/sft --lr 3e-4

Reads documents.jsonl (segments with loss weights), completions.jsonl, {"text": ...} rows, HH-RLHF files or a .txt file.
Rows of about one length share a batch, padded on the right; a document is never cut in two and never packed with another.
"""

import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

from minirlaif import cli, data, ddp, lora, trainer
from minirlaif.model import GPT, GPTConfig, rows_where, upcast
from minirlaif.muon import Muon
from minirlaif.tokenizer import load_tokenizer


@dataclass
class Args:
    data: list[str] = cli.arg(help="documents.jsonl, completions.jsonl, rows with text, HH-RLHF or .txt files; several are one")
    out: str = cli.arg(help="run folder to write")
    init: str | None = cli.arg(None, "model or run folder to fine-tune; without it, a new GPT of the shape below")
    tokenizer: str = cli.arg("toy", "toy, gpt2, gpt2:FOLDER or a .tiktoken file; ignored with --init")
    block_size: int = cli.arg(256, "tokens of context, typically 128-1024; ignored with --init")
    n_layer: int = cli.arg(4, "transformer blocks, 2-12; ignored with --init")
    n_head: int = cli.arg(4, "attention heads, must divide n_embd; ignored with --init")
    n_embd: int = cli.arg(128, "width, 64-768; ignored with --init")
    dropout: float = cli.arg(0.0, "dropout rate while training, 0-0.2; ignored with --init")
    epochs: int = cli.arg(1, "passes over the data, 1-4")
    tokens_per_batch: int = cli.arg(2560, "tokens in a batch, pads included, 1024-65536")
    lr: float = cli.arg(4e-3, "peak learning rate, 1e-5 (fine-tuning a large model) to 4e-3 (a tiny one from scratch)")
    muon_lr: float = cli.arg(0.01, "Muon's rate (blocks' matrices of a new GPT), 0.003-0.03; 0: AdamW; ignored with --init")
    schedule: str = cli.arg("linear", "what the learning rates do after warmup", choices=["linear", "cosine", "constant"])
    warmup: int = cli.arg(40, "steps of linear warmup, 0-2000")
    weight_decay: float = cli.arg(0.1, "AdamW's decay of matrices, 0-0.1")
    max_grad_norm: float = cli.arg(1.0, "clip the gradient's norm at this")
    eval_fraction: float = cli.arg(0.01, "share of the documents held out for the validation loss, 0-0.1")
    on_bad_row: str = cli.arg("error", "a row that cannot be used: stop, or skip and count it", choices=["error", "skip"])
    lora_rank: int = cli.arg(0, "rank of an adapter to train, not the weights, 4-64, at about 10 times the --lr; 0: none")
    seed: int = cli.arg(0, "seed of weights and data order")
    device: str = cli.arg("auto", "auto takes cuda, mps or cpu, the first that is there", choices=["auto", "cpu", "cuda", "mps"])
    dtype: str = cli.arg("auto", "bf16 is autocast over fp32 weights; auto measures", choices=["auto", "fp32", "bf16"])
    resume: bool = cli.arg(False, "continue the run in --out")


def weighted_loss(model: GPT, tokens: torch.Tensor, weights: torch.Tensor, total=None) -> torch.Tensor:
    """Mean cross-entropy (nats) of tokens (B, T) under weights (B, T); a token of weight 0 is context only.

    weights[b, t] belongs to token t, which is predicted from the tokens before it; the first token is never predicted.
    total: the sum of the weights of the whole batch, where these rows are a part of it.
    """
    where = weights[:, 1:] > 0
    logits = model.logits(rows_where(model.hidden(tokens)[:, :-1], where))  # (N, V): the head runs where there is a loss
    targets, weights = (rows_where(x[:, 1:, None], where).squeeze(-1) for x in (tokens, weights))
    weights[int(where.sum()) :] = 0  # the copies that fill up the shape
    loss = F.cross_entropy(upcast(logits), targets, reduction="none")
    return (loss * weights).sum() / (weights.sum() if total is None else total)


def load_documents(args: Args, tokenizer, block_size: int) -> list[tuple[list[int], list[float]]]:
    """(ids, loss weights) of every document that fits the context; long plain text is cut into windows."""

    def encode(row):
        ids, weights = data.encode_document(tokenizer, row)
        data.check_length(0, len(ids), block_size)
        if not any(weights[1:]):
            raise data.BadRow("no token has a loss weight above 0")
        return ids, weights

    documents = []
    for path in args.data:
        rows = data.read_documents(path, args.on_bad_row)
        if data.is_text(path):
            ids = tokenizer.encode(rows[0]["segments"][0][0])
            windows = [ids[i : i + block_size] for i in range(0, len(ids) - 1, block_size)]
            documents += [(w, [1.0] * len(w)) for w in windows if len(w) > 1]
        else:
            documents += data.convert(rows, encode, args.on_bad_row)
    return documents


def make_optimizers(model: GPT, args: Args, dtype) -> list[torch.optim.Optimizer]:
    """[AdamW], or for a new GPT [AdamW, Muon]."""
    matrices = [p for p in model.h.parameters() if p.dim() == 2] if args.muon_lr and not args.init else []
    adamw = trainer.configure_optimizer(model, args.lr, args.weight_decay, betas=(0.9, 0.98), but_for=matrices)
    return [adamw, Muon(matrices, args.muon_lr, weight_decay=args.weight_decay, dtype=dtype)] if matrices else [adamw]


def main(args: Args) -> dict:
    cli.require_positive(args, "epochs", "tokens_per_batch", "block_size", "n_layer", "n_head", "n_embd", "max_grad_norm")
    cli.require_not_negative(args, "lr", "muon_lr", "warmup", "weight_decay", "lora_rank")
    cli.require_share(args, "eval_fraction", "dropout")
    device = ddp.start(trainer.resolve_device(args.device))
    if args.init:
        tokenizer = trainer.tokenizer_of(args.init)
        model = lora.trainable(trainer.load_gpt(args.init, device), args.lora_rank, trainer.rng(args.seed, "adapter"))
    else:
        if args.lora_rank:
            raise cli.UserError("--lora-rank: an adapter needs trained weights to adapt; name them with --init")
        if args.n_embd % args.n_head:
            raise cli.UserError(f"--n-embd {args.n_embd} is not a multiple of --n-head {args.n_head}")
        tokenizer = load_tokenizer(args.tokenizer)
        config = GPTConfig(args.block_size, tokenizer.n_vocab, args.n_layer, args.n_head, args.n_embd, args.dropout)
        model = GPT(config).init_weights(trainer.rng(args.seed, "weights")).to(device)
    documents = load_documents(args, tokenizer, model.config.block_size)
    order = torch.randperm(len(documents), generator=trainer.rng(args.seed, "held out")).tolist()
    n_eval = min(int(len(documents) * args.eval_fraction), 1000)
    held_out, documents = [documents[i] for i in order[:n_eval]], [documents[i] for i in order[n_eval:]]

    def batch(rows):
        tokens, _ = data.pad([ids for ids, _ in rows], tokenizer.eot, multiple=16, limit=model.config.block_size)
        weights = torch.zeros(tokens.shape)
        for row, (_, w) in zip(weights, rows, strict=True):
            row[: len(w)] = torch.tensor(w)
        return data.to_device(tokens, device), data.to_device(weights, device)

    if not documents:
        raise cli.UserError("--data holds nothing to train on (or --eval-fraction holds all of it out)")
    lengths = [len(ids) for ids, _ in documents]
    batches = []  # of the whole run: every epoch in an order of its own
    for epoch in range(args.epochs):
        batches += data.batches_by_tokens(lengths, args.tokens_per_batch, trainer.rng(args.seed, "order", epoch))

    with trainer.Run(args.out, args, args.resume) as run:
        if run.finished:
            return {}
        dtype = run.resolve_dtype(device, model)
        optimizers = make_optimizers(model, args, torch.bfloat16 if dtype == "bf16" else torch.float32)
        first = 0
        if state := run.load_state():
            model.load_state_dict(state["model"])
            for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            first = state["step"]

        def make_state():
            return {"model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers]}

        model.train()
        seen, started = 0, time.monotonic()
        bar = tqdm(
            range(first, len(batches)), initial=first, total=len(batches), desc="pretrain", unit="step", dynamic_ncols=True,
            disable=ddp.rank() > 0,
        )
        for step in bar:
            # dropout's noise, if there is any: resumable because it depends on seed and step alone
            torch.manual_seed(trainer.rng(args.seed, "dropout", step, ddp.rank()).initial_seed())
            lr_scale = trainer.lr_at(step, len(batches), args.warmup, args.schedule)
            for optimizer, peak in zip(optimizers, (args.lr, args.muon_lr), strict=False):
                for group in optimizer.param_groups:
                    group["lr"] = peak * lr_scale
            weight = sum(sum(documents[i][1][1:]) for i in batches[step])
            loss, mine = torch.zeros((), device=device), ddp.share(batches[step])
            model.zero_grad(set_to_none=True)
            if mine:
                tokens, weights = batch([documents[i] for i in mine])
                with trainer.autocast(device, dtype):
                    loss = weighted_loss(model, tokens, weights, weight)
                loss.backward()
            loss = ddp.total(loss.detach())
            ddp.sum_gradients(model)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            trainer.check_finite({"loss": loss, "gradient": norm})  # before the step that would spoil the weights
            for optimizer in optimizers:
                optimizer.step()
            seen += sum(lengths[i] for i in batches[step])
            if step % 10 == 0 or step == len(batches) - 1:
                speed = seen / (time.monotonic() - started)
                rates = {"lr": args.lr * lr_scale} | ({"lr/muon": args.muon_lr * lr_scale} if len(optimizers) > 1 else {})
                run.log(step, **{"loss/train": loss, "grad_norm": norm, **rates, "tokens_per_second": speed})
                bar.set_postfix(loss=f"{loss.item():.3f}", tok_s=f"{speed:,.0f}")
            run.end_step(step + 1, make_state)

        model.eval()
        val = evaluate(model, held_out, batch, args.tokens_per_batch, device, dtype)
        if val is not None:
            run.log(len(batches), **{"loss/val": val})
        lora.save(args.out, model, "gpt", tokenizer.name)
        run.finish()
    print(f"{args.out}: {len(batches)} steps" + ("" if val is None else f", {val:.3f} nats a token on held-out documents"))
    return {"val_loss": val, "tokens": seen, "steps": len(batches)}


@torch.no_grad()
def evaluate(model, rows, batch, tokens_per_batch, device, dtype) -> float | None:
    """Weighted mean loss over the held-out documents."""
    total = weight = 0.0
    for indices in data.batches_by_tokens([len(ids) for ids, _ in rows], tokens_per_batch, trainer.rng(0)):
        tokens, weights = batch([rows[i] for i in indices])
        with trainer.autocast(device, dtype):
            loss = weighted_loss(model, tokens, weights)
        w = float(weights[:, 1:].sum())
        total, weight = total + float(loss) * w, weight + w
    return total / weight if weight else None


if __name__ == "__main__":
    cli.run(main, Args)
