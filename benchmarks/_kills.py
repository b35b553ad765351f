"""What the scripts that shoot at processes share: what a record says apart from times, and victims.

No benchmark itself: `make bench` leaves files that start with an underscore out.
"""

import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from mmdd.store import ResultsStore

_TIMES = ("init_seconds", "expert_seconds", "seconds_per_iteration", "peak_memory_bytes")


def timeless(record: dict[str, Any]) -> dict[str, Any]:
    """A record without what the clock and the kernel say: the rest is the same to the bit."""
    plain = {key: value for key, value in record.items() if key not in ("finished", "cpu_seconds")}
    plain["cost"] = {key: v for key, v in record["cost"].items() if key not in _TIMES}
    plain["students"] = [
        {key: value for key, value in student.items() if key != "seconds"}
        for student in record["students"]
    ]
    return plain


def records(folder: Path) -> dict[str, Any]:
    """The records of a store by run id, without times."""
    return {record["run_id"]: timeless(record) for record in ResultsStore(folder).records()}


def shoot(victims: Iterable[psutil.Process], number: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal to processes; those that are gone since are left out."""
    for process in victims:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def family(pid: int) -> list[psutil.Process]:
    """A process and all that it has started; empty when it is gone."""
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    return []


def command(process: psutil.Process) -> list[str]:
    """The words that started a process; none when it is gone or a zombie."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def marked(name: str, value: str) -> Iterator[psutil.Process]:
    """The processes, orphans too, that have an environment variable of this value."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(name) == value:
                yield process
