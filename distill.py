"""Context distillation: what a preamble does to a model, moved into its weights (Askell et al. 2021, §2.2).

The teacher is the model with the preamble in its context; the student is the same model without. The teacher answers the
prompts; the student, which sees the prompt alone, learns the teacher's whole next-token distribution at every token of those
answers: the mean over response tokens of KL(teacher || student), over the full vocabulary.

    python distill.py --model runs/my/base --prompts prompts.jsonl --out runs/my/distilled

Left out: stored top-k targets (the paper keeps 50 log-probs and one bucket for the rest; here the teacher is at hand).
"""

import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

from minirlaif import cli, constitution, data, text, trainer
from minirlaif.losses import distill_kl
from minirlaif.model import GPT, response_mask, rows_where
from minirlaif.sampling import generate


@dataclass
class Args:
    model: str = cli.arg(help="teacher (with the preamble) and start of the student (without): run folder or model file")
    prompts: str = cli.arg(help="prompts.jsonl that the teacher answers (HH-RLHF files are read too)")
    out: str = cli.arg(help="run folder to write")
    eval_prompts: str | None = cli.arg(None, "prompts for the KL before and after; default: a tenth of --prompts, held out")
    preamble: str | None = cli.arg(None, "the text to distil; default: the preamble of --constitution")
    constitution: str = cli.arg("toy", "a bundled constitution by name, or a file")
    limit: int | None = cli.arg(None, "use the first so many prompts")
    epochs: int = cli.arg(1, "passes over the teacher's answers, 1-3")
    batch_size: int = cli.arg(32, "answers a step, 16-128")
    lr: float = cli.arg(1e-3, "peak learning rate, linear to 0; 1e-5 (large models) to 1e-3 (tiny ones)")
    warmup: int = cli.arg(5, "steps of linear warmup")
    weight_decay: float = cli.arg(0.0, "AdamW's decay of matrices, 0-0.1")
    max_grad_norm: float = cli.arg(1.0, "clip the gradient's norm at this")
    max_new_tokens: int = cli.arg(48, "longest answer in tokens, 32-256")
    on_bad_row: str = cli.arg("error", "a row that cannot be used: stop, or skip and count it", choices=["error", "skip"])
    seed: int = cli.arg(0, "seed of the teacher's samples and of the order")
    device: str = cli.arg("auto", "auto takes cuda, mps or cpu, the first that is there", choices=["auto", "cpu", "cuda", "mps"])
    dtype: str = cli.arg("auto", "bf16 is autocast over fp32 weights; auto measures", choices=["auto", "fp32", "bf16"])
    resume: bool = cli.arg(False, "continue the run in --out")


def response_logprobs(model: GPT, contexts: list[list[int]], responses: list[list[int]], eot: int) -> torch.Tensor:
    """(N, V) log-probs, fp32, at each of the N response tokens of the batch, row after row.

    N does not depend on the contexts, so teacher and student, which differ in context alone, line up token by token.
    """
    tokens, length = data.pad([c + r for c, r in zip(contexts, responses, strict=True)], eot, 16, model.config.block_size)
    mask = response_mask(torch.tensor([len(c) for c in contexts]), length, tokens.shape[1])
    h = rows_where(model.hidden(tokens.to(model.device))[:, :-1], mask[:, 1:].to(model.device))  # token t is predicted at t - 1
    return F.log_softmax(model.logits(h).float(), dim=-1)[: int(mask.sum())]


def main(args: Args) -> dict:
    cli.require_positive(args, "epochs", "batch_size", "max_new_tokens", "limit", "max_grad_norm")
    cli.require_not_negative(args, "warmup", "weight_decay", "lr")
    device = trainer.resolve_device(args.device)
    tokenizer = trainer.tokenizer_of(args.model)
    teacher, student = trainer.load_gpt(args.model, device), trainer.load_gpt(args.model, device)
    preamble = constitution.load(args.constitution).preamble if args.preamble is None else args.preamble
    if not preamble.strip():
        none = f"{args.constitution}: has no preamble; give one with --preamble"
        raise cli.UserError(none if args.preamble is None else "--preamble: is empty")
    data.check_room(args.max_new_tokens, teacher.config.block_size)

    def encode(row):
        """(what the teacher sees, what the student sees)"""
        seen = tokenizer.encode(text.with_preamble(preamble, row["prompt"]))
        data.check_length(len(seen), args.max_new_tokens, teacher.config.block_size)
        return seen, tokenizer.encode(row["prompt"])

    prompts = data.convert(data.read_prompts(args.prompts, args.on_bad_row), encode, args.on_bad_row)[: args.limit]
    if args.eval_prompts:
        held_out = data.convert(data.read_prompts(args.eval_prompts, args.on_bad_row), encode, args.on_bad_row)
    else:
        cut = max(1, len(prompts) // 10)
        held_out, prompts = prompts[:cut], prompts[cut:]
    if not prompts:
        raise cli.UserError(f"{args.prompts}: too few prompts to hold some out; give --eval-prompts")

    with trainer.Run(args.out, args, args.resume) as run:
        if run.finished:
            return {}
        dtype = run.resolve_dtype(device, student)
        optimizer = trainer.configure_optimizer(student, args.lr, args.weight_decay)

        def answers(pairs, *key):
            """(teacher's context, student's context, response) of each prompt; cut-off answers are left out."""
            out = []
            for i in range(0, len(pairs), 128):
                seed = trainer.rng(args.seed, *key, i).initial_seed()
                with trainer.autocast(device, dtype):
                    s = generate(teacher, [seen for seen, _ in pairs[i : i + 128]], args.max_new_tokens, tokenizer.eot, seed=seed)
                for pair, response, stopped in zip(pairs[i : i + 128], s.responses(), s.stopped.tolist(), strict=True):
                    if stopped:
                        out.append((*pair, response + [tokenizer.eot]))
            return out

        def kl(batch):
            seen, unseen, responses = zip(*batch, strict=True)
            with trainer.autocast(device, dtype):
                with torch.no_grad():
                    target = response_logprobs(teacher, seen, responses, tokenizer.eot)
                logprobs = response_logprobs(student, unseen, responses, tokenizer.eot)
            return distill_kl(target, logprobs, torch.ones(len(target), dtype=torch.bool, device=device), "forward")

        @torch.no_grad()
        def held_out_kl(rows):
            """Nats per token."""
            total = count = 0
            for i in range(0, len(rows), 64):
                n = sum(len(r) for *_, r in rows[i : i + 64])
                total, count = total + float(kl(rows[i : i + 64])) * n, count + n
            return total / max(1, count)

        state = run.load_state()
        first = state["step"] if state else 0
        rows, test = (state["rows"], state["test"]) if state else (answers(prompts, "train"), answers(held_out[:256], "test"))
        cut_off = len(prompts) - len(rows)
        if not rows or not test:
            raise cli.UserError(f"{args.model}: no answer ended within --max-new-tokens {args.max_new_tokens}")
        if state:
            student.load_state_dict(state["student"])
            optimizer.load_state_dict(state["optimizer"])
            before = state["before"]
        else:
            before = held_out_kl(test)

        def make_state():
            weights = {"student": student.state_dict(), "optimizer": optimizer.state_dict()}
            return {**weights, "rows": rows, "test": test, "before": before}

        batches = []
        for epoch in range(args.epochs):
            order = torch.randperm(len(rows), generator=trainer.rng(args.seed, "order", epoch)).tolist()
            batches += [order[i : i + args.batch_size] for i in range(0, len(order), args.batch_size)]
        started, seen_tokens = time.monotonic(), 0
        bar = tqdm(range(first, len(batches)), initial=first, total=len(batches), desc="distill", unit="step", dynamic_ncols=True)
        for step in bar:
            lr = args.lr * trainer.lr_at(step, len(batches), args.warmup, "linear")
            for group in optimizer.param_groups:
                group["lr"] = lr
            batch = [rows[i] for i in batches[step]]
            loss = kl(batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(student.parameters(), args.max_grad_norm)
            if not norm.isfinite():  # before the step that would spoil the weights
                raise cli.UserError(f"{args.out}: step {step}: the gradient is {norm.item()}; try a lower --lr, or --dtype fp32")
            optimizer.step()
            seen_tokens += sum(len(r) for *_, r in batch)
            speed = seen_tokens / (time.monotonic() - started)
            run.log(step, **{"loss/kl": loss, "grad_norm": norm, "lr": lr, "tokens_per_second": speed})
            bar.set_postfix(kl=f"{loss.item():.3f}", tok_s=f"{speed:,.0f}")
            run.end_step(step + 1, make_state)
        after = held_out_kl(test)
        run.log(len(batches), **{"val/kl_before": before, "val/kl_after": after, "answers": len(rows), "cut_off": cut_off})
        trainer.save_model(args.out, student.config, student.state_dict(), "gpt", tokenizer.name)
        run.finish()
    print(
        f"{args.out}: KL to the prompted model {before:.4f} -> {after:.4f} nats a token on held-out answers ({cut_off} cut off)"
    )
    return {"kl_before": before, "kl_after": after}


if __name__ == "__main__":
    cli.run(main, Args)
