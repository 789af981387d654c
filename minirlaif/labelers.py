"""AI labels: how likely each of two responses is the better one, under a principle, as a judge sees it.

The recipe of Lee et al. 2023 (RLAIF, §3.1) and Bai et al. 2022 (§4.1): a multiple-choice prompt, the probabilities of the two
answer letters, both orders of the responses, combined. A judge is any object with `.name` and `.ask(calls, on_answer=None,
given=None) -> list[Answer]`, where on_answer(i, answer) is called as each answer arrives, and given, {i: Answer}, are those
that are there already and are not asked for again; `label` asks it about both orders of a pair.

LocalJudge reads text only and never gold. GoldJudge, at the end, is the toy world's scorer in the role of the human labeler.
"""

import math
import random
from dataclasses import dataclass

import torch

from minirlaif import prefix, text, trainer
from minirlaif.cli import UserError
from minirlaif.sampling import generate


@dataclass(frozen=True)
class Call:
    prompt: str
    responses: tuple[str, str]  # in the order shown
    principle: str


@dataclass(frozen=True)
class Answer:
    p: float | None  # P(the response shown first is better); None: the call failed, and `error` says why
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    error: str | None = None
    text: str = ""  # what the judge wrote: its reasoning, or a verdict in words
    kind: str = "soft"  # a probability, or "verdict": a hard choice


@dataclass(frozen=True)
class Label:
    p: float | None  # P(response 1 is better), both orders combined; None: a call failed
    p_first: float | None  # the same when response 1 is shown first
    p_first_swapped: float | None  # ... and when it is shown second
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    error: str | None = None
    kind: str = "soft"  # as the two answers are; "mixed" where they differ

    @property
    def status(self) -> str:
        return "failed" if self.p is None else "tie" if self.p == 0.5 else "ok"

    @property
    def flipped(self) -> bool:
        """The same position wins in both orders: the judge looked at the place, not at the response."""
        return self.p is not None and (self.p_first - 0.5) * (self.p_first_swapped - 0.5) < 0


def logit(p: float) -> float:
    """log p / (1 - p), within ±27.6 (p = 1e-12): a server that rounds a probability to 1 has not said "infinitely sure"."""
    return math.log(max(p, 1e-12)) - math.log(max(1 - p, 1e-12))


def combine(shown: Answer, swapped: Answer, average="probability", clamp: tuple[float, float] | None = None) -> Label:
    """The answers to one pair in its two orders -> Label; failed if either is.

    average: "probability", as the papers do: a fixed bias for one place shrinks a label but does not turn it round; or
    "logit": such a bias, a number added to the logit, cancels exactly. clamp: (low, high) bounds of p that lie evenly about
    0.5 (Bai et al. 2022 use 0.4-0.6 for a reasoning judge, which is overconfident). Exchanging the responses gives 1 - p.
    """
    if average not in ("probability", "logit"):
        raise ValueError(f"average {average!r}: must be probability or logit")
    if clamp is not None and not (0 <= clamp[0] < 0.5 and math.isclose(clamp[0] + clamp[1], 1)):
        raise ValueError(f"clamp {clamp}: must be bounds that lie evenly about 0.5, such as (0.4, 0.6)")
    a, b, p = shown.p, swapped.p, None
    if a is not None and b is not None:
        # differences of the two answers: equal answers are a tie to the last bit
        p = 0.5 + (a - b) / 2 if average == "probability" else 1 / (1 + math.exp((logit(b) - logit(a)) / 2))
        if clamp is not None:
            p = min(max(p, clamp[0]), clamp[1])
    return Label(
        p,
        a,
        None if b is None else 1 - b,
        shown.prompt_tokens + swapped.prompt_tokens,
        shown.completion_tokens + swapped.completion_tokens,
        shown.cost + swapped.cost,
        "; ".join(dict.fromkeys(x.error for x in (shown, swapped) if x.error)) or None,
        shown.kind if shown.kind == swapped.kind else "mixed",
    )


def label(judge, items: list[tuple[str, tuple[str, str], str]], average="probability", clamp=None) -> list[Label]:
    """items: (prompt, (response 1, response 2), principle) -> one Label each; all in one ask, in which the two orders of an item
    are neighbours, so that a judge that stops leaves few of them half asked."""
    answers = judge.ask([Call(prompt, shown, principle) for prompt, (a, b), principle in items for shown in ((a, b), (b, a))])
    return [combine(first, swapped, average, clamp) for first, swapped in zip(answers[::2], answers[1::2], strict=True)]


# ---- a local model --------------------------------------------------------------------------------------------------


class LocalJudge:
    """A local GPT as the judge: the probabilities of the two letters, at once or after reasoning.

    preamble, exemplars (text.worked): put before every question. cot: two steps, reason up to the end of the line, then score
    the letters; greedy for samples = 1, else self-consistency, the mean p over `samples` reasonings drawn at `temperature`.
    A sampled reasoning depends on (seed, call), whatever else is asked. What calls begin with is computed once (prefix.py);
    only the decoding of reasonings does without. batch_size: rows that are forwarded together; None: what is fast.
    """

    paid = False  # asking again costs time only

    def __init__(
        self, model, tokenizer, device, dtype: str, batch_size=None, exemplars=(), preamble="", cot=False, samples=1,
        temperature=1.0, max_new_tokens=48, seed=0, name="local",
    ):  # fmt: skip
        if samples > 1 and not (cot and temperature > 0):
            raise ValueError(f"{samples} samples need chain of thought and a temperature above 0, or all would be the same")
        self.model, self.tokenizer, self.device, self.dtype = model, tokenizer, device, dtype
        self.batch_size = batch_size or (16 if device.type == "cpu" else 256)  # 64 are a tenth slower on a CPU
        self.cot, self.samples, self.temperature, self.max_new_tokens = cot, samples, temperature, max_new_tokens
        self.before, self.seed, self.name = text.before(preamble, exemplars), seed, name
        ids = [tokenizer.encode(letter) for letter in text.CHOICES]
        assert all(len(i) == 1 for i in ids), f"an answer letter is not one token of {tokenizer.name}"
        self.letters = [i[0] for i in ids]
        self.line_ends = [i for i in range(tokenizer.n_vocab) if "\n" in tokenizer.decode([i])] if cot else []

    def encode(self, call: Call) -> list[int]:
        """The prompt of a call; with cot, that of the reasoning."""
        question = text.reasoned_question if self.cot else text.question
        return self.tokenizer.encode(self.before + text.options(call.prompt, list(call.responses)) + question(call.principle))

    def ask(self, calls: list[Call], on_answer=None, given=None) -> list[Answer]:
        """One Answer a call. Too long for the context, or a reasoning that is empty or has no end: failed, with the numbers.

        prompt_tokens counts what was read (with cot in both steps), completion_tokens the reasoning and the letter. Whatever
        is given, the others are asked in the same company, and their answers are the same to the last bit.
        """
        answers, room = [(given or {}).get(i) for i in range(len(calls))], self.model.config.block_size
        if all(answers):
            return answers

        def give(i, answer):
            if answers[i] is None:
                answers[i] = answer
                if on_answer is not None:
                    on_answer(i, answer)

        asked, conversations = [self.encode(call) for call in calls], [call.prompt for call in calls]
        new, fit = self.max_new_tokens if self.cot else 0, []
        for i, ids in enumerate(asked):
            if len(ids) + new <= room:
                fit.append(i)
            else:
                what = f"and up to {new} of reasoning do" if new else "does"
                give(i, Answer(None, error=f"a prompt of {len(ids)} tokens {what} not fit the judge's context of {room}"))
        with trainer.autocast(self.device, self.dtype):
            root = prefix.root(self.model, [asked[i] for i in fit], self.tokenizer.eot)
            for batch in prefix.batches(fit, asked, conversations, max(1, self.batch_size // self.samples), root.used):
                if all(answers[i] for i in batch):
                    continue
                judge = self.reasoned if self.cot else self.direct
                for i, answer in zip(batch, judge([calls[i] for i in batch], [asked[i] for i in batch], root), strict=True):
                    give(i, answer)
        return answers

    def direct(self, calls, asked, root) -> list[Answer]:
        p = self.p_of_first_letter(asked, [call.prompt for call in calls], root)
        return [Answer(p, len(ids), 1) for ids, p in zip(asked, p, strict=True)]

    def reasoned(self, calls, asked, root) -> list[Answer]:
        drafts = self.reason(calls, asked)
        verdicts = [
            [ids + self.tokenizer.encode(said + text.VERDICT) for said, _, _ in draft]
            for ids, draft in zip(asked, drafts, strict=True)
        ]
        errors = [self.fault(draft, max(map(len, verdict))) for draft, verdict in zip(drafts, verdicts, strict=True)]
        rows = [(i, ids) for i, error in enumerate(errors) if error is None for ids in verdicts[i]]
        groups = [calls[i].prompt if self.samples == 1 else i for i, _ in rows]
        p, answers = iter(self.p_of_first_letter([ids for _, ids in rows], groups, root) if rows else []), []
        for ids, draft, verdict, error in zip(asked, drafts, verdicts, errors, strict=True):
            mean, read, written = None, len(ids), sum(n for _, n, _ in draft)
            if error is None:
                mean = sum(next(p) for _ in verdict) / len(verdict)
                read, written = read + sum(map(len, verdict)), written + len(verdict)
            answers.append(Answer(mean, read, written, error=error, text="\n".join(said for said, _, _ in draft)))
        return answers

    def fault(self, draft, longest: int) -> str | None:
        """What is wrong with the reasonings of a call; longest: tokens of the longest prompt that ends before the letter."""
        if endless := sum(not ended for _, _, ended in draft):
            return f"{endless} of {len(draft)} reasonings did not end within {self.max_new_tokens} tokens"
        if empty := sum(not said.strip() for said, _, _ in draft):
            return f"{empty} of {len(draft)} reasonings are empty"
        room = self.model.config.block_size
        too_long = f"a prompt with its reasoning of {longest} tokens does not fit the judge's context of {room}"
        return too_long if longest > room else None

    def reason(self, calls, asked) -> list[list[tuple[str, int, bool]]]:
        """`samples` reasonings a call: (one line of text, tokens written, whether it ended)."""
        end = dict(max_new_tokens=self.max_new_tokens, eot=self.tokenizer.eot, stop=self.line_ends)
        if self.samples == 1:
            runs = [generate(self.model, asked, temperature=0, **end)]
        else:  # a decoding per call, since noise goes by the row: a call's own seed then draws the same in any company
            seeds = [trainer.rng(self.seed, call).initial_seed() for call in calls]
            runs = [
                generate(self.model, [ids] * self.samples, temperature=self.temperature, seed=seed, **end)
                for ids, seed in zip(asked, seeds, strict=True)
            ]
        drafts = [
            (self.tokenizer.decode(ids[start:stop]).split("\n")[0], stop - start, ended)
            for s in runs
            for ids, start, stop, ended in zip(*(x.tolist() for x in s), strict=True)
        ]
        return [drafts[k : k + self.samples] for k in range(0, len(drafts), self.samples)]

    @torch.no_grad()
    def p_of_first_letter(self, prompts: list[list[int]], groups: list, root) -> list[float]:
        """P(A) / (P(A) + P(B)) after each encoded prompt of one batch. UserError: NaN or infinite."""
        h = prefix.last_hidden(self.model, prompts, groups, root, self.tokenizer.eot)
        with torch.autocast(self.device.type, enabled=False):
            # only two rows of the head, in fp32: bf16 logits are so coarse that close calls would come out as ties
            logits = h.float() @ self.model.lm_head.weight[self.letters].float().T  # (B, 2)
        if not logits.isfinite().all():
            raise UserError(f"{self.name}: this judge gives numbers that are not finite; try --dtype fp32, or another judge")
        return logits.cpu().double().softmax(-1)[:, 0].tolist()

    @torch.no_grad()
    def score(self, prompts: list[str], responses: list[str], principle: str) -> list[float]:
        """A score in [-1, 1] for each response alone, usable as a reward (d-RLAIF, Lee et al. 2023, §3.2).

        Σ i P(i) over the scores 1 to 10, P normalised over these ten, mapped linearly. P of a score of several tokens is the
        product along them. Raises ValueError, with the row and the lengths, where the context is too short.
        """
        scores = [tuple(self.tokenizer.encode(f" {i}")) for i in range(1, 11)]
        starts = sorted({s[:k] for s in scores for k in range(len(s))})  # what stands before a token of a score
        tokens = sorted({t for s in scores for t in s})
        asked = [self.tokenizer.encode(p + r + text.score_question(principle)) for p, r in zip(prompts, responses, strict=True)]
        room, extra = self.model.config.block_size, max(map(len, starts))
        for row, ids in enumerate(asked):
            if len(ids) + extra > room:
                raise ValueError(f"row {row}: {len(ids)} tokens to score and {extra} more do not fit a context of {room}")
        logp, head = torch.empty(len(asked), len(starts), len(tokens)).double(), self.model.lm_head.weight.float()
        with trainer.autocast(self.device, self.dtype):
            root = prefix.root(self.model, asked, self.tokenizer.eot)
            for batch in prefix.batches(range(len(asked)), asked, prompts, max(1, self.batch_size // len(starts)), root.used):
                rows, groups = [asked[i] + list(s) for i in batch for s in starts], [i for i in batch for _ in starts]
                h = prefix.last_hidden(self.model, rows, groups, root, self.tokenizer.eot)
                with torch.autocast(self.device.type, enabled=False):
                    found = (h.float() @ head[: self.tokenizer.n_vocab].T).log_softmax(-1)[:, tokens]
                logp[batch] = found.cpu().double().view(len(batch), len(starts), len(tokens))
        along = {s: sum(logp[:, starts.index(s[:k]), tokens.index(t)] for k, t in enumerate(s)).exp() for s in scores}
        # a score that begins a longer one (1 and 10) keeps only what does not go on to that
        p = [along[s] - sum(along[o] for o in scores if o != s and o[: len(s)] == s) for s in scores]
        p = torch.stack(p, dim=1)  # (N, 10)
        mean = (p / p.sum(1, keepdim=True)) @ torch.arange(1, 11).double()
        return ((mean - 5.5) / 4.5).tolist()


# ---- gold: the one place in this file that reads it -----------------------------------------------------------------


class GoldJudge:
    """The toy world's gold scorer as the 'human' labeler (RLHF), with the faults of a labeler on request.

    asks_of: the text of a principle -> what it asks for: {p.text: p.name for p in a constitution's preferences}, a name that
    corpus.value knows, with "inverse-" before it where the worse is to win. sharpness: logit of a decided verdict (nats); where
    gold sees no difference it is 0. noise: share of verdicts turned round, in both orders of a pair alike, so that this is the
    share of wrong labels. slot_bias: nats added to the logit of the response shown first. call_noise: standard deviation (nats)
    of a Gaussian added to it, independent in the two orders. Both draws depend on (seed, what is asked) alone.
    A principle that is not known, or a prompt that is not of the toy world, is a failed answer.
    """

    name, paid = "gold", False

    def __init__(self, asks_of: dict[str, str], noise=0.0, slot_bias=0.0, sharpness=4.0, call_noise=0.0, seed=0):
        self.asks_of, self.noise, self.slot_bias = asks_of, noise, slot_bias
        self.sharpness, self.call_noise, self.seed = sharpness, call_noise, seed

    def ask(self, calls: list[Call], on_answer=None, given=None) -> list[Answer]:
        answers = [(given or {}).get(i) for i in range(len(calls))]
        for i, call in enumerate(calls):
            if answers[i] is None:
                answers[i] = self.answer(call)
                if on_answer is not None:
                    on_answer(i, answers[i])
        return answers

    def answer(self, call: Call) -> Answer:
        from minirlaif import corpus, world  # here, so that nothing else in this file can read gold

        asks = self.asks_of.get(call.principle, "")
        try:
            golds = [world.score(call.prompt, response) for response in call.responses]
            first, second = (corpus.value(asks.removeprefix("inverse-"), gold) for gold in golds)
        except ValueError as e:
            return Answer(None, error=str(e))
        except KeyError:
            return Answer(None, error=f"gold does not know what this principle asks for: {call.principle!r}")
        verdict = ((first > second) - (first < second)) * (-1 if asks.startswith("inverse-") else 1)
        if self._rng("verdict", call.prompt, sorted(call.responses), call.principle).random() < self.noise:
            verdict = -verdict
        shake = self._rng("call", call).gauss(0, self.call_noise)
        return Answer(1 / (1 + math.exp(-(self.sharpness * verdict + self.slot_bias + shake))))

    def _rng(self, *what) -> random.Random:
        return random.Random(repr((self.seed, *what)))
