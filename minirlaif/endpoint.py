"""A judge or critic behind an OpenAI-compatible endpoint: the OpenAI API, vLLM, Ollama, llama.cpp, `transformers serve`.

Soft labels as in Lee et al. 2023 (RLAIF, §3.1): P(A) / (P(A) + P(B)) from the `top_logprobs` of the answer letter. Where a
reply has none, or another word is likelier than both letters, the same call is asked again for a verdict in JSON, which is a
hard label (`Answer.kind`); a server whose first replies are all so is asked for verdicts alone. What cannot be read is a failed
answer with its error, never "A". A call that no reply came to is no answer at all: it is to be asked again. Tokens and cost are
taken from the reply's `usage` before anything is parsed; a request that brought no reply counts 0, although a provider may
bill one that timed out.
"""

import email.utils
import json
import math
import os
import random
import threading
import time
import urllib.parse
from concurrent import futures
from dataclasses import dataclass

from minirlaif import text
from minirlaif.cli import UserError
from minirlaif.labelers import Answer, Call

LETTER = "Two candidate responses follow. Reply with one letter and nothing else: {} or {}.\n\n"
VERDICT = 'Reply with JSON and nothing else: {{"chosen": x, "rejected": y}}, where x and y are "{}" and "{}", the better first.'
LETTER_MASS = 0.5  # a model that answers with a letter puts more on the letters than on all else; "A" is an article, too
TRIALS = 3  # calls without a letter's probability before a server is asked for verdicts alone
LETTER_TOKENS = 4  # only the letter is read, but some models open a bracket first
AROUND = " \t\r\n()*.:\"'Ġ▁Ċ"  # what habits and tokenizers put round a letter
LONGEST_WAIT = 120.0  # seconds; a server that asks for more patience than this gets a failed answer instead
PATIENCE = 3  # calls without a reply in a row, for each that may be in flight, before no more are sent
PICKY = ("temperature", "max_completion_tokens")  # what one server needs and another refuses
HOPELESS = {
    401: "the key in OPENAI_API_KEY is not accepted",
    402: "the account has no credit left",
    404: "no such model, or no such address (most base URLs end in /v1)",
}


class Failed(Exception):
    """A call that could not be answered; the message is the reason."""


class NoReply(Failed):
    """The server did not answer it, and may do so later."""


@dataclass(frozen=True)
class Completion:
    text: str
    ended: bool  # whether the model came to its own end
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    error: str | None = None


class Endpoint:
    """A model behind `base_url`, as a judge (`ask`) and as a writer (`complete`). The key comes from OPENAI_API_KEY.

    retries: how often a 429, a 5xx, a timeout or a broken connection is tried again, after `backoff` seconds at first, twice
    as long each time, and no sooner than the server's Retry-After. timeout: seconds. system: a preamble, e.g. what makes a
    good summary. max_tokens: the longest JSON verdict. Prices: per 1,000 tokens, in the currency of `max_cost`. A call begins
    only while `spent` is below max_cost, and one that has begun is finished, so at most `concurrency` calls go beyond it;
    `spent` may be set, to what earlier runs have cost. soft: whether letters are asked for; None until that is known.

    UserError for what would fail every call alike: no client, a bad URL, a refused key, an unknown model, a server that has
    never answered, one that does not count tokens under a max_cost.
    """

    paid = True  # so an answer that has been received is never asked for again

    def __init__(
        self, base_url: str, model: str, concurrency=4, retries=4, timeout=30.0, logprobs=True, system="", max_tokens=64,
        backoff=0.5, max_cost: float | None = None, price_prompt: float | None = None, price_completion=0.0,
    ):  # fmt: skip
        try:
            import openai
        except ImportError:
            raise UserError('an endpoint needs the openai client: pip install -e ".[api]"') from None
        try:
            parts = urllib.parse.urlsplit(base_url)
            good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # a port that is no number, half an IPv6 address
            good = False
        if not good or "@" in base_url or "?" in base_url:  # a secret in the URL would travel into messages and files
            raise UserError("the URL of an endpoint must look like http://127.0.0.1:8000/v1, with no password or query in it")
        if max_cost is not None and price_prompt is None:
            raise UserError(f"--max-cost needs the prices of {model} per 1,000 tokens: price=0.1/0.4, or 0/0 where it is free")
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not (self.key.isascii() and self.key.isprintable()):
            raise UserError("OPENAI_API_KEY: has characters that no HTTP header can carry")
        self.openai, self.base_url, self.name, self.system = openai, base_url, model, system
        self.client = openai.OpenAI(base_url=base_url, api_key=self.key or "none", timeout=timeout, max_retries=0)
        self.concurrency, self.retries, self.backoff, self.max_tokens = concurrency, retries, backoff, max_tokens
        self.max_cost, self.price_prompt, self.price_completion = max_cost, price_prompt or 0.0, price_completion
        self.spent, self.answered, self.uncounted, self.lock = 0.0, False, False, threading.Lock()
        self.soft, self.vain = None if logprobs else False, 0  # vain: calls that were asked for a letter and gave none
        self.silent = 0  # calls without a reply since the last that had one
        self.interrupted = lambda: False  # set by whoever takes Ctrl-C for a wish, and has nothing more sent
        self.adapted: frozenset[str] = frozenset()  # which of PICKY are sent the other way by now

    def ask(self, calls: list[Call], on_answer=None, given: dict[int, Answer] | None = None) -> list[Answer]:
        """One Answer a call, in their order. on_answer(i, answer) is called here, in this thread, as each one arrives. given:
        answers of an earlier run, which are not asked for again, and from which it is known what the server gives.

        What no reply came to is failed and *not* given to on_answer, so that a journal does not hold it and a later run asks
        it. After PATIENCE of them in a row, or once max_cost is spent, the rest is not sent: failed with "stopped: ...". After
        Ctrl-C or an error nothing more is sent, and what is in flight (at most `concurrency` calls) is dropped: the process
        ends when it has ended, in `timeout`.
        """
        answers = dict(given or {})
        for i in sorted(answers):
            self._learn(answers[i])

        def judge(i, stop):
            return self._judge(calls[i], stop)

        def receive(i, answer):
            self._learn(answer)
            if on_answer is not None:
                on_answer(i, answer)

        todo = [i for i in range(len(calls)) if i not in answers]
        while todo and self.soft is None and not self._stopped():  # so many, and which, does not depend on the server's pace
            trial, todo = todo[: TRIALS - self.vain], todo[TRIALS - self.vain :]
            answers |= self._each(judge, trial, receive)
        answers |= self._each(judge, todo, receive)
        return [answers.get(i) or Answer(None, error=self._stopped()) for i in range(len(calls))]

    def complete(self, prompts: list[str], max_tokens: int, temperature: float, on_answer=None, given=None) -> list[Completion]:
        """Continue each prompt, sent as one user message. on_answer, given, max_cost and what stops: as in `ask`."""

        def write(i, stop):
            used, said, ended, error, replied = [(0, 0, 0.0)], "", False, None, True
            try:
                said, ended, _ = self._request(prompts[i], stop, used, max_tokens, temperature)
            except Failed as e:
                error, replied = self._clean(e), not isinstance(e, NoReply)
            return Completion(said, ended, *map(sum, zip(*used, strict=True)), error), replied

        found = dict(given or {})
        found |= self._each(write, [i for i in range(len(prompts)) if i not in found], on_answer)
        return [found.get(i) or Completion("", False, error=self._stopped()) for i in range(len(prompts))]

    def _learn(self, answer: Answer):
        """Whether it is worth asking for letters, from one answer. An odd reply later on does not change it."""
        if self.soft is None and answer.kind == "verdict":
            self.vain += 1
            self.soft = False if self.vain >= TRIALS else None
        elif self.soft is None and answer.p is not None:
            self.soft = True

    def _stopped(self) -> str | None:
        """Why nothing more is sent, if so."""
        if self.interrupted():
            return "stopped: interrupted"
        if self.silent >= PATIENCE * self.concurrency:
            return f"stopped: {self.silent} calls in a row got no reply"
        capped = self.max_cost is not None and self.spent >= self.max_cost
        return f"stopped: --max-cost {self.max_cost:.2f} reached" if capped else None

    def _each(self, work, todo: list[int], on_result=None) -> dict:
        """work(i, stop) -> (result, whether there was a reply), for i of todo on `concurrency` threads -> {i: result}, without
        those that were not sent."""
        results, flying, todo, stop = {}, {}, todo[::-1], threading.Event()
        pool = futures.ThreadPoolExecutor(self.concurrency)
        try:
            while True:
                while todo and len(flying) < self.concurrency and not (self._stopped() or self.uncounted):
                    i = todo.pop()
                    flying[pool.submit(work, i, stop)] = i
                if not flying:
                    break
                done = futures.wait(flying, return_when=futures.FIRST_COMPLETED).done
                for future in sorted(done, key=lambda f: f.exception() is not None):  # what was received comes first
                    i = flying.pop(future)
                    results[i], replied = future.result()
                    self.silent = 0 if replied else self.silent + 1
                    if replied and on_result:
                        on_result(i, results[i])
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
        if self.uncounted:
            raise UserError(
                f"{self.name} at {self.base_url}: a reply does not say how many tokens it took, so --max-cost cannot be kept; "
                "leave it out, or give price=0/0 if this server is free"
            )
        return results

    def _judge(self, call: Call, stop) -> tuple[Answer, bool]:
        """One order of one pair, and whether there was a reply; asked a second time, in JSON, where the first reply has no
        probability of a letter. Both are paid for."""
        shown, used, p, error, written = text.options(call.prompt, list(call.responses)), [(0, 0, 0.0)], None, None, ""
        kind, replied = "soft", True
        try:
            if self.soft is not False:
                prompt = LETTER.format(*text.CHOICES) + shown + text.question(call.principle)
                written, _, top = self._request(prompt, stop, used, LETTER_TOKENS, logprobs=True)
                p = p_of_first_letter(top)
            if p is None:
                kind = "verdict"
                prompt = f"{shown}\n\n{call.principle}\n" + VERDICT.format(*text.CHOICES)
                written, _, _ = self._request(prompt, stop, used, self.max_tokens)
                p = p_of_verdict(written)
        except Failed as e:
            error, replied = self._clean(e), not isinstance(e, NoReply)
        return Answer(p, *map(sum, zip(*used, strict=True)), error, written, kind), replied

    def _request(self, prompt: str, stop, used: list, max_tokens: int, temperature=0.0, logprobs=False):
        """Send until there is a reply -> what `read` makes of it. Failed when there is nothing in it, NoReply when there is none.

        stop: an event, set to give up. used: (prompt tokens, completion tokens, cost) of a reply is added to this list. Where
        the server refuses log-probs there is no reply, and nothing to pay.
        """
        system = [{"role": "system", "content": self.system}] if self.system else []
        messages, attempt, delay = [*system, {"role": "user", "content": prompt}], 0, 0.0
        while not stop.wait(delay):
            adapted = self.adapted
            limit = "max_completion_tokens" if "max_completion_tokens" in adapted else "max_tokens"
            body = {"model": self.name, "messages": messages, limit: max_tokens}
            body |= {} if "temperature" in adapted else {"temperature": temperature}
            # five is what every server grants, and enough for a model that was told to choose between two
            body |= {"logprobs": True, "top_logprobs": 5} if logprobs else {}
            delay = self.backoff * 2**attempt * random.uniform(0.5, 1.0)
            try:
                reply = json.loads(self.client.chat.completions.with_raw_response.create(**body).http_response.text)
                self.answered = True
                used.append(self._account(reply))
                content, ended, top = read(reply)
                return self._hide(content), ended, top
            except json.JSONDecodeError:
                fault = "the reply is not JSON"
            except self.openai.APIConnectionError as e:  # a timeout is one of these
                fault = f"{e} {e.__cause__ or ''}"
            except self.openai.APIStatusError as e:
                self.answered, status, fault = True, e.status_code, f"HTTP {e.status_code}: {e.response.text}"
                picky = status in (400, 403, 422)
                if picky and logprobs and "logprobs" in fault:
                    return "", False, None
                if picky and (refused := {name for name in PICKY if name in fault} - adapted):
                    self.adapted, delay = self.adapted | refused, 0.0
                    continue
                if status in HOPELESS:
                    why = "it wants a key, and OPENAI_API_KEY is not set" if status == 401 and not self.key else HOPELESS[status]
                    raise UserError(f"{self.name} at {self.base_url}: {why} (HTTP {status})") from None
                delay = max(delay, retry_after(e.response.headers.get("retry-after")))
                if status not in (408, 429) and status < 500:
                    raise Failed(fault) from None
                if delay > LONGEST_WAIT:
                    raise NoReply(fault) from None
            attempt += 1
            if attempt > self.retries:
                fault = f"tried {attempt}x: {fault}"
                if self.answered:
                    raise NoReply(fault)
                raise UserError(f"{self.base_url}: no chat server has answered; is it running? {self._clean(fault)}")
        raise futures.CancelledError

    def _account(self, reply) -> tuple[int, int, float]:
        """(prompt tokens, completion tokens, cost) by the reply's own count; 0 where it has none, which max_cost cannot allow."""
        usage = reply.get("usage") if isinstance(reply, dict) else None
        counts = [(usage or {}).get(key) for key in ("prompt_tokens", "completion_tokens")]
        tokens = [n if isinstance(n, int) else 0 for n in counts]
        if None in counts and self.max_cost is not None and self.price_prompt + self.price_completion > 0:
            self.uncounted = True
        cost = (tokens[0] * self.price_prompt + tokens[1] * self.price_completion) / 1000
        with self.lock:
            self.spent += cost
        return *tokens, cost

    def _hide(self, words: str) -> str:
        """Without the key, which servers like to quote. A short one is no secret but a placeholder, often a plain word."""
        return words.replace(self.key, "***") if len(self.key) >= 8 else words

    def _clean(self, message) -> str:
        """One line without the key; cut only when the key is out, so that no part of it is left."""
        return " ".join(self._hide(str(message)).split())[:300]


def retry_after(value: str | None) -> float:
    """The Retry-After header, seconds or a date -> seconds from now; 0 where there is none that can be read."""
    try:
        return float(value) if value[:1].isdigit() else email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    except (TypeError, ValueError):
        return 0.0


def read(reply) -> tuple[str, bool, list[tuple[str, float]] | None]:
    """A reply -> its text; whether it came to its own end; (token, log-prob) of the likeliest first tokens, or None where the
    server gives none. The first token is the first that is more than a space or a bracket."""
    try:
        choice = reply["choices"][0]
        content, tokens = choice["message"]["content"], (choice.get("logprobs") or {}).get("content") or []
        top = next((t.get("top_logprobs") for t in tokens if t["token"].strip(AROUND)), None)
        top = [(t["token"], float(t["logprob"])) for t in top] if top else None
    except (LookupError, TypeError, AttributeError, ValueError):
        raise Failed(f"malformed reply: {json.dumps(reply)}") from None
    if not isinstance(content, str) or not content.strip():
        raise Failed(f"empty reply (finish_reason {choice.get('finish_reason')})")
    return content, choice.get("finish_reason") == "stop", top


def p_of_first_letter(top: list[tuple[str, float]] | None) -> float | None:
    """(token, log-prob)s -> P(A) / (P(A) + P(B)), each summed over its spellings; None where both have less than LETTER_MASS.

    One that is not listed has the most that it can have: what the list leaves over, but no more than its last entry.
    """
    mass, listed = dict.fromkeys(text.CHOICES, 0.0), [math.exp(min(logprob, 0.0)) for _, logprob in top or []]
    for (token, _), p in zip(top or [], listed, strict=True):
        if (letter := token.strip(AROUND)) in mass:
            mass[letter] += p
    if not sum(mass.values()) >= LETTER_MASS:
        return None
    a, b = (found or max(0.0, min(1 - sum(listed), *listed)) for found in mass.values())
    return a / (a + b)


def p_of_verdict(reply: str) -> float:
    """The first {...} of a reply -> 1.0 where it chooses the first letter over the second, 0.0 where the second."""
    try:
        verdict, _ = json.JSONDecoder().raw_decode(reply, reply.index("{"))
        return {text.CHOICES: 1.0, text.CHOICES[::-1]: 0.0}[verdict["chosen"], verdict["rejected"]]
    except (LookupError, TypeError, ValueError):
        raise Failed(f"not a verdict: {reply}") from None
