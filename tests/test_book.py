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
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import nbformat
import pytest
import yaml
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

ROOT = Path(__file__).resolve().parent.parent
WHOLE_BOOK = ROOT / "_build" / "html"
SITES = ["small", *(["whole"] if (WHOLE_BOOK / "index.html").is_file() else [])]
PHONE, DESKTOP = (390, 844), (1280, 900)
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


# ---------------------------------------------------------------- building


def toc_files(toc: dict) -> list[str]:
    return [toc["root"], *(c["file"] for part in toc["parts"] for c in part["chapters"])]


def write_notebook(path: Path, title: str, source: str) -> None:
    cells = [nbformat.v4.new_markdown_cell(f"# {title}"), nbformat.v4.new_code_cell(source)]
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
    write_notebook(folder / "notebooks" / "probe.ipynb", "Probe", PROBE)
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
    outputs = text.split('class="cell_output', 1)[1]
    assert "a spent bar" not in outputs
    assert "chatter on stderr" not in outputs


def test_the_status_page_lists_versions_and_execution_times(small_book: Path) -> None:
    page = parsed(small_book / "_build" / "html" / "book" / "status.html")
    text = " ".join("".join(page.text).split())
    assert "1.0.4.post1" in text, "the version of jupyter-book"
    for name in EXECUTED:
        assert re.search(rf"{name} .*?\d+\.\d+", text), f"no execution time of {name}"


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
        f"--user-data-dir={profile}",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    chrome.set_page_load_timeout(60)
    chrome.set_script_timeout(60)
    yield chrome
    chrome.quit()


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    """The site behind a real local web server."""
    handler = functools.partial(QuietHandler, directory=str(site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def show(browser: webdriver.Chrome, url: str, size: tuple[int, int]) -> None:
    """Open a page at a size and wait until its images and formulas are there."""
    width, height = size
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
    )
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


def faults(browser: webdriver.Chrome, width: int) -> list[str]:
    """What is wrong with the page on show, in its light and in its dark form."""
    return browser.execute_script(
        """
        const width = arguments[0], faults = [];
        const root = document.documentElement;
        for (const img of document.images)
          if (!img.naturalWidth) faults.push("image does not load: " + img.src);
        for (const theme of ["light", "dark"]) {
          root.dataset.theme = theme;
          root.dataset.mode = theme;
          const reach = Math.max(root.scrollWidth, document.body.scrollWidth);
          if (reach > width) {
            const scrolls = e => e && (getComputedStyle(e).overflowX !== "visible"
                                       ? e !== root && e !== document.body
                                       : scrolls(e.parentElement));
            const wide = [...document.querySelectorAll("main *")]
              .filter(e => e.getBoundingClientRect().right > width + 1 && !scrolls(e))
              .slice(0, 3).map(e => e.tagName + "." + e.className);
            faults.push(`${theme}: ${reach} px wide on ${width} px (${wide.join(", ")})`);
          }
          const style = getComputedStyle(document.body);
          const level = s => s.match(/[\\d.]+/g).slice(0, 3).reduce((a, b) => a + +b, 0);
          const contrast = level(style.backgroundColor) - level(style.color);
          if (theme === "light" ? contrast < 300 : contrast > -300)
            faults.push(`${theme}: text ${style.color} on ${style.backgroundColor}`);
        }
        return faults;
        """,
        width,
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


@pytest.mark.browser
@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_pages_fit_the_screen_and_load_whole_in_both_themes(
    browser: webdriver.Chrome, site: Path, address: str, size: tuple[int, int]
) -> None:
    found: list[str] = []
    browser.get_log("browser")
    for page in pages(site):
        name = page.relative_to(site).as_posix()
        show(browser, f"{address}/{name}", size)
        found += [f"{name}: {fault}" for fault in faults(browser, size[0])]
        found += [f"{name}: console: {error}" for error in console_errors(browser, address)]
    assert not found, "\n".join(found)


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
def test_the_front_door_leads_to_the_first_page(
    browser: webdriver.Chrome, site: Path, address: str
) -> None:
    browser.get(f"{address}/index.html")
    assert browser.current_url.endswith("/book/intro.html")
    assert "Distilling" in browser.title


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
        "data/published/t.csv",
        "data/published/c.yaml",
    ):
        (tmp_path / name).write_text("changed", encoding="utf-8")
        after = mmdd_book.inputs_digest(tmp_path)
        assert after != before, name
        before = after
