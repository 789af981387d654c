"""Context distillation: what a context C does to a model, moved into its weights (Askell et al. 2021, §2.2).

The teacher is the model with C in its context (a preamble, few-shot dialogues, a constitution), or another model of the same
vocabulary; the student is the model without C. At every token of an answer, or of any other text, the student learns the
teacher's whole next-token distribution: KL(teacher || student) over the full vocabulary, or over the teacher's k likeliest
tokens and one bucket for all others. The request then costs no more than itself.

    python distill.py --model runs/my/base --data prompts.jsonl --out runs/my/distilled
    python distill.py --model runs/my/base --data prompts.jsonl book.txt --weights 1 1 --out runs/my/distilled  # half and half

Each row of --data is one of: a `prompt` ("\\n\\nHuman: ...\\n\\nAssistant:"), which the teacher answers; it and its `completion`;
a `text` or document, also a .txt file, which is put after a new "Human:" (the paper's plain half: nobody has asked anything).
Left out: hidden-state losses, and new answers as the student changes (on-policy distillation).
"""

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from minirlaif import cli, constitution, data, ddp, examples, lora, prefix, targets, trainer, world
from minirlaif.examples import Example
from minirlaif.metrics import gold_of
from minirlaif.model import GPT, KVCache
from minirlaif.sampling import generate


@dataclass
class Args:
    model: str = cli.arg(help="start of the student, and the teacher's weights: run folder or model file")
    data: list[str] = cli.arg(help="prompts (the teacher answers), completions, texts, documents, HH-RLHF files; one or more")
    out: str = cli.arg(help="run folder to write")
    weights: list[float] = cli.arg([], "each file's share of the response tokens, in any unit; default: each row once an epoch")
    eval_data: str | None = cli.arg(None, "rows for the KL before, during and after; default: a tenth of each file, held out")
    teacher: str | None = cli.arg(None, "another model of the same vocabulary as the teacher, frozen; default: --model")
    preamble: str | None = cli.arg(None, "C is this text; '' with --teacher: none; default: the --constitution's", empty=True)
    context: str | None = cli.arg(None, "C is this file (after --preamble): few-shot dialogues as text or a JSON list of them")
    constitution: str = cli.arg("toy", "C is the preamble of a bundled constitution, by name, or of a file")
    principles: bool = cli.arg(False, "C is the --constitution's preamble, and then what it tells judges (else revisers)")
    limit: int | None = cli.arg(None, "use the first so many examples of each file of --data")
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
    if given and args.constitution != Args.constitution:
        raise cli.UserError("--constitution: C is what --preamble and --context give; leave it out, or these")
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


class Models(NamedTuple):
    """Who teaches whom, and what each of their forward passes needs."""

    student: torch.nn.Module  # reads a prompt
    teacher: GPT  # reads C and the prompt; frozen
    root: KVCache  # keys and values of what all that the teacher reads begins with, C above all: computed once
    eot: int
    precision: AbstractContextManager

    def context(self, model, example: Example) -> list[int]:
        return example.seen if model is self.teacher else example.unseen

    def shared(self, model) -> KVCache | None:
        return self.root if model is self.teacher else None


# ---- the loss -------------------------------------------------------------------------------------------------------


def states(models: Models, model, batch: list[Example]) -> torch.Tensor:
    """What a model has in mind (N', C) before each of the N response tokens of a batch, and copies; the same N for both."""
    contexts, responses = [models.context(model, e) for e in batch], [e.response for e in batch]
    return targets.response_states(model, contexts, responses, models.eot, models.shared(model))


@torch.no_grad()
def target_of(models: Models, batch: list[Example], top_k: int, temperature: float):
    """What the student is to match: Targets; or, for the whole vocabulary, the teacher and its states, for `targets.kl`."""
    h = states(models, models.teacher, batch)
    return targets.predict(models.teacher, h, top_k, temperature) if top_k else (models.teacher, h)


def total_kl(models: Models, batch: list[Example], target, direction="forward", temperature=1.0) -> torch.Tensor:
    """Sum over a batch's response tokens of temperature² · KL between teacher and student, nats."""
    kl = targets.kl(models.student, states(models, models.student, batch), target, direction, temperature)
    return kl[: sum(len(e.response) for e in batch)].sum()


@torch.no_grad()
def held_out_kl(models: Models, test: list[Example], weights: list[float]) -> float:
    """KL(teacher || student) over the whole vocabulary at temperature 1, whatever the loss is; nats a token. With weights, the
    files' means are weighed as the loss weighs the files."""
    total = shares = 0.0
    for file in {e.file for e in test}:
        rows = [e for e in test if e.file == file]
        count = sum(len(e.response) for e in rows)
        share = weights[file] if weights else count
        for batch in (rows[i : i + 64] for i in range(0, len(rows), 64)):
            with models.precision:
                total += share / count * float(total_kl(models, batch, target_of(models, batch, 0, 1.0)))
        shares += share
    return total / shares


# ---- examples and answers -------------------------------------------------------------------------------------------


def load_examples(args: Args, context: str, tokenizer, rooms) -> tuple[list[Example], list[Example]]:
    """--data as (train, held out): --eval-data is held out, or else the first tenth of each file."""

    def load(path, number):
        return examples.load(path, number, context, tokenizer, rooms, args.max_new_tokens, args.on_bad_row)

    files = [load(path, i)[: args.limit] for i, path in enumerate(args.data)]
    if args.eval_data:
        return [e for rows in files for e in rows], load(args.eval_data, 0)[:HELD_OUT]
    train, held_out = [], []
    for path, rows in zip(args.data, files, strict=True):
        if len(rows) == 1:
            raise cli.UserError(f"{path}: one example cannot be learnt and held out; give --eval-data, or a larger --limit")
        cut = min(max(1, len(rows) // 10), max(1, HELD_OUT // len(files)))
        held_out += rows[:cut]
        train += rows[cut:]
    return train, held_out


def sample(models: Models, model, rows: list[Example], args: Args, key, pause=lambda: None) -> list[tuple[list[int], bool]]:
    """A model's answer to each example: ids without end-of-text, and whether it ended. pause: called between batches."""
    out, parts = [], range(0, len(rows), 128)
    for i in tqdm(parts, f"{key}: answers", disable=len(parts) < 3 or ddp.rank() > 0):
        pause()
        contexts = [models.context(model, e) for e in rows[i : i + 128]]
        seed = trainer.rng(args.seed, key, i).initial_seed()
        with models.precision:
            s = generate(model, contexts, args.max_new_tokens, models.eot, seed=seed, root=models.shared(model))
        out += zip(s.responses(), s.stopped.tolist(), strict=True)
    return out


def respond(models: Models, rows: list[Example], args: Args, key, pause) -> list[list[int] | None]:
    """The response of each example, the teacher's where there was none; None for an answer that was cut off."""
    found = sample(models, models.teacher, [e for e in rows if e.response is None], args, key, pause)
    answers = iter([ids + [models.eot] if stopped else None for ids, stopped in found])
    return [next(answers) if e.response is None else e.response for e in rows]


def filled(rows: list[Example], responses: list) -> list[Example]:
    return [e._replace(response=r) for e, r in zip(rows, responses, strict=True) if r is not None]


def to_ask(held_out: list[Example], tokenizer, rooms, max_new_tokens: int) -> list[Example]:
    """Held-out prompts for samples: some that gold can judge, or else a few; no plain text, and where an answer has room."""
    turn = tokenizer.encode(examples.TURN)
    fit = [e for e in held_out if len(e.seen) + max_new_tokens <= rooms[0] and len(e.unseen) + max_new_tokens <= rooms[1]]
    prompts = [e for e in fit if e.unseen != turn]
    return [e for e in prompts if world.parse_request(tokenizer.decode(e.unseen))][:ASKED] or prompts[:SHOWN]


def answers_of(models: Models, model, asked: list[Example], args: Args, tokenizer) -> list[dict]:
    """Answers to held-out prompts, to be read and judged."""
    return [
        dict(prompt=tokenizer.decode(e.unseen), response=tokenizer.decode(ids), stopped=stopped)
        for e, (ids, stopped) in zip(asked, sample(models, model, asked, args, "gold"), strict=True)
    ]


def gold_means(answers: list[dict]) -> dict:
    """Mean gold harm, and helpfulness on harmless requests; nothing where a prompt is not the toy world's."""
    requests = [world.parse_request(row["prompt"]) for row in answers]
    if not answers or None in requests:
        return {}
    gold = [gold_of(row) for row in answers]
    helpful = [g.helpfulness for g, request in zip(gold, requests, strict=True) if not request.harmful]
    return {"harm": sum(g.harm for g in gold) / len(gold), "helpfulness": sum(helpful) / max(1, len(helpful))}


# ---- the run --------------------------------------------------------------------------------------------------------


def main(args: Args) -> dict:
    cli.require_positive(args, "epochs", "batch_size", "max_new_tokens", "limit", "temperature")
    cli.require_not_negative(args, "lr", "top_k", "lora_rank")
    if args.weights and (len(args.weights) != len(args.data) or not all(0 < w < float("inf") for w in args.weights)):
        raise cli.UserError(f"--weights: {len(args.data)} files need as many numbers above 0")
    if args.store_targets and not (folder := Path(args.store_targets).parent).is_dir():
        raise cli.UserError(f"--store-targets {args.store_targets}: there is no folder {folder}")
    if args.store_targets and Path(args.store_targets).is_dir():
        raise cli.UserError(f"--store-targets {args.store_targets}: must name a file, and this is a folder")
    device, context = ddp.start(trainer.resolve_device(args.device)), context_of(args)
    tokenizer = trainer.tokenizer_of(args.model, args.teacher or args.model)
    base = trainer.load_gpt(args.model, device).requires_grad_(False)
    student = lora.trainable(base, args.lora_rank, trainer.rng(args.seed, "adapter"))
    teacher = trainer.load_gpt(args.teacher, device).requires_grad_(False) if args.teacher else base
    top_k = (0 if tokenizer.n_vocab < MANY_TOKENS else 50) if args.top_k is None else args.top_k
    rooms = teacher.config.block_size, student.config.block_size
    train, held_out = load_examples(args, context, tokenizer, rooms)

    with trainer.Run(args.out, args, args.resume) as run:
        if run.finished:
            return {}
        precision = trainer.autocast(device, run.resolve_dtype(device, student))
        optimizer = trainer.configure_optimizer(student, args.lr)
        with precision:
            root = prefix.root(teacher, [e.seen for e in train + held_out], tokenizer.eot)
        models = Models(student, teacher, root, tokenizer.eot, precision)
        state = run.load_state()

        pause = run.stop_if_interrupted  # on Ctrl-C, while there is nothing to save

        # 1. The teacher answers where there is no response yet; with --store-targets, its log-probs are kept beside it
        stored, file = None, Path(args.store_targets) if args.store_targets else None
        if file:
            teacher_of, limits = args.teacher or args.model, (args.seed, args.max_new_tokens)
            made = targets.made_of(teacher_of, context, train, *limits, args.temperature, top_k)
        if ddp.agree(bool(file and file.exists())):
            stored, responses = targets.load(file, made)
        else:
            responses = state["responses"] if state else ddp.agree(respond(models, train, args, "train", pause))
        rows = filled(train, responses)
        if file and rows and not stored:
            with precision:
                found = targets.predict_all(teacher, root, rows, top_k, args.temperature, tokenizer.eot)
            if ddp.rank() == 0:
                targets.save(file, found, responses, made)
            ddp.agree(None)  # it is there
            stored, _ = targets.load(file, made)
        start = [0, *accumulate(len(e.response) for e in rows)]  # of each row's tokens among the stored targets
        test_responses = state["test_responses"] if state else ddp.agree(respond(models, held_out, args, "test", pause))
        test = filled(held_out, test_responses)
        used = {path: [e for e in rows if e.file == i] for i, path in enumerate(args.data)}
        for path, kept in {**used, args.eval_data or "what is held out": test}.items():
            if not kept:
                raise cli.UserError(f"{path}: no answer of the teacher ended within --max-new-tokens {args.max_new_tokens}")

        # 2. How far the student is from the teacher before
        asked = to_ask(held_out, tokenizer, rooms, args.max_new_tokens)
        if state:
            student.load_state_dict(state["student"])
            optimizer.load_state_dict(state["optimizer"])
            first, before, said = state["step"], state["before"], state["said"]
        else:
            first, before = 0, held_out_kl(models, test, args.weights)
            said = {"prompted": answers_of(models, teacher, asked, args, tokenizer)}
            said["before"] = answers_of(models, student, asked, args, tokenizer)

        def make_state():
            weights = {"student": student.state_dict(), "optimizer": optimizer.state_dict()}
            return {**weights, "responses": responses, "test_responses": test_responses, "before": before, "said": said}

        if not state:
            run.save_state({"step": 0, **make_state()})  # the answers are what takes long

        # 3. Train: at each step the teacher's prediction of each token, and the student's without C
        batches, weights = [], examples.by_tokens(args.weights, rows)
        for epoch in range(args.epochs):
            order = examples.epoch_order([e.file for e in rows], weights, args.seed, epoch)
            batches += [order[i : i + args.batch_size] for i in range(0, len(order), args.batch_size)]
        per_step = sum(len(rows[i].response) for batch in batches for i in batch) / len(batches)
        quarters = {len(batches) * i // 4 for i in (1, 2, 3)} - {0}
        started, tokens_seen = time.monotonic(), 0
        bar = tqdm(range(first, len(batches)), "distill", initial=first, total=len(batches), disable=ddp.rank() > 0)
        for step in bar:
            val = {"val/kl": before} if step == 0 else {}
            if step in quarters:
                began = time.monotonic()
                val = {"val/kl": held_out_kl(models, test, args.weights)}
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
                    if stored:
                        index = torch.cat([torch.arange(start[i], start[i + 1]) for i in mine])
                        target = stored.at(F.pad(index, (0, -len(index) % 128)), device)  # as many as `states` gives
                    else:
                        target = target_of(models, batch, top_k, args.temperature)
                    loss = total_kl(models, batch, target, args.direction, args.temperature) / count
                # of a mixture every token weighs the same in the run, not in its batch, where a long text has many neighbours
                (loss * count / per_step if weights else loss).backward()
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

        # 4. And after
        after, cut_off = held_out_kl(models, test, args.weights), len(train) - len(rows)
        said["after"] = answers_of(models, student, asked, args, tokenizer)
        gold = {f"{what}_{name}": v for name, answers in said.items() for what, v in gold_means(answers).items()}
        saved = sum(len(e.seen) - len(e.unseen) for e in held_out) / len(held_out)
        found = {"kl_before": before, "kl_after": after, **gold, "tokens_saved": saved}
        logged = {f"val/{name}": value for name, value in found.items()} | {"val/kl": after}
        run.log(len(batches), **logged, answers=len(rows), cut_off=cut_off)
        if ddp.rank() == 0:
            data.write_jsonl(run.folder / "samples.jsonl", [{"model": name, **row} for name in said for row in said[name]])
        lora.save(args.out, student, "gpt", tokenizer.name)
        run.finish()
    for i, e in enumerate(asked[:SHOWN]):
        shown = (f"\n  {name:>8}:{answers[i]['response']}" for name, answers in said.items())
        print(tokenizer.decode(e.unseen).strip(), *shown, sep="")
    for what in ("harm", "helpfulness") if gold else ():
        print(f"{what} on {len(asked)} held-out requests:", *(f"{gold[f'{what}_{name}']:.3f} {name}" for name in said))
    print(
        f"{args.out}: KL to the teacher {before:.4f} -> {after:.4f} nats a token on held-out answers"
        f" ({cut_off} cut off); {saved:.0f} tokens saved a request"
    )
    return found


if __name__ == "__main__":
    cli.run(main, Args)
