"""Critique and revision: the supervised data of Constitutional AI (Bai et al. 2022, §3.1).

The model answers each prompt, then, `rounds` times: it is shown a principle drawn at random, criticises its last answer
under it, and rewrites the answer. Every revision becomes a row of completions.jsonl, as in the paper. `--rounds 0` writes the
first answers themselves: the helpful samples that the paper mixes in.

    python critique.py --model runs/my/base --prompts prompts.jsonl --out runs/my/critique
    python critique.py --model runs/my/base --prompts helpful.jsonl --out runs/my/helpful --rounds 0
    python critique.py --model runs/my/base --prompts redteam.jsonl --sample-prompts 500 --out runs/my/critique-sampled

With `--sample-prompts` the model writes the prompts too, after a few of --prompts as examples; prompts.jsonl has them.
What is kept out of training is counted and printed: a text that was cut before it ended, an empty one, one that found no
room in the context, a call that failed; chains.jsonl has every chain with what became of it. revisions.json is the table at
the end: length by number of revisions, on toy-world prompts gold's harm and helpfulness, and with `--judge` and `--principle`
a local judge's score from -1 to 1.

What an endpoint says is in journal.jsonl before anything else happens. When it answers no more, or --max-cost is reached,
--resume goes on from there, and pays for nothing twice.
"""

import contextlib
import functools
import json
import random
import time
from collections import Counter
from dataclasses import dataclass

from tqdm import tqdm

from minirlaif import cli, constitution, data, judges, redteam, text, trainer, world
from minirlaif.endpoint import Completion
from minirlaif.journal import Journal
from minirlaif.labelers import LocalJudge
from minirlaif.metrics import cluster, gold_of, rate
from minirlaif.sampling import generate


@dataclass
class Args:
    out: str = cli.arg(help="run folder to write; completions.jsonl is in it")
    model: str = cli.arg(help="who answers, criticises and revises: a model, or NAME@URL of an endpoint (see judges.py)")
    prompts: str = cli.arg(help="prompts.jsonl (HH-RLHF files are read too)")
    constitution: str = cli.arg("toy", "a bundled constitution by name, or a file (the paper's are read as they are)")
    rounds: int = cli.arg(4, "critique-revision rounds a prompt, 0-4; 0 writes the first answers")
    direct_revision: bool = cli.arg(False, "revise without a critique (the paper's ablation)")
    few_shot: str | None = cli.arg(None, "examples to put before every critique and revision: a text file or the paper's list")
    sample_prompts: int | None = cli.arg(None, "let the model write so many new prompts, with those of --prompts as examples")
    max_cost: float | None = cli.arg(None, "stop when the endpoint has cost this much, in the unit of its price=")
    judge: str | None = cli.arg(None, "a local model that scores answers and revisions for the table, as in label.py")
    principle: str | None = cli.arg(None, "what --judge is asked: the name of a preference of --constitution, or a text")
    limit: int | None = cli.arg(None, "use the first so many prompts")
    temperature: float = cli.arg(1.0, "sampling temperature, 0 is greedy")
    max_new_tokens: int = cli.arg(48, "longest answer, critique or revision in tokens, 32-256")
    batch_size: int = cli.arg(256, "prompts decoded together, 16-512")
    on_bad_row: str = cli.arg("error", "a row that cannot be used: stop, or skip and count it", choices=["error", "skip"])
    seed: int = cli.arg(0, "seed of principles and samples")
    device: str = cli.arg("auto", "auto takes cuda, mps or cpu, the first that is there", choices=["auto", "cpu", "cuda", "mps"])
    dtype: str = cli.arg("auto", "bf16 is autocast over fp32 weights; auto measures", choices=["auto", "fp32", "bf16"])
    resume: bool = cli.arg(False, "continue the run in --out")


def revise_batch(
    sample, prompts: list[str], pairs: list, rounds: int, seed_of, rng: random.Random, few_shot="", direct=False
) -> list[dict]:
    """One chain per prompt: its first answer, and `rounds` of (principle, critique, revision).

    sample(prompts, seed, paragraph) -> (texts, ended): continues each prompt; a critique is one paragraph. ended: True,
    False (cut off), or in words why there is no text. A chain stops at a text that is missing, cut off or empty; "fault"
    then says where. few_shot: goes before every request to criticise or revise. direct: revise without a critique.
    """
    answers, ended = sample(prompts, seed_of("answer"), False)
    chains = [dict(prompt=p, initial=a, principles=[], critiques=[], revisions=[]) for p, a in zip(prompts, answers, strict=True)]
    for chain, good in zip(chains, ended, strict=True):
        mark_fault(chain, "answer", chain["initial"], good)
    for round in range(rounds):
        alive = [c for c in chains if "fault" not in c]
        asked = [rng.choice(pairs) for _ in chains][: len(alive)]
        requests = [few_shot + c["prompt"] + [c["initial"], *c["revisions"]][-1] for c in alive]
        if not direct:
            requests = [text.critique_request(r, "", p.critique) for r, p in zip(requests, asked, strict=True)]
            critiques, ended = sample(requests, seed_of("critique", round), True)
            for chain, critique, good in zip(alive, critiques, ended, strict=True):
                if not mark_fault(chain, "critique", critique, good):
                    chain["critiques"].append(critique)
            requests = [r + critique for r, critique in zip(requests, critiques, strict=True)]
        requests = [r + text.revision_request(p.revision) for r, p in zip(requests, asked, strict=True)]
        revisions, ended = sample(requests, seed_of("revision", round), False)
        for chain, principle, revision, good in zip(alive, asked, revisions, ended, strict=True):
            chain["principles"].append(principle.revision if direct else principle.critique)
            if not mark_fault(chain, "revision", revision, good):
                chain["revisions"].append(revision)
    return chains


def mark_fault(chain: dict, what: str, said: str, ended: bool | str) -> bool:
    """Write down the chain's first fault, if this text is one; True for a chain that has a fault."""
    if "fault" not in chain and (ended is not True or not said.strip()):
        chain |= {"fault": f"{what} {'empty' if ended is True else ended or 'too long'}", "faulty": said}
    return "fault" in chain


def completions(chain: dict, rounds: int) -> list[dict]:
    """The rows of a chain: one a revision (or the first answer when there are no rounds)."""
    if rounds == 0:
        return [] if "fault" in chain else [dict(prompt=chain["prompt"], completion=chain["initial"], stopped=True)]
    return [
        dict(
            prompt=chain["prompt"],
            completion=chain["revisions"][k],
            stopped=True,
            initial=chain["initial"],
            principles=chain["principles"][: k + 1],
            critiques=chain["critiques"][: k + 1],
            revisions=chain["revisions"][: k + 1],
        )
        for k in range(len(chain["revisions"]))
    ]


# ---- who speaks -----------------------------------------------------------------------------------------------------


def cut(said: str, ended: bool, paragraph: bool) -> tuple[str, bool]:
    """A blank line ends a critique; a model that goes on to write the human's next turn has ended its own."""
    said, turn, _ = said.partition("\n\n" if paragraph else "\n\nHuman:")
    return said, ended or bool(turn)


def make_sampler(model, tokenizer, device, dtype, temperature: float, max_new_tokens: int):
    """sample(prompts, seed, paragraph) -> (texts, ended) with a local model; see revise_batch."""
    blank, room = tokenizer.encode("\n\n")[0], model.config.block_size - max_new_tokens

    def sample(prompts, seed, paragraph):
        encoded = [tokenizer.encode(p) for p in prompts]
        out = [("", "has no room in the context")] * len(prompts)
        fit = [i for i, ids in enumerate(encoded) if len(ids) <= room]
        if fit:
            stop = (blank,) if paragraph else ()
            with trainer.autocast(device, dtype):
                found = generate(
                    model, [encoded[i] for i in fit], max_new_tokens, tokenizer.eot, temperature, seed=seed, stop=stop
                )
            for i, ids, ended in zip(fit, found.responses(), found.stopped.tolist(), strict=True):
                out[i] = cut(tokenizer.decode(ids), ended, paragraph)
        return [said for said, _ in out], [ended for _, ended in out]

    return sample


def endpoint_sampler(endpoint, journal: Journal, temperature: float, max_new_tokens: int):
    """The same with a model behind a server: minirlaif.endpoint's `complete`. UserError: some got no answer."""

    def sample(prompts, seed, paragraph):  # the server keeps its own dice: what it has said once is in the journal
        ask = functools.partial(endpoint.complete, prompts, max_new_tokens, temperature)
        keys = [f"{seed}/{i}" for i in range(len(prompts))]
        found = journal.fill(keys, ask, Completion)
        if missing := [c.error for key, c in zip(keys, found, strict=True) if key not in journal]:
            if endpoint.interrupted():
                raise KeyboardInterrupt
            again = "--resume and a higher --max-cost" if any("--max-cost" in error for error in missing) else "--resume"
            raise cli.UserError(
                f"{journal.path}: {len(missing)} of {len(keys)} calls got no answer ({missing[0]}; {endpoint.spent:.4f} spent); "
                f"nothing is lost: go on with {again}"
            )
        texts, ends = [], []
        for completion in found:
            said, ended = cut(completion.text.strip(), completion.ended, paragraph)
            texts.append(" " + said.strip() if said else "")  # a response begins with its space
            ends.append(f"failed: {completion.error}" if completion.error else ended)
        return texts, ends

    return sample


# ---- the script -----------------------------------------------------------------------------------------------------


def add_scores(judge, asked: str, chains: list[dict]) -> int:
    """A local judge's scores of the answer and every revision of each whole chain, as its "scores" -> how many did not fit."""
    whole = [c for c in chains if "fault" not in c]
    room = judge.model.config.block_size - 4  # tokens: more than a score has

    def asks(chain):
        return [(chain["prompt"], said) for said in (chain["initial"], *chain["revisions"])]

    def length(prompt, said):
        return len(judge.tokenizer.encode(prompt + said + text.score_question(asked)))

    fit = [c for c in whole if max(length(*ask) for ask in asks(c)) <= room]
    prompts, responses = zip(*[ask for c in fit for ask in asks(c)], strict=True) if fit else ((), ())
    scores = iter(judge.score(list(prompts), list(responses), asked) if fit else ())
    for chain in fit:
        chain["scores"] = [next(scores) for _ in asks(chain)]
    return len(whole) - len(fit)


def by_revision(chains: list[dict], rounds: int, count, unit: str) -> list[dict]:
    """A row for each number of revisions, over the chains that came to their end, so that all rows have the same prompts.

    unit: "tokens" or "words", what count(text) counts. harm, helpfulness: gold's, as {"value", "ci", "n"}; n is 0 where no
    prompt is of the toy world. Helpfulness is over its harmless requests, as in evaluate.py. score: a judge's, the same way.
    """
    whole = [c for c in chains if "fault" not in c]
    rows = []
    for k in range(rounds + 1):
        said = [dict(prompt=c["prompt"], response=[c["initial"], *c["revisions"]][k], stopped=True) for c in whole]
        toy = [(r, gold_of(r), world.parse_request(r["prompt"]).harmful) for r in said if world.parse_request(r["prompt"])]
        row = {"revision": k, "n": len(said), unit: sum(count(r["response"]) for r in said) / max(1, len(said))}
        row["harm"] = rate([gold.harm for _, gold, _ in toy], [cluster(r) for r, *_ in toy])
        harmless = [(r, gold) for r, gold, harmful in toy if not harmful]
        row["helpfulness"] = rate([gold.helpfulness for _, gold in harmless], [cluster(r) for r, _ in harmless])
        scored = [c for c in whole if "scores" in c]
        row["score"] = rate([c["scores"][k] for c in scored], [cluster(c) for c in scored])
        rows.append(row)
    return rows


def table(rows: list[dict], unit: str) -> str:
    def cell(found):
        return f"{found['value']:.3f} ± {(found['ci'][1] - found['ci'][0]) / 2:.3f}" if found["n"] else ""

    judged = any(r["score"]["n"] for r in rows)
    lines = [f"| revision | chains | {unit} | gold harm | gold helpfulness |", "| --- | --- | --- | --- | --- |"]
    for r in rows:
        lines.append(f"| {r['revision']} | {r['n']} | {r[unit]:.1f} | {cell(r['harm'])} | {cell(r['helpfulness'])} |")
    columns = [" judge score |", " --- |", *(f" {cell(r['score'])} |" for r in rows)]
    return "\n".join(line + (column if judged else "") for line, column in zip(lines, columns, strict=True))


def main(args: Args) -> dict:
    cli.require_positive(args, "batch_size", "max_new_tokens", "limit", "sample_prompts", "max_cost")
    cli.require_not_negative(args, "rounds", "temperature")
    if args.rounds > 4:
        raise cli.UserError(f"--rounds {args.rounds}: must be at most 4")
    if args.rounds == 0 and (args.direct_revision or args.few_shot):
        raise cli.UserError("--rounds 0 revises nothing: --direct-revision and --few-shot have nothing to do")
    pairs = constitution.load(args.constitution).critique_revision
    if args.rounds and not pairs:
        raise cli.UserError(f"{args.constitution}: has no critique_revision pairs")
    if (args.judge is None) != (args.principle is None):
        raise cli.UserError("--judge and --principle belong together: who scores, and under which principle")
    few_shot = constitution.load_few_shot(args.few_shot) if args.few_shot else ""
    local, device = "://" not in args.model, trainer.resolve_device(args.device)
    if args.judge:
        asked = constitution.wording(args.constitution, args.principle)
        judge = judges.load(args.judge, args.constitution, device, lambda model: "fp32")
        if not isinstance(judge, LocalJudge):
            raise cli.UserError(f"--judge {args.judge}: only a local model gives scores")
    if local:
        if args.max_cost is not None:
            raise cli.UserError("--max-cost: a local --model costs nothing")
        tokenizer, model = trainer.tokenizer_of(args.model), trainer.load_gpt(args.model, device)
        unit, count, block_size = "tokens", lambda said: len(tokenizer.encode(said)), model.config.block_size
    else:  # the tokenizer and the context are the server's
        endpoint = judges.load_endpoint(args.model, args.max_cost, flag="--model")
        unit, count, block_size = "words", lambda said: len(said.split()), float("inf")

    def usable(row):
        data.check_length(count(row["prompt"]), args.max_new_tokens, block_size)
        if args.sample_prompts and redteam.human_turn(row["prompt"]) is None:
            raise data.BadRow("no human turn of one paragraph to serve as an example")
        return row["prompt"]

    prompts = data.convert(data.read_prompts(args.prompts, args.on_bad_row), usable, args.on_bad_row)[: args.limit]
    if (n := count(few_shot)) + (least := min(map(count, prompts))) + args.max_new_tokens > block_size:
        raise cli.UserError(
            f"{args.few_shot}: {n} tokens of examples, {least} of the shortest prompt and {args.max_new_tokens} new ones do not "
            f"fit a context of {block_size}; shorten the examples or lower --max-new-tokens"
        )
    with trainer.Run(args.out, args, args.resume) as run, contextlib.ExitStack() as stack:
        if run.finished:
            return {}
        stored, paid = run.load_state(), {}
        state = {"step": 0, "chains": [], "drafts": []} | (stored or {})
        chains, drafts, left_out, bar = state["chains"], state["drafts"], {}, dict(unit="batch", dynamic_ncols=True)
        if local:
            dtype = run.resolve_dtype(device, model)
            sample = make_sampler(model, tokenizer, device, dtype, args.temperature, args.max_new_tokens)
        else:
            journal = stack.enter_context(Journal(run.folder / "journal.jsonl"))
            if stored is None:
                journal.clear()
                run.save_state(state)  # before the first reply: from here on it takes --resume, and the same flags
            endpoint.spent, endpoint.interrupted = journal.cost, lambda: run.interrupted
            sample = endpoint_sampler(endpoint, journal, args.temperature, args.max_new_tokens)

        def make_state():
            return {"chains": chains, "drafts": drafts}

        if args.sample_prompts:
            examples = [redteam.human_turn(p) for p in prompts]
            for start in tqdm(range(len(drafts), args.sample_prompts, args.batch_size), desc="prompts", **bar):
                n, seed = min(args.batch_size, args.sample_prompts - start), trainer.rng(args.seed, "prompts", start)
                drafts += redteam.write(sample, examples, n, seed.initial_seed())
                run.end_step(0, make_state)
            prompts, left_out = redteam.choose(drafts, examples)
            print(f"{args.out}: {len(prompts)} new prompts of {len(drafts)} drafts; left out: {dict(left_out) or 'none'}")
            if not prompts:
                raise cli.UserError(f"{args.out}: none of {len(drafts)} drafts is a usable prompt ({dict(left_out)})")
            data.write_jsonl(run.folder / "prompts.jsonl", [{"prompt": p} for p in prompts])
        chunks = [prompts[i : i + args.batch_size] for i in range(0, len(prompts), args.batch_size)]
        bar = tqdm(range(state["step"], len(chunks)), initial=state["step"], total=len(chunks), desc="critique", **bar)
        for step in bar:
            began = time.monotonic()
            rng = random.Random(f"{args.seed} principles {step}")
            seed_of = lambda *keys, step=step: trainer.rng(args.seed, step, *keys).initial_seed()  # noqa: E731
            new = revise_batch(sample, chunks[step], pairs, args.rounds, seed_of, rng, few_shot, args.direct_revision)
            chains += new
            faults = sum("fault" in c for c in chains)
            written = sum(count(t) for c in new for t in (c["initial"], *c["critiques"], *c["revisions"]))
            speed = written / (time.monotonic() - began)
            run.log(step, prompts=len(chains), faults=faults, **{f"{unit}_per_second": speed})
            cost = {} if local else {"cost": f"{endpoint.spent:.4f}"}
            bar.set_postfix(prompts=len(chains), kept_out=faults, **{f"{unit}_s": f"{speed:,.0f}"}, **cost)
            run.end_step(step + 1, make_state)
        if args.judge:
            judge.dtype = run.resolve_dtype(device, judge.model)
            if too_long := add_scores(judge, asked, chains):
                print(f"{args.out}: {too_long} chains do not fit the context of {args.judge} and have no score")
        rows = [row for chain in chains for row in completions(chain, args.rounds)]
        revisions = by_revision(chains, args.rounds, count, unit)
        data.write_jsonl(run.folder / "completions.jsonl", rows)
        data.write_jsonl(run.folder / "chains.jsonl", chains)
        with data.atomic_write(run.folder / "revisions.json") as f:
            f.write(json.dumps(revisions, indent=2).encode())
        if not local:
            paid = {k: sum(r[k] for r in journal.records.values()) for k in ("prompt_tokens", "completion_tokens", "cost")}
        run.finish()
    faults = Counter(c["fault"].split(":")[0] for c in chains if "fault" in c)
    print(f"{args.out}: {len(rows)} completions of {len(prompts)} prompts; kept out: {json.dumps(faults) if faults else 'none'}")
    if paid:
        print(f"{args.model}: {paid['prompt_tokens']} + {paid['completion_tokens']} tokens, cost {paid['cost']:.4f}")
    if failed := [c["fault"] for c in chains if "failed: " in c.get("fault", "")]:
        print(f"the first of {len(failed)} failed calls: {failed[0]}")
    print(table(revisions, unit))
    if not rows:
        raise cli.UserError(f"{args.out}: no completion came to its end: nothing to train on (chains.jsonl has them)")
    return {"rows": len(rows), "faults": dict(faults), "revisions": revisions, "left_out": dict(left_out), **paid}


if __name__ == "__main__":
    cli.run(main, Args)
