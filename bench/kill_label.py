"""kill -9 during labelling: label.py is killed at random moments and resumed, until it is done.

    python -m bench.kill_label

Three judges: an endpoint (a slow chat server on 127.0.0.1, that of the tests), one whose server gives no log-probs, so that it is
asked for verdicts after the first answers, and a local model with random weights. A kill comes
when a random number of answers is in the journal, and a random part of an answer's time later; where the journal is already
beyond that number, at a random moment while label.py starts. Counted:

    received      answers in the journal at the end; there must be as many as an uninterrupted run has
    lost          answers that were in the journal at some kill, and were gone or others later (the server numbers its answers)
    doubled       lines of the journal beyond one for each answer
    paid again    requests that the server answered beyond those that the journal's answers took: at most those of `concurrency`
                  answers for every kill (two requests for each of the first answers of a server without log-probs)
    identical     preferences.jsonl is, byte for byte, that of an uninterrupted run
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from bench.label_speed import candidates
from minirlaif import cli, data, trainer
from minirlaif.model import GPT, GPTConfig
from minirlaif.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tests"))  # for its chat server
CONCURRENCY, PROMPT_TOKENS = 4, 100  # the tokens are what that server counts for every request


@dataclass
class Args:
    kills: int = cli.arg(20, "how often each run is killed, 1-100")
    prompts: int = cli.arg(40, "prompts with three responses: six answers each, 10-200")
    judges: list[str] = cli.arg(["endpoint", "verdicts", "local"], "who judges: endpoint, verdicts (no log-probs), local")
    latency: float = cli.arg(0.03, "seconds the server takes over an answer, 0.001-1")
    seed: int = cli.arg(0, "seed of the moments")
    quick: bool = cli.arg(False, "2 kills, 8 prompts: shows that it runs")


def slow_server(latency: float, *script: str):
    """The tests' chat server, which takes its time and numbers its answers: one that is asked for again is another one."""
    from chat_server import ChatServer

    class Slow(ChatServer):
        answers = 0

        def __enter__(self):
            super().__enter__()
            self.http.handle_error = lambda *_: None  # a client that was killed is no news
            return self

        def reply(self, *request):
            time.sleep(latency)
            reply = super().reply(*request)
            with self.lock:
                self.answers += 1
                reply["choices"][0]["message"]["content"] += f" {self.answers}"
            return reply

    return Slow(*script)


def label(judge: str, rows: Path, out: Path) -> subprocess.Popen:
    """label.py, started and not waited for."""
    command = [sys.executable, "label.py", "--candidates", rows, "--judge", judge, "--out", out]
    command += ["--batch-size", "4", "--device", "cpu", "--dtype", "fp32", "--resume"]
    out.mkdir(exist_ok=True)
    with open(out / "log.txt", "ab") as log:
        environment = os.environ | {"NO_PROXY": "127.0.0.1"}
        return subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment, stdout=log, stderr=log)


def must_end_well(process: subprocess.Popen, out: Path):
    if process.wait() != 0:
        raise RuntimeError(f"label.py ended with {process.returncode}:\n{(out / 'log.txt').read_text()[-2000:]}")


def journal(out: Path) -> list[tuple[str, dict]]:
    """The whole lines of the journal: (key, answer)."""
    content = (out / "journal.jsonl").read_bytes() if (out / "journal.jsonl").exists() else b""
    rows = [json.loads(line) for line in content[: content.rfind(b"\n") + 1].splitlines()]
    return [(row["key"], row["record"]) for row in rows]


def trial(judge: str, rows: Path, folder: Path, kills: int, latency: float, rng: random.Random, server=None) -> dict:
    """One run that is killed so often, against one that is not -> the tally."""
    whole, broken = folder / "whole", folder / "broken"
    began = time.monotonic()
    must_end_well(label(judge, rows, whole), whole)
    longest, expected = time.monotonic() - began, dict(journal(whole))
    if not 0 < kills < len(expected):
        raise cli.UserError(f"--kills {kills}: should be fewer than the {len(expected)} answers, so that each has its moment")
    if server:
        server.answers = 0

    def wasted(found):  # an answer counts the tokens of all of its requests
        return server.answers - sum(answer["prompt_tokens"] for answer in found.values()) // PROMPT_TOKENS

    seen, lost, starting, most, paid_before = {}, 0, 0, 0, 0
    for target in tqdm(sorted(rng.sample(range(1, len(expected)), kills)), desc="kill", dynamic_ncols=True):
        process, held = label(judge, rows, broken), len(journal(broken))
        if held >= target:
            starting += 1
            time.sleep(rng.uniform(0, longest / 2))
        while held < target and process.poll() is None:
            time.sleep(0.001)
            held = len(journal(broken))
        time.sleep(rng.uniform(0, latency))
        process.kill()
        process.wait()
        time.sleep(0.02)  # what was sent arrives
        while server and server.in_flight:  # the server finishes what it has begun, and would bill it
            time.sleep(0.005)
        found = dict(journal(broken))
        lost += sum(found.get(key) != answer for key, answer in seen.items())
        seen = found
        if server:
            most, paid_before = max(most, wasted(found) - paid_before), wasted(found)
    must_end_well(label(judge, rows, broken), broken)
    lines = journal(broken)
    found = dict(lines)
    return {
        "kills": kills,
        "while starting": starting,
        "received": f"{len(found)} of {len(expected)}",
        "lost": lost + sum(found.get(key) != answer for key, answer in seen.items()),
        "doubled": len(lines) - len(found),
        "paid again": wasted(found) if server else "-",
        "most by one kill": most if server else "-",
        "identical": (whole / "preferences.jsonl").read_bytes() == (broken / "preferences.jsonl").read_bytes(),
    }


def main(args: Args) -> dict:
    cli.require_positive(args, "kills", "prompts", "latency")
    if unknown := set(args.judges) - {"endpoint", "verdicts", "local"}:
        raise cli.UserError(f"--judges {unknown.pop()}: there are endpoint, verdicts and local")
    kills, prompts = (2, 8) if args.quick else (args.kills, args.prompts)
    found = {}
    with (
        tempfile.TemporaryDirectory() as home,
        slow_server(args.latency) as soft,
        slow_server(args.latency, "no logprobs") as hard,
    ):
        home = Path(home)
        data.write_jsonl(home / "candidates.jsonl", candidates(prompts, 3))
        config = GPTConfig(vocab_size=load_tokenizer("toy").n_vocab)
        weights = GPT(config).init_weights(trainer.rng(0)).state_dict()
        trainer.save_model(home / "model.pt", config, weights, tokenizer_name="toy")
        servers = {"endpoint": soft, "verdicts": hard, "local": None}
        for name in args.judges:
            (home / name).mkdir()
            server = servers[name]
            judge = f"any@{server.url},concurrency={CONCURRENCY}" if server else str(home / "model.pt")
            rng = random.Random(f"kill {args.seed} {name}")
            found[name] = trial(judge, home / "candidates.jsonl", home / name, kills, args.latency, rng, server)
    head = ["judge", *next(iter(found.values()))]
    print(f"| {' | '.join(head)} |\n|" + " --- |" * len(head))
    for name, tally in found.items():
        print(f"| {' | '.join([name, *map(str, tally.values())])} |")
    return found


if __name__ == "__main__":
    cli.run(main, Args)
