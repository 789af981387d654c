"""AI feedback: prompts -> two responses each -> a soft preference under a principle (Bai et al. 2022, §4.1; Lee et al. 2023).

    python label.py --policy runs/my/sl --judge runs/my/base --data prompts.jsonl --out runs/my/labels
    python label.py --candidates pairs.jsonl --judge runs/my/base --out runs/my/labels

Both responses come from the policy. A reward model is asked about worse text than the policy writes, so `--contrast-share`
of the second responses come from elsewhere, in turn: `--contrast` (the base), the policy at temperature 1.6, the answer to
another prompt (`--others`). `--principles` picks, by name, the principles that are drawn from, one at random a label:
harmlessness on all prompts and helpfulness on helpful ones are two runs of this script, which train_rm.py reads together.
"""

import random
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from minirlaif import cli, constitution, data, trainer
from minirlaif.labelers import LocalJudge
from minirlaif.sampling import generate


@dataclass
class Args:
    out: str = cli.arg(help="run folder to write; preferences.jsonl is in it")
    judge: str = cli.arg(help="the model that judges: a run folder or model file")
    policy: str | None = cli.arg(None, "the model that answers; needs --data")
    data: str | None = cli.arg(None, "prompts.jsonl (HH-RLHF files are read too); needs --policy")
    candidates: str | None = cli.arg(None, "candidates.jsonl instead: pairs of responses that exist already")
    contrast: str | None = cli.arg(None, "another model for some of the second responses, e.g. the base")
    others: str | None = cli.arg(None, 'prompts.jsonl for "the answer to another prompt"; default: --data')
    contrast_share: float = cli.arg(0.5, "share of second responses that do not come from the policy, 0-1")
    constitution: str = cli.arg("toy", "a bundled constitution by name, or a file (the paper's are read as they are)")
    principles: list[str] = cli.arg([], "names of the principles to draw from, e.g. danger insult; default: all")
    limit: int | None = cli.arg(None, "use the first so many prompts")
    temperature: float = cli.arg(1.0, "sampling temperature")
    max_new_tokens: int = cli.arg(48, "longest response in tokens, 32-256")
    batch_size: int = cli.arg(256, "prompts decoded and judged together, 16-512")
    on_bad_row: str = cli.arg("error", "a row that cannot be used: stop, or skip and count it", choices=["error", "skip"])
    seed: int = cli.arg(0, "seed of principles and samples")
    device: str = cli.arg("auto", "auto takes cuda, mps or cpu, the first that is there", choices=["auto", "cpu", "cuda", "mps"])
    dtype: str = cli.arg("auto", "bf16 is autocast over fp32 weights; auto measures", choices=["auto", "fp32", "bf16"])
    resume: bool = cli.arg(False, "continue the run in --out")


HOT = 1.6  # temperature of the hot samples


def respond(args: Args, prompts: list[str], others: list[str], policy, contrast, tokenizer, device, dtype, step: int):
    """Two responses a prompt -> (first, second, source): lists of (text, stopped), and where each second one came from."""

    def sample(model, prompts, temperature, *key):
        if not prompts:
            return []
        with trainer.autocast(device, dtype):
            out = generate(
                model,
                [tokenizer.encode(p) for p in prompts],
                args.max_new_tokens,
                tokenizer.eot,
                temperature,
                seed=trainer.rng(args.seed, step, *key).initial_seed(),
            )
        return list(zip(map(tokenizer.decode, out.responses()), out.stopped.tolist(), strict=True))

    n = len(prompts)
    first = sample(policy, prompts, args.temperature, "first")
    rng = random.Random(f"{args.seed} contrast {step}")
    ways = ["contrast", "hot", "elsewhere"] if contrast is not None else ["hot", "elsewhere"]
    way = [rng.choice(ways) if rng.random() < args.contrast_share else "policy" for _ in range(n)]
    asked = [rng.choice(others) if w == "elsewhere" else p for w, p in zip(way, prompts, strict=True)]
    second = {}
    for name in ("policy", *ways):
        rows = [i for i in range(n) if way[i] == name]
        model, temperature = contrast if name == "contrast" else policy, HOT if name == "hot" else args.temperature
        second |= dict(zip(rows, sample(model, [asked[i] for i in rows], temperature, name), strict=True))
    return first, [second[i] for i in range(n)], way


def record(prompt: str, pair: tuple[str, str], principle, source: str, label, judge: str) -> dict:
    """A row of preferences.jsonl. source: where the second response came from."""
    first_is_chosen = label.p >= 0.5
    p_chosen = round(max(label.p, 1 - label.p), 6)
    chosen, rejected = pair if first_is_chosen else pair[::-1]
    return dict(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        p_chosen=p_chosen,
        status="tie" if p_chosen == 0.5 else "ok",
        labeler=judge,
        principle=principle.text,
        principle_name=principle.name,
        source=source,
        p_first=round(label.p_first, 6),
        p_first_swapped=round(label.p_first_swapped, 6),
        first_is_chosen=first_is_chosen,
        is_random=False,
        error=None,
        prompt_tokens=label.prompt_tokens,
        completion_tokens=2,
        cost=0.0,
    )


def flip_rate(rows: list[dict]) -> float:
    """How often the same position won in both orders."""
    return sum((r["p_first"] > 0.5) != (r["p_first_swapped"] > 0.5) for r in rows) / max(1, len(rows))


def main(args: Args) -> dict:
    if (args.candidates is None) == (args.data is None):
        raise cli.UserError("give either --data (with --policy) or --candidates")
    if args.data and not args.policy:
        raise cli.UserError("--data needs --policy, the model that answers them")
    if args.candidates and (args.policy or args.contrast):
        raise cli.UserError("--candidates brings its own responses: --policy and --contrast have nothing to do")
    cli.require_positive(args, "batch_size", "max_new_tokens", "temperature", "limit")
    device = trainer.resolve_device(args.device)
    models = [m for m in (args.judge, args.policy, args.contrast) if m]
    tokenizer = trainer.tokenizer_of(*models)
    judge_model, policy, contrast = (trainer.load_gpt(m, device) if m else None for m in (args.judge, args.policy, args.contrast))
    principles = constitution.load(args.constitution).preferences
    if args.principles:
        known = {p.name for p in principles}
        if unknown := [name for name in args.principles if name not in known]:
            raise cli.UserError(f"--principles {unknown[0]}: {args.constitution} has {', '.join(sorted(known))}")
        principles = [p for p in principles if p.name in args.principles]
    if not principles:
        raise cli.UserError(f"{args.constitution}: has no preference principles")

    def fits(row):
        if args.data:
            room = min(m.config.block_size for m in (policy, contrast) if m is not None)
            data.check_length(len(tokenizer.encode(row["prompt"])), args.max_new_tokens, room)
        elif len(row["responses"]) != 2:
            raise data.BadRow("more than two responses", ": label.py compares pairs")
        return row

    path = args.data or args.candidates
    rows = data.read_prompts(path, args.on_bad_row) if args.data else data.read_candidates(path, args.on_bad_row)
    rows = data.convert(rows, fits, args.on_bad_row)[: args.limit]
    others = [row["prompt"] for row in rows]
    if args.others:
        found = data.convert(data.read_prompts(args.others, args.on_bad_row), fits, args.on_bad_row)
        others = [row["prompt"] for row in found]
    chunks = [rows[i : i + args.batch_size] for i in range(0, len(rows), args.batch_size)]
    with trainer.Run(args.out, args, args.resume) as run:
        if run.finished:
            return {}
        dtype = run.resolve_dtype(device, judge_model)
        judge = LocalJudge(judge_model, tokenizer, device, dtype)
        state = run.load_state() or {"step": 0, "rows": [], "left_out": {}}
        done, left_out, started = state["rows"], Counter(state["left_out"]), time.monotonic()
        bar = tqdm(
            range(state["step"], len(chunks)),
            initial=state["step"],
            total=len(chunks),
            desc="label",
            unit="batch",
            dynamic_ncols=True,
        )
        for step in bar:
            prompts = [row["prompt"] for row in chunks[step]]
            if args.data:
                first, second, sources = respond(args, prompts, others, policy, contrast, tokenizer, device, dtype, step)
            else:
                first, second = ([(row["responses"][k], True) for row in chunks[step]] for k in (0, 1))
                sources = ["candidates"] * len(prompts)
            rng = random.Random(f"{args.seed} principles {step}")
            items = []
            for prompt, (a, a_ended), (b, b_ended), source in zip(prompts, first, second, sources, strict=True):
                principle = rng.choice(principles)
                longest = max(len(judge.encode(prompt, pair, principle.text)) for pair in ((a, b), (b, a)))
                fault = (
                    "cut off" if not (a_ended and b_ended)
                    else "empty" if not (a.strip() and b.strip())
                    else "same response twice" if a == b
                    else "too long for the judge" if longest > judge_model.config.block_size
                    else None
                )  # fmt: skip
                if fault:
                    left_out[fault] += 1
                else:
                    items.append((prompt, (a, b), principle, source))
            labels = judge.label([(prompt, pair, principle.text) for prompt, pair, principle, _ in items])
            done += [record(*item, label, args.judge) for item, label in zip(items, labels, strict=True)]
            speed = len(done) / (time.monotonic() - started)
            run.log(step, labels=len(done), left_out=sum(left_out.values()), flip_rate=flip_rate(done), labels_per_second=speed)
            bar.set_postfix(labels=len(done), flips=f"{flip_rate(done):.2f}", labels_s=f"{speed:.0f}")
            run.end_step(step + 1, lambda done=done: {"rows": done, "left_out": dict(left_out)})
        if not done:
            raise cli.UserError(f"{args.out}: no pair could be labelled ({dict(left_out)})")
        data.write_jsonl(Path(args.out) / "preferences.jsonl", done)
        run.finish()
    sure = sum(r["p_chosen"] for r in done) / len(done)
    print(
        f"{args.out}: {len(done)} labels, mean p_chosen {sure:.3f}, flip rate {flip_rate(done):.3f}; "
        f"left out: {dict(left_out) or 'none'}"
    )
    return {"n": len(done), "flip_rate": flip_rate(done), "left_out": dict(left_out)}


if __name__ == "__main__":
    cli.run(main, Args)
