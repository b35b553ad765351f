"""The results store: one JSON file per finished run, packed into one JSON-lines file per sweep.

A packed file starts with a line that says how many records follow, so that a file that was cut
between two lines is an error, not a smaller sweep. Files packed before there was such a line have
none and stay readable.
"""

import json
import re
from collections.abc import Iterator, Set
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from mmdd.disk import locked, writing
from mmdd.errors import StoreError
from mmdd.files import atomic_write_text
from mmdd.seal import sealed, unsealed

SCHEMA = 2
_CHECKED = 2  # from this schema on a record carries a checksum; older ones stay as they are
PACKED, PACKED_VERSION = "mmdd.results", 1  # what the first line of a packed file says of it
_RESTORE = "restore it from version control, or remove it and run it again"
_RUN_ID = re.compile(r'"run_id": "([^"]*)"')
_SWEEPS = "[!.]*"  # hidden folders belong to files that are being written, and come and go


class ResultsStore:
    """Records under a folder: `<sweep>/<run id>.json` while a sweep runs, `<sweep>.jsonl` packed.

    Book: book/status.
    """

    def __init__(self, folder: str | Path = "results") -> None:
        self.folder = Path(folder)

    def find(self, run_id: str) -> dict[str, Any] | None:
        """The latest finished record of a run, from whichever sweep has it, or None."""
        return next(self.records({run_id}), None)

    def records(self, run_ids: Set[str] | None = None) -> Iterator[dict[str, Any]]:
        """Every finished record once: of several copies, packed or in other sweeps, the latest.

        run_ids: of these runs only; the others are not parsed, nor checked for damage.
        """
        latest: dict[str, dict[str, Any]] = {}
        for record in self._all(run_ids):
            known = latest.get(record["run_id"])
            if known is None or _age(record) > _age(known):
                latest[record["run_id"]] = record
        yield from latest.values()

    def _all(self, run_ids: Set[str] | None = None) -> Iterator[dict[str, Any]]:
        """Every copy of every record, or of those of some runs."""
        for path in sorted(self.folder.glob(f"{_SWEEPS}/*.json")):
            if run_ids is None or path.stem in run_ids:
                with suppress(FileNotFoundError):  # packed since; then the packed file has it
                    yield _read(path)
        for path in sorted(self.folder.glob("*.jsonl")):
            yield from _packed(path, run_ids)

    def write(self, record: dict[str, Any]) -> Path:
        """Store a finished record, atomically."""
        sweep = record["sweep"]
        path = self.working_folder(sweep) / f"{record['run_id']}.json"
        with self._lock(sweep):  # or packing could remove it right after reading the one before
            atomic_write_text(path, json.dumps(_to_write(record), sort_keys=True, indent=1) + "\n")
        return path

    def _lock(self, sweep: str) -> AbstractContextManager[None]:
        return locked(self.folder / f".{sweep}.lock")

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
        head = {"format": PACKED, "records": len(merged), "version": PACKED_VERSION}
        entries = [head, *(_to_write(merged[i]) for i in sorted(merged))]
        text = "".join(json.dumps(entry, sort_keys=True) + "\n" for entry in entries)
        atomic_write_text(target, text)
        with writing(self.working_folder(sweep)):
            for path in singles:
                path.unlink()
        return target


def _to_write(record: dict[str, Any]) -> dict[str, Any]:
    return sealed(record) if record["schema"] >= _CHECKED else record


def _age(record: dict[str, Any]) -> str:
    """When a record was finished, as text that sorts."""
    return str(record.get("finished", ""))


def _read(path: Path) -> dict[str, Any]:
    return _parse(_text(path), str(path))


def _packed(path: Path, run_ids: Set[str] | None = None) -> Iterator[dict[str, Any]]:
    """The records of a packed file, or only those of some runs."""
    numbered = enumerate(_text(path).splitlines(), 1)
    lines = [(number, line) for number, line in numbered if line.strip()]
    if not lines:
        raise StoreError(f"{path} is empty, which no packed file is: {_RESTORE}.")
    if f'"format": "{PACKED}"' in lines[0][1]:
        number, head = lines.pop(0)
        _check_head(path, number, head, len(lines))
    for number, line in lines:
        # Parsing a line and checking it costs far more than looking for its id first.
        if run_ids is None or not run_ids.isdisjoint(_RUN_ID.findall(line)):
            record = _parse(line, f"{path}, line {number}")
            if run_ids is None or record["run_id"] in run_ids:
                yield record


def _check_head(path: Path, number: int, line: str, found: int) -> None:
    """Raise `StoreError` where a packed file does not hold what its first line says.

    found: lines after it that hold something.
    """
    try:
        head = json.loads(line)
        version, count = head["version"], head["records"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise _unreadable(f"{path}, line {number}", error) from error
    if version != PACKED_VERSION:
        raise StoreError(
            f"{path} is of version {version!r}, this mmdd reads version {PACKED_VERSION}: install "
            "a newer mmdd."
        )
    if count != found:
        raise StoreError(
            f"{path} should hold {count!r} records and holds {found}: it was cut off, or put "
            f"together by hand; {_RESTORE}."
        )


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
        # A new record that has lost its checksum is as damaged as one that does not fit it.
        if not newer and (record["schema"] >= _CHECKED or "sha256" in record):
            record = unsealed(record)
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise _unreadable(where, error) from error
    if newer:
        raise StoreError(
            f"{where} has schema {record['schema']}, this mmdd reads up to {SCHEMA}: install a "
            "newer mmdd."
        )
    return record


def _unreadable(where: str, error: Exception) -> StoreError:
    return StoreError(f"{where} is not a result record ({error!r}): {_RESTORE}.")
