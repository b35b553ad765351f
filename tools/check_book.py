"""Stop with an error unless the built book holds a page for every entry of _toc.yml.

Some versions of jupyter-book end with success after building nothing, so `make book` asks here.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent


def toc_entries(node: Any) -> Iterator[str]:
    """Every page that a table of contents names, as a path without suffix, in reading order."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("root", "file"):
                yield str(
                    Path(value).with_suffix("") if value.endswith((".md", ".ipynb")) else value
                )
            else:
                yield from toc_entries(value)
    elif isinstance(node, list):
        for item in node:
            yield from toc_entries(item)


def problems(toc: Any, html: Path) -> list[str]:
    """What is missing from the folder `html` (a built book) given the parsed _toc.yml."""
    entries = list(toc_entries(toc))
    if not entries:
        return ["_toc.yml names no page"]
    found = [] if (html / "index.html").is_file() else [f"{html / 'index.html'} does not exist"]
    for entry in entries:
        page = html / f"{entry}.html"
        if not page.is_file():
            found.append(f"{page} does not exist, though _toc.yml names {entry!r}")
    pages = len(list(html.rglob("*.html"))) if html.is_dir() else 0
    if pages < len(entries):
        found.append(f"{pages} pages in {html} for {len(entries)} entries of _toc.yml")
    return found


def main() -> None:
    html = ROOT / "_build" / "html"
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    found = problems(toc, html)
    if found:
        sys.exit("The book is not whole:\n" + "\n".join(f"- {line}" for line in found))
    print(f"The book is whole: {len(list(toc_entries(toc)))} pages. Open {html / 'index.html'}")


if __name__ == "__main__":
    main()
