"""HTTP downloads that survive dropped connections and killed processes. Used through pooch."""

import contextlib
import email.utils
import json
import logging
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import requests
from tqdm.auto import tqdm

from mmdd.errors import DownloadError

log = logging.getLogger(__name__)

# Small, because what was read of a chunk is lost when the connection drops within it.
_CHUNK = 1 << 15
_SPARE_BYTES = 64 * 2**20
# Answers that a later try may change; all other errors are final.
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})


class _Interrupted(Exception):
    """The transfer stopped early and may be taken up again. wait: seconds the server asks for."""

    def __init__(self, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.wait = wait


def require_free_space(folder: Path, needed: int, purpose: str) -> None:
    """Raise `DownloadError` unless `folder`'s disk has `needed` bytes (and a little more) free."""
    free = shutil.disk_usage(folder).free
    if needed + _SPARE_BYTES > free:
        raise DownloadError(
            f"not enough disk space in {folder} {purpose}: {needed / 2**30:.2f} GiB needed, "
            f"{free / 2**30:.2f} GiB free. Make room, or point MMDD_CACHE at a larger disk."
        )


class ResumingDownloader:
    """A pooch downloader that goes on where a dropped connection or a killed process stopped.

    part: file that collects the bytes, kept when the download fails. What the server says about
    the file's version (ETag or Last-Modified) is kept beside it, and a version that changed, or
    that a server does not tell, is downloaded from its start by the next process. retries: how
    often in a row the connection may fail without a new byte; the pause before each doubles from
    `backoff` seconds up to a minute.

    Raises `DownloadError` when the server refuses, the retries are used up, or the disk is full.

    Book: notebooks/01_data.
    """

    def __init__(
        self,
        part: Path,
        *,
        retries: int = 6,
        backoff: float = 1.0,
        timeout: float = 60.0,
        progress: bool = True,
    ) -> None:
        self.part = part
        self.notes = part.with_name(part.name + ".json")
        self.retries = retries
        self.backoff = backoff
        self.timeout = timeout
        self.progress = progress
        self.resumed = False
        self.validator: str | None = None
        self.total: int | None = None

    def __call__(self, url: str, output_file: str | Path, pooch: Any) -> None:
        """Fetch `url` to `output_file`; the form of call that pooch prescribes."""
        self._take_up(url)
        failures = 0
        with requests.Session() as session:
            while True:
                before = self._size()
                try:
                    self._attempt(session, url)
                    break
                except (_Interrupted, requests.ConnectionError, requests.Timeout) as error:
                    reason: Exception = error
                except requests.exceptions.ChunkedEncodingError as error:
                    reason = error
                except requests.RequestException as error:
                    raise DownloadError(f"cannot download {url}: {error}") from error
                except OSError as error:
                    raise DownloadError(f"cannot write {self.part}: {error}") from error
                failures = 1 if self._size() > before else failures + 1
                if failures > self.retries:
                    raise DownloadError(
                        f"gave up on {url} after {failures} failures in a row: {reason}. The "
                        f"{self._size():,} bytes so far stay in {self.part}; try again later."
                    ) from reason
                pause = max(
                    getattr(reason, "wait", 0.0), min(60.0, self.backoff * 2 ** (failures - 1))
                )
                log.warning(
                    "%s: %s; going on from byte %d in %.1f s", url, reason, self._size(), pause
                )
                time.sleep(pause)
        os.replace(self.part, output_file)
        self.notes.unlink(missing_ok=True)

    def forget(self) -> None:
        """Remove the collected bytes."""
        self.part.unlink(missing_ok=True)
        self.notes.unlink(missing_ok=True)

    def _size(self) -> int:
        try:
            return self.part.stat().st_size
        except FileNotFoundError:
            return 0

    def _take_up(self, url: str) -> None:
        """Use the bytes of an earlier process if it is known which version they belong to."""
        self.part.parent.mkdir(parents=True, exist_ok=True)
        try:
            notes = json.loads(self.notes.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            notes = {}
        if self._size() and notes.get("url") == url and notes.get("validator"):
            self.validator, self.total = notes["validator"], notes.get("total")
            self.resumed = True
            log.info("%s: resuming at byte %d", url, self._size())
        else:
            self.forget()

    def _attempt(self, session: requests.Session, url: str) -> None:
        offset = self._size()
        # Compressed transfer would make byte offsets meaningless.
        headers = {"Accept-Encoding": "identity"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
            if self.validator:
                headers["If-Range"] = self.validator
        with session.get(url, headers=headers, stream=True, timeout=(10, self.timeout)) as answer:
            if answer.status_code == 416 and offset and _content_range(answer)[1] == offset:
                return  # a process was killed after the last byte
            offset = self._accept(answer, url, offset)
            require_free_space(self.part.parent, (self.total or 0) - offset, f"to download {url}")
            self._collect(answer, offset)
        if self.total is not None and self._size() < self.total:
            raise _Interrupted(f"the connection closed {self.total - self._size():,} bytes early")
        if self.total is not None and self._size() > self.total:
            self.forget()
            raise _Interrupted("more bytes came than were announced")

    def _accept(self, answer: requests.Response, url: str, offset: int) -> int:
        """Check an answer's status; the offset at which its bytes belong."""
        if answer.status_code == 206 and offset:
            start, total = _content_range(answer)
            if start == offset and (self.total is None or total in (None, self.total)):
                self.total = total if total is not None else self.total
                self.resumed = True
                return offset
            self.forget()
            raise _Interrupted("the server sent another part of the file than was asked for")
        if answer.status_code == 416 and offset:
            self.forget()
            raise _Interrupted("the file on the server is shorter than what was already here")
        if answer.status_code == 200:
            if offset:
                log.info("%s: the server starts over", url)
            length = answer.headers.get("Content-Length", "")
            self.total = int(length) if length.isdigit() else None
            self._note(answer, url)
            return 0
        message = f"the server answered {answer.status_code} {answer.reason}"
        if answer.status_code in _PASSING:
            raise _Interrupted(message, _retry_after(answer))
        raise DownloadError(
            f"cannot download {url}: {message}. Check the address, or fetch the file by hand and "
            f"put it where it is expected."
        )

    def _note(self, answer: requests.Response, url: str) -> None:
        etag = answer.headers.get("ETag")
        # A weak ETag promises equal meaning, not equal bytes.
        strong = etag if etag and not etag.startswith("W/") else None
        self.validator = strong or answer.headers.get("Last-Modified")
        notes = {"url": url, "validator": self.validator, "total": self.total}
        self.notes.write_text(json.dumps(notes), encoding="utf-8")

    def _collect(self, answer: requests.Response, offset: int) -> None:
        with (
            open(self.part, "r+b" if offset else "wb") as file,
            tqdm(
                total=self.total,
                initial=offset,
                unit="B",
                unit_scale=True,
                desc=self.part.name.removesuffix(".part"),
                disable=not self.progress,
            ) as bar,
        ):
            file.seek(offset)
            for chunk in answer.iter_content(_CHUNK):
                file.write(chunk)
                bar.update(len(chunk))


def _content_range(answer: requests.Response) -> tuple[int, int | None]:
    """First byte and total length that an answer announces; (-1, None) when it does not."""
    found = re.fullmatch(
        r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", answer.headers.get("Content-Range", "").strip()
    )
    if not found:
        return -1, None
    return int(found[1] or -1), None if found[2] == "*" else int(found[2])


def _retry_after(answer: requests.Response) -> float:
    """Seconds a server asks to wait, at most five minutes."""
    value = answer.headers.get("Retry-After", "")
    if value.isdigit():
        return min(300.0, float(value))
    with contextlib.suppress(ValueError, TypeError):
        when = email.utils.parsedate_to_datetime(value)
        return min(300.0, max(0.0, when.timestamp() - time.time()))
    return 0.0
