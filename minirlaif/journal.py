"""A journal of answers: one JSON line each, on the disk before anything else happens.

An answer of an endpoint costs money and an answer of a slow model costs time, so what has been received is never asked
for again: a process that is killed leaves at most one line half-written, which is cut off when the journal is opened again.
"""

import json
import os
from pathlib import Path

from minirlaif.cli import UserError


class Journal:
    """{key: record} on disk. `with Journal(path) as journal`: a key is written once, and read back ever after."""

    def __init__(self, path):
        self.path, self.records = Path(path), {}
        content = self.path.read_bytes() if self.path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]  # a line without its end was being written when the process died
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                self.records.setdefault(row["key"], row["record"])
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path}:{number}: not a line of a journal; give another --out to start again") from None
        try:
            self.file = open(self.path, "ab")  # noqa: SIM115 (open for the life of this object)
            self.file.truncate(len(whole))
        except OSError as e:
            raise UserError(f"{path}: cannot write: {e.strerror}") from e

    def add(self, records: dict):
        """Write records under their keys, and wait until they are on the disk. Keys that are there already are kept."""
        new = {key: record for key, record in records.items() if key not in self.records}
        if not new:
            return
        try:
            self.file.write(b"".join(json.dumps({"key": k, "record": r}).encode() + b"\n" for k, r in new.items()))
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as e:
            raise UserError(f"{self.path}: cannot write: {e.strerror}; what was there before is safe") from e
        self.records |= new

    def __contains__(self, key) -> bool:
        return key in self.records

    def __getitem__(self, key) -> dict:
        return self.records[key]

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.file.close()
