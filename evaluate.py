"""What a policy, a judge and a reward model are worth, against the toy world's gold scorer, on held-out requests. With a word
first, without gold too: `evaluate.py hhh`, `labels` and `winrate` (evaluate_words.py; --help after the word).

    python evaluate.py --policies base=runs/my/base prompted=runs/my/base+preamble --prompts heldout.jsonl --out runs/my/eval
    python evaluate.py --preferences runs/my/labels/preferences.jsonl --reward-model runs/my/rm --out runs/my/eval-rm
    python evaluate.py --judge runs/my/base --out runs/my/eval-judge       # a right answer against each kind of failure
    python evaluate.py labels runs/my/labels/preferences.jsonl

A policy is NAME=PATH; "+preamble" after the path puts the constitution's preamble before every prompt. All policies answer
the same prompts under the same noise, so that their differences are paired. Every rate comes with a 95 % interval.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import evaluate_words
from minirlaif import cli, constitution, data, labelers, text, trainer, world
from minirlaif.failures import FAILURES, failure_table, refusal_table
from minirlaif.metrics import cluster, gold_of, gold_prefers_chosen, label_metrics, policy_metrics, rate
from minirlaif.model import response_mask, token_logprobs
from minirlaif.sampling import generate


@dataclass
class Args:
    out: str = cli.arg(help="run folder to write: results.json and samples.jsonl")
    policies: list[str] = cli.arg([], "NAME=PATH or NAME=PATH+preamble, several; needs --prompts")
    prompts: str | None = cli.arg(None, "prompts.jsonl of toy-world requests, held out from training")
    ref: str | None = cli.arg(None, "model to report each policy's KL to, as kl_to_sl_cai: the SL-CAI policy")
    baseline: str | None = cli.arg(None, "name of the policy that the others' harm is compared with, pair by pair")
    preferences: str | None = cli.arg(None, "labels to compare with gold: preferences.jsonl of label.py on held-out prompts")
    reward_model: str | None = cli.arg(None, "reward model to score those pairs with")
    judge: str | None = cli.arg(None, "judge to show a right answer and each kind of failure")
    constitution: str = cli.arg("toy", "constitution whose preamble and principles are used")
    limit: int | None = cli.arg(None, "use the first so many prompts")
    temperature: float = cli.arg(1.0, "sampling temperature")
    max_new_tokens: int = cli.arg(48, "longest response in tokens; a longer one is cut, and so ill-formed")
    batch_size: int = cli.arg(400, "prompts decoded together")
    on_bad_row: str = cli.arg("error", "a row that cannot be used: stop, or skip and count it", choices=["error", "skip"])
    seed: int = cli.arg(0, "seed of the samples")
    device: str = cli.arg("auto", "auto takes cuda, mps or cpu, the first that is there", choices=["auto", "cpu", "cuda", "mps"])
    dtype: str = cli.arg("auto", "bf16 is autocast over fp32 weights; auto measures", choices=["auto", "fp32", "bf16"])
    resume: bool = cli.arg(False, "continue the run in --out")


# ---- policies -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample_policy(args: Args, policy, ref, tokenizer, prompts: list[str], preamble: str, device, dtype) -> list[dict]:
    """One response a prompt -> {"prompt", "response", "tokens", "stopped", "kl"}; kl is log π - log π_ref, summed (nats)."""
    rows = []
    for start in range(0, len(prompts), args.batch_size):
        part = prompts[start : start + args.batch_size]
        seed = trainer.rng(args.seed, "evaluate", start).initial_seed()
        with trainer.autocast(device, dtype):
            shown = [tokenizer.encode(text.with_preamble(preamble, p)) for p in part]
            s = generate(policy, shown, args.max_new_tokens, tokenizer.eot, args.temperature, seed=seed)
            kl = [None] * len(part)
            if ref is not None:
                logp, _ = token_logprobs(
                    policy, s.tokens, response_mask(s.prompt_len, s.length, s.tokens.shape[1]), args.temperature
                )
                # the reference sees the prompt without the preamble
                responses = [
                    row[p:n] for row, p, n in zip(s.tokens.tolist(), s.prompt_len.tolist(), s.length.tolist(), strict=True)
                ]
                bare = [tokenizer.encode(p) for p in part]
                tokens, length = data.pad([b + r for b, r in zip(bare, responses, strict=True)], tokenizer.eot)
                mask = response_mask(torch.tensor([len(b) for b in bare]), length, tokens.shape[1])
                ref_logp, _ = token_logprobs(ref, tokens.to(device), mask.to(device), args.temperature)
                kl = (logp.sum(1) - ref_logp.sum(1)).tolist()
        for prompt, ids, n, stopped, k in zip(
            part, s.responses(), (s.length - s.prompt_len).tolist(), s.stopped.tolist(), kl, strict=True
        ):
            rows.append(dict(prompt=prompt, response=tokenizer.decode(ids), tokens=n, stopped=stopped, kl=k))
    return rows


# ---- reward models ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def reward_metrics(reward_model, tokenizer, rows: list[dict], device, dtype) -> dict:
    """Accuracy of a reward model on labelled pairs: against gold (less harm in all) and against the labels."""
    delta = []
    for i in range(0, len(rows), 64):
        pairs = [data.encode_pair(tokenizer, r["prompt"], r[k])[0] for k in ("chosen", "rejected") for r in rows[i : i + 64]]
        tokens, length = data.pad(pairs, tokenizer.eot, 16, reward_model.gpt.config.block_size)
        with trainer.autocast(device, dtype):
            chosen, rejected = reward_model(tokens.to(device), length.to(device)).float().chunk(2)
        delta += (chosen - rejected).tolist()
    gold = [(r, (d > 0) == g) for r, d in zip(rows, delta, strict=True) if (g := gold_prefers_chosen(r, "harm")) is not None]
    return {
        "gold_accuracy": rate([a for _, a in gold], [cluster(r) for r, _ in gold]),
        "label_accuracy": rate([d > 0 for d in delta], [cluster(r) for r in rows]),
        "n": len(rows),
    }


# ---- the script -----------------------------------------------------------------------------------------------------


def policies_of(args: Args) -> dict[str, str]:
    """--policies -> {name: path}"""
    policies = {}
    for given in args.policies:
        name, mark, path = (part.strip() for part in given.partition("="))
        if not (name and mark and path.removesuffix("+preamble")):
            raise cli.UserError(f"--policies {given}: write it as NAME=PATH or NAME=PATH+preamble")
        if name in policies:
            raise cli.UserError(f"--policies {given}: there is another policy of the name {name}")
        policies[name] = path
    return policies


def read_labels(args: Args) -> list[dict]:
    """Labels that gold can check; those without a verdict (failed, or a marked coin flip) are counted and left out."""
    rows = data.read_preferences(args.preferences, args.on_bad_row)
    labels = [row for row in rows if row.get("status") != "failed"]
    if len(labels) < len(rows):
        print(f"{args.preferences}: {len(rows) - len(labels)} of {len(rows)} labels are failed ones: left out", file=sys.stderr)
    for row in labels:
        figures = all(isinstance(row.get(key), float | int) for key in ("p_first", "p_first_swapped"))
        name = row.get("principle_name") or ("" if row.get("labeler") == "ranks" else None)
        if not isinstance(name, str) or not figures or world.parse_request(row["prompt"]) is None:
            raise cli.UserError(f"{row.where}: not a label of label.py on a toy-world request, which gold could check")
        try:
            gold_prefers_chosen(row, name or "harm")
        except KeyError:
            raise cli.UserError(f"{row.where}: gold knows no principle named {name}") from None
    if not labels:
        raise cli.UserError(f"{args.preferences}: every label is a failed one")
    return labels


def check_room(path: str, kind: str, longest: int, what: str):
    room = trainer.read_model(path, kind)["config"]["block_size"]
    if longest > room:
        raise cli.UserError(f"{path}: {what}, {longest} tokens, do not fit its context of {room}")


def main(args: Args) -> dict:
    if args.ref and not args.policies:
        raise cli.UserError("--ref needs --policies, whose KL to it is to be measured")
    if args.policies and not args.prompts:
        raise cli.UserError("--policies needs --prompts, the requests that they answer")
    if args.reward_model and not args.preferences:
        raise cli.UserError("--reward-model needs --preferences, the pairs to score")
    if not (args.policies or args.preferences or args.judge):
        raise cli.UserError("nothing to evaluate: give --policies, --preferences or --judge")
    policies = policies_of(args)
    if args.baseline and args.baseline not in policies:
        raise cli.UserError(f"--baseline {args.baseline}: not one of the policies {', '.join(policies)}")
    cli.require_positive(args, "limit", "batch_size", "max_new_tokens", "temperature")
    device, principles = trainer.resolve_device(args.device), constitution.load(args.constitution)
    prompts = []
    if args.prompts:

        def check(row):
            if world.parse_request(row["prompt"]) is None:
                raise data.BadRow("not a request of the toy world, whose scorer is all the gold there is")
            return row["prompt"]

        prompts = data.convert(data.read_prompts(args.prompts, args.on_bad_row), check, args.on_bad_row)[: args.limit]
    paths = [path.removesuffix("+preamble") for path in policies.values()]
    models = paths + [p for p in (args.ref, args.judge, args.reward_model) if p]
    tokenizer = trainer.tokenizer_of(*models) if models else None
    if not principles.preamble and any(path.endswith("+preamble") for path in policies.values()):
        raise cli.UserError(f"{args.constitution}: has no preamble, which a policy with +preamble needs")
    asked = {p.name: p.text for p in reversed(principles.preferences)}
    if args.judge and (missing := {asks for asks, _ in FAILURES.values()} - asked.keys()):
        raise cli.UserError(f"{args.constitution}: --judge needs a principle named {sorted(missing)[0]}")
    if policies:
        longest = max(len(tokenizer.encode(principles.preamble + p)) for p in prompts) + args.max_new_tokens
        for path in paths + ([args.ref] if args.ref else []):
            check_room(path, "gpt", longest, f"the longest prompt and {args.max_new_tokens} new tokens")
    labels = read_labels(args) if args.preferences else []
    if args.reward_model:
        encoded = [data.encode_pair(tokenizer, r["prompt"], r[k])[0] for r in labels for k in ("chosen", "rejected")]
        check_room(args.reward_model, "reward", max(map(len, encoded)), "the longest prompt and response")

    with trainer.Run(args.out, args, args.resume) as run:
        if run.finished:
            results = json.loads((Path(args.out) / "results.json").read_text())
            show(args, results)
            return results
        state = run.load_state() or {"step": 0, "samples": {}}
        samples = state["samples"]
        ref = trainer.load_gpt(args.ref, device) if args.ref else None
        bar = tqdm(list(policies.items())[state["step"] :], desc="evaluate", unit="policy", dynamic_ncols=True)
        for step, (name, path) in enumerate(bar, state["step"]):
            bar.set_postfix(policy=name)
            policy = trainer.load_gpt(path.removesuffix("+preamble"), device)
            dtype = run.resolve_dtype(device, policy)
            preamble = principles.preamble if path.endswith("+preamble") else ""
            samples[name] = sample_policy(args, policy, ref, tokenizer, prompts, preamble, device, dtype)
            run.log(step, policy=name, n=len(prompts))
            run.end_step(step + 1, lambda: {"samples": samples})

        def pause():  # Ctrl-C after the policies: their samples are kept
            run.end_step(len(policies), lambda: {"samples": samples})

        results = {"policies": {name: policy_metrics(rows) for name, rows in samples.items()}}
        for name, rows in samples.items():
            if args.baseline:
                difference = [gold_of(a).harm - gold_of(b).harm for a, b in zip(rows, samples[args.baseline], strict=True)]
                found = rate(difference, [cluster(r) for r in rows], (-1, 1))
                results["policies"][name] |= {"harm_minus_baseline": found["value"], "harm_minus_baseline_ci": found["ci"]}
        if args.judge:
            judge_model = trainer.load_gpt(args.judge, device)
            judge = labelers.LocalJudge(judge_model, tokenizer, device, run.resolve_dtype(device, judge_model), name=args.judge)
            results["failures"] = failure_table(judge, asked, pause=pause)
            results["refusals"] = refusal_table(judge, asked, pause=pause)
        if args.preferences:
            results["labels"] = label_metrics(labels)
            if args.reward_model:
                reward_model = trainer.load_reward(args.reward_model, device)
                dtype = run.resolve_dtype(device, reward_model)
                results["reward_model"] = reward_metrics(reward_model, tokenizer, labels, device, dtype)
        pause()
        data.write_jsonl(
            Path(args.out) / "samples.jsonl", [dict(policy=name, **r) for name, rows in samples.items() for r in rows]
        )
        with data.atomic_write(Path(args.out) / "results.json") as f:
            f.write(json.dumps(results, indent=2).encode())
        run.finish()
    show(args, results)
    return results


def show(args: Args, results: dict):
    """What there is, in words."""
    if results["policies"]:
        print(table(results["policies"]))
    for name, r in results.get("failures", {}).items():
        print(f"right answer against {name:30} ({r['principle']}): {r['value']:.2f}")
    labels, reward = results.get("labels", {}), results.get("reward_model", {})
    figures = {
        "agreement with gold on what the principle asks": labels.get("agreement_principle"),
        "agreement with gold on less harm": labels.get("agreement_overall"),
        "flip rate": labels.get("flip_rate"),
        "reward model, accuracy against gold": reward.get("gold_accuracy"),
        "reward model, accuracy against the labels": reward.get("label_accuracy"),
    }
    for name, r in figures.items():
        if r:
            print(f"{name}: {cell(r['value'], r['ci'])} n={r['n']}")
    print(f"all figures: {Path(args.out) / 'results.json'}")


def cell(value, ci) -> str:
    """A mean with its interval; "" where there was nothing to average."""
    return "" if value is None else f"{value:.3f} [{ci[0]:.3f}, {ci[1]:.3f}]"


COLUMNS = {
    "harm": "harm",
    "harm_unseen": "harm, unseen",
    "harmful_compliance": "complies",
    "refused_harmful": "refuses harmful",
    "evasive_harmful": "evades harmful",
    "helpfulness": "helpful",
    "refused_harmless": "refuses harmless",
    "evasive_harmless": "evades harmless",
    "honesty": "honest",
    "ill_formed": "ill-formed",
}


def table(policies: dict) -> str:
    """A markdown table, a row a policy, with the interval behind each mean."""
    head = ["policy", *COLUMNS.values(), "tokens", "KL to ref"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for name, m in policies.items():
        cells = [name]
        for key in COLUMNS:
            cells.append(cell(m[key], m[key + "_ci"]))
        kl = m.get("kl_to_sl_cai")
        cells += [f"{m['mean_tokens']:.1f}", "" if kl is None else f"{kl:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main, Args, words=evaluate_words.WORDS)
