"""AI feedback: prompts -> k responses each -> soft preferences under principles (Bai et al. 2022, §4.1; Lee et al. 2023).

    python label.py --policy runs/my/sl --judge runs/my/base --data prompts.jsonl --out runs/my/labels
    python label.py --candidates runs/my/labels/candidates.jsonl --judge gold --out runs/my/labels_gold     # the same pairs
    python label.py --candidates summaries.jsonl --judge MODEL@https://api.openai.com/v1 --constitution summarization --out runs/s

First the responses: all come from the policy, but a reward model is asked about worse text than the policy writes, so
`--contrast-share` of the responses after the first come from elsewhere, in turn: `--contrast` (the base), the policy at
temperature 1.6, the answer to another prompt (`--others`). They are kept in candidates.jsonl. Then the labels: every pair,
in both orders, by every judge, each answer journaled as it comes: kill this at any moment, run it again with --resume, and
nothing that was received is lost or asked again. A call that a server does not answer at all is no failed label: it is asked
by the next run with --resume, and until then there is no preferences.jsonl. `minirlaif/judges.py` says how a judge is written.
"""

import functools
import random
import statistics
import time
from collections import Counter
from dataclasses import dataclass

from tqdm import tqdm

from minirlaif import cli, comparison, constitution, data, judges, trainer
from minirlaif.journal import Journal
from minirlaif.labelers import Answer, Label, LocalJudge, combine
from minirlaif.pairs import Pair, flip_rate, labels_by_rank, pairs_of, record
from minirlaif.sampling import generate

CLAMPS = {"off": None, "20-80": (0.2, 0.8), "40-60": (0.4, 0.6)}  # Bai et al. 2022, §4.1: for judges that reason


@dataclass
class Args:
    out: str = cli.arg(help="run folder to write; preferences.jsonl is in it")
    judge: list[str] = cli.arg(help="a model or run folder, NAME@URL of an endpoint, gold or ranks (see minirlaif/judges.py)")
    policy: str | None = cli.arg(None, "the model that answers; needs --data")
    data: str | None = cli.arg(None, "prompts.jsonl (HH-RLHF files are read too); needs --policy")
    candidates: str | None = cli.arg(None, "candidates.jsonl instead: responses that exist already")
    responses: int = cli.arg(2, "responses a prompt, 2-8; k of them give all k(k-1)/2 pairs, kept together as a group")
    contrast: str | None = cli.arg(None, "another model for some of the later responses, e.g. the base")
    others: str | None = cli.arg(None, 'prompts.jsonl for "the answer to another prompt"; default: --data')
    contrast_share: float = cli.arg(0.5, "share of later responses that do not come from the policy, 0-1")
    constitution: str = cli.arg("toy", "a bundled constitution by name, or a file (the paper's are read as they are)")
    principles: list[str] = cli.arg([], "names of the principles to draw from, e.g. danger insult; default: all")
    per_pair: int = cli.arg(1, "principles drawn for each pair, 1-16; the label is the mean over them and over the judges")
    average: str = cli.arg("probability", "what is averaged over the two orders", choices=["probability", "logit"])
    clamp: str = cli.arg("off", "keep a label within these per cents, for judges that reason", choices=list(CLAMPS))
    on_failure: str = cli.arg(
        "drop", "a pair whose answers cannot be read: no label, or a marked coin flip", choices=["drop", "random"]
    )
    max_cost: float | None = cli.arg(None, "stop when the endpoints have cost this much, in the unit of their price=")
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


# ---- responses ------------------------------------------------------------------------------------------------------


def respond(args: Args, prompts: list[str], others: list[str], policy, contrast, tokenizer, device, dtype, step: int):
    """k responses a prompt -> (responses, sources), both [k][n]: (text, stopped), and where each of them came from."""

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
    responses, sources = [sample(policy, prompts, args.temperature, "first")], [["policy"] * n]
    ways = ["contrast", "hot", "elsewhere"] if contrast is not None else ["hot", "elsewhere"]
    for k in range(1, args.responses):
        again = (k,) if k > 1 else ()
        rng = random.Random("/".join(map(str, (f"{args.seed} contrast {step}", *again))))
        way = [rng.choice(ways) if rng.random() < args.contrast_share else "policy" for _ in range(n)]
        asked = [rng.choice(others) if w == "elsewhere" else p for w, p in zip(way, prompts, strict=True)]
        found = {}
        for name in ("policy", *ways):
            rows = [i for i in range(n) if way[i] == name]
            model, temperature = contrast if name == "contrast" else policy, HOT if name == "hot" else args.temperature
            found |= dict(zip(rows, sample(model, [asked[i] for i in rows], temperature, name, *again), strict=True))
        responses.append([found[i] for i in range(n)])
        sources.append(way)
    return responses, sources


def candidates_of(prompts, responses, sources) -> list[dict]:
    """[k][n] -> one row of candidates.jsonl a prompt."""
    return [
        dict(prompt=prompt, responses=[t for t, _ in said], stopped=[s for _, s in said], sources=list(where))
        for prompt, said, where in zip(prompts, zip(*responses, strict=True), zip(*sources, strict=True), strict=True)
    ]


# ---- the script -----------------------------------------------------------------------------------------------------


def check(args: Args):
    for name in ("data", "candidates"):
        if getattr(args, name) == "":
            raise cli.UserError(f"--{name}: names no file")
    if (args.candidates is None) == (args.data is None):
        raise cli.UserError("give either --data (with --policy) or --candidates")
    if args.data and not args.policy:
        raise cli.UserError("--data needs --policy, the model that answers them")
    if args.candidates and (args.policy or args.contrast or args.others):
        raise cli.UserError("--candidates brings its own responses: --policy, --contrast and --others need --data")
    if not args.judge:
        raise cli.UserError("--judge: name at least one judge")
    if "ranks" in args.judge and (len(args.judge) > 1 or not args.candidates):
        raise cli.UserError("--judge ranks takes the ranks in --candidates as they are: give no other judge, and no --data")
    if args.responses < 2:
        raise cli.UserError(f"--responses {args.responses}: it takes two to compare")
    for name, most in (("responses", 8), ("per_pair", 16)):
        if getattr(args, name) > most:
            raise cli.UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at most {most}")
    if not 0 <= args.contrast_share <= 1:
        raise cli.UserError(f"--contrast-share {args.contrast_share}: must be in 0-1")
    cli.require_positive(args, "batch_size", "max_new_tokens", "temperature", "limit", "per_pair", "max_cost")
    if args.max_cost is not None and not any("://" in judge for judge in args.judge):
        raise cli.UserError("--max-cost: no --judge is an endpoint, and the others cost nothing")


def read_rows(args: Args, path: str, models, tokenizer) -> list[dict]:
    """Prompts that leave room for a response, or candidates."""
    if path == args.candidates:
        rows = data.read_candidates(path, args.on_bad_row)
        if "ranks" in args.judge and (bad := next((row for row in rows if "ranks" not in row), None)):
            raise cli.UserError(f"{bad.where}: no key 'ranks', which --judge ranks needs")
        return rows
    room = min(model.config.block_size for model in models)
    data.check_room(args.max_new_tokens, room)

    def fits(row):
        data.check_length(len(tokenizer.encode(row["prompt"])), args.max_new_tokens, room)
        return row

    return data.convert(data.read_prompts(path, args.on_bad_row), fits, args.on_bad_row)


def read_principles(args: Args) -> list[constitution.Preference]:
    """The preference principles of the constitution; with --principles, those of these names."""
    principles = constitution.load(args.constitution).preferences
    if not principles:
        raise cli.UserError(f"{args.constitution}: has no preference principles")
    known = {p.name for p in principles} - {""}
    if unknown := [name for name in args.principles if name not in known]:
        there = ", ".join(sorted(known)) or "principles without names: leave --principles out to draw from all of them"
        raise cli.UserError(f"--principles {unknown[0]}: {args.constitution} has {there}")
    return [p for p in principles if not args.principles or p.name in args.principles]


def main(args: Args) -> dict:
    check(args)
    device = trainer.resolve_device(args.device)
    models = [trainer.load_gpt(m, device) for m in (args.policy, args.contrast) if m]
    tokenizer = trainer.tokenizer_of(*(m for m in (args.policy, args.contrast) if m)) if models else None
    principles = [] if args.judge == ["ranks"] else read_principles(args)  # people were asked nothing that we know
    # before there is a run folder: a judge that cannot be, or a password in its URL, should leave nothing behind
    specs = [spec for spec in args.judge if spec != "ranks"]
    every = [judges.load(spec, args.constitution, device, lambda model: "fp32", args.seed, args.max_cost) for spec in specs]
    rows = read_rows(args, args.data or args.candidates, models, tokenizer)[: args.limit]
    others = [row["prompt"] for row in (read_rows(args, args.others, models, tokenizer) if args.others else rows)]
    chunks = [range(i, min(i + args.batch_size, len(rows))) for i in range(0, len(rows), args.batch_size)]

    with trainer.Run(args.out, args, args.resume) as run:
        if run.finished:
            return {}
        with Journal(run.folder / "journal.jsonl") as journal:
            state = run.load_state()
            if state is None:
                journal.clear()
                state = {"step": 0, "candidates": [], "judged": 0}
                run.save_state(state)  # before the first answer: from here on it takes --resume, and the same flags
            for judge in every:
                if isinstance(judge, LocalJudge):
                    judge.dtype = run.resolve_dtype(device, judge.model)
            if args.data:
                sample_all(args, run, state, chunks, [row["prompt"] for row in rows], others, models, tokenizer, device)
                data.write_jsonl(run.folder / "candidates.jsonl", state["candidates"])
            found, work = state["candidates"] or rows, []
            for step, chunk in enumerate(chunks):
                rng = random.Random(f"{args.seed} principles {step}")
                work.append(pairs_of([found[i] for i in chunk], chunk.start, principles, args.per_pair, rng))
            left_out = sum((faults for _, faults in work), Counter())
            try:
                done, spent = label(args, run, state, journal, every, work), journal.cost
                if not any(row["p_chosen"] is not None for row in done):
                    why = [f"left out: {dict(left_out)}"] * bool(left_out) + [why_failed(done)] * bool(done)
                    what = f"{args.out}: no pair could be labelled ({'; '.join(why)})"
                    again = "; its journal keeps failures too, so give another --out to ask again"
                    raise cli.UserError(what + again * bool(done and kept(args, journal)))
            except cli.UserError:
                if not kept(args, journal):  # a wrong URL, say: the run may begin anew, with other flags
                    run.forget("journal.jsonl")
                raise
        data.write_jsonl(run.folder / "preferences.jsonl", done)
        run.finish()
    return summary(args, done, left_out, spent)


def kept(args: Args, journal: Journal) -> bool:
    """Whether the run holds something that is not to be had for nothing: responses, answers, or failures that were paid for."""
    paid = any(record.get("p") is not None or record.get("prompt_tokens") for record in journal.records.values())
    return paid or args.data is not None


def sample_all(args: Args, run, state: dict, chunks, prompts: list[str], others: list[str], models, tokenizer, device):
    """Fill state["candidates"]: responses to all prompts."""
    policy, contrast = (*models, None)[:2]
    dtype, begun = run.resolve_dtype(device, policy), state["step"]
    bar = tqdm(chunks[begun:], desc="respond", unit="batch", dynamic_ncols=True)
    for step, chunk in enumerate(bar, begun):
        asked = [prompts[i] for i in chunk]
        said = respond(args, asked, others, policy, contrast, tokenizer, device, dtype, step)
        state["candidates"] += candidates_of(asked, *said)
        run.end_step(step + 1, lambda: {"candidates": state["candidates"], "judged": 0})
    if begun < len(chunks):  # an answer in the journal must find the responses that it was about
        run.save_state({"step": len(chunks), "candidates": state["candidates"], "judged": 0})


def label(args: Args, run, state: dict, journal: Journal, every: list, work: list[tuple]) -> list[dict]:
    """Ask every judge about the pairs of each chunk (work: pairs_of each of them) -> the rows of preferences.jsonl.

    UserError: some calls got no answer, or the money ran out.
    """
    keys = [key for pairs, _ in work for pair in pairs for n in range(len(every)) for key, _ in pair.calls(n)]
    held, per_label = sum(key in journal for key in keys), len(keys) / max(1, sum(len(pairs) for pairs, _ in work))
    new, failures, spent, started = 0, 0, journal.cost, time.monotonic()
    bar = tqdm(total=len(keys), initial=held, desc="label", unit="answer", dynamic_ncols=True)

    def on_answer(answer):
        nonlocal new, failures, spent
        new, failures, spent = new + 1, failures + (answer.p is None), spent + answer.cost
        bar.set_postfix(failed=failures, **({"cost": f"{spent:.4f}"} if spent else {}), refresh=False)
        bar.update()

    done, missing, left_out = [], [], 0

    def make_state():
        return {"candidates": state["candidates"], "judged": state["judged"]}

    for step, (pairs, faults) in enumerate(work):
        for n, judge in enumerate(every):
            calls = dict(call for pair in pairs for call in pair.calls(n))
            judge.spent, judge.interrupted = spent, lambda: run.interrupted
            ask = functools.partial(judge.ask, list(calls.values()))
            answers = journal.fill(list(calls), ask, Answer, judge.paid, on_answer)
            missing += [answer.error for key, answer in zip(calls, answers, strict=True) if key not in journal]
        if any(error.startswith("stopped: ") for error in missing):
            break
        left_out += faults.total()
        if not missing:
            for pair in pairs:
                labels = [x for n in range(len(every)) for x in labels_of(pair, n, journal, args)] or labels_by_rank(pair)
                coin = random.Random(f"{args.seed} coin {pair.number} {pair.i} {pair.j}")
                done.append(record(pair, labels, "+".join(args.judge), args.on_failure, coin))
            if step < state["judged"]:
                continue  # logged and saved by the run that this one continues
            state["judged"] = step + 1
            speed = new / per_label / (time.monotonic() - started) if new else None  # of this process: it knows no other's time
            run.log(step, labels=len(done), left_out=left_out, flip_rate=flip_rate(done), labels_per_second=speed)
        run.end_step(len(work) + state["judged"], make_state)
    bar.close()
    if run.interrupted:  # some of a chunk is missing, since nothing was sent after Ctrl-C
        run.end_step(len(work) + state["judged"], make_state)
    if any("--max-cost" in error for error in missing):
        raise cli.UserError(
            f"{args.out}: --max-cost {args.max_cost} is reached ({spent:.4f} spent, {len(done)} labels so far); "
            "nothing is lost: go on with --resume and a higher --max-cost"
        )
    if missing:
        raise cli.UserError(
            f"{args.out}: {len(keys) - held - new} of {len(keys)} answers are missing, the first because {missing[0]}; "
            "nothing is lost: run it again with --resume, which asks for these alone"
        )
    return done


def labels_of(pair: Pair, judge: int, journal: Journal, args: Args) -> list[Label]:
    """One Label for each principle of the pair."""
    answers = [Answer(**journal[key]) for key, _ in pair.calls(judge)]
    half = len(answers) // 2
    return [combine(a, b, args.average, CLAMPS[args.clamp]) for a, b in zip(answers[:half], answers[half:], strict=True)]


def why_failed(done: list[dict]) -> str:
    """The commonest reasons why rows have no label of a judge."""
    errors = Counter(comparison.fault(row["error"]) for row in done if row["status"] == "failed" and row["error"])
    return "; ".join(f"{n} x {error}" for error, n in errors.most_common(3))


def summary(args: Args, done: list[dict], left_out: Counter, spent: float) -> dict:
    """Say what came out; what failed is never hidden."""
    sure = [row["p_chosen"] for row in done if row["p_chosen"] is not None]
    status, hard = Counter(row["status"] for row in done), sum(row["kind"] in ("verdict", "mixed") for row in done)
    print(
        f"{args.out}: {len(sure)} labels, mean p_chosen {statistics.fmean(sure):.3f}, flip rate {flip_rate(done):.3f}, "
        f"{status['tie']} ties, {status['failed']} failed ({sum(row['is_random'] for row in done)} of them random), "
        f"{hard} from hard verdicts, cost {spent:.4f}; left out: {dict(left_out) or 'none'}"
    )
    if errors := why_failed(done):
        print(f"failed: {errors}")
    left_out = dict(left_out)
    return {"n": len(sure), "flip_rate": flip_rate(done), "failed": status["failed"], "hard": hard, "left_out": left_out}


if __name__ == "__main__":
    cli.run(main, Args)
