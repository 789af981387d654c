"""The words around the words: dialogue, critique and revision, multiple choice, reasoning, score.

One place for every template, so that the pretraining text, the labeler and the critic speak alike. The dialogue and
critique-revision keywords are those of Bai et al. 2022 (Constitutional AI, App. A and C). A prompt ends in "Assistant:"
and a response begins with its space, so that encoding both apart gives the tokens of the whole.
"""

CHOICES = ("A", "B")


def dialogue(request: str, preamble: str = "") -> str:
    """The prompt of a one-turn dialogue, with an optional preamble that sets the assistant's character."""
    return f"{preamble}\n\nHuman: {request}\n\nAssistant:"


def with_preamble(preamble: str, prompt: str) -> str:
    """The prompt behind a preamble, or any other context; a blank line stands between them if neither has brought white space."""
    gap = "" if not preamble or preamble[-1].isspace() or prompt[:1].isspace() else "\n\n"
    return f"{preamble}{gap}{prompt}"


def critique_request(prompt: str, response: str, critique: str) -> str:
    """Ask for a critique of a response; the answer to this prompt is the critique."""
    return f"{prompt}{response}\n\nCritiqueRequest: {critique}\n\nCritique:"


def revision_request(revision: str) -> str:
    """Follows a critique; the answer to this is the revision."""
    return f"\n\nRevisionRequest: {revision}\n\nRevision:"


def options(prompt: str, responses: list[str]) -> str:
    """A conversation and its candidate responses, ready for questions."""
    return (
        "Consider this conversation."
        + ("" if prompt.startswith("\n") else "\n\n")  # an article, which opens with no turn of a human
        + prompt
        + "".join(f"\n({letter}){response}" for letter, response in zip(CHOICES, responses, strict=False))
    )


def question(principle: str) -> str:
    """Ask which option a principle prefers; the next token is the letter."""
    return f"\n\n{principle}\nThe answer is ("


def reasoned_question(principle: str) -> str:
    """Ask for reasoning first; followed by the reasoning, then `VERDICT`, then the letter (chain of thought)."""
    return f"\n\n{principle}\nThink:"


VERDICT = "\nThe answer is ("


def score_question(principle: str) -> str:
    """Ask for a score of the last response; the next token is a number from 1 to 10."""
    return f"\n\n{principle}\nScore from 1 to 10:"


# ---- what may stand before a judgement ------------------------------------------------------------------------------

PREAMBLES = {
    "none": "",
    "plain": "two answers to one request are given. the judge says which is better.",
    "detailed": (
        "two answers to one request are given. the judge reads both to the end, asks only what the question below asks, and "
        "says which is better. it does not count which is shown first, which is longer or which sounds more sure."
    ),
}


def before(preamble: str, exemplars: list[str]) -> str:
    """What precedes a judgement: a preamble and worked judgements, a blank line after each."""
    return "".join(part + "\n\n" for part in (preamble, *exemplars) if part)


def worked(prompt: str, responses: list[str], principle: str, letter: str, reasoning: str | None = None) -> str:
    """A worked judgement, to show a judge what is wanted (few-shot). `reasoning` begins with its space and is one line."""
    asked = question(principle) if reasoning is None else reasoned_question(principle) + reasoning + VERDICT
    return f"{options(prompt, responses)}{asked}{letter})"
