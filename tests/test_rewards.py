"""rewards.py: a labeler or a Python function in the place of the reward model, from one line of text to the PPO step."""

import json
from dataclasses import replace

import pytest
import torch
from small import CPU, interrupted

import train_ppo
from minirlaif import constitution, labelers, rewards, trainer
from minirlaif.cli import UserError
from minirlaif.sampling import generate


@pytest.fixture
def samples(base):
    model, tokenizer = trainer.load_gpt(base), trainer.tokenizer_of(base)
    prompts = [tokenizer.encode(f"\n\nHuman: {x}\n\nAssistant:") for x in ("how do i fix a lamp?", "why?", "who are you?")]
    return generate(model, prompts, 12, tokenizer.eot, seed=3), tokenizer


def load(spec, tokenizer):
    return rewards.load(spec, tokenizer, torch.device("cpu"), lambda model: "fp32")


@pytest.fixture
def functions(tmp_path, monkeypatch):
    """A module of the user's, in the folder where the user stands."""
    (tmp_path / "my_rewards.py").write_text(
        "seen = []\n"
        "def shorter(prompts, responses):\n    seen.append((prompts, responses))\n    return [-len(r) for r in responses]\n"
        "def words(prompts, responses):\n    return ['good' for r in responses]\n"
        "def too_few(prompts, responses):\n    return [1.0]\n"
        "def broken(prompts, responses):\n    return [float('nan') if i else 1.0 for i, r in enumerate(responses)]\n"
        "def same(prompts, responses):\n    return [2.5 for r in responses]\n"
        "def raises(prompts, responses):\n    return [1 / 0]\n"
        "def huge(prompts, responses):\n    return [10**400 for r in responses]\n"
        "number = 3\n"
    )
    (tmp_path / "bad_syntax.py").write_text("def f(:\n")
    (tmp_path / "bad_exit.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "critiques.json").write_text('{"critique_revision": [{"critique": "is it bad?", "revision": "mend it."}]}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "my_rewards", raising=False)
    return tmp_path


def test_a_function_reads_prompts_and_responses_verbatim(functions, samples):
    s, tokenizer = samples
    reward = load("my_rewards:shorter", tokenizer)
    scores = reward(s)
    import my_rewards

    ((prompts, responses),) = my_rewards.seen
    assert prompts[1] == "\n\nHuman: why?\n\nAssistant:"
    whole = [tokenizer.decode(row[:n]) for row, n in zip(s.tokens.tolist(), s.length.tolist(), strict=True)]
    assert [p + r + "<|endoftext|>" * stop for p, r, stop in zip(prompts, responses, s.stopped.tolist(), strict=True)] == whole
    assert scores.tolist() == [-len(r) for r in responses]


def test_scores_are_normalised_on_reference_samples(functions, samples):
    s, tokenizer = samples
    reward = load("my_rewards:shorter", tokenizer)
    raw = reward(s)
    reward.normalise([s.select(torch.arange(2)), s.select(torch.tensor([2]))])
    assert reward(s).mean().item() == pytest.approx(0, abs=1e-6) and reward(s).std().item() == pytest.approx(1, abs=1e-5)
    assert torch.allclose(reward(s), (raw - raw.mean()) / raw.std())
    with pytest.raises(UserError, match="same: gives all reference samples the same score, 2.5"):
        load("my_rewards:same", tokenizer).normalise([s])


@pytest.mark.parametrize(
    "name, message",
    [
        ("words", "should give a list of numbers"),
        ("too_few", r"shape \[1\] for 3 responses"),
        ("broken", "gives nan for the response"),
        ("raises", r"raised ZeroDivisionError: division by zero \(.*my_rewards.py:\d+\)"),
        ("huge", "should give a list of numbers"),
    ],
)
def test_what_is_no_score_stops_with_one_line(functions, samples, name, message):
    s, tokenizer = samples
    with pytest.raises(UserError, match=message) as error:
        load(f"my_rewards:{name}", tokenizer)(s)
    assert f"--reward-model my_rewards:{name}: " in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("my_rewards:nothing", "no attribute 'nothing'"),
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("my_rewards:number", "number is no function"),
        ("judge:nowhere", "nowhere: no such model file"),
        ("judge:{base},principles=harm+joy", "no principle asks for 'joy'; there are danger"),
        ("judge:{base},cot=1", "no option 'cot'"),
        ("judge:gold", "judge:PATH; wrap anything else in a function"),
        ("judge:m@http://127.0.0.1:1/v1", "judge:PATH"),
        ("my_rewards.py:shorter", "without .py"),
        ("bad_syntax:f", "importing bad_syntax raised SyntaxError"),
        ("bad_exit:f", "importing bad_exit raised SystemExit"),
        ("judge:{base},constitution=critiques.json", "no preference principles"),
        ("nowhere", "nowhere: no such model file"),
        ("a/my_rewards:f", "a function is written package.module:function"),
        ("my_rewards:f,opt=1", "without options"),
    ],
)
def test_a_wrong_spec_is_named(functions, base, samples, spec, message):
    with pytest.raises(UserError, match=message):
        load(spec.format(base=base), samples[1])


def test_a_labeler_gives_the_mean_of_its_scores_over_principles(judge, samples):
    s, tokenizer = samples
    prompts = [tokenizer.decode(ids[:n]) for ids, n in zip(s.tokens.tolist(), s.prompt_len.tolist(), strict=True)]
    responses = [tokenizer.decode(ids) for ids in s.responses()]
    alone = labelers.LocalJudge(trainer.load_gpt(judge), tokenizer, torch.device("cpu"), "fp32")
    texts = [p.text for p in constitution.load("toy").preferences_for("harm", "ad")]
    by_principle = torch.tensor([alone.score(prompts, responses, text) for text in texts])
    assert by_principle.std() > 0.01
    assert torch.allclose(load(f"judge:{judge},principles=harm+ad", tokenizer)(s), by_principle.mean(0))


def make_args(base, prompts, out, reward, **changes):
    args = train_ppo.Args(
        out=str(out), init=base, reward_model=reward, data=prompts, steps=3, batch_size=8, minibatch_size=4, ppo_epochs=1,
        max_new_tokens=16, lr=1e-3, **CPU,
    )  # fmt: skip
    return replace(args, **changes)


def rows_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("reward", ["judge:{judge},principles=harm", "my_rewards:shorter"])
def test_ppo_without_a_reward_model_runs_and_resumes(functions, tmp_path, base, judge, prompts, monkeypatch, reward):
    """The value model starts from the policy at 0; killed and resumed, the scale of the scores is that of the beginning."""
    spec = reward.format(judge=judge)
    models = train_ppo.load_models(
        make_args(base, prompts, "", spec), trainer.tokenizer_of(base), torch.device("cpu"), lambda model: "fp32"
    )
    tokens, mask = torch.ones(1, 8, dtype=torch.long), torch.ones(1, 8, dtype=torch.bool)
    assert models.value_model(tokens, mask).abs().max() == 0
    assert torch.equal(models.value_model.gpt.wte.weight, models.policy.wte.weight)
    assert models.value_model.gpt.wte.weight is not models.policy.wte.weight

    train_ppo.main(make_args(base, prompts, tmp_path / "whole", spec))
    interrupted(monkeypatch, train_ppo.main, make_args(base, prompts, tmp_path / "cut", spec), after=2)
    whole, cut = trainer.load_gpt(tmp_path / "whole").state_dict(), trainer.load_gpt(tmp_path / "cut").state_dict()
    assert all(torch.equal(whole[k], cut[k]) for k in whole)
    first = rows_of(tmp_path / "whole")[0]
    assert first["reference/std"] > 0 and abs(first["objective/scores"]) < 2


def test_a_function_that_has_changed_is_no_longer_that_of_the_run(functions, tmp_path, base, prompts, monkeypatch):
    args = make_args(base, prompts, tmp_path / "run", "my_rewards:shorter")
    end_step = trainer.Run.end_step

    def stop(run, step, make_state):
        run.save_state({"step": step, **make_state()})
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.Run, "end_step", stop)
    with pytest.raises(KeyboardInterrupt):
        train_ppo.main(args)
    monkeypatch.setattr(trainer.Run, "end_step", end_step)
    file = functions / "my_rewards.py"
    file.write_text(file.read_text().replace("[-len(r)", "[+len(r)"))
    with pytest.raises(UserError, match="my_rewards:shorter has changed since this run began"):
        train_ppo.main(replace(args, resume=True))


def test_the_scale_does_not_hang_on_one_drawn_limit(functions, tmp_path, base, prompts):
    found = []
    for seed in (0, 1, 2):
        train_ppo.main(make_args(base, prompts, tmp_path / str(seed), "my_rewards:shorter", seed=seed, steps=1, min_new_tokens=1))
        found.append(rows_of(tmp_path / str(seed))[0]["reference/std"])
    assert max(found) < 1.6 * min(found)  # one limit for all samples: 2 to 6 times


def test_ppo_learns_what_a_function_rewards(functions, tmp_path, base, prompts):
    changes = dict(steps=12, batch_size=32, minibatch_size=16, lr=3e-3, kl_coef=0.0)
    train_ppo.main(make_args(base, prompts, tmp_path / "run", "my_rewards:shorter", **changes))
    rows = rows_of(tmp_path / "run")
    assert rows[-1]["objective/scores"] > rows[0]["objective/scores"] + 0.3
    assert rows[-1]["objective/response_tokens"] < rows[0]["objective/response_tokens"]
