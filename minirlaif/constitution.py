"""Constitutions: principles to criticise, revise and judge by, and worked examples to put before them, read from JSON.

Ours (data/constitutions/*.json) has a preamble (the assistant's character), `critique_revision` pairs, `preferences` and perhaps
a `judge_preamble` (what a judge is told). The files published with
Constitutional AI (Bai et al. 2022) are read as they are: a dict of {"prompt": [...], "edit_request": ...} for critique and
revision, a list of strings for preferences, and three lists of few-shot examples (`load_few_shot`, `load_exemplars`).
"""

import functools
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from minirlaif.cli import UserError

BUNDLED = Path(__file__).parent.parent / "data" / "constitutions"


@dataclass(frozen=True)
class CritiqueRevision:
    critique: str  # what to look for
    revision: str  # what to change
    name: str = ""  # what it asks for ("asks" in the file); only evaluation reads it, and gold knows these: one of the
    # world's kinds, harm, evasion, helpfulness, honesty; with "inverse-" before it, the principle prefers the worse


@dataclass(frozen=True)
class Preference:
    text: str
    name: str = ""  # what it asks for (see above)


@dataclass(frozen=True)
class Constitution:
    preamble: str = ""
    critique_revision: list[CritiqueRevision] = field(default_factory=list)
    preferences: list[Preference] = field(default_factory=list)
    judge_preamble: str = ""

    def preferences_for(self, *names: str) -> list[Preference]:
        return [p for p in self.preferences if p.name in names]


@dataclass(frozen=True)
class Exemplar:
    """A pair that has been judged, to show a judge how it is done. Reasoning, one line, calls the responses (A) and (B)."""

    prompt: str
    responses: tuple[str, str]
    better: int  # 0 or 1
    reasoning: str = ""


class _Broken(Exception):
    """What is wrong with a file, without its name."""


def path_of(name: str) -> Path:
    return BUNDLED / f"{name}.json" if re.fullmatch(r"\w+", name) else Path(name)


@functools.cache
def load(name: str) -> Constitution:
    """A bundled constitution by name ("toy"), or a file by path. UserError names the file and the key that is wrong."""
    path = path_of(name)
    if not path.exists():
        bundled = ", ".join(sorted(p.stem for p in BUNDLED.glob("*.json")))
        raise UserError(f"{name}: no such constitution; give a .json file or one of: {bundled}")
    return _read(name, path, _parse)


def wording(name: str, principle: str) -> str:
    """What a judge is asked: the first wording of the preference of this name in the constitution `name`, or a text as it is.
    UserError: a single word that is no name in it."""
    wordings = {p.name: p.text for p in reversed(load(name).preferences) if p.name}
    if principle not in wordings and len(principle.split()) < 2:
        known = ", ".join(sorted(wordings)) or "principles without names"
        raise UserError(f"--principle {principle}: {name} has {known}; or give a text, such as 'Choose the safer answer.'")
    return wordings.get(principle, principle)


@functools.cache
def load_few_shot(name: str) -> str:
    """Worked examples of critique and revision as one text, to go before a conversation.

    A text file, or a JSON list of strings like the paper's: dialogues that end in a revision. UserError as in `load`.
    """
    if not name.lower().endswith(".json"):
        try:
            shots = [Path(name).read_text(encoding="utf-8-sig")]
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"{name}: cannot be read as text: {getattr(e, 'strerror', None) or e}") from None
    else:
        shots = _read(name, Path(name), lambda raw: [_entry(i, shot) for i, shot in _numbered(raw)])
    # the conversation that follows opens with "\n\nHuman:" itself; most of the paper's examples end in it too
    shots = [re.sub(r"\s*Human:\s*$", "", shot).rstrip() for shot in shots]
    if not any(shots):
        raise UserError(f"{name}: holds no example")
    return "".join(shot if shot.startswith("\n\n") else "\n\n" + shot.lstrip() for shot in shots)


@functools.cache
def load_exemplars(name: str) -> list[Exemplar]:
    """Judged pairs from the paper's two lists: with `corrects` and `incorrects`, or with reasoning in the prompt."""
    return _read(name, Path(name), lambda raw: [_exemplar(i, row) for i, row in _numbered(raw)])


# ---- reading --------------------------------------------------------------------------------------------------------


def _read(name: str, path: Path, parse):
    try:
        return parse(json.loads(path.read_text(encoding="utf-8-sig")))
    except (OSError, ValueError, RecursionError) as e:  # bad UTF-8 and bad JSON are ValueErrors
        raise UserError(f"{name}: cannot be read as JSON: {e}") from None
    except _Broken as e:
        raise UserError(f"{name}: {e}") from None


def _parse(raw) -> Constitution:
    if isinstance(raw, list):  # the paper's preference principles; each ends in "Options:", which is our template's word
        if any("Human:" in str(entry) for entry in raw):
            raise _Broken("holds examples (few-shot), not principles")
        found = Constitution(preferences=[Preference(_entry(i, text, r"\s*Options:\s*$")) for i, text in _numbered(raw)])
    elif not isinstance(raw, dict):
        raise _Broken("not a constitution: should be an object with preferences and critique_revision, or the paper's lists")
    elif raw and "preferences" not in raw and all(isinstance(v, dict) for v in raw.values()):  # the paper's first file
        found = Constitution(critique_revision=[_papers_pair(name, v) for name, v in raw.items()])
    else:
        _only(raw, "", "name", "preamble", "critique_revision", "preferences", "judge_preamble")
        pairs = [CritiqueRevision(*texts) for texts in _rows(raw, "critique_revision", "critique", "revision", "asks")]
        preferences = [Preference(*texts) for texts in _rows(raw, "preferences", "text", "asks")]
        found = Constitution(_text(raw, "preamble"), pairs, preferences, _text(raw, "judge_preamble"))
    if not found.critique_revision and not found.preferences:
        raise _Broken("holds no critique_revision pair and no preference")
    return found


def _papers_pair(name: str, row: dict) -> CritiqueRevision:
    if isinstance(row.get("prompt"), list) and len(row["prompt"]) == 1:
        row = row | {"prompt": row["prompt"][0]}
    # "\n\nCritiqueRequest: ... \n\nCritique:" down to what it says: text.py puts the template's words back
    critique = _text(row, "prompt", f"{name}: ", r"^\s*CritiqueRequest:\s*|\s*Critique:\s*$")
    return CritiqueRevision(critique, _text(row, "edit_request", f"{name}: ", r"^\s*RevisionRequest:\s*|\s*Revision:\s*$"), name)


PAPERS_REASONING = re.compile(
    r"\s*Human:[^\n]*:\n\n(?P<talk>.*?)\n*\{\}\n \(A\) \[\[\[(?P<a>.*?)\]\]\]\n \(B\) \[\[\[(?P<b>.*?)\]\]\]"
    r"\n\nAssistant: Let's think step by step:\s*(?P<why>.*?)\n\nHuman:\s*So the answer is: \((?P<answer>[AB])\)\s*",
    re.DOTALL,
)


def _exemplar(i: int, row) -> Exemplar:
    where = f"entry {i}: "
    if not isinstance(row, dict):
        raise _Broken(f"{where}should be an object with the key 'prompt'")
    prompt = _text(row, "prompt", where)
    if "corrects" not in row and "incorrects" not in row:
        match = PAPERS_REASONING.fullmatch(prompt)
        if not match:
            raise _Broken(f"{where}key 'prompt' should hold talk, {{}}, options, reasoning and answer like the paper's")
        talk = re.sub(r"(?:^|\n+)([HA]):", lambda m: "\n\nHuman:" if m[1] == "H" else "\n\nAssistant:", match["talk"].strip())
        pair = (" " + match["a"].strip(), " " + match["b"].strip())
        return Exemplar(f"{talk}\n\nAssistant:", pair, "AB".index(match["answer"]), " ".join(match["why"].split()))
    for key in ("corrects", "incorrects"):
        if isinstance(row.get(key), list) and len(row[key]) == 1:
            row = row | {key: row[key][0]}
    pair = [" " + _text(row, key, where).strip() for key in ("corrects", "incorrects")]
    better = i % 2  # the right answer is (B) and (A) in turn, so that the examples teach no letter
    return Exemplar(prompt, tuple(pair[::-1] if better else pair), better)


def _numbered(raw):
    if not isinstance(raw, list):
        raise _Broken("should be a list of examples")
    return enumerate(raw, 1)


def _rows(raw: dict, key: str, *known: str):
    """The texts of each entry of the list raw[key], in the order of the known keys."""
    rows = raw.get(key, [])
    if not isinstance(rows, list):
        raise _Broken(f"key '{key}' should hold a list")
    for i, row in enumerate(rows, 1):
        where = f"key '{key}' entry {i}: "
        if not isinstance(row, dict):
            raise _Broken(f"{where}should be an object with the keys {', '.join(known)}")
        _only(row, where, *known)
        yield [_text(row, k, where) for k in known]


def _only(row: dict, where: str, *known: str):
    if unknown := [key for key in row if key not in known]:  # a misspelt "asks" would go unnoticed
        raise _Broken(f"{where}key '{unknown[0]}' is not known; these are: {', '.join(known)}")


def _entry(i: int, value, template: str | None = None) -> str:
    return _text({f"entry {i}": value}, f"entry {i}", template=template)


def _text(row: dict, key: str, where: str = "", template: str | None = None) -> str:
    """row[key], checked; what matches `template` is taken out, and the space around the rest."""
    optional = key in ("asks", "preamble", "judge_preamble")
    if key not in row and not optional:
        raise _Broken(f"{where}key '{key}' is missing")
    value = row.get(key, "")
    said = re.sub(template, "", value).strip() if template and isinstance(value, str) else value
    if not isinstance(value, str) or not (said.strip() or optional):
        raise _Broken(f"{where}key '{key}' should hold text, not {value!r:.60}")
    return said
