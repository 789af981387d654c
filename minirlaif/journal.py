"""A journal of answers: one JSON line each, on the disk before anything else happens.

An answer of an endpoint costs money and an answer of a slow model costs time, so what has been received is never asked
for again: a process that is killed leaves at most one line half-written, which is cut off when the journal is opened again.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path

from minirlaif.cli import UserError
from minirlaif.data import sync

try:
    import fcntl
except ImportError:  # Windows: there nothing keeps a second process away
    fcntl = None


class Journal:
    """{key: record} on disk. `with Journal(path) as journal`: a key is written once, and read back ever after.

    It is held by one process at a time. UserError: another one has it, or the file cannot be read or written.
    """

    def __init__(self, path):
        self.path, self.records = Path(path), {}
        try:
            is_new = not self.path.exists()
            self.file = open(self.path, "ab")  # noqa: SIM115 (open for the life of this object)
            if is_new:
                sync(self.path.parent)  # its name, too, must outlive a power cut
            if fcntl:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read()
        except BlockingIOError:
            raise UserError(f"{path}: another process is writing it; wait for that, or give another --out") from None
        except OSError as e:
            raise UserError(f"{path}: cannot write: {e.strerror}") from e

    def _read(self):
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]  # a line without its end was being written when the process died
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                self.records.setdefault(row["key"], {**row["record"]})
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{self.path}:{number}: not a line of a journal; give another --out to start again") from None
        self.file.truncate(len(whole))

    def add(self, records: dict, durable=True):
        """Write records under their keys; keys that are there already are kept. durable: wait until they are on the disk. If
        not, they outlive this process, but not a power cut."""
        new = {key: record for key, record in records.items() if key not in self.records}
        if not new:
            return
        try:
            self.file.write(b"".join(json.dumps({"key": k, "record": r}).encode() + b"\n" for k, r in new.items()))
            self.file.flush()
            if durable:
                os.fsync(self.file.fileno())
        except OSError as e:
            raise UserError(f"{self.path}: cannot write: {e.strerror}; what was there before is safe") from e
        self.records |= new

    def fill(self, keys: list[str], ask, kind, durable=True, on_answer=None) -> list:
        """Ask for what is not here, and write each answer as it comes -> one answer a key, of the dataclass `kind`.

        ask(on_answer, given): as in labelers.py and endpoint.py, with indices into keys. An answer that is returned and yet
        not here was no reply: it is to be asked again, and only what was paid in vain is kept, under a key of its own.
        on_answer(answer): called when each new one is written.
        """

        def write(i, answer):
            self.add({keys[i]: asdict(answer)}, durable)
            if on_answer:
                on_answer(answer)

        try:
            given = {i: kind(**self.records[key]) for i, key in enumerate(keys) if key in self.records}
        except TypeError:
            raise UserError(f"{self.path}: a record is no {kind.__name__}; give another --out to start again") from None
        answers = ask(on_answer=write, given=given)
        for key, answer in zip(keys, answers, strict=True):
            if answer.cost and key not in self.records:
                self.add({f"{key} in vain {len(self.records)}": asdict(answer)})
        return answers

    def clear(self):
        """Forget what is here: it belongs to a run that never began."""
        self.file.truncate(0)
        self.records = {}

    @property
    def cost(self) -> float:
        return sum(record.get("cost", 0) for record in self.records.values())

    def __contains__(self, key) -> bool:
        return key in self.records

    def __getitem__(self, key) -> dict:
        return self.records[key]

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.file.close()
