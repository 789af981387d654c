"""Constitutions: principles to criticise, revise and judge by, read from JSON.

Ours (data/constitutions/*.json) has a preamble, `critique_revision` pairs and `preferences`. The files published with
Constitutional AI (Bai et al. 2022) are read as they are: a dict of {"prompt": [...], "edit_request": ...} for critique and
revision, a list of strings for preferences.
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
    name: str = ""  # what it asks for: one of the world's kinds, or "harm"; only evaluation reads it


@dataclass(frozen=True)
class Preference:
    text: str
    name: str = ""  # what it asks for (see above)


@dataclass(frozen=True)
class Constitution:
    preamble: str = ""
    critique_revision: list[CritiqueRevision] = field(default_factory=list)
    preferences: list[Preference] = field(default_factory=list)

    def preferences_for(self, *names: str) -> list[Preference]:
        return [p for p in self.preferences if p.name in names]


def _keyword(text: str, word: str) -> str:
    """Cut the paper's "\\n\\nCritiqueRequest: ... \\n\\nCritique:" down to what it says."""
    return re.sub(rf"^\s*{word}Request:\s*|\s*{word}:\s*$", "", text).strip()


@functools.cache
def load(name: str) -> Constitution:
    """A bundled constitution by name ("toy"), or a file by path. UserError names the file and the key that is wrong."""
    path = BUNDLED / f"{name}.json" if re.fullmatch(r"\w+", name) else Path(name)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        bundled = ", ".join(sorted(p.stem for p in BUNDLED.glob("*.json")))
        raise UserError(f"{name}: no such constitution; give a .json file or one of: {bundled}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise UserError(f"{name}: cannot be read as a JSON constitution: {e}") from None
    try:
        found = _parse(raw)
    except KeyError as e:
        raise UserError(f"{name}: key {e} is missing") from None
    except (TypeError, AttributeError, IndexError):
        raise UserError(f"{name}: not a constitution: expected preferences and critique_revision pairs as strings") from None
    if not isinstance(found.preamble, str):
        raise UserError(f"{name}: key 'preamble' should hold text")
    for part in (*found.critique_revision, *found.preferences):
        for key, value in vars(part).items():
            if not isinstance(value, str) or not (value.strip() or key == "name"):
                raise UserError(f"{name}: key '{'asks' if key == 'name' else key}' should hold text, not {value!r}")
    if not found.critique_revision and not found.preferences:
        raise UserError(f"{name}: holds no critique_revision pair and no preference")
    return found


def _parse(raw) -> Constitution:
    if isinstance(raw, list):  # the paper's preference principles; each ends in "Options:", which is our template's word
        return Constitution(preferences=[Preference(re.sub(r"\s*Options:\s*$", "", text).strip()) for text in raw])
    if raw and all(isinstance(v, dict) and "edit_request" in v for v in raw.values()):  # the paper's critique-revision file
        pairs = [
            CritiqueRevision(_keyword(v["prompt"][0], "Critique"), _keyword(v["edit_request"], "Revision"), name)
            for name, v in raw.items()
        ]
        return Constitution(critique_revision=pairs)
    pairs = [CritiqueRevision(p["critique"], p["revision"], p.get("asks", "")) for p in raw.get("critique_revision", [])]
    preferences = [Preference(p["text"], p.get("asks", "")) for p in raw.get("preferences", [])]
    return Constitution(raw.get("preamble", ""), pairs, preferences)
