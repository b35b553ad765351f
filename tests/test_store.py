"""The results store: whole records, packed or not, and errors that name the line."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from mmdd.errors import StoreError
from mmdd.store import SCHEMA, ResultsStore


def record(run_id: str, sweep: str = "s", **values: Any) -> dict[str, Any]:
    return {"schema": SCHEMA, "run_id": run_id, "sweep": sweep, "note": "größer", **values}


@pytest.fixture
def store(tmp_path: Path) -> ResultsStore:
    return ResultsStore(tmp_path / "results")


def ids(store: ResultsStore) -> list[str]:
    return [r["run_id"] for r in store.records()]


def packed(path: Path) -> list[str]:
    """The lines of a packed file that are records, below the one that counts them."""
    head, *lines = path.read_text(encoding="utf-8").splitlines()
    assert json.loads(head) == {"format": "mmdd.results", "records": len(lines), "version": 1}
    return lines


def test_an_empty_store(store: ResultsStore) -> None:
    assert store.find("a") is None
    assert ids(store) == []
    with pytest.raises(StoreError, match="sweep 's' has no record"):
        store.pack("s")
    assert not store.folder.exists()


def test_write_and_find(store: ResultsStore) -> None:
    path = store.write(record("a", value=0.1))
    assert path == store.folder / "s" / "a.json"
    assert store.find("a") == record("a", value=0.1)
    assert ResultsStore(str(store.folder)).find("a") == record("a", value=0.1)
    assert store.find("b") is None
    store.write(record("a", value=0.2))
    assert store.find("a") == record("a", value=0.2)
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_the_latest_copy_of_a_record_counts(store: ResultsStore) -> None:
    """A record that was redone under another sweep is not hidden by the old one, packed or not."""
    old, new = "2026-01-01T00:00:00+00:00", "2026-01-02T00:00:00+00:00"
    for first, second in ((old, new), (new, old)):
        store.write(record("x", sweep="a", finished=first))
        store.write(record("x", sweep="b", finished=second))
        for pack in ((), ("a",), ("b",)):
            for sweep in pack:
                store.pack(sweep)
            found = store.find("x")
            assert found is not None
            assert found["finished"] == new
            assert [r["finished"] for r in store.records()] == [new]


def test_the_records_of_some_runs(store: ResultsStore) -> None:
    """Single or packed; another run's damage is not in the way, that of an asked one is named."""
    for run_id in ("a", "b", "c"):
        store.write(record(run_id))
    packed_file = store.pack("s")
    store.write(record("d", sweep="t"))
    store.write(record("e", sweep="t"))
    assert {r["run_id"] for r in store.records({"b", "d", "none"})} == {"b", "d"}
    assert list(store.records(set())) == []
    assert len(ids(store)) == 5
    damaged = packed_file.read_text(encoding="utf-8").replace('"run_id": "c"', '"run_id": "c" 1')
    packed_file.write_text(damaged, encoding="utf-8")
    assert {r["run_id"] for r in store.records({"b", "d"})} == {"b", "d"}
    with pytest.raises(StoreError, match="line 4"):
        list(store.records({"c"}))
    with pytest.raises(StoreError, match="line 4"):
        list(store.records())


def test_packing_and_writing_take_turns(store: ResultsStore) -> None:
    """A record written while another process packs is written before or after, never lost."""
    store.write(record("x", finished="1"))
    written = threading.Event()

    def write() -> None:
        store.write(record("x", finished="2"))
        written.set()

    with store._lock("s"):
        thread = threading.Thread(target=write)
        thread.start()
        assert not written.wait(0.3)
    thread.join()
    store.pack("s")
    found = store.find("x")
    assert found is not None
    assert found["finished"] == "2"


def test_a_file_that_is_packed_meanwhile_is_no_error(
    store: ResultsStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process packs between the listing of the files and the reading of one."""
    store.write(record("x"))
    listing = Path.glob

    def glob(self: Path, pattern: str) -> list[Path]:
        found = list(listing(self, pattern))
        if found and found[0].suffix == ".json" and not (store.folder / "s.jsonl").exists():
            monkeypatch.undo()
            store.pack("s")
        return found

    monkeypatch.setattr(Path, "glob", glob)
    assert store.find("x") == record("x")
    assert (store.folder / "s.jsonl").exists()
    assert ids(store) == ["x"]


def test_other_files_of_a_sweep_are_no_records(store: ResultsStore) -> None:
    store.write(record("a"))
    for name in ("sets/x.safetensors", "checkpoints/y.safetensors", "notebooks/a.ipynb"):
        path = store.folder / "s" / name
        path.parent.mkdir()
        path.write_text("{}")
    (store.folder / "README.md").write_text("hello")
    assert ids(store) == ["a"]


def test_packing(store: ResultsStore) -> None:
    for name in ("c", "a"):
        store.write(record(name, value=1))
    path = store.pack("s")
    assert path == store.folder / "s.jsonl"
    lines = packed(path)
    assert [json.loads(line)["run_id"] for line in lines] == ["a", "c"]
    assert list((store.folder / "s").glob("*.json")) == []
    assert store.find("c") == record("c", value=1)
    before = path.read_bytes()
    assert store.pack("s") == path
    assert path.read_bytes() == before  # idempotent

    store.write(record("b"))
    store.write(record("c", value=2))  # done again: the newer one counts, packed or not
    assert store.find("c") == record("c", value=2)
    assert [r.get("value") for r in store.records()] == [None, 2, 1]
    store.pack("s")
    lines_after = packed(path)
    assert [json.loads(line)["run_id"] for line in lines_after] == ["a", "b", "c"]
    assert lines_after[0] == lines[0]
    assert store.find("c") == record("c", value=2)


def test_sweeps_are_packed_one_by_one(store: ResultsStore) -> None:
    store.write(record("a", "one"))
    store.write(record("b", "two"))
    store.pack("one")
    assert sorted(p.name for p in store.folder.glob("*.jsonl")) == ["one.jsonl"]
    assert ids(store) == ["b", "a"]
    assert store.find("a") == record("a", "one")


def test_a_run_in_two_sweeps_comes_once(store: ResultsStore) -> None:
    store.write(record("a", "one"))
    store.write(record("a", "two"))
    assert ids(store) == ["a"]
    store.pack("one")
    assert ids(store) == ["a"]


def test_blank_lines_do_not_matter(store: ResultsStore) -> None:
    store.write(record("a"))
    path = store.pack("s")
    path.write_text(path.read_text() + "\n\n")
    assert ids(store) == ["a"]
    store.pack("s")
    assert path.read_text().count("\n") == 2


DAMAGED = [
    b'{"schema": 1, "run_id": "b", "sw',
    b"[1, 2]",
    b'{"run_id": "b", "sweep": "s"}',
    b'{"schema": 1, "sweep": "s"}',
    b'{"schema": 2, "run_id": "b", "sweep": "s"}',
    b'{"schema": "x", "run_id": "b", "sweep": "s"}',
    b'{"schema": 1, "run_id": "b", "sweep": "\xff"}',
    b"<<<<<<< HEAD",
]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_record_is_named(store: ResultsStore, content: bytes) -> None:
    store.write(record("a"))
    (store.folder / "s" / "b.json").write_bytes(content)
    with pytest.raises(StoreError, match=r"b\.json.* is not a result record.*remove it"):
        ids(store)
    with pytest.raises(StoreError, match=r"b\.json"):
        store.find("b")
    with pytest.raises(StoreError, match=r"b\.json"):
        store.pack("s")
    assert store.find("a") == record("a")
    assert not (store.folder / "s.jsonl").exists()


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_line_is_named(store: ResultsStore, content: bytes) -> None:
    for name in ("a", "b", "c"):
        store.write(record(name))
    path = store.pack("s")
    head, first, _, last = path.read_bytes().splitlines()
    for lines in ((head, first, content, last), (first, content, last)):  # with a count or without
        before = b"\n".join(lines) + b"\n"
        path.write_bytes(before)
        number = lines.index(content) + 1
        for action in (lambda: ids(store), lambda: store.pack("s")):
            with pytest.raises(StoreError, match=rf"s\.jsonl, line {number} is not a result rec"):
                action()
        assert path.read_bytes() == before


def test_a_packed_file_that_was_cut_is_an_error(store: ResultsStore) -> None:
    """At every boundary of two lines, where each line that is left is whole."""
    for name in ("a", "b", "c"):
        store.write(record(name))
    path = store.pack("s")
    whole = path.read_bytes().splitlines(keepends=True)
    assert len(whole) == 4
    for kept in range(4):
        content = b"".join(whole[:kept])
        path.write_bytes(content)
        told = "is empty" if kept == 0 else f"should hold 3 records and holds {kept - 1}"
        for action in (lambda: ids(store), lambda: store.find("a"), lambda: store.pack("s")):
            with pytest.raises(StoreError, match=rf"s\.jsonl {told}.*restore it from version"):
                action()
        assert path.read_bytes() == content, "nothing is packed over what may still be restored"
    path.write_bytes(b"".join([*whole, whole[-1]]))
    with pytest.raises(StoreError, match="should hold 3 records and holds 4"):
        ids(store)
    path.write_bytes(b"".join(whole))
    assert ids(store) == ["a", "b", "c"]


def test_a_file_packed_before_there_was_a_count(store: ResultsStore) -> None:
    for name in ("a", "b"):
        store.write(record(name))
    path = store.pack("s")
    path.write_text("\n".join(packed(path)) + "\n", encoding="utf-8")
    assert ids(store) == ["a", "b"]
    assert store.find("b") == record("b")
    store.write(record("c"))
    store.pack("s")
    assert len(packed(path)) == 3
    assert ids(store) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("head", "told"),
    [
        ('{"format": "mmdd.results", "records": 1, "version": 2}', "version 2.*install a newer"),
        ('{"format": "mmdd.results", "records": 1}', "line 1 is not a result record"),
        ('{"format": "mmdd.results", "records": "1", "version": 1}', "should hold '1' records"),
        ('{"format": "mmdd.results", "records": 1, "ver', "line 1 is not a result record"),
        ('{"format": "mmdd.resulls", "records": 1, "version": 1}', "line 1 is not a result record"),
    ],
)
def test_a_damaged_count_is_named(store: ResultsStore, head: str, told: str) -> None:
    store.write(record("a"))
    path = store.pack("s")
    path.write_text("\n".join([head, *packed(path)]) + "\n", encoding="utf-8")
    with pytest.raises(StoreError, match=rf"s\.jsonl.*{told}"):
        ids(store)


def test_a_run_named_in_the_record_of_another_is_not_found(store: ResultsStore) -> None:
    store.write(record("a", about={"run_id": "b"}))
    store.pack("s")
    assert store.find("b") is None
    assert store.find("a") == record("a", about={"run_id": "b"})


def test_a_newer_schema_is_refused(store: ResultsStore) -> None:
    store.write(record("a") | {"schema": SCHEMA + 1})
    with pytest.raises(StoreError, match=r"a\.json has schema 3.*install a newer"):
        store.find("a")
    with pytest.raises(StoreError, match="install a newer"):
        store.pack("s")
    (store.folder / "s" / "a.json").rename(store.folder / "x.jsonl")
    text = json.dumps(record("a") | {"schema": SCHEMA + 1})
    (store.folder / "x.jsonl").write_text(text + "\n")
    with pytest.raises(StoreError, match=r"x\.jsonl, line 1 has schema 3"):
        ids(store)
