"""Data sets made in a temporary folder, and a web server that breaks off, refuses and sends parts."""

import http.server
import threading
from pathlib import Path

import pytest
from PIL import Image

from regvit.data.decoding import image_suffixes
from regvit.data.sources import Made, make_dataset


@pytest.fixture
def make(tmp_path):
    """Make a data set in tmp_path/data; what is fetched lies in tmp_path/packages and tmp_path/downloads."""

    def make(source: str, name: str = "mine", seed: int = 0, **entry) -> Made:
        folder = tmp_path / "data" / name
        return make_dataset(source, name, folder, tmp_path, seed, show_progress=False, **entry)

    return make


FORMATS = {".avif": "AVIF", ".jp2": "JPEG2000", ".tga": "TGA", ".jfif": "JPEG", ".webp": "WEBP", ".gif": "GIF"}


@pytest.fixture
def photos(tmp_path):
    """Write files by their names under tmp_path/photos: images by their suffixes, "-> target" a link, "(broken)" no image in
    spite of its suffix; returns that folder."""

    def photos(*names: str) -> Path:
        root = tmp_path / "photos"
        for i, name in enumerate(names):
            name, _, target = name.partition(" -> ")
            path = root / name.removesuffix(" (broken)")
            path.parent.mkdir(parents=True, exist_ok=True)
            suffix = path.suffix.lower()
            if target:
                path.symlink_to(root / target)
            elif suffix in image_suffixes() and not name.endswith("(broken)"):
                Image.new("RGB", (16, 16), (i, 0, 0)).save(path, FORMATS.get(suffix, "PNG"))
            else:
                path.write_text("no image")
        return root

    return photos


class Site:
    """A local web server with one file, /a.bin.

    Attributes:
        content: of the file.
        breaks: after how many bytes each answer breaks off, first answer first; none left: answers are whole.
        ranges: whether it can send a part.
        status: None, or what it answers instead.
        asked: the Range header of each request, or None.
    """

    def __init__(self):
        self.content, self.breaks, self.ranges, self.status, self.asked = b"", [], True, None, []

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        asked = handler.headers.get("Range")
        self.asked.append(asked)
        if self.status:
            handler.send_error(self.status)
            return
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.ranges else 0
        if start >= len(self.content) > 0:
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{len(self.content)}")
            handler.end_headers()
            return
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        handler.send_header("Content-Length", str(len(self.content) - start))
        handler.end_headers()
        end = start + self.breaks.pop(0) if self.breaks else len(self.content)
        handler.wfile.write(self.content[start:end])
        handler.close_connection = True


@pytest.fixture
def site():
    """A running Site, with its address as `site.url`."""
    made = Site()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            made.answer(self)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        made.url = f"http://127.0.0.1:{server.server_port}/a.bin"
        yield made
        server.shutdown()
        thread.join()
