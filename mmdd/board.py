"""What a sweep shows while it runs: a table in a terminal, else a line for each finished point."""

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

_SHOWN = 8  # of the latest finished jobs


class Board:
    """Progress of jobs. begun: name → `time.monotonic()` of those that run, kept by the caller.

    total: jobs in all; done: of them finished before; labels: of jobs, by name. With `show` false
    nothing is printed.
    """

    def __init__(
        self,
        total: int,
        done: int,
        begun: dict[str, float],
        labels: Mapping[str, str],
        show: bool = True,
        console: Console | None = None,
    ) -> None:
        self.total, self.done, self.failed, self.begun = total, done, 0, begun
        self.console = console or Console(stderr=True, quiet=not show)
        self._started, self._done_before = time.monotonic(), done
        self._latest: list[tuple[str, str, str]] = []
        self._labels = labels
        self._live = (
            Live(self.table(), console=self.console, transient=True, auto_refresh=False)
            if self.console.is_terminal and show
            else None
        )

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.update(self.table(), refresh=True)
            self._live.stop()

    def refresh(self) -> None:
        """Draw the table again, in a terminal."""
        if self._live is not None:
            self._live.update(self.table(), refresh=True)

    def finished(self, name: str, label: str, error: str, score: float | None) -> None:
        """Count a job that ended. score: its mean recall in percent, if it has one."""
        self.done += 1
        self.failed += bool(error)
        told = error.splitlines()[-1] if error else "" if score is None else f"{score:.2f}"
        self._latest.append((label, "failed" if error else "done", told))
        if self._live is None:
            self.console.print(
                f"[{self.done}/{self.total}] {label} ({name}): {'failed: ' if error else ''}{told}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )

    def table(self) -> Group:
        """The running jobs and the latest finished ones, under a line of counts."""
        now = time.monotonic()
        rate = (self.done - self._done_before) / max(now - self._started, 1e-9)
        left = f"about {_clock((self.total - self.done) / rate)} left" if rate > 0 else ""
        head = (
            f"{self.done} of {self.total} done, {self.failed} failed, {_clock(now - self._started)}"
        )
        rows = Table(box=None, pad_edge=False)
        for column in ("point", "state", "mean recall (%)"):
            rows.add_column(column)
        for label, state, told in self._latest[-_SHOWN:]:
            colour = "red" if state == "failed" else "green"
            rows.add_row(Text(label), Text(state, style=colour), Text(told))
        for name, since in sorted(self.begun.items(), key=lambda item: item[1]):
            label = self._labels.get(name, name)
            rows.add_row(Text(label), f"running {_clock(now - since)}", "")
        return Group(Text(f"{head} {left}".strip()), rows)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
