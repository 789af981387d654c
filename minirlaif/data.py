"""JSONL files in, token batches out.

Every stage reads and writes one JSON object a line. What the readers here return is `Row`s: plain dicts that remember the
file and line they came from, so that a complaint made much later (a prompt too long for the model, say) still names it.
Public data is dirty: `on_bad_row="error"` stops at the first bad row with `path:line: reason`, `"skip"` leaves bad rows out
and prints once how many, by reason. Paths are shown as the user typed them.

Texts are verbatim: a prompt is "\\n\\nHuman: ...\\n\\nAssistant:", a response starts with its own leading space. The two are
encoded separately and joined, so the boundary is where it was.
"""

import contextlib
import gzip
import json
import math
import os
import sys
import zlib
from collections import Counter
from pathlib import Path

import torch

from minirlaif.cli import UserError


class Row(dict):
    """One JSON object; `where` is its "path:line"."""

    def __init__(self, items, where):
        super().__init__(items)
        self.where = where


class BadRow(Exception):
    """This row cannot be used. reason: the kind of fault, by which skips are counted; detail: what is special here."""

    def __init__(self, reason, detail=""):
        super().__init__(reason + detail)
        self.reason = reason


def convert(rows, function, on_bad_row="error"):
    """[function(row) for row in rows]; a BadRow stops everything as a UserError, or is skipped and counted. on_bad_row=None: it
    stops, and the script has no such flag to speak of."""
    kept, skipped = [], Counter()
    for row in rows:
        try:
            kept.append(function(row))
        except BadRow as e:
            if on_bad_row != "skip":
                hint = " (--on-bad-row skip leaves such rows out)" if on_bad_row else ""
                raise UserError(f"{row.where}: {e}{hint}") from None
            skipped[e.reason] += 1
    path = rows[0].where.rpartition(":")[0] if rows else "no file"
    if skipped:
        reasons = ", ".join(f"{n} {reason}" for reason, n in skipped.most_common())
        print(f"{path}: skipped {sum(skipped.values())} of {len(rows)} rows: {reasons}", file=sys.stderr)
    if not kept:
        raise UserError(f"{path}: no usable rows")
    return kept


def read_jsonl(path, required=None, on_bad_row="error", check=lambda row: row):
    """A .jsonl or .jsonl.gz file -> list[Row].

    required: {key: type}; the key must be there with that type (float takes ints too, nothing takes a bool for a number).
    check(row) -> Row may rearrange the row or raise BadRow. Blank lines are no rows. UserError: the file is missing, is
    not readable or has no usable rows, or (on_bad_row="error") a row is bad.
    """

    def decode(line):
        try:
            row = json.loads(line["bytes"].decode("utf-8"))
        except UnicodeDecodeError as e:
            raise BadRow("not UTF-8", f" (byte {e.start + 1} of the line)") from None
        except (ValueError, RecursionError) as e:
            raise BadRow("not JSON", f" ({e})") from None
        if not isinstance(row, dict):
            raise BadRow("not a JSON object", f" but {_kind(row)}")
        row = Row(row, line.where)
        for key, kind in (required or {}).items():
            _require(row, key, kind)
        return check(row)

    lines = _read_bytes(path).removeprefix(b"\xef\xbb\xbf").split(b"\n")  # not splitlines: JSON strings may hold U+2028
    lines = [Row({"bytes": line}, f"{path}:{i}") for i, line in enumerate(lines, 1) if line.strip()]
    if not lines:
        raise UserError(f"{path}: the file is empty")
    return convert(lines, decode, on_bad_row)


def _read_bytes(path):
    try:
        with gzip.open(path) if str(path).endswith(".gz") else open(path, "rb") as f:
            return f.read()
    except gzip.BadGzipFile:
        raise UserError(f"{path}: not a gzip file, whatever its name says") from None
    except (EOFError, zlib.error):
        raise UserError(f"{path}: not a complete gzip file") from None
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None


def _require(row, key, kind, default=None):
    """row[key] must be a `kind`; a missing key takes the default when there is one."""
    if key not in row:
        if default is None:
            raise BadRow(f"no key '{key}'")
        row[key] = default
    value = row[key]
    good = isinstance(value, (int, float) if kind is float else kind)
    if not good or (isinstance(value, bool) and kind is not bool):
        raise BadRow(f"'{key}' should be {_NAMES[kind]}", f", not {_kind(value)}")
    if key == "prompt" and not value.strip():
        raise BadRow("empty prompt", " (key 'prompt')")


_NAMES = {str: "a string", bool: "true or false", int: "an integer", float: "a number", list: "a list", dict: "an object"}


def _kind(value):
    return "null" if value is None else _NAMES[type(value)]


def read_prompts(path, on_bad_row="error"):
    """Rows with `prompt` (other keys are kept). HH-RLHF files give the dialogue up to the last answer."""
    return read_jsonl(path, {}, on_bad_row, _with_prompt)


def read_completions(path, on_bad_row="error"):
    """Rows with `prompt`, `completion` and `stopped` (default true: it ended by itself)."""
    return read_jsonl(path, {}, on_bad_row, _with_completion)


def read_examples(path, on_bad_row="error"):
    """Rows of any of these kinds: with `completion`, as read_completions; with `text` or `segments`, or a .txt file, as
    read_documents; any other, as read_prompts."""

    def check(row):
        if "completion" in row:
            return _with_completion(row)
        if "text" in row or "segments" in row:
            return _with_segments(row)
        if "prompt" not in row and "chosen" not in row:
            raise BadRow("no key 'prompt', 'completion', 'text' or 'segments'")
        return _with_prompt(row)

    return read_documents(path) if is_text(path) else read_jsonl(path, {}, on_bad_row, check)


def read_candidates(path, on_bad_row="error"):
    """Rows with `prompt` and `responses` (two or more), perhaps `ranks` (one a response, smaller is better), `stopped` (whether
    each came to its own end) and `sources` (where each came from).

    `summary_1`, `summary_2` are read as two responses; a preference pair as two responses, a human's (which has no `p_chosen`)
    with ranks 0 and 1.
    """

    def check(row):
        row = _with_prompt(row)
        if "responses" not in row:
            keys = next((keys for keys in (("summary_1", "summary_2"), ("chosen", "rejected")) if keys[0] in row), ())
            for key in keys:
                _require(row, key, str)
            if keys:
                row["responses"] = [row[key] for key in keys]
            if "chosen" in keys and "p_chosen" not in row:
                row["ranks"] = [0, 1]
        _require(row, "responses", list)
        responses = row["responses"]
        if len(responses) < 2 or not all(isinstance(r, str) for r in responses):
            raise BadRow("'responses' should be two or more strings")
        if row.get("ranks") is None:
            row.pop("ranks", None)
        for key, what, good in (
            ("ranks", "finite number", lambda x: type(x) in (int, float) and math.isfinite(x)),
            ("stopped", "true or false", lambda x: isinstance(x, bool)),
            ("sources", "string", lambda x: isinstance(x, str)),
        ):
            found = row.get(key, responses)
            if not isinstance(found, list) or len(found) != len(responses) or not (key not in row or all(map(good, found))):
                raise BadRow(f"'{key}' should be one {what} a response")
        return row

    return read_jsonl(path, {}, on_bad_row, check)


def read_preferences(path, on_bad_row="error"):
    """Rows with `prompt`, `chosen`, `rejected`, and `p_chosen` in [0.5, 1] (default 1: a hard label).

    HH-RLHF files are recognised. Rows whose p_chosen is null carry no label (a tie or a failure that was to be dropped):
    they are left out, and said so, whatever on_bad_row is.
    """

    def check(row):
        row = _with_prompt(row)
        _require(row, "chosen", str)
        _require(row, "rejected", str)
        if row["chosen"] == row["rejected"]:
            raise BadRow("chosen and rejected are the same")
        if not (row["chosen"].strip() and row["rejected"].strip()):
            raise BadRow("empty response")
        if row.get("p_chosen", 1.0) is not None:
            _require(row, "p_chosen", float, default=1.0)
            if not 0.5 <= row["p_chosen"] <= 1:
                raise BadRow("p_chosen is not in [0.5, 1]", f" but {row['p_chosen']}")
        return row

    rows = read_jsonl(path, {}, on_bad_row, check)
    labelled = [row for row in rows if row["p_chosen"] is not None]
    if len(labelled) < len(rows):
        print(f"{path}: {len(rows) - len(labelled)} of {len(rows)} pairs have no label", file=sys.stderr)
    if not labelled:
        raise UserError(f"{path}: no pair has a label")
    return labelled


def read_documents(path, on_bad_row="error"):
    """Text to train on -> rows with `segments` [[text, loss weight], ...] and `stopped` (an end-of-text token follows).

    Read from rows with `segments`; with `text` (weight 1); with `prompt` and `completion` (weights 0 and 1); from HH-RLHF
    files (the chosen dialogue, weight 1); or from a .txt file, which is one text.
    """

    if not is_text(path):
        return read_jsonl(path, {}, on_bad_row, _with_segments)
    try:
        return [_with_segments(Row({"text": _read_bytes(path).decode("utf-8-sig")}, f"{path}:1"))]
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 (byte {e.start + 1})") from None
    except BadRow:
        raise UserError(f"{path}: the file is empty") from None


def is_text(path):
    """Whether a file is one plain text, as its name says."""
    return str(path).lower().endswith(".txt")


def _with_segments(row):
    """`segments`, from a row of read_documents."""
    if "segments" in row:
        _require(row, "segments", list)
        for s in row["segments"]:
            if not (isinstance(s, list) and len(s) == 2 and isinstance(s[0], str) and type(s[1]) in (int, float)):
                raise BadRow("a segment should be [text, weight]")
            if not 0 <= s[1] <= 1e6:  # NaN and infinity are neither
                raise BadRow("the weight of a segment should be 0 or more", f", not {s[1]:.3g}")
    elif "completion" in row:
        row = _with_completion(row)
        row["segments"] = [[row["prompt"], 0.0], [row["completion"], 1.0]]
    else:
        key = "chosen" if _is_dialogue_pair(row) else "text"
        if key not in row:
            raise BadRow("no text to train on", ": a row needs 'text', or 'segments', or 'prompt' and 'completion'")
        _require(row, key, str)
        row["segments"] = [[row[key], 1.0]]
    if not any(text for text, _ in row["segments"]):
        raise BadRow("empty text")
    return _with_stopped(row)


def _with_completion(row):
    _require(row, "prompt", str)
    _require(row, "completion", str)
    return _with_stopped(row)


def _with_stopped(row):
    _require(row, "stopped", bool, default=True)
    return row


def _is_dialogue_pair(row):
    return "prompt" not in row and isinstance(row.get("chosen"), str) and isinstance(row.get("rejected"), str)


def _with_prompt(row):
    """Check `prompt`; two whole dialogues (HH-RLHF: no prompt, only chosen and rejected) are split before the last answer."""
    if _is_dialogue_pair(row):
        turn = "\n\nAssistant:"
        (prompt, mark, chosen), (other, _, rejected) = row["chosen"].rpartition(turn), row["rejected"].rpartition(turn)
        if not mark or prompt != other:
            raise BadRow("chosen and rejected do not share a prompt that ends in '\\n\\nAssistant:'")
        if "\n\nHuman:" in chosen + rejected:
            raise BadRow("a dialogue that ends in a human turn")
        row.update(prompt=prompt + turn, chosen=chosen, rejected=rejected)
    _require(row, "prompt", str)
    return row


def encode_pair(tokenizer, prompt, response, stopped=True):
    """Prompt and response encoded separately and joined -> (ids, prompt_len); end-of-text follows if it stopped."""
    head = tokenizer.encode(prompt)
    return head + tokenizer.encode(response) + [tokenizer.eot] * stopped, len(head)


def encode_document(tokenizer, row):
    """A row of read_documents -> (ids, weights): the loss weight of every token; end-of-text weighs what came last."""
    ids, weights = [], []
    for text, weight in [*row["segments"], *([[None, row["segments"][-1][1]]] if row["stopped"] else [])]:
        piece = [tokenizer.eot] if text is None else tokenizer.encode(text)
        ids += piece
        weights += [float(weight)] * len(piece)
    return ids, weights


def check_length(prompt_len, response_len, block_size):
    """BadRow when prompt + response (tokens) do not fit into the model's context. For use inside `convert`."""
    if prompt_len + response_len > block_size:
        raise BadRow(
            "longer than the model's context",
            f": {prompt_len} prompt + {response_len} response tokens, block_size {block_size}",
        )


def check_room(max_new_tokens, block_size):
    """UserError when not even the shortest prompt would leave room for the response."""
    if max_new_tokens >= block_size:
        raise UserError(f"--max-new-tokens {max_new_tokens}: the model's context holds {block_size} tokens, prompt and all")


def pad(sequences, pad_id, multiple=1, limit=None):
    """Lists of ids -> tokens [B, T] padded on the right, length [B].

    T is the longest length, rounded up to `multiple` (fewer distinct shapes run faster) but not beyond `limit`.
    """
    length = torch.tensor([len(s) for s in sequences])
    T = longest = int(length.max())
    T += -T % multiple
    if limit is not None:
        T = max(longest, min(T, limit))
    tokens = torch.full((len(sequences), T), pad_id)
    for row, s in zip(tokens, sequences, strict=True):
        row[: len(s)] = torch.tensor(s, dtype=torch.long)
    return tokens, length


def to_device(x, device):
    """x there; to a GPU from pinned memory, so that nobody waits for the copy."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def batches_by_tokens(lengths, tokens_per_batch, generator, multiple=16):
    """Indices cut into batches of rows of about one length, in random order -> list of index lists.

    A batch padded to a multiple of `multiple` has at most tokens_per_batch tokens, pads included (a single row may have
    more). Each index comes once. Rows of one length meet in random company, drawn from the torch.Generator.
    """
    rounded = [n + -n % multiple for n in lengths]
    order = torch.randperm(len(lengths), generator=generator).tolist()
    order.sort(key=lambda i: rounded[i])
    batches = []
    for i in order:  # lengths ascend, so row i sets the width of the batch it joins
        if not batches or (len(batches[-1]) + 1) * rounded[i] > tokens_per_batch:
            batches.append([])
        batches[-1].append(i)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


@contextlib.contextmanager
def atomic_write(path, previous=None):
    """A binary file that appears as `path` only when it is complete: readers see the old content or the new, never half.

    Temporary name in the same folder, fsync, rename, fsync of the folder; the old file is renamed `previous`, if given.
    UserError: the disk is full, or the folder is missing or not writable; the old file is then untouched.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException as e:
        with contextlib.suppress(OSError):
            temporary.unlink()
        cause = e if isinstance(e, OSError) else e.__context__  # torch.save hides a failed write behind a RuntimeError
        if isinstance(cause, OSError):
            raise UserError(f"{path}: cannot write: {cause.strerror}") from e
        raise


def sync(path):
    """Wait until a file, or a folder's list of names, is on the disk. (Windows does not open folders.)"""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_jsonl(path, rows):
    """Dicts -> one JSON object a line, atomically; the folder is made if need be."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as f:
        for row in rows:
            # backslashreplace: a lone surrogate, which JSON can hold and UTF-8 cannot, becomes its JSON escape
            f.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
