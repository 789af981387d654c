"""What is distilled on: examples from files of prompts, completions and texts, and the order in which a mixture is seen.

Askell et al. 2021 distil on one half of dialogues and one half of pretraining text, each text put after a new "Human:".
"""

from typing import NamedTuple

import torch

from minirlaif import data, text, trainer

TURN = "\n\nHuman:"


class Example(NamedTuple):
    seen: list[int]  # ids of what the teacher sees before the response: C and the prompt
    unseen: list[int]  # and the student: the prompt
    response: list[int] | None  # None: the teacher is to answer
    file: int  # which of --data it comes from


def load(path: str, number: int, context: str, tokenizer, rooms, max_new_tokens: int, on_bad_row="error") -> list[Example]:
    """The examples of a file of prompts, completions, or texts and documents, as its first row shows; number: the file's.

    context: C; rooms: block_size of teacher and student. A text goes after "\\n\\nHuman:" (not twice), cut into as many examples
    as its length needs. UserError: a row cannot be used, as everywhere.
    """

    def contexts(prompt, length):
        found = tokenizer.encode(text.with_preamble(context, prompt)), tokenizer.encode(prompt)
        for ids, room in zip(found, rooms, strict=True):
            data.check_length(len(ids), length, room)
        return found

    def prompted(row):
        return [Example(*contexts(row["prompt"], max_new_tokens), None, number)]

    def completed(row):
        response = tokenizer.encode(row["completion"]) + [tokenizer.eot] * row["stopped"]
        if not response:
            raise data.BadRow("empty completion")
        return [Example(*contexts(row["prompt"], len(response)), response, number)]

    def plain(row):
        words = "".join(piece for piece, _ in row["segments"]).removeprefix(TURN)
        ids = tokenizer.encode(words if words[:1].isspace() else f" {words}") + [tokenizer.eot] * row["stopped"]
        seen, unseen = contexts(TURN, 1)
        room = min(rooms[0] - len(seen), rooms[1] - len(unseen))
        return [Example(seen, unseen, ids[i : i + room], number) for i in range(0, len(ids), room)]

    first = {"text": ""} if path.endswith(".txt") else data.read_jsonl(path, on_bad_row=on_bad_row)[0]
    if "completion" in first:
        read, encode = data.read_completions, completed
    else:
        read, encode = (data.read_documents, plain) if {"text", "segments"} & {*first} else (data.read_prompts, prompted)
    return [e for found in data.convert(read(path, on_bad_row), encode, on_bad_row) for e in found]


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
