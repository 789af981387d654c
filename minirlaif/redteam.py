"""Prompts that a model writes itself, after examples: the generated red-team prompts of Bai et al. 2022 (§3.1, App. B).

The model is shown a few human turns and a "Human:", and writes the next. What it writes is used if it is one whole human
turn and neither an example nor a repeat; what is left out is counted.
"""

import random
import re
from collections import Counter

from minirlaif import text

SHOTS = 6  # examples before each new prompt, drawn at random, so that the prompts differ
TURN = re.compile(r"\n\nHuman: ((?:(?!\n\n|Human:|Assistant:).)+)\n\nAssistant:", re.DOTALL)


def human_turn(prompt: str) -> str | None:
    """What the human says in the first turn of a dialogue; None where there is no turn of one paragraph."""
    match = TURN.search(prompt)
    return match and match[1]


def write(sample, examples: list[str], n: int, seed: int) -> list[tuple]:
    """n drafts (text, ended); sample as in critique.revise_batch, examples from human_turn."""
    rng = random.Random(seed)
    shown = [rng.sample(examples, min(SHOTS, len(examples))) for _ in range(n)]
    said, ended = sample(["".join(f"\n\nHuman: {turn}" for turn in turns) + "\n\nHuman:" for turns in shown], seed, True)
    return list(zip(said, ended, strict=True))


def choose(drafts: list[tuple], examples: list[str]) -> tuple[list[str], Counter]:
    """(prompts, all different, and how many drafts were left out for which reason). Case and spacing make no new prompt."""
    prompts, left_out = {" ".join(e.lower().split()): None for e in examples}, Counter()
    for said, ended in drafts:
        prompt, words = text.dialogue(said.strip()), " ".join(said.lower().split())
        if ended is not True:
            left_out[ended.split(":")[0] if ended else "too long"] += 1
        elif not TURN.fullmatch(prompt):
            left_out["not one human turn"] += 1
        elif words in prompts:
            left_out["a repeat"] += 1
        else:
            prompts[words] = prompt
    return [p for p in prompts.values() if p is not None], left_out
