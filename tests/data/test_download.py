"""Downloads from a real local HTTP server that drops, lies, ignores and refuses."""

import hashlib
import http.server
import json
import logging
import os
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mmdd.data import download
from mmdd.data.download import fetch, fetch_hub, fetch_url
from mmdd.data.sources import SOURCES, HubFile, RemoteFile, Source
from mmdd.data.transfer import require_free_space
from mmdd.data.unpack import unpack_zip, unpacked_note
from mmdd.errors import DownloadError

PAYLOAD = np.random.default_rng(0).bytes(3_000_000)
PIECE = 1 << 15  # what the downloader reads at a time
SHA = hashlib.sha256(PAYLOAD).hexdigest()


class Server:
    """An HTTP server in a thread whose answers the tests steer; it remembers the requests."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.etag: str | None = '"v1"'
        self.ranges = True
        self.drop_after: list[int] = []  # bytes to send before hanging up, one per request
        self.status: list[int] = []  # statuses to answer first, one per request
        self.announce: int | None = None  # a Content-Length that is a lie
        self.pace = 0.0  # seconds between pieces of 64 KiB
        self.headers: dict[str, str] = {}
        self.moved: dict[str, str] = {}  # path → where it is now
        self.requests: list[tuple[str, str | None]] = []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_args):
                pass

            def do_HEAD(self):
                server.answer(self, body=False)

            def do_GET(self):
                server.requests.append((self.path, self.headers.get("Range")))
                server.answer(self, body=True)

        self.httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.httpd.server_port}"
        self.thread = threading.Thread(target=self.httpd.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def answer(self, handler, body: bool) -> None:
        path = handler.path.partition("?")[0]
        if path in self.moved:
            handler.send_response(302)
            handler.send_header("Location", self.moved[path])
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return None
        data = self.files.get(path)
        if body and self.status:
            code = self.status.pop(0)
            if code != 200:
                return self.refuse(handler, code)
        if data is None:
            return self.refuse(handler, 404)
        start = 0
        wanted = handler.headers.get("Range")
        valid = handler.headers.get("If-Range") in (None, self.etag)
        if wanted and self.ranges and valid:
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
            if start >= len(data):
                handler.send_response(416)
                handler.send_header("Content-Range", f"bytes */{len(data)}")
                handler.send_header("Content-Length", "0")
                handler.end_headers()
                return None
            handler.send_response(206)
            handler.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            handler.send_response(200)
        handler.send_header("Content-Length", str(self.announce or len(data) - start))
        if self.etag:
            handler.send_header("ETag", self.etag)
        for key, value in self.headers.items():
            handler.send_header(key, value)
        handler.end_headers()
        if not body:
            return None
        stop = len(data)
        if self.drop_after:
            stop = min(stop, start + self.drop_after.pop(0))
        try:
            for begin in range(start, stop, 65536):
                handler.wfile.write(data[begin : min(stop, begin + 65536)])
                if self.pace:
                    time.sleep(self.pace)
        except (BrokenPipeError, ConnectionResetError):
            pass
        if stop < len(data) or self.announce:
            handler.close_connection = True
        return None

    @staticmethod
    def refuse(handler, code: int) -> None:
        handler.send_response(code)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    def close(self) -> None:
        self.httpd.shutdown()
        self.httpd.server_close()
        self.thread.join()


@pytest.fixture
def server():
    server = Server()
    server.files["/file.bin"] = PAYLOAD
    yield server
    server.close()


def get(server: Server, path: Path, **more) -> Path:
    more = {"retries": 3, "backoff": 0.01, "progress": False, **more}
    return fetch_url(server.url + "/file.bin", path, **more)


def leftovers(folder: Path) -> set[str]:
    return {p.name for p in folder.rglob("*") if p.is_file() and not p.name.endswith(".lock")}


def zip_bytes(path: Path, members: dict[str, bytes]) -> bytes:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    data = path.read_bytes()
    path.unlink()
    return data


# One file by URL


def test_a_good_server_is_asked_once(server, tmp_path):
    path = get(server, tmp_path / "a.bin", sha256=SHA)
    assert path.read_bytes() == PAYLOAD
    assert get(server, tmp_path / "a.bin", sha256=SHA) == path
    assert server.requests == [("/file.bin", None)]
    assert leftovers(tmp_path) == {"a.bin", "a.bin.sha256.json"}


def test_dropped_connections_are_taken_up_where_they_broke(server, tmp_path, caplog):
    server.drop_after = [16 * PIECE, 30 * PIECE, 20 * PIECE]
    assert get(server, tmp_path / "a.bin", sha256=SHA).read_bytes() == PAYLOAD
    assert [wanted for _, wanted in server.requests] == [
        None,
        f"bytes={16 * PIECE}-",
        f"bytes={46 * PIECE}-",
        f"bytes={66 * PIECE}-",
    ]
    assert f"going on from byte {16 * PIECE}" in caplog.text


def test_a_server_that_ignores_ranges_costs_a_new_start_only(server, tmp_path):
    server.ranges = False
    server.drop_after = [500_000, 1_000_000]
    assert get(server, tmp_path / "a.bin", sha256=SHA).read_bytes() == PAYLOAD
    assert len(server.requests) == 3


def test_a_later_call_goes_on_when_the_retries_were_used_up(server, tmp_path):
    server.drop_after = [28 * PIECE] + [0] * 3
    with pytest.raises(DownloadError, match=r"gave up on .*917,504 bytes so far"):
        get(server, tmp_path / "a.bin", sha256=SHA, retries=2)
    assert not (tmp_path / "a.bin").exists()
    server.drop_after = []
    server.requests.clear()
    assert get(server, tmp_path / "a.bin", sha256=SHA).read_bytes() == PAYLOAD
    assert server.requests == [("/file.bin", f"bytes={28 * PIECE}-")]


def test_a_file_that_changed_in_between_is_not_mixed(server, tmp_path):
    server.drop_after = [28 * PIECE] + [0] * 3
    with pytest.raises(DownloadError):
        get(server, tmp_path / "a.bin", retries=2)
    server.drop_after = []
    server.etag, other = '"v2"', PAYLOAD[::-1]
    server.files["/file.bin"] = other
    assert get(server, tmp_path / "a.bin").read_bytes() == other


def test_without_a_version_a_later_call_starts_over(server, tmp_path):
    server.etag = None
    server.drop_after = [28 * PIECE] + [0] * 3
    with pytest.raises(DownloadError):
        get(server, tmp_path / "a.bin", retries=2)
    server.drop_after = []
    server.files["/file.bin"] = PAYLOAD[::-1]
    assert get(server, tmp_path / "a.bin").read_bytes() == PAYLOAD[::-1]


def test_bytes_left_by_a_kill_after_the_last_one_are_used(server, tmp_path):
    (tmp_path / "a.bin.part").write_bytes(PAYLOAD)
    notes = {"url": server.url + "/file.bin", "validator": '"v1"', "total": len(PAYLOAD)}
    (tmp_path / "a.bin.part.json").write_text(json.dumps(notes))
    assert get(server, tmp_path / "a.bin", sha256=SHA).read_bytes() == PAYLOAD
    assert server.requests == [("/file.bin", f"bytes={len(PAYLOAD)}-")]


def test_a_file_that_moved_is_followed_and_checked(server, tmp_path):
    server.files["/new.bin"] = server.files.pop("/file.bin")
    server.moved = {"/file.bin": "/on/the/way", "/on/the/way": server.url + "/new.bin"}
    server.drop_after = [200_000]
    assert get(server, tmp_path / "a.bin", sha256=SHA).read_bytes() == PAYLOAD
    begun = [offset for path, offset in server.requests if path == "/new.bin"]
    assert begun[0] is None
    assert begun[1].startswith("bytes="), "taken up where it broke, at its new place"
    server.files["/new.bin"] = b"a page that says where to log in"
    with pytest.raises(DownloadError, match="other bytes than expected"):
        get(server, tmp_path / "b.bin", sha256=SHA)
    assert not any(name.startswith("b.bin") for name in leftovers(tmp_path))


@pytest.mark.parametrize("target", ["/file.bin", "file:///etc/passwd", "ftp://127.0.0.1/a", "//"])
def test_a_redirect_that_leads_nowhere_is_an_error(server, tmp_path, target):
    server.moved = {"/file.bin": target}
    with pytest.raises(DownloadError, match="cannot download"):
        get(server, tmp_path / "a.bin")
    assert leftovers(tmp_path) == set()


def test_a_body_cut_by_a_server_that_tells_no_length_is_found_by_its_sum(server, tmp_path):
    server.announce = None
    server.files["/file.bin"] = PAYLOAD[:-7]
    with pytest.raises(DownloadError, match="other bytes than expected"):
        get(server, tmp_path / "a.bin", sha256=SHA)
    assert leftovers(tmp_path) == set()


def test_wrong_bytes_never_get_the_final_name(server, tmp_path):
    wrong = PAYLOAD[:-1] + bytes([PAYLOAD[-1] ^ 1])
    server.files["/file.bin"] = wrong
    with pytest.raises(DownloadError, match="other bytes than expected") as caught:
        get(server, tmp_path / "a.bin", sha256=SHA)
    assert hashlib.sha256(wrong).hexdigest() in str(caught.value)
    assert SHA in str(caught.value)
    with pytest.raises(DownloadError, match="other bytes than expected"):
        get(server, tmp_path / "a.bin", sha256=SHA[:8])
    assert leftovers(tmp_path) == set()


def test_a_spoilt_partial_file_is_started_over_once(server, tmp_path, caplog):
    (tmp_path / "a.bin.part").write_bytes(bytes(1000))
    notes = {"url": server.url + "/file.bin", "validator": '"v1"', "total": len(PAYLOAD)}
    (tmp_path / "a.bin.part.json").write_text(json.dumps(notes))
    assert get(server, tmp_path / "a.bin", sha256=SHA).read_bytes() == PAYLOAD
    assert [wanted for _, wanted in server.requests] == ["bytes=1000-", None]
    assert "starting over" in caplog.text


def test_the_first_sum_is_recorded_and_binds_later_downloads(server, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = get(server, tmp_path / "a.bin")
    assert f"recorded sha256 {SHA}" in caplog.text
    lock = json.loads((tmp_path / "a.bin.sha256.json").read_text())
    assert lock["sha256"] == SHA
    assert lock["bytes"] == len(PAYLOAD)
    path.write_bytes(b"damaged on disk")
    assert get(server, tmp_path / "a.bin").read_bytes() == PAYLOAD
    path.unlink()
    server.files["/file.bin"] = b"replaced at its source"
    with pytest.raises(DownloadError, match="other bytes than expected"):
        get(server, tmp_path / "a.bin")
    (tmp_path / "a.bin.sha256.json").write_text("{")
    with pytest.raises(DownloadError, match="damaged"):
        get(server, tmp_path / "a.bin")


def test_only_the_leading_digits_of_a_sum_may_be_known(server, tmp_path):
    path = get(server, tmp_path / "a.bin", sha256=SHA[:8])
    assert json.loads((tmp_path / "a.bin.sha256.json").read_text())["sha256"] == SHA
    path.write_bytes(b"damaged on disk")
    assert get(server, tmp_path / "a.bin", sha256=SHA[:8]).read_bytes() == PAYLOAD


@pytest.mark.parametrize("code", [403, 404, 410])
def test_a_refusal_is_final(server, tmp_path, code):
    server.status = [code] * 10
    with pytest.raises(DownloadError, match=str(code)):
        get(server, tmp_path / "a.bin")
    assert len(server.requests) == 1
    assert leftovers(tmp_path) == set()


def test_passing_errors_are_tried_again(server, tmp_path):
    server.status = [503, 429, 500]
    assert get(server, tmp_path / "a.bin").read_bytes() == PAYLOAD
    server.status = [503] * 10
    with pytest.raises(DownloadError, match=r"gave up .*503"):
        get(server, tmp_path / "b.bin", retries=2)


def test_the_pauses_double(server, tmp_path, monkeypatch):
    pauses: list[float] = []
    monkeypatch.setattr("mmdd.data.transfer.time.sleep", pauses.append)
    server.status = [503] * 10
    with pytest.raises(DownloadError):
        get(server, tmp_path / "a.bin", retries=8, backoff=1.0)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]


def test_no_server_and_no_address(tmp_path):
    with pytest.raises(DownloadError, match="gave up"):
        fetch_url("http://127.0.0.1:9/x", tmp_path / "x", retries=1, backoff=0.01, progress=False)
    with pytest.raises(DownloadError, match="cannot download"):
        fetch_url("http://", tmp_path / "x", progress=False)


def test_a_file_larger_than_the_disk_is_not_begun(server, tmp_path):
    server.announce = 10**16
    with pytest.raises(DownloadError, match="not enough disk space"):
        get(server, tmp_path / "a.bin")
    assert not (tmp_path / "a.bin").exists()
    with pytest.raises(DownloadError, match="to test"):
        require_free_space(tmp_path, 10**16, "to test")
    require_free_space(tmp_path, 1, "to test")


def test_kill_nine_midway_then_resume(server, tmp_path):
    server.pace = 0.02
    code = (
        "import sys; from mmdd.data.download import fetch_url; "
        "fetch_url(sys.argv[1], sys.argv[2], progress=False)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, server.url + "/file.bin", str(tmp_path / "a.bin")],
        env={**os.environ, "PYTHONPATH": str(Path(download.__file__).parents[2])},
    )
    part = tmp_path / "a.bin.part"
    deadline = time.monotonic() + 30
    while not (part.exists() and part.stat().st_size):
        assert time.monotonic() < deadline
        assert child.poll() is None
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    size = part.stat().st_size
    assert 0 < size < len(PAYLOAD)
    server.pace = 0.0
    assert get(server, tmp_path / "a.bin", sha256=SHA).read_bytes() == PAYLOAD
    assert server.requests[-1] == ("/file.bin", f"bytes={size}-")


# Archives


def test_unpacking_leaves_one_top_folder_and_litter_away(tmp_path):
    archive = tmp_path / "a.zip"
    members = {
        "Photos/": b"",
        "Photos/a.jpg": b"1",
        "Photos/deep/b.jpg": b"22",
        "Photos/.DS_Store": b"x",
        "__MACOSX/Photos/._a.jpg": b"x",
    }
    archive.write_bytes(zip_bytes(tmp_path / "t", members))
    target = unpack_zip(archive, tmp_path / "out", max_bytes=100, progress=False)
    assert (target / "a.jpg").read_bytes() == b"1"
    assert (target / "deep/b.jpg").read_bytes() == b"22"
    assert leftovers(target) == {"a.jpg", "b.jpg", ".unpacked.json"}
    assert unpacked_note(target) == {"files": 2, "bytes": 3}
    archive.write_bytes(zip_bytes(tmp_path / "t", {"x/a": b"1", "b": b"2"}))
    unpack_zip(archive, tmp_path / "out", max_bytes=100, progress=False)
    assert leftovers(target) == {"a", "b", ".unpacked.json"}
    assert (target / "x/a").exists()


@pytest.mark.parametrize(
    "name", ["../out.txt", "a/../../out.txt", "/etc/out.txt", "a\\..\\out.txt", "C:/out.txt"]
)
def test_members_that_would_leave_the_folder_are_refused(tmp_path, name):
    archive = tmp_path / "in" / "a.zip"
    archive.parent.mkdir()
    archive.write_bytes(zip_bytes(tmp_path / "t", {"good": b"1", name: b"2"}))
    with pytest.raises(DownloadError, match="refused"):
        unpack_zip(archive, tmp_path / "in" / "out", max_bytes=100, progress=False)
    assert leftovers(tmp_path) == {"a.zip"}


@pytest.mark.parametrize("place", ["out", "out.partial"])
def test_a_link_in_the_place_of_the_folder_is_not_followed(tmp_path, place):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_bytes(b"1")
    (tmp_path / place).symlink_to(elsewhere)
    (tmp_path / "a.zip").write_bytes(zip_bytes(tmp_path / "t", {"x/a": b"1", "b": b"2"}))
    unpack_zip(tmp_path / "a.zip", tmp_path / "out", max_bytes=100, progress=False)
    assert leftovers(elsewhere) == {"precious"}
    assert (tmp_path / "out" / "b").read_bytes() == b"2"
    assert not (tmp_path / "out").is_symlink()


def test_a_link_and_a_file_written_through_it_are_refused(tmp_path):
    """The archive that tar and zip programs make of a folder with a link in it, and one more."""
    box = tmp_path / "box"
    box.mkdir()
    link = zipfile.ZipInfo("top/door")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(link, str(box))
        archive.writestr("top/door/out.txt", b"2")
    with pytest.raises(DownloadError, match="link or a device"):
        unpack_zip(tmp_path / "a.zip", tmp_path / "in" / "out", max_bytes=99, progress=False)
    assert list(box.iterdir()) == []
    assert leftovers(tmp_path) == {"a.zip"}


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO])
def test_links_and_devices_are_refused(tmp_path, kind):
    info = zipfile.ZipInfo("link")
    info.external_attr = (kind | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(DownloadError, match="link or a device"):
        unpack_zip(tmp_path / "a.zip", tmp_path / "out", max_bytes=100, progress=False)
    assert not (tmp_path / "out").exists()


def test_bombs_doubles_and_damage_are_refused(tmp_path):
    def refused(data: bytes, match: str) -> None:
        (tmp_path / "a.zip").write_bytes(data)
        with pytest.raises(DownloadError, match=match):
            unpack_zip(tmp_path / "a.zip", tmp_path / "out", max_bytes=10**6, progress=False)
        assert leftovers(tmp_path) == {"a.zip"}
        assert not (tmp_path / "out.partial").exists()

    bomb = zip_bytes(tmp_path / "t", {"zeros": bytes(50_000_000)})
    assert len(bomb) < 60_000
    refused(bomb, "would unpack to 50,000,000")
    # the same bomb, announcing one byte: reading stops there and the checksum does not fit
    size = (50_000_000).to_bytes(4, "little")
    assert bomb.count(size) == 2
    refused(bomb.replace(size, (1).to_bytes(4, "little")), "not a usable zip")
    refused(zip_bytes(tmp_path / "t", {"A.jpg": b"1", "a.jpg": b"2"}), "same name")
    refused(zip_bytes(tmp_path / "t", {"a": b"1", "a/b": b"2"}), "cannot unpack")
    good = zip_bytes(tmp_path / "t", {"a": PAYLOAD[:1000]})
    refused(good[:-30], "not a usable zip")
    refused(good[:200] + b"spoilt" + good[206:], "not a usable zip")
    refused(b"<html>moved</html>", "not a usable zip")
    refused(zip_bytes(tmp_path / "t", {}), "holds no file")


# Whole sources


def small_source(server: Server, tmp_path: Path) -> Source:
    images = zip_bytes(tmp_path / "t", {"Flicker8k_Dataset/a.jpg": PAYLOAD[:5000]})
    text = zip_bytes(tmp_path / "t", {"Flickr8k.token.txt": b"a.jpg#0\twords\n"})
    server.files.update({"/images.zip": images, "/text.zip": text, "/w.th": b"weights"})
    return Source(
        name="small",
        title="Small",
        homepage="http://example.org",
        licence="Free.",
        files=(
            RemoteFile(
                "images.zip", server.url + "/images.zip", unpack_to="images", max_bytes=9999
            ),
            RemoteFile("text.zip", server.url + "/text.zip", unpack_to="text", max_bytes=9999),
            RemoteFile(
                "w.th", server.url + "/w.th", sha256=hashlib.sha256(b"weights").hexdigest()[:8]
            ),
        ),
    )


def test_a_source_is_fetched_unpacked_and_then_left_alone(server, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    source = small_source(server, tmp_path)
    paths = fetch(source, tmp_path / "d", progress=False)
    assert paths == {
        "images.zip": tmp_path / "d/small/images",
        "text.zip": tmp_path / "d/small/text",
        "w.th": tmp_path / "d/small/w.th",
    }
    assert (paths["images.zip"] / "a.jpg").read_bytes() == PAYLOAD[:5000]
    assert not (tmp_path / "d/small/images.zip").exists()
    assert "Free." in caplog.text
    before = len(server.requests)
    assert fetch(source, tmp_path / "d", progress=False) == paths
    assert len(server.requests) == before == 3


def test_an_archive_that_cannot_be_unpacked_does_not_bind_later_downloads(server, tmp_path):
    source = small_source(server, tmp_path)
    good, server.files["/images.zip"] = server.files["/images.zip"], b"<html>busy</html>"
    with pytest.raises(DownloadError, match="not a usable zip"):
        fetch(source, tmp_path / "d", progress=False)
    assert leftovers(tmp_path / "d") == set()
    server.files["/images.zip"] = good
    assert (fetch(source, tmp_path / "d", progress=False)["images.zip"] / "a.jpg").exists()


def test_the_default_place_is_the_cache(server, tmp_path, monkeypatch):
    monkeypatch.setenv("MMDD_CACHE", str(tmp_path / "cache"))
    paths = fetch(small_source(server, tmp_path), progress=False, keep_archives=True)
    assert paths["w.th"] == tmp_path / "cache/downloads/small/w.th"
    assert (tmp_path / "cache/downloads/small/text.zip").exists()


def test_an_unknown_source_names_the_known_ones(tmp_path):
    with pytest.raises(DownloadError, match="flickr8k, flickr30k, coco, karpathy"):
        fetch("imagenet", tmp_path)


def test_the_table_is_sound():
    for name, source in SOURCES.items():
        assert source.name == name
        assert source.licence
        assert source.files
        for file in source.files:
            assert (file.url is None) != (file.hub is None)
            assert "/" not in file.name
            assert file.sha256 is None or set(file.sha256) <= set("0123456789abcdef")
            assert (file.max_bytes > 0) == (file.unpack_to is not None)
    assert SOURCES["cifar-resnet20"].files[0].sha256 == "12fca82f"


def test_importing_downloads_nothing():
    code = (
        "import socket\n"
        "def refuse(*a, **k): raise SystemExit('network used at import')\n"
        "socket.socket.connect = refuse\n"
        "import mmdd.data.download, mmdd.data.readers, sys\n"
        "assert 'pooch' not in sys.modules and 'huggingface_hub' not in sys.modules\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(download.__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


# The Hugging Face hub

HUB_FILE = HubFile("someone/photos", "photos.zip", "a" * 40)
HUB_PATH = f"/datasets/someone/photos/resolve/{'a' * 40}/photos.zip"


@pytest.fixture
def hub(server):
    server.files[HUB_PATH] = PAYLOAD
    server.etag = f'"{SHA}"'  # the hub's ETag of a large file is its sha256
    server.headers = {"X-Repo-Commit": "a" * 40}
    return server


def test_a_hub_file_is_checked_against_the_sum_the_hub_states(hub, tmp_path):
    path = fetch_hub(HUB_FILE, tmp_path / "p.zip", endpoint=hub.url, progress=False)
    assert path.read_bytes() == PAYLOAD
    asked = len(hub.requests)
    fetch_hub(HUB_FILE, tmp_path / "p.zip", endpoint=hub.url, progress=False)
    assert len(hub.requests) == asked
    hub.files[HUB_PATH] = PAYLOAD[::-1]
    with pytest.raises(DownloadError, match="other bytes than expected"):
        fetch_hub(HUB_FILE, tmp_path / "q.zip", endpoint=hub.url, progress=False)
    assert not (tmp_path / "q.zip").exists()


def test_a_hub_connection_that_drops_is_taken_up(hub, tmp_path):
    hub.drop_after = [1_000_000, 500_000]
    path = fetch_hub(HUB_FILE, tmp_path / "p.zip", endpoint=hub.url, progress=False)
    assert path.read_bytes() == PAYLOAD
    assert len(hub.requests) == 3


def test_a_hub_that_refuses_or_is_too_large(hub, tmp_path):
    gone = HubFile("someone/photos", "other.zip", "a" * 40)
    with pytest.raises(DownloadError, match=r"someone/photos/other\.zip"):
        fetch_hub(gone, tmp_path / "p.zip", endpoint=hub.url, progress=False)
    hub.announce = 10**16
    with pytest.raises(DownloadError, match="not enough disk space"):
        fetch_hub(HUB_FILE, tmp_path / "p.zip", endpoint=hub.url, progress=False)
    assert not (tmp_path / "p.zip").exists()


def test_a_source_may_lie_on_the_hub(hub, tmp_path):
    data = zip_bytes(tmp_path / "t", {"photos/a.jpg": b"1"})
    hub.files[HUB_PATH] = data
    hub.etag = f'"{hashlib.sha256(data).hexdigest()}"'
    file = RemoteFile("photos.zip", hub=HUB_FILE, unpack_to="images", max_bytes=100)
    source = Source("hubbed", "Hubbed", "http://example.org", "Free.", (file,))
    paths = fetch(source, tmp_path / "d", endpoint=hub.url, progress=False)
    assert (paths["photos.zip"] / "a.jpg").read_bytes() == b"1"
