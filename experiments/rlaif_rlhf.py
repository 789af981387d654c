"""AI labels against gold labels, on the same pairs with the same PPO; and AI labels under principles that want the worse.

    python -m experiments.rlaif_rlhf --runs runs/demo-0 runs/demo-1 runs/demo-2 --out runs/experiments/rlaif_rlhf

Each arm labels the pairs of a finished demo.py again and then trains a reward model and a policy with that run's own flags:

    rlhf          every pair under the principle it had, by the gold scorer in the role of the human
    direct        no pairs and no reward model: the judge scores each response in PPO, under "harm" and "helpfulness" (d-RLAIF)
    direct_harm   the same under "harm" alone
    inverted      the harmlessness pairs by the same AI judge, under a constitution that asks for the more harmful answer
    advertising   the same, under one that asks for sales talk

The helpfulness labels of `inverted` and `advertising` stay those of the demo. Each policy then answers the held-out requests of
the demo under the same noise, so that all differences are paired.

What the papers found. Lee et al. 2023: RLAIF and RLHF win against each other about equally often, 50 % on summaries (47 %
corrected for length) and 52 % (50 %) on helpful dialogue; harmless answers: 64 % of the supervised policy, 76 % after RLHF, 88 %
after RLAIF; d-RLAIF wins 60 % against RLAIF with a labeler of the same size. Here: gold harm, helpfulness, refusals and KL. That
the method follows any principle, good or bad, is a danger that the literature names; here it is measured. A toy gives the
shape of such results, not the papers' numbers; and gold is a human who is never wrong, which no human is.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import evaluate
import label
import train_ppo
import train_rm
from experiments import common
from minirlaif import cli, comparison, constitution, data, labelers, world
from minirlaif.metrics import gold_of

TITLE = "AI labels, gold labels, and principles that want the worse"
DIRECT = {"direct": "harm+helpfulness", "direct_harm": "harm"}
ARMS = ("rlhf", *DIRECT, "inverted", "advertising")
HARMLESSNESS, HELPFULNESS = "labels", "labels_helpful"  # where the demo has its two sets of pairs


@dataclass
class Args:
    runs: list[str] = cli.arg(help="out folders of demo.py, one a seed; the results are of these alone")
    out: str = cli.arg("runs/experiments/rlaif_rlhf", "folder to write; what is done there is not done again")
    arms: list[str] = cli.arg(list(ARMS), "which to run: rlhf, direct, direct_harm, inverted, advertising")


# ---- labels ---------------------------------------------------------------------------------------------------------


def shown_pairs(path: str) -> list[dict]:
    """A preference file -> candidates: its pairs in the order in which the judge was shown them, with their principles."""
    return [
        dict(
            prompt=row["prompt"],
            responses=[row["chosen"], row["rejected"]][:: 1 if row["first_is_chosen"] else -1],
            sources=["policy", row["source"]],
            principle=row["principle"],
            principle_name=row["principle_name"],
        )
        for row in data.read_preferences(path)
    ]


def label_by_gold(pairs: list[dict]) -> list[dict]:
    """Preferences of the gold scorer, each pair under the principle that it had. UserError: one that gold does not know."""
    judge = labelers.GoldJudge({p.text: p.name for p in constitution.load("toy").preferences})
    found = labelers.label(judge, [(pair["prompt"], tuple(pair["responses"]), pair["principle"]) for pair in pairs])
    if error := next((one.error for one in found if one.error), None):
        raise cli.UserError(f"gold cannot label the pairs of these runs: {error}")
    principles = [constitution.Preference(pair["principle"], pair["principle_name"]) for pair in pairs]
    return [
        label.record(label.Pair(pair, number, 0, 1, [principle]), [one], judge.name)
        for number, (pair, principle, one) in enumerate(zip(pairs, principles, found, strict=True))
    ]


def label_again(arm: str, run: str, out: str) -> list[str]:
    """The two preference files of an arm; those that it does not change are the demo's."""
    files = {name: f"{run}/{name}/preferences.jsonl" for name in (HARMLESSNESS, HELPFULNESS)}
    if arm == "rlhf":
        for name, file in files.items():
            files[name] = f"{out}/{name}.jsonl"
            if not Path(files[name]).exists():
                data.write_jsonl(files[name], label_by_gold(shown_pairs(file)))
    elif arm not in DIRECT:
        candidates = f"{out}/candidates.jsonl"
        if not Path(candidates).exists():
            data.write_jsonl(candidates, shown_pairs(files[HARMLESSNESS]))
        demo = common.flags(f"{run}/rm", train_rm.Args)  # its seed, device and dtype, which all stages share
        label.main(
            label.Args(
                out=f"{out}/{HARMLESSNESS}",
                judge=[f"{run}/base"],
                candidates=candidates,
                constitution=arm,
                seed=demo.seed,
                device=demo.device,
                dtype=demo.dtype,
                resume=True,
            )
        )
        files[HARMLESSNESS] = f"{out}/{HARMLESSNESS}/preferences.jsonl"
    return list(files.values())


# ---- an arm ---------------------------------------------------------------------------------------------------------


def train(arm: str, run: str, out: str) -> dict:
    """Labels, reward model, policy and samples of an arm in `out`, each stage skipped if it is done -> what was found."""
    sl, files = f"{run}/sl_cai", label_again(arm, run, out)
    if arm in DIRECT:
        reward_model, reward = f"{run}/rm", f"judge:{run}/base,principles={DIRECT[arm]}"
    else:
        reward_model = reward = f"{out}/rm"
        train_rm.main(common.flags(f"{run}/rm", train_rm.Args, init=sl, data=files, out=reward_model))
    changes = dict(init=sl, reward_model=reward, data=f"{run}/world/prompts.jsonl", out=f"{out}/policy")
    train_ppo.main(common.flags(f"{run}/rl_cai", train_ppo.Args, **changes))
    evaluate.main(
        common.flags(
            f"{run}/evaluate",
            evaluate.Args,
            policies=[f"{arm}={out}/policy"],
            prompts=f"{run}/world/heldout.jsonl",
            ref=sl,
            baseline=None,
            judge=None,
            preferences=f"{run}/labels_heldout/preferences.jsonl",
            reward_model=reward_model,
            out=f"{out}/evaluate",
        )
    )
    return found_in(f"{out}/evaluate", files, [arm])


def found_in(folder: str, labels: list[str], policies: list[str]) -> dict:
    """What an evaluation and the labels behind it hold: {"samples": {policy: rows}, "labels", "reward_model"}."""
    rows = data.read_jsonl(f"{folder}/samples.jsonl")
    results = json.loads((Path(folder) / "results.json").read_text())
    harmlessness, helpfulness = (comparison.label_report(data.read_jsonl(file))["agreement"] for file in labels)
    return {
        "samples": {name: [row for row in rows if row["policy"] == name] for name in policies},
        "labels": {"harmlessness": harmlessness, "helpfulness": helpfulness},
        "reward_model": results["reward_model"]["gold_accuracy"],
    }


# ---- what gold says -------------------------------------------------------------------------------------------------


def measures(row: dict) -> dict:
    """Gold on one answer; None: not asked of this request."""
    harmful, gold = world.parse_request(row["prompt"]).harmful, gold_of(row)
    return {
        "harm": gold.harm,
        "helpfulness": None if harmful else gold.helpfulness,
        "refuses harmful": gold.refused if harmful else None,
        "refuses harmless": None if harmful else gold.refused,
        "ill-formed": gold.ill_formed,
        "with an ad": "ad" in gold.kinds,
        "KL to SL-CAI": row["kl"],
    }


DIFFERENCES = [
    ("rl_cai", "sl_cai"),
    ("rlhf", "sl_cai"),
    ("rl_cai", "rlhf"),
    ("direct", "sl_cai"),
    ("direct", "rl_cai"),
    ("direct_harm", "sl_cai"),
    ("direct_harm", "rl_cai"),
    ("inverted", "sl_cai"),
    ("inverted", "base"),
    ("advertising", "sl_cai"),
    ("advertising", "base"),
]


def compare(samples: dict[str, dict[str, list[dict]]]) -> dict:
    """{run: {policy: rows, all of the same prompts}} -> {measure: {policy, or "a - b": side_by_side}}."""
    runs, policies = list(samples), list(next(iter(samples.values())))
    for run, name in ((run, name) for run in runs for name in policies):
        if [row["prompt"] for row in samples[run][name]] != [row["prompt"] for row in samples[run][policies[0]]]:
            raise cli.UserError(f"{run}: {name} did not answer the prompts that {policies[0]} did; run demo.py again")
    measured = {name: {run: [measures(row) for row in samples[run][name]] for run in runs} for name in policies}
    found = {}
    for measure in measures(samples[runs[0]][policies[0]][0]):
        # which requests a measure asks about depends on the request alone, so it is the same for every policy
        of = {n: {run: [m[measure] for m in measured[n][run] if m[measure] is not None] for run in runs} for n in policies}
        asked = {run: zip(samples[run][policies[0]], measured[policies[0]][run], strict=True) for run in runs}
        rows = {run: [row for row, m in asked[run] if m[measure] is not None] for run in runs}
        found[measure] = {name: common.side_by_side(of[name], rows) for name in policies}
        for a, b in DIFFERENCES:
            if a in of and b in of:
                found[measure][f"{a} - {b}"] = common.side_by_side(common.minus(of[a], of[b]), rows, (-1, 1))
    return found


def verdicts(found: dict) -> list[str]:
    """What the figures say, in words; what did not come out as hoped is said in the same place."""

    def difference(measure, name):
        where, figures = common.told(found[measure][name])
        return where, f"difference {figures}"

    lines = []
    if "rlhf" in found["harm"]:
        for measure in ("harm", "helpfulness"):
            where, numbers = difference(measure, "rl_cai - rlhf")
            words = {0: "no difference is shown", 1: "RLAIF's is higher", -1: "RLHF's is higher"}[where]
            lines.append(f"- RLAIF against RLHF, gold {measure}: {words} ({numbers}).")
    for arm in (arm for arm in DIRECT if arm in found["harm"]):
        for measure in ("harm", "helpfulness"):
            where, numbers = difference(measure, f"{arm} - rl_cai")
            words = {0: "no difference is shown", 1: "d-RLAIF's is higher", -1: "RLAIF's is higher"}[where]
            lines.append(f"- d-RLAIF ({DIRECT[arm]}) against RLAIF, gold {measure}: {words} ({numbers}).")
    for arm, measure, what in (("inverted", "harm", "gold harm"), ("advertising", "with an ad", "share of answers with an ad")):
        if arm not in found[measure]:
            continue
        for other in ("base", "sl_cai"):
            where, numbers = difference(measure, f"{arm} - {other}")
            words = {1: "rises above", 0: "cannot be told from", -1: "stays below"}[where]
            lines.append(f"- {arm}: its {what} {words} that of {other} ({numbers}).")
        if difference(measure, f"{arm} - sl_cai")[0] > 0:
            lines.append(
                f"- RLAIF aligns to whatever it is told: with the same judge, pairs and PPO, the principles of `{arm}` made the "
                "policy worse. No step of the method asks whether the principles are good."
            )
        else:
            lines.append(f"- Against expectation, the policy did not go where the principles of `{arm}` point.")
    return lines


def summarise(found: dict[str, dict[str, dict]]) -> dict:
    """{run: {"demo" or arm: what found_in gives}} -> results.json."""
    arms = {"demo": "rl_cai"} | {arm: arm for arm in ARMS if arm in next(iter(found.values())) and arm not in DIRECT}
    policies = compare({run: {n: rows for part in found[run].values() for n, rows in part["samples"].items()} for run in found})
    return {
        "verdicts": verdicts(policies),
        "policies": policies,
        "labels": {
            f"{name}, {kind}": {run: parts[arm]["labels"][kind] for run, parts in found.items()}
            for kind in ("harmlessness", "helpfulness")
            for arm, name in arms.items()
        },
        "reward_model": {name: {run: parts[arm]["reward_model"] for run, parts in found.items()} for arm, name in arms.items()},
    }


def report(results: dict) -> list[str]:
    """The lines of results.md."""
    lines = [f"# {TITLE}", "", *results["verdicts"], ""]
    lines += ["Means with 95 % intervals over the held-out requests (bootstrap over deed x thing); differences are paired."]
    for measure, rows in results["policies"].items():
        lines += ["", f"## {measure}", "", *common.table("policy", rows)]
    lines += ["", "## Labels: agreement with gold on what their principles ask", "", *common.table("labels", results["labels"])]
    lines += ["", "## Reward model: held-out pairs on which it sides with gold (less harm in all)", ""]
    return lines + common.table("labels", results["reward_model"])


def main(args: Args) -> dict:
    if unknown := [arm for arm in args.arms if arm not in ARMS]:
        raise cli.UserError(f"--arms {unknown[0]}: there are {', '.join(ARMS)}")
    runs, began, found, results = common.named(args.runs), time.monotonic(), {}, {}
    args.out = common.claim(args.out, TITLE)
    for name, run in runs.items():
        labels = [f"{run}/{kind}/preferences.jsonl" for kind in (HARMLESSNESS, HELPFULNESS)]
        found[name] = {"demo": found_in(f"{run}/evaluate", labels, ["base", "sl_cai", "rl_cai"])}
        for arm in args.arms:
            print(f"\n[{name}] {arm}", flush=True)
            found[name][arm] = train(arm, run, f"{args.out}/{name}/{arm}")
        results = summarise(found)
        common.write(args.out, results, report(results))
    common.close(args.out, report(results), began)
    return results


if __name__ == "__main__":
    cli.run(main, Args, again="the same command goes on where it stopped")
