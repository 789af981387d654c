"""Critique and revision: the supervised data of Constitutional AI (Bai et al. 2022, §3.1).

The model answers each prompt, then, `rounds` times: it is shown a principle drawn at random, criticises its last answer
under it, and rewrites the answer. Every revision becomes a row of completions.jsonl, as in the paper. `--rounds 0` writes the
first answers themselves: the helpful samples that the paper mixes in.

    python critique.py --model runs/my/base --prompts prompts.jsonl --out runs/my/critique
    python critique.py --model runs/my/base --prompts helpful.jsonl --out runs/my/helpful --rounds 0

What is kept out of training is counted and printed: a text that was cut before it ended, and an empty one.
"""

import json
import random
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from minirlaif import cli, constitution, data, text, trainer
from minirlaif.sampling import generate


@dataclass
class Args:
    model: str = cli.arg(help="the model that answers, criticises and revises: a run folder or model file")
    prompts: str = cli.arg(help="prompts.jsonl (HH-RLHF files are read too)")
    out: str = cli.arg(help="run folder to write; completions.jsonl is in it")
    constitution: str = cli.arg("toy", "a bundled constitution by name, or a file (the paper's are read as they are)")
    rounds: int = cli.arg(4, "critique-revision rounds a prompt, 0-4; 0 writes the first answers")
    limit: int | None = cli.arg(None, "use the first so many prompts")
    temperature: float = cli.arg(1.0, "sampling temperature, 0 is greedy")
    max_new_tokens: int = cli.arg(48, "longest answer, critique or revision in tokens, 32-256")
    batch_size: int = cli.arg(256, "prompts decoded together, 16-512")
    on_bad_row: str = cli.arg("error", "a row that cannot be used: stop, or skip and count it", choices=["error", "skip"])
    seed: int = cli.arg(0, "seed of principles and samples")
    device: str = cli.arg("auto", "auto takes cuda, mps or cpu, the first that is there", choices=["auto", "cpu", "cuda", "mps"])
    dtype: str = cli.arg("auto", "bf16 is autocast over fp32 weights; auto measures", choices=["auto", "fp32", "bf16"])
    resume: bool = cli.arg(False, "continue the run in --out")


def revise_batch(sample, prompts: list[str], pairs: list, rounds: int, seed_of, rng: random.Random) -> list[dict]:
    """One chain per prompt: its first answer, and `rounds` of (principle, critique, revision).

    sample(prompts, seed, paragraph) -> (texts, ended): continues each prompt; a critique is one paragraph. A chain ends
    early when a text is cut off or empty; "fault" then says where.
    """
    answers, ended = sample(prompts, seed_of("answer"), False)
    chains = [dict(prompt=p, initial=a, principles=[], critiques=[], revisions=[]) for p, a in zip(prompts, answers, strict=True)]
    for chain, good in zip(chains, ended, strict=True):
        mark_fault(chain, "answer", chain["initial"], good)
    for round in range(rounds):
        alive = [c for c in chains if "fault" not in c]
        asked = [rng.choice(pairs) for _ in chains][: len(alive)]
        last = [c["revisions"][-1] if c["revisions"] else c["initial"] for c in alive]
        requests = [text.critique_request(c["prompt"], a, p.critique) for c, a, p in zip(alive, last, asked, strict=True)]
        critiques, ended_1 = sample(requests, seed_of("critique", round), True)
        requests = [r + c + text.revision_request(p.revision) for r, c, p in zip(requests, critiques, asked, strict=True)]
        revisions, ended_2 = sample(requests, seed_of("revision", round), False)
        for chain, principle, critique, revision, good_1, good_2 in zip(
            alive, asked, critiques, revisions, ended_1, ended_2, strict=True
        ):
            if mark_fault(chain, "critique", critique, good_1) or mark_fault(chain, "revision", revision, good_2):
                continue
            chain["principles"].append(principle.critique)
            chain["critiques"].append(critique)
            chain["revisions"].append(revision)
    return chains


def mark_fault(chain: dict, what: str, said: str, ended: bool) -> bool:
    if not ended or not said.strip():
        chain["fault"] = f"{what} {'empty' if ended else 'too long'}"
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


def make_sampler(model, tokenizer, device, dtype, temperature: float, max_new_tokens: int):
    """sample(prompts, seed, paragraph) -> (texts, ended) with a local model; paragraph: stop at the first blank line too."""
    blank = tokenizer.encode("\n\n")[0]

    def sample(prompts, seed, paragraph):
        with trainer.autocast(device, dtype):
            samples = generate(
                model,
                [tokenizer.encode(p) for p in prompts],
                max_new_tokens,
                tokenizer.eot,
                temperature,
                seed=seed,
                stop=(blank,) if paragraph else (),
            )
        said = [tokenizer.decode(ids) for ids in samples.responses()]
        return [s.split("\n\n")[0] for s in said] if paragraph else said, samples.stopped.tolist()

    return sample


def main(args: Args) -> dict:
    cli.require_positive(args, "batch_size", "max_new_tokens", "limit")
    device = trainer.resolve_device(args.device)
    tokenizer, model = trainer.tokenizer_of(args.model), trainer.load_gpt(args.model, device)
    pairs = constitution.load(args.constitution).critique_revision
    if args.rounds and not pairs:
        raise cli.UserError(f"{args.constitution}: has no critique_revision pairs")
    longest = model.config.block_size - args.max_new_tokens

    def fits(row):
        data.check_length(len(tokenizer.encode(row["prompt"])), args.max_new_tokens, model.config.block_size)
        return row["prompt"]

    prompts = data.convert(data.read_prompts(args.prompts, args.on_bad_row), fits, args.on_bad_row)[: args.limit]
    chunks = [prompts[i : i + args.batch_size] for i in range(0, len(prompts), args.batch_size)]
    with trainer.Run(args.out, args, args.resume) as run:
        if run.finished:
            return {}
        dtype = run.resolve_dtype(device, model)
        local = make_sampler(model, tokenizer, device, dtype, args.temperature, args.max_new_tokens)

        def sample(prompts, seed, paragraph):  # a conversation that has outgrown the context counts as too long
            fit = [i for i, p in enumerate(prompts) if len(tokenizer.encode(p)) <= longest]
            said, ended = local([prompts[i] for i in fit], seed, paragraph) if fit else ([], [])
            found = dict(zip(fit, zip(said, ended, strict=True), strict=True))
            both = [found.get(i, ("", False)) for i in range(len(prompts))]
            return [s for s, _ in both], [e for _, e in both]

        state = run.load_state() or {"step": 0, "chains": []}
        chains = state["chains"]
        bar = tqdm(
            range(state["step"], len(chunks)),
            initial=state["step"],
            total=len(chunks),
            desc="critique",
            unit="batch",
            dynamic_ncols=True,
        )
        for step in bar:
            began = time.monotonic()
            rng = random.Random(f"{args.seed} principles {step}")
            seed_of = lambda *keys, step=step: trainer.rng(args.seed, step, *keys).initial_seed()  # noqa: E731
            new = revise_batch(sample, chunks[step], pairs, args.rounds, seed_of, rng)
            chains += new
            faults = sum("fault" in c for c in chains)
            written = sum(len(tokenizer.encode(t)) for c in new for t in (c["initial"], *c["critiques"], *c["revisions"]))
            speed = written / (time.monotonic() - began)
            run.log(step, prompts=len(chains), faults=faults, tokens_per_second=speed)
            bar.set_postfix(prompts=len(chains), kept_out=faults, tok_s=f"{speed:,.0f}")
            run.end_step(step + 1, lambda chains=chains: {"chains": chains})
        rows = [row for chain in chains for row in completions(chain, args.rounds)]
        data.write_jsonl(Path(args.out) / "completions.jsonl", rows)
        run.finish()
    faults = Counter(c["fault"] for c in chains if "fault" in c)
    print(f"{args.out}: {len(rows)} completions of {len(prompts)} prompts; kept out: {json.dumps(faults) if faults else 'none'}")
    return {"rows": len(rows), "faults": dict(faults)}


if __name__ == "__main__":
    cli.run(main, Args)
