"""Who scores the responses of train_ppo, from one line of text, as it stands behind `--reward-model`:

    runs/my/rm                            a reward model: a run folder of train_rm.py, or its model file
    judge:runs/my/base                    d-RLAIF (Lee et al. 2023, §3.2): a local labeler, asked for a score of 1 to 10, without
        ,constitution=toy                     any reward model between; the mean over the preference principles of a constitution,
        ,principles=harm+helpfulness          or over those that ask for one of these
    package.module:function               function(prompts: list[str], responses: list[str]) -> list of as many numbers, higher is
                                          better; texts are verbatim, the response begins with its space

The last two score texts (TextReward). A reward model scores token ids and carries its own scale.
"""

import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import torch

from minirlaif import constitution, ddp, trainer
from minirlaif.cli import UserError
from minirlaif.labelers import LocalJudge


@dataclass
class TextReward:
    """function(prompts, responses) -> scores, brought to mean 0 and standard deviation 1 by `normalise`."""

    name: str
    function: Callable[[list[str], list[str]], list[float]]
    tokenizer: object
    mean: float = 0.0
    std: float = 1.0

    def __call__(self, samples) -> torch.Tensor:
        """sampling.Samples -> scores (B,), fp32, on the CPU; of several processes each scores its share.

        UserError: what the function gives is not one finite number a response.
        """
        whole = torch.zeros(len(samples.tokens))
        for rank, part in enumerate(ddp.gather(self.raw(samples.select(ddp.share(torch.arange(len(whole))))))):
            ddp.share(whole, rank)[:] = part
        return (whole - self.mean) / self.std

    def raw(self, samples) -> torch.Tensor:
        tokens, prompt_len = samples.tokens.tolist(), samples.prompt_len.tolist()
        prompts = [self.tokenizer.decode(ids[:n]) for ids, n in zip(tokens, prompt_len, strict=True)]
        responses = [self.tokenizer.decode(ids) for ids in samples.responses()]
        try:
            found = self.function(prompts, responses)
        except UserError:
            raise
        except Exception as e:  # the user's own code: say whose it is, and where it went wrong
            place = traceback.extract_tb(e.__traceback__)[-1]
            where = "" if place.filename == __file__ else f" ({place.filename}:{place.lineno})"  # here: it cannot be called so
            raise UserError(f"--reward-model {self.name}: raised {type(e).__name__}: {e}{where}") from e
        try:
            scores = torch.as_tensor(found, dtype=torch.float32, device="cpu")
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise UserError(f"--reward-model {self.name}: should give a list of numbers, not {found!r:.60}") from None
        if scores.shape != (len(prompts),):
            shape = list(scores.shape)
            raise UserError(f"--reward-model {self.name}: gives numbers of shape {shape} for {len(prompts)} responses")
        if not scores.isfinite().all():
            row = int((~scores.isfinite()).nonzero()[0])
            raise UserError(f"--reward-model {self.name}: gives {scores[row]} for the response {responses[row]!r:.60}")
        return scores

    def normalise(self, batches):
        """Mean 0, std 1 on these batches of samples of the reference, so that kl_coef keeps its meaning. UserError: no spread."""
        scores = torch.cat([self(samples) for samples in batches])
        if len(scores) < 2 or not scores.std() > 0:
            raise UserError(f"--reward-model {self.name}: gives all reference samples the same score, {scores[0]:.4g}")
        self.mean, self.std = scores.mean().item(), scores.std().item()


def load(spec: str, tokenizer, device, dtype_of):
    """A RewardModel or a TextReward. dtype_of(model) -> "fp32" or "bf16", for a judge. UserError: no such thing."""
    kind, _, rest = spec.partition(":")
    if kind == "judge" and ("://" in rest or rest.split(",")[0] in ("", "gold", "ranks")):
        raise UserError(f"--reward-model {spec}: scores come from a local model: judge:PATH; wrap anything else in a function")
    if kind == "judge":
        return TextReward(spec, judge_score(spec, rest, device, dtype_of), tokenizer)
    if ".py:" in spec and not os.path.exists(spec):
        raise UserError(f"--reward-model {spec}: name the module as in an import, without .py: my_rewards:shorter")
    if re.fullmatch(r"[\w.]+:\w+", spec) and not os.path.exists(spec):
        return TextReward(spec, find_function(spec, kind, rest), tokenizer)
    if ":" in spec and not os.path.exists(spec):
        raise UserError(f"--reward-model {spec}: no such file; a function is written package.module:function, without options")
    return trainer.load_reward(spec, device)


def judge_score(spec: str, rest: str, device, dtype_of):
    who, *given = rest.split(",")
    options = dict(item.partition("=")[::2] for item in given)
    if unknown := [name for name in options if name not in ("constitution", "principles")]:
        raise UserError(f"--reward-model {spec}: no option '{unknown[0]}', but constitution, principles")
    principles = constitution.load(options.get("constitution", "toy"))
    if not principles.preferences:
        raise UserError(f"--reward-model {spec}: this constitution has no preference principles to score by")
    names = options["principles"].split("+") if "principles" in options else [p.name for p in principles.preferences]
    for name in names:
        if not principles.preferences_for(name):
            known = ", ".join(dict.fromkeys(p.name for p in principles.preferences))
            raise UserError(f"--reward-model {spec}: no principle asks for '{name}'; there are {known}")
    texts = [p.text for p in principles.preferences_for(*names)]
    model = trainer.load_gpt(who, device)
    judge = LocalJudge(model, trainer.tokenizer_of(who), device, dtype_of(model), name=who)

    def score(prompts, responses):
        try:
            by_principle = [judge.score(prompts, responses, text) for text in texts]
        except ValueError as e:
            raise UserError(f"--reward-model {spec}: {e}; give a lower --max-new-tokens") from None
        return [sum(scores) / len(texts) for scores in zip(*by_principle, strict=True)]

    return score


def find_function(spec: str, module: str, name: str):
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` would: the user's files lie where the user is
    try:
        function = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as e:  # whatever the user's module does when it is imported
        kind = "" if isinstance(e, ImportError | AttributeError) else f"importing {module} raised {type(e).__name__}: "
        raise UserError(f"--reward-model {spec}: {kind}{e}") from None
    if not callable(function):
        raise UserError(f"--reward-model {spec}: {name} is no function")
    return function
