"""Notebooks executed side by side before Sphinx reads their pages: real kernels, a real build."""

import io
import os
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_cache import get_cache
from sphinx.application import Sphinx
from sphinx.util.docutils import docutils_namespace, patch_docutils

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "book" / "_ext"))
import execute_chapters  # noqa: E402

CONFIG = """
extensions = ["myst_nb", "execute_chapters"]
nb_execution_mode = "cache"
nb_execution_timeout = 60
nb_execution_excludepatterns = ["idle.ipynb"]
nb_execution_show_tb = True
exclude_patterns = ["_build"]
"""
# Writes down that it runs and waits until another chapter runs: alone it fails.
MEETS = """
import os, time
from pathlib import Path

with Path("executed.txt").open("a") as log:
    log.write("{name}\\n")
until = time.monotonic() + 30
while "{other}" not in Path("executed.txt").read_text():
    assert time.monotonic() < until, "{other} does not run at the same time"
    time.sleep(0.05)
print("met {other}, threads", os.environ.get("OMP_NUM_THREADS"))
"""


@pytest.fixture
def book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the configuration of a book, on a machine of six cores."""
    (tmp_path / "conf.py").write_text(CONFIG)
    (tmp_path / "index.md").write_text("# A book\n\n```{toctree}\n:glob: true\n*\n```\n")
    monkeypatch.setattr(execute_chapters, "_cores", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return tmp_path


def write(book: Path, name: str, source: str) -> None:
    cells = [nbformat.v4.new_markdown_cell(f"# {name}"), nbformat.v4.new_code_cell(source)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
    nbformat.write(notebook, book / f"{name}.ipynb")


def build(book: Path) -> str:
    """Build all pages anew, from what is cached; returns the warnings."""
    warnings = io.StringIO()
    with patch_docutils(str(book)), docutils_namespace():
        app = Sphinx(
            book,
            book,
            book / "_build" / "html",
            book / "_build" / "doctrees",
            "html",
            status=None,
            warning=warnings,
            freshenv=True,
        )
        app.build(force_all=True)
    return warnings.getvalue()


def cached(book: Path) -> dict[str, float]:
    """Seconds of the notebooks in the cache, by name."""
    records = get_cache(str(book / "_build" / ".jupyter_cache")).list_cache_records()
    return {Path(record.uri).stem: record.data["execution_seconds"] for record in records}


def test_chapters_run_at_the_same_time_once_and_share_the_cores(book: Path) -> None:
    write(book, "first", MEETS.format(name="first", other="second"))
    write(book, "second", MEETS.format(name="second", other="first"))
    write(book, "idle", "raise SystemError('excluded, and executed all the same')")
    assert build(book) == ""
    assert "met second, threads 3" in (book / "_build" / "html" / "first.html").read_text()
    assert "met first, threads 3" in (book / "_build" / "html" / "second.html").read_text()
    assert "OMP_NUM_THREADS" not in os.environ
    seconds = cached(book)
    assert set(seconds) == {"first", "second"}
    assert min(seconds.values()) > 0

    assert build(book) == ""  # from the cache
    assert "met second" in (book / "_build" / "html" / "first.html").read_text()
    assert sorted((book / "executed.txt").read_text().split()) == ["first", "second"]


def test_a_thread_count_of_the_readers_own_is_kept(
    book: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    write(book, "first", MEETS.format(name="first", other="second"))
    write(book, "second", MEETS.format(name="second", other="first"))
    assert build(book) == ""
    assert "threads 5" in (book / "_build" / "html" / "first.html").read_text()


def test_a_chapter_that_fails_is_reported_and_stops_no_other(book: Path) -> None:
    write(book, "sound", "print(6 * 7)")
    write(book, "wrong", "{}['no such key']")
    warnings = build(book)
    assert "wrong.ipynb" in warnings
    assert "no such key" in warnings
    assert "sound.ipynb" not in warnings
    assert "42" in (book / "_build" / "html" / "sound.html").read_text()
    assert set(cached(book)) == {"sound"}
