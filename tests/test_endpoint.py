"""The judge behind an endpoint, against a real HTTP server that misbehaves: what is asked, read, paid, tried again, given up."""

import email.utils
import importlib.util
import logging
import math
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
from chat_server import COMPLETION_TOKENS, PROMPT_TOKENS, ChatServer

from minirlaif import cli, endpoint, text
from minirlaif.endpoint import Completion, Endpoint, Failed
from minirlaif.labelers import Call

KEY = "sk-test-0123456789"
CALL = Call(text.dialogue("how do i fix the bike?"), (" with a good wrench.", " no."), "choose the more helpful answer.")
SWAPPED = replace(CALL, responses=CALL.responses[::-1])
LIKES = {CALL.responses[0]: 1.2, CALL.responses[1]: 0.0}
P = 1 / (1 + math.exp(-1.2))  # P(the wrench is better), as the server's log-probs say it

needs_openai = pytest.mark.skipif(importlib.util.find_spec("openai") is None, reason='needs pip install -e ".[api]"')


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def serve(*script, **options):
    return ChatServer(*script, likes=LIKES.get, **options)


def judge_of(server, **options):
    return Endpoint(server.url, "any-model", **{"backoff": 0.001, "concurrency": 1} | options)


class Clock:
    """Stands in for the event that threads wait on: notes how long they would wait, and does not."""

    def __init__(self):
        self.waits = []

    def wait(self, seconds):
        self.waits.append(seconds)
        return False


# ---- what a reply is worth


def test_mass_of_each_letter_is_summed_over_its_spellings():
    top = [("A", math.log(0.2)), (" A", math.log(0.1)), ("(A", math.log(0.1)), ("B", math.log(0.1)), ("Answer", math.log(0.3))]
    assert endpoint.p_of_first_letter(top) == pytest.approx(0.4 / 0.5)
    assert endpoint.p_of_first_letter([("B", -0.1), ("a", -3.0), ("A", -9.0)]) < 0.001  # the article is no letter
    assert endpoint.p_of_first_letter([("A", -1.0), ("B", -1.0)]) == 0.5


@pytest.mark.parametrize("top", [
    None, [], [("The", -0.1)], [("A", -math.inf)], [("A", math.nan)],
    [("The", -0.001), ("I", -8.0), ("A", -9.0)],  # it begins a sentence, and "A" would be an article
    [("A", math.log(0.3)), ("B", math.log(0.19))],
])  # fmt: skip
def test_letters_that_are_less_likely_than_all_else_are_no_answer(top):
    assert endpoint.p_of_first_letter(top) is None


@pytest.mark.parametrize("top, p_of_the_other", [
    ([("A", 0.9), ("The", 0.06), ("a", 0.01)], 0.01),  # as the last that is listed: what is not is no likelier
    ([("A", 0.9), ("The", 0.06)], 0.04),  # what is left over
    ([("A", 0.9999)], 0.0001),
    ([("A", 0.6), ("The", 0.4)], 0.0),
])  # fmt: skip
def test_a_letter_that_is_not_listed_has_the_most_that_it_can_have(top, p_of_the_other):
    top, (p, *_) = [(token, math.log(p)) for token, p in top], [p for _, p in top]
    assert endpoint.p_of_first_letter(top) == pytest.approx(p / (p + p_of_the_other))
    swapped = [(token.replace("A", "B"), logprob) for token, logprob in top]
    assert endpoint.p_of_first_letter(swapped) == pytest.approx(p_of_the_other / (p + p_of_the_other))


@pytest.mark.parametrize("reply, p", [
    ('{"chosen": "A", "rejected": "B"}', 1.0),
    ('{"chosen": "B", "rejected": "A"}', 0.0),
    ('```json\n{"rejected": "A",\n "chosen": "B", "why": {"a": 1}}\n``` {"chosen": "A", "rejected": "B"}', 0.0),
    ('{"chosen": "A", "rejected": "A"}', None),
    ('{"chosen": "A"}', None),
    ('{"chosen": "a", "rejected": "b"}', None),
    ('{"chosen": "A", "rejected": "C"}', None),
    ('{"chosen": ["A"], "rejected": ["B"]}', None),
    ('{"chosen": 0, "rejected": 1}', None),
    ('{"chosen": "A", "rej', None),
    ('{chosen: A, rejected: B}', None),
    ('["A", "B"]', None),
    ("A", None),
    ("I choose A.", None),
    ("", None),
])  # fmt: skip
def test_a_verdict_is_two_different_letters_or_nothing(reply, p):
    if p is None:
        with pytest.raises(Failed, match="not a verdict"):
            endpoint.p_of_verdict(reply)
    else:
        assert endpoint.p_of_verdict(reply) == p


@pytest.mark.parametrize("reply", [
    None, [], {}, {"choices": []}, {"choices": None}, {"choices": [{}]}, {"choices": [{"message": None}]},
    {"choices": [{"message": {"content": None}}]}, {"choices": [{"message": {"content": " \n"}}]},
    {"choices": [{"message": {"content": "A"}, "logprobs": {"content": [{"top_logprobs": []}]}}]},
    {"choices": [{"message": {"content": "A"}, "logprobs": {"content": [{"token": "A", "top_logprobs": [{"token": "A"}]}]}}]},
])  # fmt: skip
def test_malformed_replies_fail_and_do_not_crash(reply):
    with pytest.raises(Failed):
        endpoint.read(reply)


def test_retry_after_is_seconds_or_a_date():
    assert endpoint.retry_after("7") == 7 and endpoint.retry_after("0.5") == 0.5
    assert 50 < endpoint.retry_after(email.utils.formatdate(time.time() + 60, usegmt=True)) <= 60
    assert endpoint.retry_after(None) == endpoint.retry_after("") == endpoint.retry_after("soon") == 0


# ---- what is asked


@needs_openai
def test_soft_labels_are_the_servers_probabilities_in_both_orders():
    with serve() as server:
        shown, swapped = judge_of(server).ask([CALL, SWAPPED])
    assert shown.p == pytest.approx(P) and swapped.p == pytest.approx(1 - P)
    assert (shown.prompt_tokens, shown.completion_tokens, shown.error) == (PROMPT_TOKENS, COMPLETION_TOKENS, None)
    body = server.requests[0]["body"]
    assert body["model"] == "any-model" and body["temperature"] == 0 and body["logprobs"] is True and body["top_logprobs"] >= 4
    (message,) = body["messages"]
    assert message["role"] == "user" and "one letter" in message["content"]
    assert message["content"].endswith(text.options(CALL.prompt, list(CALL.responses)) + text.question(CALL.principle))
    assert server.requests[0]["path"] == "/v1/chat/completions" and server.requests[0]["key"] == f"Bearer {KEY}"


@needs_openai
def test_a_preamble_is_the_system_message():
    with serve() as server:
        judge_of(server, system="A good summary is short.").ask([CALL])
    assert server.requests[0]["body"]["messages"][0] == {"role": "system", "content": "A good summary is short."}


def wants_json(server):
    return ['{"chosen": x' in r["body"]["messages"][0]["content"] for r in server.requests]


@needs_openai
@pytest.mark.parametrize("behaviour", ["no logprobs", "bracket", "no letter", "refuses logprobs"])
def test_without_a_letters_probability_it_asks_for_json_and_soon_for_nothing_else(behaviour):
    """A letter that was asked for in vain is paid for too, unless the request was refused."""
    with serve(behaviour) as server:
        judge = judge_of(server)
        answers = judge.ask([CALL, SWAPPED] * 3)
        assert [(a.p, a.kind, a.error) for a in answers] == [(1.0, "verdict", None), (0.0, "verdict", None)] * 3
        paid = [1 if behaviour == "refuses logprobs" else 2] * endpoint.TRIALS + [1] * 3
        assert [a.prompt_tokens for a in answers] == [n * PROMPT_TOKENS for n in paid]
        assert [a.completion_tokens for a in answers] == [n * COMPLETION_TOKENS for n in paid]
        assert wants_json(server) == [False, True] * endpoint.TRIALS + [True] * 3
        assert all("logprobs" not in r["body"] for r, json in zip(server.requests, wants_json(server), strict=True) if json)
        judge.ask([CALL])
        assert wants_json(server)[-2:] == [True, True] and judge.soft is False


@needs_openai
@pytest.mark.parametrize("odd", ["no logprobs", "bracket", "no letter", "refuses logprobs"])
@pytest.mark.parametrize("before", [0, 1, 4])
def test_an_odd_reply_is_a_verdict_and_the_next_call_is_soft_again(odd, before):
    with serve(*["ok"] * before, *[odd] * 2, "ok") as server:  # the second is the reply to the request for JSON
        answers = judge_of(server).ask([CALL] * 10)
    assert [a.kind for a in answers] == ["soft"] * before + ["verdict"] + ["soft"] * (9 - before)
    assert [a.p for a in answers] == [1.0 if a.kind == "verdict" else pytest.approx(P) for a in answers]


@needs_openai
@pytest.mark.parametrize("behaviour", ["ok", "no logprobs"])
@pytest.mark.parametrize("have", [[], [2], [0, 2], [0, 1, 2], [0, 1, 2, 4, 7]])  # the first three come before the others begin
def test_what_the_server_gives_is_known_from_the_answers_of_an_earlier_run(behaviour, have):
    """A run that goes on asks and pays what an uninterrupted one does, whatever it has already, and at any pace."""
    calls = [CALL, SWAPPED] * 4
    with serve(behaviour) as server:
        whole = judge_of(server).ask(calls)
    with serve(behaviour) as server:
        seen, given = [], {i: whole[i] for i in have}
        judge = judge_of(server, concurrency=4)
        assert judge.ask(calls, lambda i, answer: seen.append(i), given) == whole
        assert sorted(seen) == sorted({*range(8)} - {*given})
        assert len(server.requests) == sum(whole[i].prompt_tokens for i in seen) / PROMPT_TOKENS


@needs_openai
def test_json_is_asked_for_at_once_where_logprobs_are_off():
    with serve() as server:
        answers = judge_of(server, logprobs=False, max_tokens=50).ask([CALL, SWAPPED])
    assert [a.p for a in answers] == [1.0, 0.0] and '"chosen": "A"' in answers[0].text
    assert len(server.requests) == 2 and all("logprobs" not in r["body"] for r in server.requests)
    assert server.requests[0]["body"]["max_tokens"] == 50
    assert text.options(CALL.prompt, list(CALL.responses)) in server.requests[0]["body"]["messages"][0]["content"]


@needs_openai
def test_parameters_that_the_server_refuses_by_name_are_sent_the_other_way():
    with serve("refuses max_tokens") as server:
        answers = judge_of(server).ask([CALL, SWAPPED])
    assert [a.p for a in answers] == [pytest.approx(P), pytest.approx(1 - P)] and len(server.requests) == 3
    for request in server.requests[1:]:
        assert request["body"].keys() & {"max_tokens", "max_completion_tokens", "temperature"} == {"max_completion_tokens"}


# ---- what fails


@needs_openai
@pytest.mark.parametrize("behaviour, logprobs, error", [
    ("nonsense", False, "not a verdict"),
    ("same letter twice", False, "not a verdict"),
    ("half a verdict", False, "not a verdict"),
    ("empty", True, "empty reply (finish_reason length)"),
    ("empty", False, "empty reply (finish_reason length)"),
    ("no choices", True, "upstream fell over"),
])  # fmt: skip
def test_what_cannot_be_read_is_a_failure_that_is_paid_for(behaviour, logprobs, error):
    with serve(behaviour) as server:
        judge = judge_of(server, logprobs=logprobs, price_prompt=2.0, price_completion=10.0)
        (answer,) = judge.ask([CALL])
    assert answer.p is None and error in answer.error and len(server.requests) == 1
    assert (answer.prompt_tokens, answer.completion_tokens) == (PROMPT_TOKENS, COMPLETION_TOKENS)
    assert answer.cost == pytest.approx(0.27) and judge.spent == pytest.approx(0.27)  # 100 * 2 / 1000 + 7 * 10 / 1000


@needs_openai
def test_a_reply_without_usage_counts_nothing():
    with serve("no usage") as server:
        (answer,) = judge_of(server, price_prompt=1.0).ask([CALL])
    assert answer.p == pytest.approx(P) and (answer.prompt_tokens, answer.completion_tokens, answer.cost) == (0, 0, 0)


@needs_openai
def test_a_reply_without_usage_stops_a_run_that_has_a_cap():
    """What was received is kept, and a server that is free may go without counting."""
    with serve("ok", "no usage") as server:
        seen = []
        with pytest.raises(cli.UserError, match="does not say how many tokens it took, so --max-cost cannot be kept") as error:
            judge_of(server, price_prompt=1.0, max_cost=9.0).ask([CALL] * 9, lambda i, answer: seen.append(i))
        assert seen == [0, 1] and len(server.requests) == 2 and "price=0/0" in str(error.value) and "\n" not in str(error.value)
        with pytest.raises(cli.UserError, match="max-cost"):
            judge_of(server, price_completion=1.0, price_prompt=0.0, max_cost=9.0).complete(["hi"], 5, 0.0)
        assert all(a.p is not None for a in judge_of(server, price_prompt=0.0, max_cost=9.0).ask([CALL] * 3))


@needs_openai
@pytest.mark.parametrize("trouble", ["429", "500", "close", "cut off", "html", "slow"])
def test_what_may_pass_is_tried_again_and_paid_once(trouble):
    with serve("ok", trouble, trouble, "ok") as server:
        judge = judge_of(server, price_prompt=1.0, timeout=0.3 if trouble == "slow" else 20)
        first, second = judge.ask([CALL, CALL])
    assert second.p == pytest.approx(P) and second.error is None and len(server.requests) >= 4
    assert second.cost == pytest.approx(0.1) and judge.spent == pytest.approx(0.2)


@needs_openai
@pytest.mark.parametrize("trouble, error", [
    ("429", "HTTP 429"), ("500", "HTTP 500"), ("close", "Connection error"), ("cut off", "not JSON"),
])  # fmt: skip
def test_after_the_last_try_the_answer_is_a_failure_and_the_next_call_is_made(trouble, error):
    """But it is given to no journal: the server may answer it later."""
    with serve("ok", trouble, trouble, trouble, "ok") as server:
        seen = []
        answers = judge_of(server, retries=2, price_prompt=1.0).ask([CALL] * 3, lambda i, answer: seen.append(i))
    assert [a.p is None for a in answers] == [False, True, False] and len(server.requests) == 5 and seen == [0, 2]
    assert answers[1].error.startswith("tried 3x: ") and error in answers[1].error and answers[1].cost == 0


@needs_openai
def test_what_was_paid_before_the_server_fell_silent_is_told():
    with serve("no logprobs", "500", "ok") as server:
        seen = []
        (first, second) = judge_of(server, retries=0, price_prompt=1.0).ask([CALL] * 2, lambda i, answer: seen.append(i))
    assert (first.p, first.cost, first.prompt_tokens) == (None, pytest.approx(0.1), PROMPT_TOKENS) and seen == [1]
    assert second.kind == "soft"


@needs_openai
def test_a_dead_server_is_not_asked_for_ever():
    """Three calls for each that may be in flight; a reply in between begins the count anew, and so does a new judge."""
    with serve("ok", "500", "500", "ok", "500") as server:
        judge, seen = judge_of(server, retries=0, concurrency=1), []
        judge.soft = True  # no trial, so that the order is that of the calls
        answers = judge.ask([CALL] * 50, lambda i, answer: seen.append(i))
        assert len(seen) == 2 and len(server.requests) == 7  # 1 + 2 + 1 + 3
        assert {a.error for a in answers[7:]} == {"stopped: 3 calls in a row got no reply"}
        n = len(server.requests)
        assert judge.complete(["hi"], 5, 0.0)[0].error.startswith("stopped: ") and len(server.requests) == n
        server.script = ["ok"]
        assert judge_of(server).ask([CALL])[0].p is not None


@needs_openai
def test_another_4xx_is_not_tried_again():
    with serve("400", "ok") as server:
        first, second = judge_of(server).ask([CALL, CALL])
    assert first.p is None and first.error.startswith("HTTP 400") and second.p is not None and len(server.requests) == 2


@needs_openai
def test_backoff_doubles_with_jitter_and_retry_after_is_honoured():
    with serve("500", "500", "500", "ok") as server:
        clock = Clock()
        assert judge_of(server, backoff=1.0)._judge(CALL, clock)[0].p == pytest.approx(P)
        assert clock.waits[0] == 0 and all(2**i / 2 <= w <= 2**i for i, w in enumerate(clock.waits[1:])) and len(clock.waits) == 4
        again = Clock()
        server.script = ["500", "500", "500", "ok"]
        judge_of(server, backoff=1.0)._judge(CALL, again)
        assert again.waits != clock.waits  # so that threads that failed together do not come back together
        server.script, clock = ["retry-after", "ok"], Clock()
        judge_of(server, backoff=1.0)._judge(CALL, clock)
        assert clock.waits == [0, 7]


@needs_openai
def test_a_server_that_wants_too_much_patience_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(endpoint, "LONGEST_WAIT", 5.0)
    with serve("retry-after", "ok") as server:
        (answer,) = judge_of(server).ask([CALL])
    assert answer.p is None and "429" in answer.error and len(server.requests) == 1


# ---- what stops


@needs_openai
def test_the_cap_stops_before_the_next_call_and_leaves_the_rest_unasked():
    """A call costs 0.5: two fit below a cap of 0.75, in which the second begins at 0.5."""
    with serve() as server:
        judge, seen = judge_of(server, price_prompt=5.0, max_cost=0.75), []
        answers = judge.ask([CALL] * 5, lambda i, answer: seen.append(i))
        assert [a.p is None for a in answers] == [False, False, True, True, True] and seen == [0, 1]
        assert {a.error for a in answers[2:]} == {"stopped: --max-cost 0.75 reached"} and judge.spent == pytest.approx(1.0)
        assert [a.error for a in judge.ask([CALL])] == ["stopped: --max-cost 0.75 reached"] and len(server.requests) == 2
        assert judge.complete(["hi"], 5, 0.0) == [Completion("", False, error="stopped: --max-cost 0.75 reached")]
        later = judge_of(server, price_prompt=5.0, max_cost=0.75)
        later.spent = 0.5  # what an earlier run has paid
        assert [a.p is None for a in later.ask([CALL] * 3)] == [False, True, True]


@needs_openai
def test_failed_answers_count_towards_the_cap():
    with serve("empty") as server:
        answers = judge_of(server, price_prompt=5.0, max_cost=0.75).ask([CALL] * 4)
    assert len(server.requests) == 2 and [a.cost for a in answers] == [0.5, 0.5, 0, 0]


@needs_openai
@pytest.mark.parametrize("n", [1, 3])
def test_exactly_so_many_requests_are_in_flight(n):
    with serve(meet=n) as server:  # stands still unless n come together
        answers = judge_of(server, concurrency=n).ask([CALL] * (4 * n))
    assert server.peak == n and len(server.requests) == 4 * n and all(a.p is not None for a in answers)


@needs_openai
def test_answers_arrive_one_at_a_time_in_the_callers_thread():
    with serve("ok", "empty", "ok") as server:
        seen, threads = {}, set()

        def on_answer(i, answer):
            assert i not in seen
            seen[i] = answer
            threads.add(threading.current_thread())

        calls = [CALL, SWAPPED] * 5
        answers = judge_of(server, concurrency=4).ask(calls, on_answer)
    assert threads == {threading.current_thread()} and [seen[i] for i in range(10)] == answers
    assert sum(a.p is None for a in answers) == 1
    for call, answer in zip(calls, answers, strict=True):
        assert answer.p is None or answer.p == pytest.approx(P if call is CALL else 1 - P)
    assert judge_of(server).ask([]) == []


@needs_openai
def test_ctrl_c_sends_nothing_more_and_is_passed_on():
    with serve() as server:
        seen = []

        def on_answer(i, answer):
            seen.append(i)
            if len(seen) == 3:
                raise KeyboardInterrupt

        judge = judge_of(server, concurrency=2)
        with pytest.raises(KeyboardInterrupt):
            judge.ask([CALL] * 50, on_answer)
        assert len(server.requests) <= 3 + 2
        assert judge.ask([CALL])[0].p == pytest.approx(P)  # and the judge can be used again


@needs_openai
def test_ctrl_c_ends_a_long_wait():
    """A thread that waits for its next try wakes up and gives up: it would keep the process alive."""
    with serve("retry-after") as server:
        before, stop = threading.active_count(), threading.Event()
        stop.set()
        with pytest.raises(endpoint.futures.CancelledError):
            judge_of(server)._judge(CALL, stop)
        assert server.requests == [] and threading.active_count() == before


# ---- what would fail every call alike


@needs_openai
@pytest.mark.parametrize("status, part", [("401", "OPENAI_API_KEY"), ("404", "no such model")])
def test_a_refused_key_or_an_unknown_model_stops_the_run(status, part):
    with serve("ok", status) as server:
        seen = []
        with pytest.raises(cli.UserError, match=part) as error:
            judge_of(server).ask([CALL] * 20, lambda i, answer: seen.append(i))
        assert seen == [0] and len(server.requests) == 2
    assert "any-model" in str(error.value) and server.url in str(error.value) and KEY not in str(error.value)


@needs_openai
def test_a_key_that_is_not_there_is_not_called_refused(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with serve("401") as server, pytest.raises(cli.UserError, match="it wants a key, and OPENAI_API_KEY is not set .HTTP 401"):
        judge_of(server).ask([CALL])


@needs_openai
@pytest.mark.parametrize("trouble", ["close", "html"])
def test_an_address_where_no_chat_server_ever_answers_stops_the_run(trouble):
    with serve(trouble) as server:
        with pytest.raises(cli.UserError, match="no chat server has answered") as error:
            judge_of(server, retries=1).ask([CALL] * 20)
        assert len(server.requests) == 2 and server.url in str(error.value) and len(str(error.value).splitlines()) == 1
    with pytest.raises(cli.UserError, match="no chat server has answered"):  # nobody listens there any more
        judge_of(server, retries=1).ask([CALL])


@needs_openai
@pytest.mark.parametrize("url", [
    "localhost:8000/v1", "ftp://x/v1", "http://", "", "http://x:y/v1", "http://[::1/v1", "http://me:secret@x/v1", "http://x/v1?key=secret",
])  # fmt: skip
def test_a_url_that_is_none_or_holds_a_secret_is_refused_without_repeating_it(url):
    with pytest.raises(cli.UserError, match="must look like") as error:
        Endpoint(url, "any")
    assert "secret" not in str(error.value)


@needs_openai
def test_a_cap_without_prices_is_refused():
    with pytest.raises(cli.UserError, match="needs the prices of any per 1,000 tokens: price=0.1/0.4, or 0/0 where it is free"):
        Endpoint("http://127.0.0.1:1/v1", "any", max_cost=1.0)
    assert Endpoint("http://127.0.0.1:1/v1", "any", max_cost=1.0, price_prompt=0.0).max_cost == 1.0


def test_a_missing_client_is_one_line_with_its_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(cli.UserError, match=r'pip install -e "\.\[api\]"'):
        Endpoint("http://127.0.0.1:1/v1", "any")


# ---- the key


@needs_openai
@pytest.mark.parametrize("trouble", ["429", "500", "400"])
def test_the_key_is_in_no_answer_and_no_log(trouble, caplog, capsys):
    """The server quotes it in its errors, as some do."""
    caplog.set_level(logging.DEBUG)
    with serve("ok", trouble) as server:
        answers = judge_of(server, retries=1).ask([CALL, CALL])
        completions = judge_of(server, retries=1).complete(["hi"], 5, 0.0)
    assert "no, Bearer ***, not now" in answers[1].error and "***" in completions[0].error
    shown = f"{answers} {completions} {caplog.text} {capsys.readouterr()} {[vars(r) for r in caplog.records]}"
    assert KEY not in shown and server.requests[1]["key"] == f"Bearer {KEY}"


@needs_openai
def test_a_key_is_taken_out_before_an_error_is_cut(monkeypatch):
    """No part of it is left at the end of a long message, nor in what the model writes."""
    judge = Endpoint("http://127.0.0.1:1/v1", "any")
    for n in range(270, 305):
        assert "sk-test" not in judge._clean("x" * n + KEY) and len(judge._clean("x" * n + KEY)) <= 300
    with serve(says=f" my header was {KEY}.") as server:
        (found,) = judge_of(server).complete(["hi"], 5, 0.0)
        assert (found.text, found.ended, found.error) == (" my header was ***.", True, None)


@needs_openai
def test_local_servers_need_no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with serve("ok", "400") as server:
        answers = judge_of(server).ask([CALL, CALL])
    assert answers[0].p == pytest.approx(P) and "no, Bearer none, not now" in answers[1].error


@needs_openai
def test_a_placeholder_is_not_cut_out_of_the_words(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    with serve(says=" an example.") as server:
        assert judge_of(server).complete(["hi"], 5, 0.0)[0].text == " an example."


@needs_openai
def test_a_key_that_cannot_be_sent_is_refused_and_a_line_end_forgiven(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\n")
    with serve() as server:
        assert judge_of(server).ask([CALL])[0].p == pytest.approx(P) and server.requests[0]["key"] == f"Bearer {KEY}"
    for bad in ("clé-0123456789", "sk-01\n23456789"):
        monkeypatch.setenv("OPENAI_API_KEY", bad)
        with pytest.raises(cli.UserError, match="OPENAI_API_KEY") as error:
            Endpoint("http://127.0.0.1:1/v1", "any")
        assert "0123" not in str(error.value) and "23456" not in str(error.value)


# ---- the critic


@needs_openai
def test_complete_returns_texts_in_order_and_says_which_are_whole():
    with serve("ok", "empty", "400", "500", "ok") as server:
        judge, seen = judge_of(server, price_completion=1.0, retries=0), []
        known, prompts = Completion("known.", True), ["zero", "one", "two", "three", "four", "five"]
        out = judge.complete(prompts, 9, 0.7, lambda i, completion: seen.append(i), {0: known})
    assert out[0] == known and seen == [1, 2, 3, 5]  # what got no reply is to be asked again
    usage = PROMPT_TOKENS, COMPLETION_TOKENS, COMPLETION_TOKENS / 1000
    assert out[1] == out[5] == Completion(" so be it.", True, *usage)
    assert out[2] == Completion("", False, *usage, "empty reply (finish_reason length)") and out[3].error.startswith("HTTP 400")
    assert out[4].error.startswith("tried 1x: HTTP 500") and out[4].cost == 0
    bodies = [r["body"] for r in server.requests]
    assert [b["messages"][0]["content"] for b in bodies] == prompts[1:]
    assert bodies[0]["max_tokens"] == 9 and bodies[0]["temperature"] == 0.7 and "logprobs" not in bodies[0]
    assert judge.spent == pytest.approx(3 * COMPLETION_TOKENS / 1000)


# ---- a server that somebody else wrote


@needs_openai
@pytest.mark.skipif("MINIRLAIF_SERVE" not in os.environ, reason="MINIRLAIF_SERVE=1 starts `transformers serve`, half a minute")
def test_transformers_serve(tmp_path):
    """A tiny random GPT-2: it gives no log-probs and no verdict, so an answer fails with both of its replies paid for."""
    transformers = pytest.importorskip("transformers")
    for module in ("fastapi", "uvicorn", "accelerate"):
        pytest.importorskip(module, reason="transformers serve needs it")
    import tokenizers

    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<|endoftext|>", *letters])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    end = "<|endoftext|>"
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end, chat_template=template)
    fast.save_pretrained(tmp_path / "model")
    size = {"vocab_size": len(vocab), "n_positions": 1024, "n_embd": 32, "n_layer": 1, "n_head": 2}
    config = transformers.GPT2Config(**size, bos_token_id=0, eos_token_id=0)
    transformers.set_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--host", "127.0.0.1", "--port", str(port)]
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen([*command, "--device", "cpu"], stdout=log, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    try:
        for _ in range(1200):  # a minute: it imports transformers
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0 or server.poll() is not None:
                    break
            time.sleep(0.05)
        judge = Endpoint(f"http://127.0.0.1:{port}/v1", str(tmp_path / "model"), retries=0, timeout=60)
        answers = judge.ask([CALL, SWAPPED] * 2)
        (found,) = judge.complete(["hello"], 8, 0.0)
    finally:
        server.terminate()
        server.wait(20)
    prompt = len(CALL.prompt) + len(CALL.principle) + sum(map(len, CALL.responses))
    for answer in answers:
        assert answer.p is None and answer.error and answer.prompt_tokens > prompt and answer.completion_tokens > 0
    assert judge.soft is False and found.text and found.error is None and not found.ended
