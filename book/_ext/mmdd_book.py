"""What the book needs beyond jupyter-book's own configuration, as one small Sphinx extension.

1. The role ``fn`` links a name such as ``mmdd.losses.info_nce`` to the line that defines it, and
   turns a name that no longer exists into a warning, which the build treats as an error.
2. The execution cache of jupyter-book looks at a notebook's code cells only. Here it is also keyed
   on `mmdd/`, the grids, the shipped data, the committed results and the benchmarks' records, so a
   chapter never shows old outputs.
3. Progress bars that were displayed as widgets are dropped from the pages.
4. Inline scripts that the extensions of jupyter-book register twice are kept once: a second
   `const` of the same name is an error in the browser.
5. A figure that a cell drew gets its caption, the paragraph "**Figure.** …" below the cell, as
   alternative text; a figure without such a caption, or an `alt` of its own in the cell's metadata,
   is a warning. Its width in pixels goes along, so that a phone does not shrink it beyond reading.
6. In the data frames that cells show, a value that is missing is a dash, and a sentence may wrap.
7. MathJax is copied beside the pages when the package sphinx-mathjax-offline is installed, so the
   book reads without a network; without that package it is fetched from its CDN.
"""

import ast
import hashlib
import importlib.util
import itertools
import re
import shutil
from functools import cache
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import states
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.util import logging
from sphinx.util.images import get_image_size

logger = logging.getLogger(__name__)

SHIPPED = ("safetensors", "csv", "json", "yaml")
KEYED = ("mmdd/**/*.py", "sweeps/*.yaml", *(f"data/**/*.{kind}" for kind in SHIPPED))
KEYED_RESULTS = (
    *("results/*.jsonl", "results/*.json", "results/shown/*"),
    "benchmarks/*.json",
)
NOT_KEYED = ("data/cache/", "data/downloads/")
WIDGET = "application/vnd.jupyter.widget-view+json"
MATHJAX_PARTS = ("tex-chtml.js", "input/tex/extensions", "output/chtml/fonts/woff-v2")


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_config_value("mmdd_inputs", "", "env")  # a new value makes Sphinx read all pages again
    app.add_role("fn", function_link)
    app.connect("config-inited", key_execution_cache)
    app.connect("config-inited", use_local_mathjax)
    app.connect("doctree-read", drop_widgets)
    app.connect("doctree-read", describe_figures)
    app.connect("doctree-read", tidy_tables)
    app.connect("html-page-context", drop_repeated_scripts, priority=900)  # after all others
    app.connect("build-finished", copy_mathjax)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def function_link(
    role: str,
    rawtext: str,
    text: str,
    lineno: int,
    inliner: states.Inliner,
    options: dict | None = None,
    content: list[str] | None = None,
) -> tuple[list[nodes.Node], list[nodes.Node]]:
    """``{fn}`mmdd.module.name` `` → the name as code, linked to its definition in the repository.

    With a leading ``~`` only the last part of the name is shown.
    """
    env = inliner.document.settings.env
    name = text.lstrip("~")
    found = find_definition(Path(env.srcdir), name)
    if found is None:
        logger.warning("fn role: nothing named %r is defined", name, location=(env.docname, lineno))
        return [nodes.literal(rawtext, name)], []
    theme = env.config.html_theme_options
    path, line = found
    url = f"{theme['repository_url']}/blob/{theme['repository_branch']}/{path}#L{line}"
    reference = nodes.reference(rawtext, "", refuri=url)
    reference += nodes.literal(rawtext, name.rsplit(".", 1)[-1] if text.startswith("~") else name)
    return [reference], []


def find_definition(root: Path, name: str) -> tuple[str, int] | None:
    """(path relative to root, line) of a module, function, class or method; None if absent."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        stem = root.joinpath(*parts[:length])
        for file in (stem.with_suffix(".py"), stem / "__init__.py"):
            if file.is_file():
                line = _line_in(file.read_text(encoding="utf-8"), tuple(parts[length:]))
                return None if line is None else (file.relative_to(root).as_posix(), line)
    return None


@cache
def _line_in(source: str, path: tuple[str, ...]) -> int | None:
    node: ast.AST = ast.parse(source)
    line = 1
    for part in path:
        for child in ast.iter_child_nodes(node):
            if _defines(child, part):
                node, line = child, child.lineno  # type: ignore[attr-defined]
                break
        else:
            return None
    return line


def _defines(node: ast.AST, name: str) -> bool:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return node.name == name
    targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
    return any(isinstance(target, ast.Name) and target.id == name for target in targets)


def inputs_digest(root: Path) -> str:
    """SHA-256 over the files, besides a notebook's own cells, that decide what a chapter shows."""
    digest = hashlib.sha256()
    for pattern in (*KEYED, *KEYED_RESULTS):
        for file in sorted(root.glob(pattern)):
            relative = file.relative_to(root).as_posix()
            if file.is_file() and not relative.startswith(NOT_KEYED):
                digest.update(relative.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def key_execution_cache(app: Sphinx, config: Config) -> None:
    """One execution cache per state of the inputs; the caches of earlier states are removed."""
    config.mmdd_inputs = inputs_digest(Path(app.srcdir))
    if config.nb_execution_mode != "cache" or config.nb_execution_cache_path:
        return
    folder = Path(app.outdir).parent / ".jupyter_cache"
    current = folder / config.mmdd_inputs[:16]
    if folder.is_dir():
        for old in folder.iterdir():
            if old != current:
                shutil.rmtree(old) if old.is_dir() else old.unlink()
    config.nb_execution_cache_path = str(current)


def drop_widgets(app: Sphinx, doctree: nodes.document) -> None:
    """Remove outputs that are widgets: in a finished notebook they are spent progress bars."""
    for bundle in list(doctree.findall(nodes.container)):
        if bundle.get("nb_element") == "mime_bundle" and any(
            isinstance(child, nodes.Element) and child.get("mime_type") == WIDGET
            for child in bundle.children
        ):
            bundle.parent.remove(bundle)


def alternative_text(caption: str) -> str:
    """What a figure's caption says of the figure: without its label and how to reproduce it."""
    text = re.sub(r"^Figure(\s+\d+)?\.?\s*", "", " ".join(caption.split()))
    return re.split(r"\s*Reproduce\b", text)[0]


def describe_figures(app: Sphinx, doctree: nodes.document) -> None:
    """Alternative text and natural width for every image in the output of a cell."""
    paragraphs = list(doctree.findall(nodes.paragraph))
    order = {id(node): place for place, node in enumerate(doctree.findall())}
    for bundle in doctree.findall(nodes.container):
        if bundle.get("nb_element") != "mime_bundle":
            continue
        for image in list(bundle.findall(nodes.image)):
            place = order[id(image)]
            below = (p for p in paragraphs if order[id(p)] > place and not _in_output(p))
            caption = next(below, nodes.paragraph()).astext()
            if "alt" not in image and caption.startswith("Figure"):
                image["alt"] = alternative_text(caption)
            if not image.get("alt"):
                logger.warning(
                    "a figure has no caption below its cell (**Figure.** ...), and so nothing for "
                    "a reader who cannot see it",
                    location=image,
                )
            size = get_image_size(Path(app.srcdir) / image["uri"])
            if size:
                box = f'<div class="figure-box" style="--natural-width: {size[0]}px">'
                place_in_parent = image.parent.index(image)
                image.parent.insert(place_in_parent + 1, nodes.raw("", "</div>", format="html"))
                image.parent.insert(place_in_parent, nodes.raw("", box, format="html"))


def tidy_tables(app: Sphinx, doctree: nodes.document) -> None:
    """Dashes for what is missing in data frames, and a class for cells that hold a sentence."""
    for table in list(doctree.findall(nodes.raw)):
        html = classed(table.astext())
        if _in_output(table) and 'class="dataframe"' in html:
            table.replace_self(nodes.raw("", tidied(html), **table.non_default_attributes()))


def classed(html: str) -> str:
    """A styled data frame with the class of a plain one, which the theme goes by in the dark."""
    return re.sub(r'(<table id="T_[^"]*")>', r'\1 class="dataframe">', html)


def tidied(table: str) -> str:
    """The HTML of a data frame as `tidy_tables` shows it: a column with a sentence wraps."""
    table = re.sub(r"(<t[dh][^>]*>)\s*(?:NaN|NaT|None|&lt;NA&gt;)\s*(?=</t)", r"\1–", table)
    head, begin, body = table.partition("<tbody>")
    rows = [re.findall(r"<td>([^<]*)</td>", row) for row in re.findall(r"<tr>.*?</tr>", body, re.S)]
    sentences = {k for cells in rows for k, cell in enumerate(cells) if len(cell) >= 25}

    def marked(row: re.Match[str]) -> str:
        place = itertools.count()
        return re.sub(
            r"<td>", lambda _: '<td class="text">' if next(place) in sentences else "<td>", row[0]
        )

    body = re.sub(r'<th((?: [a-z]+="[^"]*")*)>(?=[^<]{25})', r'<th\1 class="text">', body)
    return head + begin + re.sub(r"<tr>.*?</tr>", marked, body, flags=re.S)


def _in_output(node: nodes.Node | None) -> bool:
    while node is not None:
        if isinstance(node, nodes.Element) and node.get("nb_element") in (
            "cell_code_output",
            "mime_bundle",
        ):
            return True
        node = node.parent
    return False


def drop_repeated_scripts(
    app: Sphinx, pagename: str, templatename: str, context: dict, doctree: nodes.document | None
) -> None:
    # An inline script has the file name "" in one place and None in the other.
    files = context.get("script_files", [])
    context["script_files"] = list(
        {(file.filename or "", file.attributes.get("body")): file for file in files}.values()
    )


def mathjax_folder() -> Path | None:
    """Where sphinx-mathjax-offline keeps MathJax, or None when it is not installed."""
    spec = importlib.util.find_spec("sphinx-mathjax-offline")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "static" / "mathjax"


def use_local_mathjax(app: Sphinx, config: Config) -> None:
    if mathjax_folder() is not None:
        config.mathjax_path = "mathjax/tex-chtml.js"


def copy_mathjax(app: Sphinx, exception: Exception | None) -> None:
    source = mathjax_folder()
    if exception is not None or source is None or app.builder.format != "html":
        return
    for part in MATHJAX_PARTS:  # the rest of the package, 20 MB, is never asked for
        target = Path(app.outdir) / "_static" / "mathjax" / part
        target.parent.mkdir(parents=True, exist_ok=True)
        if (source / part).is_dir():
            shutil.copytree(source / part, target, dirs_exist_ok=True)
        else:
            shutil.copyfile(source / part, target)
