"""The commands under figures: every chapter prints one that draws them, and the tool compares."""

from pathlib import Path

import nbformat
import pytest
from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn
from nbclient import execute

from tools.check_figures import check, printed_commands

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = [*sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")), ROOT / "book" / "claims.ipynb"]
DRAW = "import matplotlib.pyplot as plt\nplt.plot([1, {last}, 2]);"
CAPTION = "**Figure.** A line. Reproduce: `papermill --cwd notebooks notebooks/a.ipynb out.ipynb`."


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_with_figures_prints_the_command_that_draws_them(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    assert any(text.startswith("**Figure") for text in texts)
    name = path.relative_to(ROOT)
    command = f"papermill --cwd {name.parent} {name} out.ipynb"
    assert [c for c in printed_commands(notebook) if c.startswith("papermill")] == [command]


def chapter(caption: str = CAPTION, last: int = 3) -> nbformat.NotebookNode:
    cells = [
        nbformat.v4.new_code_cell(DRAW.format(last=last)),
        nbformat.v4.new_code_cell(DRAW.format(last=5)),
        nbformat.v4.new_markdown_cell(caption),
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})


def built(root: Path, notebook: nbformat.NotebookNode) -> Path:
    """A checkout with this chapter and the outputs that its book shows."""
    path = root / "notebooks" / "a.ipynb"
    path.parent.mkdir()
    nbformat.write(notebook, path)
    # Times in the cells' metadata would make it another notebook to the cache.
    executed = execute(nbformat.read(path, as_version=4), cwd=str(path.parent), record_timing=False)
    cache = get_cache(str(root / "_build" / ".jupyter_cache" / "0123456789abcdef"))
    cache.cache_notebook_bundle(CacheBundleIn(executed, str(path)), check_validity=False)
    return path


def test_figures_are_compared_pixel_by_pixel(tmp_path: Path) -> None:
    path = built(tmp_path, chapter())
    found = check(path, tmp_path)
    assert str(found) == "a: 2 of 2 equal"
    assert found.sound

    # The book shows another first figure than the command draws.
    folder = tmp_path / "_build" / ".jupyter_cache" / "0123456789abcdef"
    (shown,) = folder.glob("executed/*/base.ipynb")
    notebook = nbformat.read(shown, as_version=4)
    other = execute(chapter(last=4), cwd=str(tmp_path))
    for ours, theirs in zip(notebook.cells[:1], other.cells[:1], strict=True):
        ours.outputs = theirs.outputs
    nbformat.write(notebook, shown)
    found = check(path, tmp_path)
    assert str(found) == "a: 1 of 2 equal, different: 1"
    assert not found.sound


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    path = built(tmp_path, chapter(caption="**Figure.** A line that nobody can draw."))
    found = check(path, tmp_path)
    assert str(found) == "a: no caption says how its figures are drawn"
    assert not found.sound

    nbformat.write(chapter(caption=CAPTION.replace("a.ipynb", "b.ipynb")), path)
    found = check(path, tmp_path)
    assert "notebooks/b.ipynb out.ipynb: " in str(found)
    assert "No such file" in str(found)

    nbformat.write(chapter(last=9), path)  # not what the book was built from
    assert str(check(path, tmp_path)) == "a: the built book has no outputs of a: make book"
