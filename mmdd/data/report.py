"""One report of everything that is wrong with a source, instead of one error at a time."""

import logging

from mmdd.errors import DataError

log = logging.getLogger(__name__)

# Enough to see the pattern; a wrong folder would otherwise print a hundred thousand names.
_SHOWN_PER_KIND = 20


class SourceError(DataError):
    """A source has offenders. `offenders`: kind of fault → {name: detail}, complete.

    Book: notebooks/01_data.
    """

    def __init__(self, message: str, offenders: dict[str, dict[str, str]] | None = None) -> None:
        super().__init__(message)
        self.offenders: dict[str, dict[str, str]] = offenders or {}


class Report:
    """Collects offenders by kind of fault while a source is read."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.offenders: dict[str, dict[str, str]] = {}

    def add(self, kind: str, name: str, detail: str = "") -> None:
        """Note that `name` has a fault of this kind; the first detail given for a name stays."""
        self.offenders.setdefault(kind, {}).setdefault(name, detail)

    def extend(self, offenders: dict[str, dict[str, str]]) -> None:
        """Take over offenders that were collected elsewhere."""
        for kind, names in offenders.items():
            for name, detail in names.items():
                self.add(kind, name, detail)

    def counts(self) -> dict[str, int]:
        """How many offenders there are of each kind."""
        return {kind: len(names) for kind, names in self.offenders.items()}

    def settle(self, on_error: str) -> None:
        """Raise `SourceError` naming every offender, or with "drop" log how many of each kind.

        Does nothing when there are none.
        """
        if not self.offenders:
            return
        if on_error == "drop":
            for kind, names in self.offenders.items():
                some = ", ".join(list(names)[:3]) + (", …" if len(names) > 3 else "")
                log.warning("%s: dropped %d × %s: %s", self.where, len(names), kind, some)
            return
        raise SourceError(self._message(), self.offenders)

    def _message(self) -> str:
        total = sum(self.counts().values())
        lines = [f"{self.where}: {total} problem{'s' if total > 1 else ''} found."]
        for kind, names in self.offenders.items():
            shown = [
                f"{name} ({detail})" if detail else name
                for name, detail in list(names.items())[:_SHOWN_PER_KIND]
            ]
            if len(names) > _SHOWN_PER_KIND:
                shown.append(f"… and {len(names) - _SHOWN_PER_KIND} more")
            lines.append(f"  {kind} ({len(names)}): " + ", ".join(shown))
        lines.append(
            'Repair the source, or pass on_error="drop" to leave these out; '
            "the error's .offenders holds every name."
        )
        return "\n".join(lines)
