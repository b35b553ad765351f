"""The results store: one JSON file per finished run, packed into one JSON-lines file per sweep."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from mmdd.errors import StoreError
from mmdd.files import atomic_write_text

SCHEMA = 1
_SWEEPS = "[!.]*"  # hidden folders belong to files that are being written, and come and go


class ResultsStore:
    """Records under a folder: `<sweep>/<run id>.json` while a sweep runs, `<sweep>.jsonl` packed.

    Book: book/status.
    """

    def __init__(self, folder: str | Path = "results") -> None:
        self.folder = Path(folder)

    def find(self, run_id: str) -> dict[str, Any] | None:
        """The finished record of a run, from whichever sweep has it, or None."""
        for path in sorted(self.folder.glob(f"{_SWEEPS}/{run_id}.json")):
            return _read(path)
        for path in sorted(self.folder.glob("*.jsonl")):
            # Parsing a line costs more than looking for the id in it first.
            for number, line in enumerate(_text(path).splitlines(), 1):
                if f'"run_id": "{run_id}"' in line:
                    return _parse(line, f"{path}, line {number}")
        return None

    def records(self) -> Iterator[dict[str, Any]]:
        """Every finished record once; an unpacked one goes before its packed copy."""
        seen: set[str] = set()
        for path in sorted(self.folder.glob(f"{_SWEEPS}/*.json")):
            record = _read(path)
            if record["run_id"] not in seen:
                seen.add(record["run_id"])
                yield record
        for path in sorted(self.folder.glob("*.jsonl")):
            for record in _packed(path):
                if record["run_id"] not in seen:
                    seen.add(record["run_id"])
                    yield record

    def write(self, record: dict[str, Any]) -> Path:
        """Store a finished record, atomically."""
        path = self.working_folder(record["sweep"]) / f"{record['run_id']}.json"
        atomic_write_text(path, json.dumps(record, sort_keys=True, indent=1) + "\n")
        return path

    def working_folder(self, sweep: str) -> Path:
        """The folder of a sweep's records, checkpoints and sets."""
        return self.folder / sweep

    def pack(self, sweep: str) -> Path:
        """Merge a sweep's records into its sorted JSON-lines file; the single files go afterwards.

        Raises `StoreError` when the sweep has no record.
        """
        # Two sweeps that pack at once would each lose what the other has just written.
        with FileLock(self.folder / f".{sweep}.lock"):
            return self._pack(sweep)

    def _pack(self, sweep: str) -> Path:
        singles = sorted(self.working_folder(sweep).glob("*.json"))
        target = self.folder / f"{sweep}.jsonl"
        merged: dict[str, dict[str, Any]] = {}
        if target.exists():
            merged |= {record["run_id"]: record for record in _packed(target)}
        merged |= {record["run_id"]: record for record in map(_read, singles)}
        if not merged:
            raise StoreError(f"sweep {sweep!r} has no record under {self.folder}: nothing to pack.")
        lines = [json.dumps(merged[run_id], sort_keys=True) for run_id in sorted(merged)]
        atomic_write_text(target, "\n".join(lines) + "\n")
        for path in singles:
            path.unlink()
        return target


def _read(path: Path) -> dict[str, Any]:
    return _parse(_text(path), str(path))


def _packed(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_text(path).splitlines(), 1):
        if line.strip():
            yield _parse(line, f"{path}, line {number}")


def _text(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise _unreadable(f"{path}, line {line}", error) from error


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
        newer = record["schema"] > SCHEMA
        record["run_id"], record["sweep"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise _unreadable(where, error) from error
    if newer:
        raise StoreError(
            f"{where} has schema {record['schema']}, this mmdd reads up to {SCHEMA}: install a "
            "newer mmdd."
        )
    return record


def _unreadable(where: str, error: Exception) -> StoreError:
    return StoreError(
        f"{where} is not a result record ({error!r}): restore it from version control, or "
        "remove it and run it again."
    )
