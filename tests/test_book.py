"""The built book, in a real headless Chromium.

`make test` must work before any `make book`, so a session fixture builds the book itself from the
real configuration, table of contents and pages, executing only the cheap notebooks. When
`_build/html` exists, the whole book is checked the same way.
"""

import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import nbformat
import pandas as pd
import pytest
import yaml
from PIL import Image
from pypdf import PdfReader
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from tools.draw_result import description, landing_scores
from tools.print_book import print_pages

ROOT = Path(__file__).resolve().parent.parent
WHOLE_BOOK = ROOT / "_build" / "html"
SITES = ["small", *(["whole"] if (WHOLE_BOOK / "index.html").is_file() else [])]
PHONE, TABLET, DESKTOP = (390, 844), (768, 1024), (1440, 900)
PAGE_FAULTS = (ROOT / "tests" / "page_faults.js").read_text(encoding="utf-8")
# Axis labels have 11 points at 110 dots an inch: at this scale of a figure, nine pixels.
FIGURE_SCALE = 0.55
LARGEST_PAINT = 2500  # ms until the largest thing on the first screen stands there
EXECUTED = ("book/status", "notebooks/probe")

sys.path.insert(0, str(ROOT / "book" / "_ext"))
import mmdd_book  # noqa: E402

# What a careless notebook leaves behind: a finished progress bar, chatter on stderr, a figure.
PROBE = """
import sys

import matplotlib.pyplot as plt
from tqdm.auto import tqdm

for _ in tqdm(range(3), desc="a spent bar"):
    pass
print("chatter on stderr", file=sys.stderr)
print("kept on stdout")
plt.plot([1, 3, 2]);
"""
CAPTION = (
    "**Figure.** A line that rises\nand *falls*. Reproduce: `papermill probe.ipynb out.ipynb`."
)


# ---------------------------------------------------------------- building


def toc_files(toc: dict) -> list[str]:
    return [toc["root"], *(c["file"] for part in toc["parts"] for c in part["chapters"])]


def write_notebook(path: Path, title: str, source: str, caption: str) -> None:
    cells = [
        nbformat.v4.new_markdown_cell(f"# {title}"),
        nbformat.v4.new_code_cell(source),
        nbformat.v4.new_markdown_cell(caption),
    ]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    nbformat.write(notebook, path)


def jupyter_book(folder: Path) -> subprocess.CompletedProcess[str]:
    command = "from jupyter_book.cli.main import main; main()"
    arguments = ["build", "-n", "-W", "--keep-going", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", command, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.fixture(scope="session")
def small_book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a book built from the real pages, with most notebooks not executed."""
    folder = tmp_path_factory.mktemp("book")
    ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "_build")
    for name in ("book", "notebooks", "mmdd"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    (folder / "results").mkdir()
    for records in (ROOT / "results").glob("*.jsonl"):
        shutil.copyfile(records, folder / "results" / records.name)

    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    idle = [f"{name}.ipynb" for name in toc_files(toc) if name not in EXECUTED]
    config["execute"]["exclude_patterns"] = idle
    toc["parts"][-1]["chapters"].append({"file": "notebooks/probe"})
    write_notebook(folder / "notebooks" / "probe.ipynb", "Probe", PROBE, CAPTION)
    (folder / "_toc.yml").write_text(yaml.safe_dump(toc), encoding="utf-8")
    (folder / "_config.yml").write_text(yaml.safe_dump(config), encoding="utf-8")

    built = jupyter_book(folder)
    assert built.returncode == 0, f"the book does not build:\n{built.stdout}\n{built.stderr}"
    return folder


@pytest.fixture(params=SITES)
def site(request: pytest.FixtureRequest) -> Path:
    """The folder of HTML pages of the small book, and of the whole one where it was built."""
    if request.param == "whole":
        return WHOLE_BOOK
    return request.getfixturevalue("small_book") / "_build" / "html"


def pages(site: Path) -> list[Path]:
    """The pages a reader reaches from the contents, search and index included."""
    hidden = {"_static", "_sources", "_images", "_downloads"}
    found = sorted(p for p in site.rglob("*.html") if not hidden & set(p.relative_to(site).parts))
    assert found, f"no pages under {site}"
    return found


# ---------------------------------------------------------------- what the pages hold


class Page(HTMLParser):
    """Links, anchors, classes and visible text of one HTML page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.classes: set[str] = set()
        self.text: list[str] = []
        self._silent = 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attrs}
        self.links += [values[key] for key in ("href", "src") if values.get(key)]
        self.anchors |= {values[key] for key in ("id", "name") if values.get(key)}
        self.classes |= set(values.get("class", "").split())
        self._silent += tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._silent -= tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.text.append(data)


@functools.cache
def parsed(path: Path) -> Page:
    return Page(path)


def test_every_chapter_of_the_contents_has_its_page(site: Path) -> None:
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    names = {page.relative_to(site).with_suffix("").as_posix() for page in pages(site)}
    assert set(toc_files(toc)) <= names
    assert "index" in names


def test_every_chapter_opens_on_colab_and_binder(site: Path) -> None:
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    where = config["repository"]["url"].removeprefix("https://github.com/")
    for notebook in sorted((ROOT / "notebooks").glob("[!.]*.ipynb")):
        links = parsed(site / "notebooks" / f"{notebook.stem}.html").links
        name = f"notebooks/{notebook.name}"
        assert f"https://colab.research.google.com/github/{where}/blob/main/{name}" in links
        binder = f"https://mybinder.org/v2/gh/{where}/main?urlpath=lab/tree/{name}"
        assert binder in links, [link for link in links if "binder" in link]


def test_every_internal_link_resolves(site: Path) -> None:
    broken = []
    for page in pages(site):
        for link in parsed(page).links:
            if urlsplit(link).scheme or link.startswith("//"):
                continue
            target, anchor = urldefrag(urljoin(page.as_uri(), link.split("?")[0]))
            if "#" in link and "?" in link:
                anchor = link.rsplit("#", 1)[1]
            path = Path(unquote(urlsplit(target).path))
            if not path.is_file():
                broken.append(f"{page.relative_to(site)}: {link} (no such file)")
            elif anchor and path.suffix == ".html" and unquote(anchor) not in parsed(path).anchors:
                broken.append(f"{page.relative_to(site)}: {link} (no such anchor)")
    assert not broken, "\n".join(broken)


# Tags whose address the browser loads without being asked.
LOADED = re.compile(
    r"<(?:(?:script|img|iframe|source|video|audio|embed|object)\b"
    r'|link\b[^>]*\brel="(?:stylesheet|preload|icon|modulepreload))[^>]*>',
    re.IGNORECASE,
)
ADDRESS = re.compile(r"""(?:src|href|srcset|data)=["']((?:https?:)?//[^"']+)""", re.IGNORECASE)
IN_STYLES = re.compile(r"""(?:@import|url\()\s*["']?((?:https?:)?//[^"')]+)""", re.IGNORECASE)


def loaded_from_elsewhere(html: str) -> list[str]:
    """Addresses on other machines that a browser asks on showing a page."""
    styles = re.findall(r"<style[^>]*>(.*?)</style>", html, re.DOTALL)
    found = [address for tag in LOADED.findall(html) for address in ADDRESS.findall(tag)]
    return found + [address for style in styles for address in IN_STYLES.findall(style)]


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    """No script, style, font or picture: links that a reader clicks may lead anywhere."""
    found = []
    for page in pages(site):
        addresses = loaded_from_elsewhere(page.read_text(encoding="utf-8"))
        if mmdd_book.mathjax_folder() is None:  # then formulas need the network
            addresses = [address for address in addresses if "mathjax" not in address]
        found += [f"{page.relative_to(site)}: {address}" for address in addresses]
    for sheet in site.rglob("*.css"):
        addresses = IN_STYLES.findall(sheet.read_text(encoding="utf-8"))
        found += [f"{sheet.relative_to(site)}: {address}" for address in addresses]
    assert found == []


def test_the_search_for_what_a_page_loads_finds_it() -> None:
    for html in (
        '<script async src="https://cdn.example/a.js"></script>',
        "<img alt='x' src='//cdn.example/a.png'>",
        '<link rel="stylesheet" type="text/css" href="https://cdn.example/a.css">',
        "<style>@import url(https://cdn.example/a.css);</style>",
        "<style>p {background: url('//cdn.example/a.png')}</style>",
        '<iframe title="x" src="http://video.example/1"></iframe>',
    ):
        assert len(loaded_from_elsewhere(html)) == 1, html
    for html in (
        '<a href="https://arxiv.org/abs/1">paper</a>',
        '<link rel="canonical" href="https://book.example/">',
        '<img src="_images/a.png">',
    ):
        assert loaded_from_elsewhere(html) == [], html


def test_no_page_shows_an_error_or_the_litter_of_a_run(site: Path) -> None:
    offences = []
    for page in pages(site):
        content = parsed(page)
        text = "".join(content.text)
        if "Traceback (most recent call last)" in text or "traceback" in content.classes:
            offences.append(f"{page.relative_to(site)}: a traceback")
        if {"stderr", "system-message"} & content.classes:
            offences.append(f"{page.relative_to(site)}: stderr output or a build message")
        if re.search(r"\d+%\|.*\|.*(it/s|s/it)", text) or "widget-view+json" in page.read_text():
            offences.append(f"{page.relative_to(site)}: a progress bar")
    assert not offences, "\n".join(offences)


def test_spent_progress_bars_and_stderr_are_dropped_and_the_rest_is_kept(small_book: Path) -> None:
    page = small_book / "_build" / "html" / "notebooks" / "probe.html"
    text = page.read_text(encoding="utf-8")
    assert "kept on stdout" in text
    assert re.search(r'<img [^>]*src="\.\./_images/', text)
    assert '<img alt="A line that rises and falls."' in text, "the caption is the alternative text"
    outputs = text.split('class="cell_output', 1)[1]
    assert "a spent bar" not in outputs
    assert "chatter on stderr" not in outputs


def test_the_status_page_lists_versions_and_execution_times(small_book: Path) -> None:
    page = parsed(small_book / "_build" / "html" / "book" / "status.html")
    text = " ".join("".join(page.text).split())
    assert "1.0.4.post1" in text, "the version of jupyter-book"
    for name in EXECUTED:
        assert re.search(rf"{name} .*?\d+\.\d+", text), f"no execution time of {name}"


def test_a_styled_data_frame_has_the_class_of_a_plain_one() -> None:
    styled = pd.DataFrame({"a": [1]}).style
    assert '<table id="T_here" class="dataframe">' in mmdd_book.classed(
        styled.set_uuid("here").to_html()
    )
    own = styled.set_table_attributes('class="claims"').to_html()
    assert mmdd_book.classed(own) == own


def test_a_data_frame_is_tidied() -> None:
    frame = pd.DataFrame(
        {
            "a": [1.5, None],
            "b": pd.array([None, 3], dtype="Int64"),
            "a head that is a sentence": ["short", "a cell that holds a sentence"],
        },
        index=["rows whose name is a sentence", "None"],
    )
    table = mmdd_book.tidied(frame.to_html(classes=""))
    assert table.count("<td>–</td>") == 2
    assert "NaN" not in table
    assert "NA&gt;" not in table
    assert '<th class="text">rows whose name is a sentence</th>' in table
    assert "<td>1.5</td>" in table
    assert "<th>a</th>" in table
    assert "<th>a head that is a sentence</th>" in table
    assert re.findall(r'<td class="text">(.*?)</td>', table) == [
        "short", "a cell that holds a sentence"
    ]  # fmt: skip


# ---------------------------------------------------------------- in the browser


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    binary = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    driver = os.environ.get("CHROMEDRIVER") or shutil.which("chromedriver")
    if not binary or not driver:
        missing = "Chromium" if not binary else "chromedriver"
        pytest.fail(
            f"{missing} is not installed, and the book is tested in a real browser. On Debian or "
            "Ubuntu: `apt-get install chromium chromium-driver`; with conda: `conda install -c "
            "conda-forge chromium python-chromedriver-binary`. Or name the two programs in "
            "$CHROMIUM and $CHROMEDRIVER."
        )
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    profile = tmp_path_factory.mktemp("chromium-profile")
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-dev-shm-usage",
        # No network: whatever a page asks of another machine is not found.
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        f"--user-data-dir={profile}",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    chrome.set_page_load_timeout(60)
    chrome.set_script_timeout(60)
    yield chrome
    chrome.quit()


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a real local web server of a folder."""
    handler = functools.partial(QuietHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    with served(site) as url:
        yield url


def resize(browser: webdriver.Chrome, size: tuple[int, int]) -> None:
    width, height = size
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
    )


def show(browser: webdriver.Chrome, url: str, size: tuple[int, int]) -> None:
    """Open a page at a size and wait until its images and formulas are there."""
    resize(browser, size)
    browser.get(url)
    browser.execute_async_script(
        """
        const done = arguments[arguments.length - 1];
        document.querySelectorAll("img").forEach(img => { img.loading = "eager"; });
        const images = [...document.images].map(img => img.decode().catch(() => {}));
        const math = window.MathJax?.startup?.promise ?? Promise.resolve();
        Promise.all([...images, math]).then(() => requestAnimationFrame(() => done()));
        """
    )


def console_errors(browser: webdriver.Chrome, address: str) -> list[str]:
    """Severe messages, except that something on the internet could not be reached."""
    messages = [e["message"] for e in browser.get_log("browser") if e["level"] == "SEVERE"]
    sources = [message.split(" ", 1)[0] for message in messages]
    return [
        message
        for message, source in zip(messages, sources, strict=True)
        # The redirect at the front door names no icon, so the browser may guess one.
        if source != f"{address}/favicon.ico"
        and (source.startswith(address) or "net::ERR" not in message)
    ]


def faults(browser: webdriver.Chrome, width: int) -> list[str]:
    """What is wrong with the page on show at a width, in its light and in its dark form."""
    return browser.execute_script(PAGE_FAULTS, width, FIGURE_SCALE)


def largest_paint(browser: webdriver.Chrome) -> float:
    """Milliseconds from the request of the page on show to its largest contentful paint."""
    return browser.execute_async_script(
        """
        const done = arguments[arguments.length - 1];
        new PerformanceObserver(list => done(Math.max(...list.getEntries().map(e => e.startTime))))
          .observe({ type: "largest-contentful-paint", buffered: true });
        """
    )


# The small book stands in for the whole one where that was not built.
@pytest.mark.browser
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("site", SITES[-1:], indirect=True)
def test_every_page_is_sound_on_phone_tablet_and_desktop_in_both_themes(
    browser: webdriver.Chrome, site: Path, address: str
) -> None:
    found: list[str] = []
    browser.get_log("browser")
    for page in pages(site):
        name = page.relative_to(site).as_posix()
        if name == "index.html":  # sends the reader on; it has a test of its own
            continue
        for size in (DESKTOP, PHONE):
            show(browser, f"{address}/{name}", size)
            paints = [largest_paint(browser)]
            while paints[-1] > LARGEST_PAINT and len(paints) < 3:  # other work on the machine?
                show(browser, f"{address}/{name}", size)
                paints.append(largest_paint(browser))
            if paints[-1] > LARGEST_PAINT:
                found.append(f"{name} at {size[0]} px: slow: largest paint after {paints} ms")
        for size in (PHONE, TABLET, DESKTOP):
            resize(browser, size)
            found += [f"{name} at {size[0]} px: {fault}" for fault in faults(browser, size[0])]
        found += [f"{name}: console: {error}" for error in console_errors(browser, address)]
    assert not found, "\n".join(dict.fromkeys(found))


@pytest.mark.browser
def test_the_search_for_faults_finds_them(browser: webdriver.Chrome, tmp_path: Path) -> None:
    """One page with one fault of each kind, which is otherwise without."""
    (tmp_path / "page.html").write_text(
        """<!doctype html><html lang="en"><title>t</title><body style="background: #fff"><article
        style="width: 200px"><p style="color: #888">pale</p><p>good</p><img src="gone.png" alt="x">
        <img src="dot.svg" alt="dot.svg"><pre style="width: 50px">long long long</pre>
        <p style="width: 900px">wide</p><span class="math">x^2</span>
        <table style="width: 300px; table-layout: fixed"><tr><td>a</table>
        <div class="cell_output"><img src="dot.svg" alt="a dot" width="20"></div>
        <script src="https://example.org/tracker.js"></script></article>""",
        encoding="utf-8",
    )
    (tmp_path / "dot.svg").write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" width="300" height="9"/>', encoding="utf-8"
    )
    with served(tmp_path) as address:
        show(browser, f"{address}/page.html", PHONE)
        found = faults(browser, PHONE[0])
        errors = console_errors(browser, address)
    kinds = {fault.split(":")[0] for fault in found}
    assert kinds == {
        *("alt", "code", "contrast", "image", "legible", "math", "network", "overflow", "spills")
    }
    assert [f for f in found if f.startswith("contrast")] != []
    assert all("pale" in f for f in found if f.startswith("contrast: light"))
    assert any("gone.png" in error for error in errors)


@pytest.mark.browser
@pytest.mark.parametrize("name", ["book/intro", "notebooks/00_start", "book/status", "search"])
def test_axe_finds_nothing_to_complain_of(
    browser: webdriver.Chrome, site: Path, address: str, name: str
) -> None:
    """The rules of WCAG 2 A and AA as axe-core reads them, on pages of different kinds.

    axe takes seconds a page; the test above looks at the contrasts of all of them in a second.
    """
    axe = resources.files("axe_core_python").joinpath("axe.min.js").read_text(encoding="utf-8")
    show(browser, f"{address}/{name}.html", DESKTOP)
    browser.execute_script(axe)
    for theme in ("light", "dark"):
        violations = browser.execute_async_script(
            """
            const done = arguments[arguments.length - 1], data = document.documentElement.dataset;
            data.theme = data.mode = arguments[0];
            axe.run(document, { runOnly: ["wcag2a", "wcag2aa"], resultTypes: ["violations"] })
              .then(r => done(r.violations.map(v => [v.id, v.nodes.map(n => n.html)])));
            """,
            theme,
        )
        assert not violations, theme


@pytest.mark.browser
@pytest.mark.parametrize(
    ("word", "page"),
    [
        ("rank", "notebooks/11_ablate_rank"),
        ("rho", "notebooks/10_ablate_rho_lambda"),
        ("herding", "notebooks/03_coresets"),
    ],
)
def test_the_search_page_finds(
    browser: webdriver.Chrome, site: Path, address: str, word: str, page: str
) -> None:
    browser.get(f"{address}/search.html?q={word}")
    WebDriverWait(browser, 30).until(
        lambda b: "finished" in b.find_element(By.CSS_SELECTOR, "#search-results").text
    )
    hits = browser.find_elements(By.CSS_SELECTOR, "#search-results ul.search li a")
    found = [urlsplit(hit.get_attribute("href") or "").path for hit in hits]
    assert f"/{page}.html" in found[:10], found


@pytest.mark.browser
def test_formulas_are_typeset_without_a_network(
    browser: webdriver.Chrome, site: Path, address: str
) -> None:
    scripts = [link for link in parsed(site / "book" / "notation.html").links if "mathjax" in link]
    assert scripts
    if mmdd_book.mathjax_folder() is None:  # then formulas need the network, and the page says so
        assert scripts[0].startswith("https://")
        return
    assert not urlsplit(scripts[0]).scheme, "MathJax is installed, but the page asks a CDN for it"
    show(browser, f"{address}/book/notation.html", DESKTOP)
    typeset = browser.execute_script("return document.querySelectorAll('mjx-container').length")
    failed = browser.execute_script("return document.querySelectorAll('mjx-merror').length")
    assert typeset > 50
    assert failed == 0


@pytest.mark.browser
def test_pages_are_printed_into_one_file_with_bookmarks(site: Path, tmp_path: Path) -> None:
    output = tmp_path / "some.pdf"
    sheets = print_pages(site, ["book/intro", "book/notation"], output)
    printed = PdfReader(output)
    assert len(printed.pages) == sheets >= 2
    assert [mark.title for mark in printed.outline] == ["Distilling image–text data", "Notation"]
    assert "Fifty learned pairs" in " ".join(printed.pages[0].extract_text().split())


@pytest.mark.browser
def test_the_front_door_leads_to_the_first_page(
    browser: webdriver.Chrome, site: Path, address: str
) -> None:
    browser.get(f"{address}/index.html")
    assert browser.current_url.endswith("/book/intro.html")
    assert "Distilling" in browser.title


@pytest.mark.browser
def test_the_landing_page_says_it_all_on_one_screen(
    browser: webdriver.Chrome, site: Path, address: str
) -> None:
    show(browser, f"{address}/book/intro.html", DESKTOP)
    bottoms = browser.execute_script(
        """
        return ["article h1", "article h1 + p", "#landing img", ".landing-ways .sd-card"].map(
          s => Math.max(...[...document.querySelectorAll(s)].map(
            e => e.getBoundingClientRect().bottom)));
        """
    )
    assert all(0 < bottom <= DESKTOP[1] for bottom in bottoms), bottoms
    ways = browser.find_elements(By.CSS_SELECTOR, ".landing-ways .sd-card a")
    assert [urlsplit(way.get_attribute("href") or "").path for way in ways] == [
        "/notebooks/00_start.html",
        "/notebooks/run.html",
        "/notebooks/18_bring_your_own.html",
    ]


@pytest.mark.browser
def test_one_picture_of_two_stands_on_the_landing_page(
    browser: webdriver.Chrome, site: Path, address: str
) -> None:
    """On a phone the one whose words can be read there."""
    for size, seen in ((DESKTOP, "landing.png"), (PHONE, "landing_phone.png")):
        show(browser, f"{address}/book/intro.html", size)
        pictures = browser.find_elements(By.CSS_SELECTOR, "#landing img, img.landing-phone")
        assert len(pictures) == 2
        shown = [p.get_attribute("src") or "" for p in pictures if p.is_displayed()]
        assert [src.rsplit("/", 1)[1] for src in shown] == [seen]


def test_the_numbers_of_the_landing_page_are_the_records() -> None:
    scores = landing_scores()
    for name in ("landing.png", "landing_phone.png"):
        told = Image.open(ROOT / "book" / name).info["Description"]
        assert told == description(scores), "python tools/draw_result.py"
    page = (ROOT / "book" / "intro.md").read_text(encoding="utf-8")
    alternatives = re.findall(r":alt: (Fifty.*)", page)
    assert len(alternatives) == 2
    for text in alternatives:
        assert re.findall(r"\d+\.\d", text) == [f"{m:.1f}" for m, _ in scores.values()]


# ---------------------------------------------------------------- the Sphinx extension


def test_the_fn_role_finds_the_line_that_defines_a_name() -> None:
    for name, start in {
        "mmdd.losses.info_nce": "def info_nce(",
        "mmdd.synthetic.SyntheticPairs": "class SyntheticPairs",
        "mmdd.synthetic.SyntheticPairs.save": "def save(",
    }.items():
        found = mmdd_book.find_definition(ROOT, name)
        assert found is not None, name
        path, line = found
        source = (ROOT / path).read_text(encoding="utf-8").splitlines()
        assert source[line - 1].strip().startswith(start)
    assert mmdd_book.find_definition(ROOT, "mmdd.losses.no_such_loss") is None
    assert mmdd_book.find_definition(ROOT, "mmdd.no_such_module.f") is None


def test_a_name_that_does_not_exist_fails_the_build(tmp_path: Path) -> None:
    config = {
        "title": "t",
        "repository": {"url": "https://github.com/a/b", "branch": "main"},
        "sphinx": {"local_extensions": {"mmdd_book": str(ROOT / "book" / "_ext")}},
    }
    (tmp_path / "_config.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: page\n", encoding="utf-8")
    (tmp_path / "page.md").write_text("# P\n\n{fn}`mmdd.losses.gone`\n", encoding="utf-8")
    built = jupyter_book(tmp_path)
    assert built.returncode != 0
    assert "nothing named 'mmdd.losses.gone'" in built.stdout + built.stderr


def test_the_execution_cache_follows_code_and_results_but_not_downloads(tmp_path: Path) -> None:
    for name, text in {
        "mmdd/a.py": "x = 1",
        "results/s.jsonl": "{}",
        "results/m.json": "{}",
        "benchmarks/b.json": "{}",
        "data/published/t.csv": "a",
        "data/published/c.yaml": "a",
        "data/cache/images.json": "{}",
        "notebooks/n.ipynb": json.dumps({}),
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    before = mmdd_book.inputs_digest(tmp_path)
    assert before == mmdd_book.inputs_digest(tmp_path)
    (tmp_path / "data/cache/images.json").write_text("[]", encoding="utf-8")
    assert mmdd_book.inputs_digest(tmp_path) == before
    for name in (
        "mmdd/a.py",
        "results/s.jsonl",
        "results/m.json",
        "benchmarks/b.json",
        "data/published/t.csv",
        "data/published/c.yaml",
    ):
        (tmp_path / name).write_text("changed", encoding="utf-8")
        after = mmdd_book.inputs_digest(tmp_path)
        assert after != before, name
        before = after
