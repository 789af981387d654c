"""What is distilled on: examples from files of prompts, completions and texts, and the order in which a mixture is seen.

The paper's mixture (as Bai et al. 2022, appendix A.1, restate it) is one half dialogues and one half pretraining text, each
text put after a new "Human:".
"""

from typing import NamedTuple

import torch

from minirlaif import data, text, trainer
from minirlaif.cli import UserError

TURN = "\n\nHuman:"


class Example(NamedTuple):
    seen: list[int]  # ids of what the teacher sees before the response: C and the prompt
    unseen: list[int]  # and the student: the prompt
    response: list[int] | None  # None: the teacher is to answer
    file: int  # which of --data it comes from


def load(path: str, number: int, context: str, tokenizer, rooms, max_new_tokens: int, on_bad_row="error") -> list[Example]:
    """The examples of a file, whose rows are prompts, completions, or texts and documents, in any mixture; number: the file's.

    context: C; rooms: block_size of teacher and student. A text goes after "\\n\\nHuman:" (not twice), cut into as many examples
    as its length needs. UserError: a row cannot be used, as everywhere; or C leaves no room for what is to follow it.
    """
    c = len(tokenizer.encode(context))

    def contexts(prompt, length, what):
        seen, unseen = tokenizer.encode(text.with_preamble(context, prompt)), tokenizer.encode(prompt)
        if len(seen) + length > rooms[0] or len(unseen) + length > rooms[1]:
            detail = f": {c} tokens of C, {len(unseen)} of the prompt, {length} of {what}; the teacher holds {rooms[0]}"
            raise data.BadRow("longer than the model's context", f"{detail}, the student {rooms[1]}")
        return seen, unseen

    def check_c(length, what):
        if c + length >= rooms[0]:  # no row would fit
            raise UserError(f"C is too long: {c} tokens and {length} of {what}; the teacher holds {rooms[0]}, prompt and all")

    def convert(row):
        if "completion" in row:
            response = tokenizer.encode(row["completion"]) + [tokenizer.eot] * row["stopped"]
            if not row["completion"]:
                raise data.BadRow("empty completion")
            return [Example(*contexts(row["prompt"], len(response), "the completion"), response, number)]
        if "segments" not in row:
            data.check_room(max_new_tokens, min(rooms))
            check_c(max_new_tokens, answer := "the answer (--max-new-tokens)")
            return [Example(*contexts(row["prompt"], max_new_tokens, answer), None, number)]
        check_c(1, "text")
        words = "".join(piece for piece, _ in row["segments"]).removeprefix(TURN)
        ids = tokenizer.encode(words if words[:1].isspace() else f" {words}") + [tokenizer.eot] * row["stopped"]
        seen, unseen = contexts(TURN, 1, "text")
        room = min(rooms[0] - len(seen), rooms[1] - len(unseen))
        return [Example(seen, unseen, ids[i : i + room], number) for i in range(0, len(ids), room)]

    rows = data.read_examples(path, on_bad_row)
    return [e for found in data.convert(rows, convert, on_bad_row) for e in found]


def by_tokens(weights: list[float], rows: list[Example]) -> list[float]:
    """Weights of the files as shares of the response tokens, of which the loss is a mean -> as shares of the examples."""
    found = []
    for number, weight in enumerate(weights):
        lengths = [len(e.response) for e in rows if e.file == number]
        found.append(weight / max(weights) * len(lengths) / sum(lengths))
    return found


def epoch_order(files: list[int], weights: list[float], seed: int, epoch: int) -> list[int]:
    """Indices of one epoch's examples, as many as there are. files: the file of each; each has its weight's share of the
    epoch, its rows in random order and, where there are not enough, again in another."""
    draw = trainer.rng(seed, "order", epoch)
    if not weights:
        return torch.randperm(len(files), generator=draw).tolist()
    order = []
    for number, weight in enumerate(weights):
        mine, n = [i for i, file in enumerate(files) if file == number], round(len(files) * weight / sum(weights))
        turns = [torch.randperm(len(mine), generator=draw).tolist() for _ in range(-(-n // len(mine)))]
        order += [mine[i] for turn in turns for i in turn][:n]
    return [order[i] for i in torch.randperm(len(order), generator=draw).tolist()]
