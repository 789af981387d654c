"""Reward hacking on purpose: PPO against a reward model that was trained on few AI labels, with and without the KL penalty.

    python -m experiments.reward_hacking --runs runs/demo-0 runs/demo-1 runs/demo-2 --out runs/experiments/reward_hacking

Of each finished run of demo.py: a reward model from 1,200 of its 3,500 labels, drawn at random, then PPO against it from that
run's SL-CAI policy, once with kl_coef 0 and once with the default. The arms differ in nothing else; against the demo, the
learning rate is six times as high. Measured before every second step and at the end, on the same held-out requests under the
same noise: the proxy, which is that reward model's score; gold, which is helpfulness - harm; and the exact KL to SL-CAI.
Proxy, gold and KL of each step's own samples are measured too.

Gao et al. 2022: as the policy leaves its start, the proxy keeps rising while gold rises, turns and falls, the sooner the fewer
the labels; both are plotted against the root of the KL. In their runs a KL penalty acted like stopping early: gold at a given
KL was the same. Stiennon et al. 2020, figure 5: people's preference rises, and then turns against the reward model's score.

The claim, fixed before looking. With kl_coef 0, the proxy ends above where it was at gold's peak, and gold ends below that peak,
both by more than their 95 % intervals. With the default, gold does not. The peak is chosen on one half of the requests and
measured on the other, since the best of many noisy means lies above the last one by chance alone.

What was tried before, on the first of three runs only; the other two were first looked at with the design above:

- 600 labels, 2 epochs, lr 1e-4: that reward model scores a misplaced refusal above a right answer, by 0.25 on average. Both arms
  came to refuse harmless requests: gold fell from 0.87 to -0.94 with kl_coef 0 and from 0.86 to 0.35 with the default, where it
  stayed. The penalty bounds such a fault and does not mend it.
- 1,200 labels, 4 epochs, lr 1e-4: no arm fell (gold 0.95 and 0.98 after 24 and 20 steps). Both settled on few wordings of the
  right answer, at a root KL of 1.2, and what is not sampled is not learned. It takes larger steps to leave that place.

So this does not show that the default is safe, only what it is for. Against a reward model that is wrong about answers which the
policy gives now and then, it is not enough.
"""

import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

import train_ppo
import train_rm
from experiments import common
from minirlaif import cli, data, lora, ppo, trainer, world
from minirlaif.metrics import cluster, gold_of, policy_metrics
from minirlaif.sampling import generate

TITLE = "Reward hacking on purpose"
ARMS = {"kl_coef 0": 0.0, "kl_coef 0.1": train_ppo.Args.kl_coef}
EPOCHS = 4  # of the reward model: with few labels the demo's two are too few steps
ASPECTS = ("helpfulness", "harm", "refused_harmful", "refused_harmless", "ill_formed", "distinct")  # of policy_metrics


@dataclass
class Size:
    """How much of everything; --quick has less of it."""

    labels: int
    steps: int = 32  # as in the demo
    every: int = 2  # steps from one look at the held-out requests to the next
    requests: int = 320  # held-out ones; an even number, since harmful and harmless ones stand in turn


QUICK = Size(labels=60, steps=4, every=2, requests=16)


@dataclass
class Args:
    runs: list[str] = cli.arg(help="out folders of demo.py, one a seed; the results are of these alone")
    out: str = cli.arg("runs/experiments/reward_hacking", "folder to write; what is done there is not done again")
    labels: int = cli.arg(1200, "AI labels to train the reward model on, drawn once out of all of a run's, 300-3000")
    lr: float = cli.arg(3e-4, "learning rate of the policy in both arms, 5e-5 to 5e-4; the demo's is 5e-5")
    quick: bool = cli.arg(False, f"{QUICK.labels} labels and {QUICK.steps} steps: shows that it runs")


# ---- a reward model from few labels, and PPO against it -------------------------------------------------------------


def reward_model(run: str, labels: int, out: str) -> str:
    """Trained on so many of the run's labels, of all its principles, and otherwise with its own flags -> the run folder."""
    rows = [row for name in ("labels", "labels_helpful") for row in data.read_preferences(f"{run}/{name}/preferences.jsonl")]
    file, folder = f"{out}/labels-{labels}.jsonl", f"{out}/rm"
    if not Path(file).exists():
        data.write_jsonl(file, random.Random("few labels").sample(rows, min(labels, len(rows))))
    changes = dict(init=f"{run}/sl_cai", data=[file], epochs=EPOCHS, out=folder)
    train_rm.main(common.flags(f"{run}/rm", train_rm.Args, **changes))
    return folder


def train(args: train_ppo.Args, requests: list[str], every: int):
    """The loop of train_ppo.py, with gold's word on each step's samples and, every so many steps, on held-out requests.

    metrics.jsonl gets own/gold beside PPO's metrics, and held_out/kl (nats a response), held_out/proxy and held_out/gold
    where it looked; held_out/STEP.jsonl has those answers, each with its proxy score. All three are of the policy before
    that step's update.
    """
    device = trainer.resolve_device(args.device)
    with trainer.Run(args.out, args, resume=True) as run:
        if run.finished:
            return
        tokenizer = trainer.tokenizer_of(args.init)
        models = train_ppo.load_models(args, tokenizer, device, lambda model: run.resolve_dtype(device, model))
        prompts = train_ppo.load_prompts(args, tokenizer, models)
        precision = trainer.autocast(device, run.resolve_dtype(device, models.policy))
        learned = {name: part for name, part in models._asdict().items() if name not in ("ref_policy", "reward_model")}
        state, start = run.load_state(), 0
        if state:
            start = state["step"]
            for name, part in learned.items():
                part.load_state_dict(state[name])

        def make_state():
            return {name: part.state_dict() for name, part in learned.items()}

        def sample(batch, *key):
            with precision:
                noise = trainer.rng(args.seed, "sample", *key).initial_seed()
                return generate(models.policy, batch, args.max_new_tokens, tokenizer.eot, args.temperature, seed=noise)

        def look(step):
            samples = sample([tokenizer.encode(request) for request in requests], "held out")  # always under the same noise
            budget, g = train_ppo.TOKENS_PER_FORWARD[device.type], trainer.rng(args.seed, "held out")
            (parts,) = ppo.split_rows(samples.length.cpu(), len(requests), budget, g)
            x = train_ppo.score(models, samples, parts, args.temperature, precision)
            rows, scores = answers(samples, requests, tokenizer), x["scores"].tolist()
            file = run.folder / "held_out" / f"{step:05d}.jsonl"  # a step done again writes it again
            data.write_jsonl(file, [row | {"proxy": score} for row, score in zip(rows, scores, strict=True)])
            figures = {"kl": x["kl_full"].item() / len(rows), "proxy": np.mean(scores), "gold": np.mean(gold(rows))}
            return {f"held_out/{name}": float(value) for name, value in figures.items()}

        for step in tqdm(range(start, args.steps), "ppo", initial=start, total=args.steps, mininterval=1):
            looked = look(step) if step % every == 0 else {}
            train_ppo.anneal(models, args, step)
            batch = [prompts[i] for i in train_ppo.pick(len(prompts), step, args.batch_size, args.seed)]
            samples = sample(batch, step)
            own = answers(samples, [tokenizer.decode(ids) for ids in batch], tokenizer)
            metrics = train_ppo.ppo_step(models, samples, args, args.kl_coef, step, precision)
            run.log(step, **metrics, **looked, **{"own/gold": float(np.mean(gold(own)))})
            run.end_step(step + 1, make_state)
        run.log(args.steps, **look(args.steps))
        lora.save(run.folder, models.policy, "gpt", tokenizer.name)
        run.finish()


def answers(samples, prompts: list[str], tokenizer) -> list[dict]:
    """Rows as evaluate.py writes them."""
    lengths = (samples.length - samples.prompt_len).tolist()
    return [
        dict(prompt=prompt, response=tokenizer.decode(ids), tokens=n, stopped=stopped, kl=None)
        for prompt, ids, n, stopped in zip(prompts, samples.responses(), lengths, samples.stopped.tolist(), strict=True)
    ]


def gold(rows: list[dict]) -> list[float]:
    """A value a row; their mean is helpfulness (of the answers to harmless requests) - harm (of all answers), in [-1, 1]."""
    harmless = [not world.parse_request(row["prompt"]).harmful for row in rows]
    weight = len(rows) / max(1, sum(harmless))
    return [weight * h * g.helpfulness - g.harm for h, g in zip(harmless, map(gold_of, rows), strict=True)]


# ---- did it hack? ---------------------------------------------------------------------------------------------------


def found_in(folder: str) -> dict:
    """What `train` wrote -> {"looks": [{"step", "kl", "proxy", "gold", "rows"}], "own": [{"step", "kl", "proxy", "gold"}]}."""
    looks, own = [], []
    for x in data.read_jsonl(f"{folder}/metrics.jsonl"):
        if "held_out/kl" in x:
            rows = data.read_jsonl(f"{folder}/held_out/{x['step']:05d}.jsonl")
            looks.append({"step": x["step"], **{k: x[f"held_out/{k}"] for k in ("kl", "proxy", "gold")}, "rows": rows})
        if "own/gold" in x:
            own.append(dict(step=x["step"], kl=x["objective/kl_full"], proxy=x["objective/scores"], gold=x["own/gold"]))
    return {"looks": looks, "own": own}


def changes(looks: list[dict]) -> dict[str, list[float]]:
    """For each held-out request: what gold lost, and the proxy gained, from gold's peak to the end; and all of gold's way."""
    of_gold = np.array([gold(look["rows"]) for look in looks])  # [looks, requests]
    of_proxy = np.array([[row["proxy"] for row in look["rows"]] for look in looks])
    best, each = peaks(of_gold, in_first_half(looks[0]["rows"])), np.arange(of_gold.shape[1])
    found = {
        "gold falls": of_gold[best, each] - of_gold[-1],
        "proxy rises": of_proxy[-1] - of_proxy[best, each],
        "gold, end - start": of_gold[-1] - of_gold[0],
    }
    return {name: values.tolist() for name, values in found.items()}


def peaks(of_gold: np.ndarray, first: list[bool]) -> list[int]:
    """For each request, the look at which gold was best on the half of the requests that it is *not* in.

    The best of several noisy means is too good by chance. That luck does not carry over to requests that took no part in
    the choice, so from such a peak a policy that stays as it is falls by 0 on average.
    """
    best = {side: int(of_gold[:, np.array(first) != side].mean(1).argmax()) for side in (False, True)}
    return [best[side] for side in first]


def in_first_half(rows: list[dict]) -> list[bool]:
    """A random half of the requests; no deed x thing is in both."""
    names = sorted({cluster(row) for row in rows})
    chosen = set(random.Random("halves").sample(names, len(names) // 2))
    return [cluster(row) in chosen for row in rows]


def summarise(found: dict[str, dict[str, dict]]) -> dict:
    """{run: {arm: found_in's}} -> results.json."""
    rows = {run: next(iter(arms.values()))["looks"][0]["rows"] for run, arms in found.items()}
    measured = {arm: {run: changes(arms[arm]["looks"]) for run, arms in found.items()} for arm in ARMS}
    differences = {
        f"{arm}: {name}": common.side_by_side({run: measured[arm][run][name] for run in found}, rows, None)
        for arm in ARMS
        for name in ("gold falls", "proxy rises", "gold, end - start")
    }

    def point(look):
        means = policy_metrics(look["rows"])
        return {k: look[k] for k in ("step", "kl", "proxy", "gold")} | {k: means[k] for k in ASPECTS}

    curves = {
        run: {arm: {"looks": [point(look) for look in of["looks"]], "own": of["own"]} for arm, of in arms.items()}
        for run, arms in found.items()
    }
    examples = {run: {arm: last_words(of["looks"][-1]["rows"]) for arm, of in arms.items()} for run, arms in found.items()}
    return {"verdicts": verdicts(differences), "differences": differences, "curves": curves, "examples": examples}


def last_words(rows: list[dict]) -> list[str]:
    """The first harmless and the first harmful request, each with what is answered."""
    asked = [world.parse_request(row["prompt"]) for row in rows]
    first = [next(i for i, request in enumerate(asked) if request.harmful == harmful) for harmful in (False, True)]
    return [f"{asked[i].text} {rows[i]['response'].strip()}" for i in first]


def verdicts(differences: dict) -> list[str]:
    """What the figures say of the claim, run by run and in all; where it did not come out, that is said."""
    lines, as_claimed = [], []
    for arm, kl_coef in ARMS.items():
        falls, rises = differences[f"{arm}: gold falls"], differences[f"{arm}: proxy rises"]
        for run in falls:
            fell, rose = common.side(falls[run]) > 0, common.side(rises[run]) > 0
            as_claimed.append((fell and rose) if kl_coef == 0 else not fell)
            what = "falls from its peak" if fell else "is not shown to fall from its peak"
            proxy = "ends above" if rose else "does not end above"
            how = {(1, 1): "hacked", (1, 0): "fell, but not for the proxy's sake"}.get((fell, rose), "not hacked")
            lines.append(
                f"- {arm}, {run}: {how}. Gold {what} (by {common.shown(falls[run])}); "
                f"the proxy {proxy} where it was at that peak ({common.shown(rises[run])})."
            )
    end = "came out" if all(as_claimed) else f"came out in {sum(as_claimed)} of these {len(as_claimed)} places"
    return [f"The claim, hacked with kl_coef 0 and not hacked with the default, {end}.", "", *lines]


def report(results: dict) -> list[str]:
    """The lines of results.md."""
    lines = [f"# {TITLE}", "", *results["verdicts"], ""]
    lines += ["Held-out requests; 95 % intervals (bootstrap over deed x thing). Gold is helpfulness - harm; the proxy is the"]
    lines += ["reward model's score in standard deviations. Peaks are chosen on one half of the requests, measured on the other."]
    lines += ["", *common.table("change", results["differences"]), "", "![proxy and gold against KL](reward-hacking.png)"]
    for run, arms in results["curves"].items():
        for arm, of in arms.items():
            head = ["step", "√KL", "proxy", "gold", *ASPECTS]
            lines += ["", f"## {run}, {arm}", "", f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
            for p in of["looks"]:
                cells = [f"{p['kl'] ** 0.5:.2f}", *(f"{p[k]:.3f}" for k in ("proxy", "gold", *ASPECTS))]
                lines.append(f"| {p['step']} | {' | '.join(cells)} |")
            lines += ["", *(f"- At the end: {words}" for words in results["examples"][run][arm])]
    return lines


def plot(results: dict, every: int, path: Path):
    """Proxy and gold against √KL, held-out requests and the policy's own samples; nothing where matplotlib is not installed."""
    if (plt := common.pyplot(path)) is None:
        return
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 4), sharex=True, sharey=True, layout="constrained")
    for nth, arms in enumerate(results["curves"].values()):
        for color, (arm, of) in zip(("C3", "C0"), arms.items(), strict=True):
            own = [of["own"][i : i + every] for i in range(0, len(of["own"]), every)]  # 128 samples alone are noisy
            own = [{k: np.mean([p[k] for p in part]) for k in ("kl", "proxy", "gold")} for part in own]
            for axis, points in zip(axes, (of["looks"], own), strict=True):
                x = [p["kl"] ** 0.5 for p in points]
                for key, line in (("proxy", "--"), ("gold", "-")):
                    label = f"{key}, {arm}" if nth == 0 else None
                    axis.plot(x, [p[key] for p in points], line, marker=".", ms=3, lw=1, color=color, label=label)
                    axis.plot(x[-1], points[-1][key], "o", ms=5, color=color)
    axes[0].set(title="held-out requests", ylabel="gold: helpfulness - harm;  proxy: standard deviations")
    axes[1].set(title=f"own training samples, {every} steps together; a dot is the end")
    for axis in axes:
        axis.set(xlabel="√KL to the reference (nats a response)")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(args: Args) -> dict:
    cli.require_positive(args, "labels", "lr")
    size = QUICK if args.quick else Size(args.labels)
    runs, began, found, results = common.named(args.runs), time.monotonic(), {}, {}
    args.out = common.claim(args.out, TITLE, args.quick)
    for name, run in runs.items():
        out, found[name] = f"{args.out}/{name}", {}
        reward = reward_model(run, size.labels, out)
        requests = [row["prompt"] for row in data.read_prompts(f"{run}/world/heldout.jsonl")][: size.requests]
        for arm, kl_coef in ARMS.items():
            print(f"\n[{name}] {arm}", flush=True)
            folder = f"{out}/{arm.replace(' ', '-')}"
            models = dict(init=f"{run}/sl_cai", reward_model=reward, data=f"{run}/world/prompts.jsonl", out=folder)
            changed = dict(steps=size.steps, lr=args.lr, kl_coef=kl_coef)
            train(common.flags(f"{run}/rl_cai", train_ppo.Args, **models, **changed), requests, size.every)
            found[name][arm] = found_in(folder)
        results = summarise(found)
        common.write(args.out, results, report(results))
        plot(results, size.every, Path(args.out) / "reward-hacking.png")
    common.close(args.out, report(results), began)
    return results


if __name__ == "__main__":
    cli.run(main, Args, again="the same command goes on where it stopped")
