"""Context distillation: what a context C does to a model, moved into its weights (Askell et al. 2021, §2.2).

The teacher is the model with C in its context (a preamble, few-shot dialogues, a constitution), or another model of the same
vocabulary; the student is the model without C. At every token of an answer, or of any other text, the student learns the
teacher's whole next-token distribution: KL(teacher || student) over the full vocabulary, or over the teacher's k likeliest
tokens and one bucket for all others. The request then costs no more than itself.

    python distill.py --model runs/my/base --data prompts.jsonl --out runs/my/distilled
    python distill.py --model runs/my/base --data prompts.jsonl book.txt --weights 1 1 --out runs/my/distilled  # half and half

Each row of --data is one of: a prompt, which the teacher answers; a prompt and its completion; a text or document, which
is put after a new "Human:" (the paper's plain half: what C does where nobody has asked anything).
Left out: hidden-state losses, and new answers as the student changes (on-policy distillation).
"""

import hashlib
import time
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from minirlaif import cli, constitution, data, ddp, examples, lora, prefix, targets, trainer, world
from minirlaif.metrics import gold_of
from minirlaif.sampling import generate


@dataclass
class Args:
    model: str = cli.arg(help="start of the student, and the teacher's weights: run folder or model file")
    data: list[str] = cli.arg(help="prompts (the teacher answers), completions, texts, documents, HH-RLHF files; one or several")
    out: str = cli.arg(help="run folder to write")
    weights: list[float] = cli.arg([], "each file's share of the examples, in any unit; default: every row once an epoch")
    eval_data: str | None = cli.arg(None, "rows for the KL before, during and after; default: a tenth of each file, held out")
    teacher: str | None = cli.arg(None, "another model of the same vocabulary as the teacher, frozen; default: --model")
    preamble: str | None = cli.arg(None, "C is this text; default: the preamble of --constitution")
    context: str | None = cli.arg(None, "C is this file (after --preamble): few-shot dialogues as text or a JSON list of them")
    constitution: str = cli.arg("toy", "C is the preamble of a bundled constitution, by name, or of a file")
    principles: bool = cli.arg(False, "C is the whole of --constitution: its preamble and then its principles, one a line")
    limit: int | None = cli.arg(None, "use the first so many examples of each file")
    direction: str = cli.arg("forward", "KL(teacher || student) covers, reverse seeks a mode", choices=["forward", "reverse"])
    top_k: int | None = cli.arg(None, "teacher's tokens kept, 10-100, and one bucket; 0: all; none: 50 from 10,000 tokens up")
    temperature: float = cli.arg(1.0, "softens both sides of the loss, 1-4; the loss is times its square")
    store_targets: str | None = cli.arg(None, "file for the answers and the teacher's log-probs (fp16): made once, then read")
    epochs: int = cli.arg(1, "passes over the examples, 1-3")
    batch_size: int = cli.arg(32, "examples a step, 16-128")
    lr: float = cli.arg(1e-3, "peak learning rate, linear to 0; 1e-5 (large models) to 1e-3 (tiny ones)")
    max_new_tokens: int = cli.arg(48, "longest answer in tokens, 32-256")
    on_bad_row: str = cli.arg("error", "a row that cannot be used: stop, or skip and count it", choices=["error", "skip"])
    lora_rank: int = cli.arg(0, "rank of an adapter to train, not the weights, 4-64, at about 10 times the --lr; 0: none")
    seed: int = cli.arg(0, "seed of the teacher's samples and of the order")
    device: str = cli.arg("auto", "auto takes cuda, mps or cpu, the first that is there", choices=["auto", "cpu", "cuda", "mps"])
    dtype: str = cli.arg("auto", "bf16 is autocast over fp32 weights; auto measures", choices=["auto", "fp32", "bf16"])
    resume: bool = cli.arg(False, "continue the run in --out")


WARMUP, MAX_GRAD_NORM = 5, 1.0  # steps of linear warmup; gradients are clipped at this norm
MANY_TOKENS = 10_000  # a vocabulary from which on 50 log-probs and the rest are the default, as in the paper
HELD_OUT, ASKED, SHOWN = 256, 48, 3  # examples for the held-out KL; requests that gold judges; answers that are printed


def context_of(args: Args) -> str:
    """C, the text that stands before the teacher's prompts. UserError: there is none."""
    given = args.preamble is not None or args.context
    if args.principles and given:
        raise cli.UserError("--principles shows the whole --constitution; it cannot go with --preamble or --context")
    if given:
        found = (args.preamble or "") + (constitution.load_few_shot(args.context) if args.context else "")
    else:
        c = constitution.load(args.constitution)
        principles = [p.text for p in c.preferences] or [p.revision for p in c.critique_revision]
        found = "\n".join(filter(None, [c.preamble, *(principles if args.principles else [])]))
    if not found.strip() and not (given and args.teacher):  # another teacher teaches without a context, too
        none = f"{args.constitution}: has no preamble; give one with --preamble"
        raise cli.UserError("--preamble: is empty" if given else none)
    return found


def gold_means(answers: list[dict]) -> dict:
    """Mean gold harm, and helpfulness on harmless requests; nothing where a prompt is not the toy world's."""
    requests = [world.parse_request(row["prompt"]) for row in answers]
    if not answers or None in requests:
        return {}
    gold = [gold_of(row) for row in answers]
    helpful = [g.helpfulness for g, request in zip(gold, requests, strict=True) if not request.harmful]
    return {"harm": sum(g.harm for g in gold) / len(gold), "helpfulness": sum(helpful) / max(1, len(helpful))}


def main(args: Args) -> dict:
    cli.require_positive(args, "epochs", "batch_size", "max_new_tokens", "limit", "temperature")
    cli.require_not_negative(args, "lr", "top_k", "lora_rank")
    if args.weights and (len(args.weights) != len(args.data) or not all(0 < w < float("inf") for w in args.weights)):
        raise cli.UserError(f"--weights: {len(args.data)} files need as many numbers above 0")
    device, context = ddp.start(trainer.resolve_device(args.device)), context_of(args)
    tokenizer = trainer.tokenizer_of(args.model, args.teacher or args.model)
    base = trainer.load_gpt(args.model, device).requires_grad_(False)
    student = lora.trainable(base, args.lora_rank, trainer.rng(args.seed, "adapter"))
    teacher = trainer.load_gpt(args.teacher, device).requires_grad_(False) if args.teacher else base
    top_k = (0 if tokenizer.n_vocab < MANY_TOKENS else 50) if args.top_k is None else args.top_k
    rooms = teacher.config.block_size, student.config.block_size
    data.check_room(args.max_new_tokens, min(rooms))
    if (n := len(tokenizer.encode(context))) + args.max_new_tokens >= rooms[0]:
        total = f"{n} tokens and --max-new-tokens {args.max_new_tokens}"
        raise cli.UserError(f"C is too long: {total}; the teacher holds {rooms[0]}, prompt and all; shorten one of the two")

    def load(path, number):
        return examples.load(path, number, context, tokenizer, rooms, args.max_new_tokens, args.on_bad_row)[: args.limit]

    files = [load(path, i) for i, path in enumerate(args.data)]
    cuts = [0 if args.eval_data else max(1, len(rows) // 10) for rows in files]
    held_out = [e for rows, cut in zip(files, cuts, strict=True) for e in rows[: min(cut, HELD_OUT // len(files))]]
    if args.eval_data:
        held_out = load(args.eval_data, 0)[:HELD_OUT]
    train = [e for rows, cut in zip(files, cuts, strict=True) for e in rows[cut:]]
    for path, rows in zip(args.data, files, strict=True):
        if len(rows) == 1 and not args.eval_data:
            raise cli.UserError(f"{path}: too few rows to hold some out; give --eval-data")

    with trainer.Run(args.out, args, args.resume) as run:
        if run.finished:
            return {}
        precision = trainer.autocast(device, run.resolve_dtype(device, student))
        optimizer = trainer.configure_optimizer(student, args.lr)
        with precision:
            root = prefix.root(teacher, [e.seen for e in train + held_out], tokenizer.eot)

        def sample(model, contexts, key):
            """(ids without end-of-text, whether it stopped) after each context."""
            out, shared = [], root if model is teacher else None
            for i in range(0, len(contexts), 128):
                seed, part = trainer.rng(args.seed, key, i).initial_seed(), contexts[i : i + 128]
                with precision:
                    s = generate(model, part, args.max_new_tokens, tokenizer.eot, seed=seed, root=shared)
                out += zip(s.responses(), s.stopped.tolist(), strict=True)
            return out

        def answered(rows, key):
            """The response of each example, the teacher's where there was none; None for an answer that was cut off."""
            found = sample(teacher, [e.seen for e in rows if e.response is None], key)
            answers = iter([ids + [tokenizer.eot] if stopped else None for ids, stopped in found])
            return [next(answers) if e.response is None else e.response for e in rows]

        def filled(rows, responses):
            return [e._replace(response=r) for e, r in zip(rows, responses, strict=True) if r is not None]

        def states(model, batch):
            contexts, shared = ([e.seen for e in batch], root) if model is teacher else ([e.unseen for e in batch], None)
            return targets.response_states(model, contexts, [e.response for e in batch], tokenizer.eot, shared)

        def target_of(batch, places):
            """What the student is to match: stored targets, or the teacher's own prediction."""
            if stored is not None:
                index = torch.cat([torch.arange(start[i], start[i + 1]) for i in places])
                return stored.at(F.pad(index, (0, -len(index) % 128)), device)  # as many as rows_where gives
            with torch.no_grad():
                h = states(teacher, batch)
                return targets.predict(teacher, h, top_k, args.temperature) if top_k else (teacher, h)

        def total_kl(batch, target, direction, temperature):
            kl = targets.kl(student, states(student, batch), target, direction, temperature)
            return kl[: sum(len(e.response) for e in batch)].sum()

        @torch.no_grad()
        def held_out_kl():
            """KL(teacher || student) over the whole vocabulary at temperature 1, whatever the loss is; nats a token."""
            total = count = 0
            for batch in (test[i : i + 64] for i in range(0, len(test), 64)):
                with precision:
                    total += float(total_kl(batch, (teacher, states(teacher, batch)), "forward", 1.0))
                count += sum(len(e.response) for e in batch)
            return total / count

        prompts = [e for e in held_out if e.response is None]
        asked = [e for e in prompts if world.parse_request(tokenizer.decode(e.unseen))][:ASKED] or prompts[:SHOWN]

        def look(name, model):
            """Answers to held-out prompts, and what gold says of them where they are the toy world's -> (texts, metrics)"""
            answers = sample(model, [e.seen if name == "prompted" else e.unseen for e in asked], "gold")
            rows = [
                dict(prompt=tokenizer.decode(e.unseen), response=tokenizer.decode(ids), stopped=stopped)
                for e, (ids, stopped) in zip(asked, answers, strict=True)
            ]
            return [r["response"] for r in rows[:SHOWN]], {f"val/{k}_{name}": v for k, v in gold_means(rows).items()}

        state = run.load_state()
        origin = repr((run.info["inputs"][args.teacher or args.model], train, args.seed, args.max_new_tokens))
        made = {"--temperature": args.temperature, "--top-k": top_k}
        made["origin (teacher, C, data, --seed, --max-new-tokens)"] = hashlib.sha256(origin.encode()).hexdigest()
        stored, file = None, Path(args.store_targets) if args.store_targets else None
        if file and not file.parent.is_dir():  # said before the answers are sampled, not after
            raise cli.UserError(f"--store-targets {file}: there is no folder {file.parent}")
        if ddp.agree(bool(file and file.exists())):
            stored, responses = targets.load(file, made)
        else:
            responses = state["responses"] if state else ddp.agree(answered(train, "train"))
        rows = filled(train, responses)
        if file and rows and not stored:
            with precision:
                found = targets.predict_all(teacher, root, rows, top_k, args.temperature, tokenizer.eot)
            if ddp.rank() == 0:
                targets.save(file, found, responses, made)
            ddp.agree(None)  # it is there
            stored, _ = targets.load(file, made)
        test_responses = state["test_responses"] if state else ddp.agree(answered(held_out, "test"))
        test = filled(held_out, test_responses)
        for number, path in enumerate(args.data):
            if not test or not any(e.file == number for e in rows):
                raise cli.UserError(f"{path}: no answer ended within --max-new-tokens {args.max_new_tokens}")
        start = [0, *accumulate(len(e.response) for e in rows)]  # of each row's tokens among the stored targets
        if state:
            student.load_state_dict(state["student"])
            optimizer.load_state_dict(state["optimizer"])
            first, before, said = state["step"], state["before"], state["said"]
        else:
            first, before, said = 0, {"val/kl_before": held_out_kl()}, {}
            for name, model in (("prompted", teacher), ("before", student)):
                said[name], found = look(name, model)
                before |= found

        def make_state():
            weights = {"student": student.state_dict(), "optimizer": optimizer.state_dict()}
            return {**weights, "responses": responses, "test_responses": test_responses, "before": before, "said": said}

        batches = []
        for epoch in range(args.epochs):
            order = examples.epoch_order([e.file for e in rows], args.weights, args.seed, epoch)
            batches += [order[i : i + args.batch_size] for i in range(0, len(order), args.batch_size)]
        quarters = {len(batches) * i // 4 for i in (1, 2, 3)} - {0}
        started, tokens_seen = time.monotonic(), 0
        bar = tqdm(range(first, len(batches)), "distill", initial=first, total=len(batches), disable=ddp.rank() > 0)
        for step in bar:
            val = {"val/kl": before["val/kl_before"]} if step == 0 else {}
            if step in quarters:
                began = time.monotonic()
                val = {"val/kl": held_out_kl()}
                started += time.monotonic() - began  # no part of the speed
            lr = args.lr * trainer.lr_at(step, len(batches), WARMUP, "linear")
            for group in optimizer.param_groups:
                group["lr"] = lr
            count, mine = sum(len(rows[i].response) for i in batches[step]), ddp.share(batches[step])
            loss = torch.zeros((), device=device)
            optimizer.zero_grad(set_to_none=True)
            if mine:
                batch = [rows[i] for i in mine]
                with precision:
                    loss = total_kl(batch, target_of(batch, mine), args.direction, args.temperature) / count
                loss.backward()
            loss = ddp.total(loss.detach())
            ddp.sum_gradients(student)
            norm = torch.nn.utils.clip_grad_norm_(student.parameters(), MAX_GRAD_NORM)
            trainer.check_finite({"loss": loss, "gradient": norm})  # before the step that would spoil the weights
            optimizer.step()
            tokens_seen += count
            speed = tokens_seen / (time.monotonic() - started)
            metrics = {"loss/kl": loss, "grad_norm": norm, "lr": lr, "tokens_per_second": speed}
            run.log(step, **metrics, **val)
            bar.set_postfix(kl=f"{loss.item():.3f}", tok_s=f"{speed:,.0f}")
            run.end_step(step + 1, make_state)
        after = held_out_kl()
        said["after"], gold = look("after", student)
        saved = sum(len(e.seen) - len(e.unseen) for e in held_out) / len(held_out)
        metrics = {**before, "val/kl": after, "val/kl_after": after, **gold, "val/tokens_saved": saved}
        cut_off = len(train) - len(rows)
        run.log(len(batches), **metrics, answers=len(rows), cut_off=cut_off)
        lora.save(args.out, student, "gpt", tokenizer.name)
        run.finish()
    for i, e in enumerate(asked[:SHOWN]):
        print(tokenizer.decode(e.unseen).strip(), *(f"\n  {name:>8}:{texts[i]}" for name, texts in said.items()), sep="")
    if gold:
        for what in ("harm", "helpfulness"):
            print(f"{what} on {len(asked)} held-out requests:", *(f"{metrics[f'val/{what}_{n}']:.3f} {n}" for n in said))
    print(
        f"{args.out}: KL to the teacher {before['val/kl_before']:.4f} -> {after:.4f} nats a token on held-out answers"
        f" ({cut_off} cut off); {saved:.0f} tokens saved a request"
    )
    return {key.removeprefix("val/"): value for key, value in metrics.items() if key != "val/kl"}


if __name__ == "__main__":
    cli.run(main, Args)
