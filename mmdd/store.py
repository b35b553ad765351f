"""The results store: one JSON file per finished run, packed into one JSON-lines file per sweep."""

import json
from collections.abc import Iterator
from contextlib import suppress
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
        """The latest finished record of a run, from whichever sweep has it, or None."""
        found = []
        for path in sorted(self.folder.glob(f"{_SWEEPS}/{run_id}.json")):
            with suppress(FileNotFoundError):  # packed since; then the packed file has it
                found.append(_read(path))
        for path in sorted(self.folder.glob("*.jsonl")):
            # Parsing a line costs more than looking for the id in it first.
            for number, line in enumerate(_text(path).splitlines(), 1):
                if f'"run_id": "{run_id}"' in line:
                    found.append(_parse(line, f"{path}, line {number}"))
        return max(found, key=_age, default=None)

    def records(self) -> Iterator[dict[str, Any]]:
        """Every finished record once: of several copies, packed or in other sweeps, the latest."""
        latest: dict[str, dict[str, Any]] = {}
        for record in self._all():
            known = latest.get(record["run_id"])
            if known is None or _age(record) > _age(known):
                latest[record["run_id"]] = record
        yield from latest.values()

    def _all(self) -> Iterator[dict[str, Any]]:
        for path in sorted(self.folder.glob(f"{_SWEEPS}/*.json")):
            with suppress(FileNotFoundError):
                yield _read(path)
        for path in sorted(self.folder.glob("*.jsonl")):
            yield from _packed(path)

    def write(self, record: dict[str, Any]) -> Path:
        """Store a finished record, atomically."""
        sweep = record["sweep"]
        path = self.working_folder(sweep) / f"{record['run_id']}.json"
        with self._lock(sweep):  # or packing could remove it right after reading the one before
            atomic_write_text(path, json.dumps(record, sort_keys=True, indent=1) + "\n")
        return path

    def _lock(self, sweep: str) -> FileLock:
        self.folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self.folder / f".{sweep}.lock")

    def working_folder(self, sweep: str) -> Path:
        """The folder of a sweep's records, checkpoints and sets."""
        return self.folder / sweep

    def pack(self, sweep: str) -> Path:
        """Merge a sweep's records into its sorted JSON-lines file; the single files go afterwards.

        Raises `StoreError` when the sweep has no record.
        """
        if not self.folder.exists():
            raise StoreError(f"sweep {sweep!r} has no record under {self.folder}: nothing to pack.")
        # Two sweeps that pack at once would each lose what the other has just written.
        with self._lock(sweep):
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


def _age(record: dict[str, Any]) -> str:
    """When a record was finished, as text that sorts."""
    return str(record.get("finished", ""))


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
        named = [isinstance(record[key], str) for key in ("run_id", "sweep")]
        if not all(named):
            raise TypeError("run_id and sweep must be strings")
    except (ValueError, LookupError, TypeError, RecursionError) as error:
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
