"""A judge from one line of text, as it stands behind `--judge`: WHO, or WHO,option=value,...

    runs/my/base                      a local model; options:
        cot=1                             reason first, then the letter (1: greedily; n > 1: the mean over n sampled reasonings)
        exemplars=FILE                    worked judgements before each question, separated by lines of ---; or a list of the
                                              paper's (.json), asked under the first principle of the constitution
        preamble=plain                    words before everything: plain, detailed (minirlaif/text.py), none or a FILE;
                                              without it, the judge_preamble of the constitution, if it has one
    gpt-4o-mini@https://.../v1        an OpenAI-compatible endpoint (the key is read from OPENAI_API_KEY); its system prompt is
                                          the judge_preamble of the constitution, or else its preamble; options:
        concurrency=4 retries=4 timeout=30
        price=0.15/0.6                    per 1,000 prompt and completion tokens; 0/0: free, also under a --max-cost
        logprobs=0                        ask for JSON verdicts from the start
    gold                              the toy world's scorer, as the 'human' labeler; options:
        noise=0.1                         share of verdicts that are turned round
        slot_bias=1                       nats that the response shown first gains
        call_noise=1 sharpness=4          standard deviation of each call's logit, and the logit of a decided verdict
    ranks                             no judge: the order of --candidates that people gave; for label.py, alone, without options
"""

import re
from pathlib import Path

from minirlaif import constitution, text, trainer
from minirlaif.cli import UserError
from minirlaif.endpoint import Endpoint
from minirlaif.labelers import GoldJudge, LocalJudge

OPTIONS = {  # name -> (type, lowest, highest); texts have no bounds
    "local": {"cot": (int, 0, 64), "exemplars": (str,), "preamble": (str,)},
    "endpoint": {
        "concurrency": (int, 1, 256), "retries": (int, 0, 100), "timeout": (float, 0.1, 3600), "price": (str,),
        "logprobs": (int, 0, 1),
    },
    "gold": {
        "noise": (float, 0, 1), "slot_bias": (float, -100, 100), "call_noise": (float, 0, 100), "sharpness": (float, 0, 100),
    },
}  # fmt: skip


def parse(spec: str, flag="--judge") -> tuple[str, str, dict]:
    """"WHO,option=value,..." -> (kind, WHO, options). UserError: nobody is named, or an option that this kind of judge does not
    have, or not with this value; a URL that may hold a secret is not repeated. flag: where it was given, for messages."""
    name, _, url = spec.partition("://")
    if url and ("@" in url or "?" in url or not re.search(r".@https?$", name)):
        raise UserError(f"{flag}: an endpoint is written NAME@http://127.0.0.1:8000/v1, with no password or query in the URL")
    who, *given = spec.split(",")
    if not who.strip():
        raise UserError(f"{flag} '{spec}': names no judge")
    kind = "gold" if who == "gold" else "endpoint" if url else "local"
    if kind == "local" and not Path(who).exists():
        if "@" in who:
            raise UserError(f"{flag} {spec}: an endpoint is written NAME@http://127.0.0.1:8000/v1: this has no http://")
        if who.lower() in ("gold", "ranks"):
            raise UserError(f"{flag} {spec}: gold and ranks are written so; ranks is for label.py --candidates, alone")
    options = {}
    for item in given:
        name, _, value = item.partition("=")
        if name not in OPTIONS[kind]:
            raise UserError(f"{flag} {spec}: {kind} judges have no option '{name}', but {', '.join(OPTIONS[kind])}")
        if name in options:
            raise UserError(f"{flag} {spec}: {name} is given twice")
        number, *bounds = OPTIONS[kind][name]
        try:
            options[name] = number(value)
        except ValueError:
            raise UserError(f"{flag} {spec}: '{value}' is no value for {name}") from None
        if bounds and not bounds[0] <= options[name] <= bounds[1]:
            raise UserError(f"{flag} {spec}: {name} must be in {bounds[0]}-{bounds[1]}")
    return kind, who, options


def _read(option: str, path: str) -> str:
    known = f"; or give one of: {', '.join(text.PREAMBLES)}" if option == "preamble" else ""
    try:
        found = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{option}={path}: cannot be read as text ({e}){known}") from None
    if not found.strip():
        raise UserError(f"{option}={path}: the file is empty")
    return found


def load_endpoint(spec: str, max_cost: float | None = None, system="", flag="--judge") -> Endpoint:
    """The endpoint that `spec` describes, as a judge or as a critic."""
    _, who, options = parse(spec, flag)
    name, _, url = who.partition("@")
    if "price" in options:
        try:
            prices = [float(x) for x in options.pop("price").split("/")]
            options["price_prompt"], options["price_completion"] = prices
            if not all(0 <= price < float("inf") for price in prices):
                raise ValueError
        except ValueError:
            raise UserError(f"{flag} {spec}: price is two numbers, prompt/completion") from None
    return Endpoint(url, name, max_cost=max_cost, system=system, **options)


def load_exemplars(path: str, principles: constitution.Constitution, cot: bool) -> list[str]:
    """Worked judgements from a text file, or from a list of the paper's: with their reasoning for a judge that reasons."""
    if not path.lower().endswith(".json"):
        return [e.strip("\n") for e in _read("exemplars", path).split("\n---\n")]
    shots = constitution.load_exemplars(path)
    if not principles.preferences:
        raise UserError(f"exemplars={path}: needs a constitution with preferences, under the first of which they are asked")
    asked = principles.preferences[0].text
    reasons = [" " + e.reasoning if cot and e.reasoning else None for e in shots]
    return [text.worked(e.prompt, e.responses, asked, text.CHOICES[e.better], r) for e, r in zip(shots, reasons, strict=True)]


def load(spec: str, constitution_name: str, device, dtype_of, seed: int = 0, max_cost: float | None = None):
    """The judge that `spec` describes. dtype_of(model) -> "fp32" or "bf16", for a local one."""
    kind, who, options = parse(spec)
    principles = constitution.load(constitution_name)
    if kind == "gold":
        return GoldJudge({p.text: p.name for p in principles.preferences}, seed=seed, **options)
    if kind == "endpoint":
        return load_endpoint(spec, max_cost, principles.judge_preamble or principles.preamble)
    model, tokenizer = trainer.load_gpt(who, device), trainer.tokenizer_of(who)
    samples, given = options.get("cot", 0), options.get("preamble")
    preamble = given if given is None else text.PREAMBLES[given] if given in text.PREAMBLES else _read("preamble", given)
    return LocalJudge(
        model,
        tokenizer,
        device,
        dtype_of(model),
        exemplars=load_exemplars(options["exemplars"], principles, samples > 0) if "exemplars" in options else [],
        preamble=principles.judge_preamble if given is None else preamble.strip("\n"),
        cot=samples > 0,
        samples=max(1, samples),
        seed=seed,
        name=who,
    )
