"""A small HTTP server on 127.0.0.1 that speaks /v1/chat/completions, and misbehaves on request.

    with ChatServer("429", "ok") as server:       # the first request is refused, the second and all later ones are answered
        Endpoint(server.url, "any", backoff=0.001).ask(calls)
    assert len(server.requests) == 2

It judges by `likes(response)`: P(A) = sigmoid(likes(A) - likes(B)), so the wanted label is known; any other prompt is answered
with `says`. Usage is 100 prompt and 7 completion tokens a reply.
"""

import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PROMPT_TOKENS, COMPLETION_TOKENS = 100, 7
BEHAVIOURS = {
    "ok", "429", "retry-after", "500", "401", "404", "400", "slow", "close", "cut off", "html", "no choices", "empty", "no usage",
    "no logprobs", "refuses logprobs", "refuses max_tokens", "no letter", "bracket", "nonsense",
    "same letter twice", "half a verdict",
}  # fmt: skip


class ChatServer:
    """script: one behaviour a request, in the order of arrival; the last one holds for all later requests.

    requests: what arrived, as {"body": ..., "key": the Authorization header}. peak: the most requests in flight at once.
    meet: with n, requests wait until n are in flight; for ever unless the client really sends n at a time.
    """

    def __init__(self, *script: str, likes=len, says=" so be it.", meet: int | None = None):
        assert set(script) <= BEHAVIOURS, set(script) - BEHAVIOURS
        self.script, self.likes, self.says = list(script or ["ok"]), likes, says
        self.requests, self.in_flight, self.peak, self.lock = [], 0, 0, threading.Lock()
        self.meeting = threading.Barrier(meet, timeout=60) if meet else None
        self.closing = threading.Event()

    def __enter__(self):
        handler = type("Handler", (_Handler,), {"chat": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.http.shutdown()
        self.http.server_close()

    def begin(self, request: dict) -> str:
        """Record a request and say how to treat it."""
        with self.lock:
            self.requests.append(request)
            self.in_flight += 1
            self.peak = max(self.peak, self.in_flight)
            behaviour = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if self.meeting:
            self.meeting.wait()
            time.sleep(0.02)  # time for one too many to arrive
        return behaviour

    def end(self):
        with self.lock:
            self.in_flight -= 1

    def reply(self, body: dict, behaviour: str) -> dict:
        """The chat completion: a letter with log-probs, a verdict in JSON, or `says`."""
        content = body["messages"][-1]["content"]
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": self.says}}
        if "\n(A)" in content:
            _, _, shown = content.partition("\n(A)")
            first, _, second = shown.split("\n\n")[0].partition("\n(B)")
            p = 1 / (1 + math.exp(self.likes(second) - self.likes(first)))
            better, worse = ("A", "B") if p >= 0.5 else ("B", "A")
            verdict = {
                "same letter twice": f'{{"chosen": "{better}", "rejected": "{better}"}}',
                "half a verdict": f'{{"chosen": "{better}", "rej',
                "nonsense": f"A is nice, but B is nicer. I choose ({better})!",
            }.get(behaviour, f'Here you are:\n```json\n{{"chosen": "{better}", "rejected": "{worse}"}}\n```')
            choice["message"]["content"] = verdict if '"chosen"' in content else f"({better})"
            if body.get("logprobs") and behaviour != "no logprobs":
                choice["logprobs"] = {"content": self.tokens(p, body["top_logprobs"], behaviour)}
                if behaviour == "bracket":  # and nothing after it
                    choice["logprobs"]["content"], choice["message"]["content"] = choice["logprobs"]["content"][:1], "("
        if behaviour == "empty":
            choice |= {"finish_reason": "length", "message": {"role": "assistant", "content": None}}
        usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": COMPLETION_TOKENS}
        reply = {"id": "x", "object": "chat.completion", "model": body["model"], "choices": [choice], "usage": usage}
        if behaviour == "no choices":
            reply = {"error": {"message": "upstream fell over"}, "usage": usage}
        return {k: v for k, v in reply.items() if behaviour != "no usage" or k != "usage"}

    def tokens(self, p: float, n: int, behaviour: str) -> list[dict]:
        """An opening bracket, then the letter: its mass is on two spellings, and 30 % of it on other words."""
        mass = {"A": 0.5 * p, " A": 0.2 * p, "B": 0.7 * (1 - p), "The": 0.2, "a": 0.1}
        if behaviour == "no letter":
            mass = {"The": 0.9, "a": 0.1}
        top = [{"token": t, "logprob": math.log(max(m, 1e-9))} for t, m in sorted(mass.items(), key=lambda x: -x[1])][:n]
        bracket = {"token": "(", "logprob": -0.1, "top_logprobs": [{"token": "(", "logprob": -0.1}]}
        return [bracket, top[0] | {"top_logprobs": top}]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        key = self.headers.get("authorization", "")
        behaviour = self.chat.begin({"path": self.path, "body": body, "key": key})
        # a request is out of the way before its client can read the answer and send the next one
        try:
            status, headers, data = self.answer(behaviour, body, key)
        finally:
            self.chat.end()
        if behaviour == "close":
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def answer(self, behaviour: str, body: dict, key: str) -> tuple[int, dict, bytes]:
        """-> status, headers, body. An error quotes the key that it was sent, as some servers do."""
        if behaviour == "slow":
            self.chat.closing.wait(5)  # the client has long given up; the end of the test ends the wait
        refused = {
            "refuses logprobs": "logprobs" in body and "logprobs are not supported with this model",
            "refuses max_tokens": "max_tokens" in body and "use 'max_completion_tokens' instead, and no temperature",
        }.get(behaviour)
        status = int(behaviour) if behaviour.isdigit() else 429 if behaviour == "retry-after" else 400 if refused else 200
        headers = {"content-type": "text/html" if behaviour == "html" else "application/json"}
        if behaviour == "retry-after":
            headers["retry-after"] = "7"
        if behaviour == "html":
            return status, headers, b"<html>hello</html>"
        reply = self.chat.reply(body, behaviour) if status == 200 else {"error": {"message": refused or f"no, {key}, not now"}}
        data = json.dumps(reply).encode()
        return status, headers, data[: len(data) // 2] if behaviour == "cut off" else data

    def log_message(self, *_):
        pass
