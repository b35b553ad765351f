"""Print the built book into one PDF with headless Chromium; no LaTeX is needed.

Run as `make pdf` (after `make book`), or `python tools/print_book.py [-o book.pdf] [page ...]`.
Each page of _toc.yml is printed as the browser prints it, formulas typeset and figures loaded, and
the pieces are joined in reading order with a bookmark for each page.
"""

import argparse
import base64
import functools
import http.server
import io
import os
import shutil
import sys
import threading
from pathlib import Path

import yaml
from pypdf import PdfReader, PdfWriter
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tools.check_book import ROOT, toc_entries

# The width of the paper decides the layout: A4 at this scale leaves room for 100 columns of code.
PAPER = {"paperWidth": 8.27, "paperHeight": 11.69, "scale": 0.72, "printBackground": True}
READY = """
    const done = arguments[arguments.length - 1];
    document.documentElement.dataset.theme = document.documentElement.dataset.mode = "light";
    document.querySelectorAll("img").forEach(img => { img.loading = "eager"; });
    document.querySelectorAll("details.claim").forEach(folded => { folded.open = true; });
    const images = [...document.images].map(img => img.decode().catch(() => {}));
    const math = window.MathJax?.startup?.promise ?? Promise.resolve();
    Promise.all([...images, math]).then(() => done(document.querySelector("h1")?.innerText ?? ""));
"""


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


def chromium() -> webdriver.Chrome:
    """A headless browser; `SystemExit` says how to get one where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    binary = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    driver = os.environ.get("CHROMEDRIVER") or shutil.which("chromedriver")
    if not binary or not driver:
        sys.exit("Chromium and chromedriver are needed: `apt-get install chromium chromium-driver`")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=Service(driver))
    browser.set_script_timeout(120)
    return browser


def print_pages(html: Path, entries: list[str], output: Path) -> int:
    """Print the pages `entries` of the book in the folder `html` into `output`; → sheets."""
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(QuietHandler, directory=str(html))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    browser, writer = chromium(), PdfWriter()
    try:
        for entry in entries:
            browser.get(f"http://127.0.0.1:{server.server_port}/{entry}.html")
            title = browser.execute_async_script(READY).strip("#\n ") or entry
            printed = browser.execute_cdp_cmd("Page.printToPDF", PAPER)["data"]
            first = len(writer.pages)
            for page in PdfReader(io.BytesIO(base64.b64decode(printed))).pages:
                writer.add_page(page)
            writer.add_outline_item(title=title, page_number=first)
            print(f"{entry}: {len(writer.pages) - first} sheets", flush=True)
    finally:
        browser.quit()
        server.shutdown()
        server.server_close()
    writer.compress_identical_objects(remove_duplicates=True, remove_unreferenced=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("wb") as file:
        writer.write(file)
    return len(writer.pages)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pages", nargs="*", help="pages of _toc.yml; by default all")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "_build" / "mmdd.pdf")
    given = parser.parse_args()
    entries = list(toc_entries(yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))))
    unknown = set(given.pages) - set(entries)
    if unknown:
        sys.exit(f"not in _toc.yml: {sorted(unknown)}")
    html = ROOT / "_build" / "html"
    if not (html / "index.html").is_file():
        sys.exit("there is no built book: run `make book` first")
    sheets = print_pages(html, given.pages or entries, given.output)
    size = given.output.stat().st_size / 1e6
    print(f"{given.output}: {sheets} sheets, {size:.1f} MB")


if __name__ == "__main__":
    main()
