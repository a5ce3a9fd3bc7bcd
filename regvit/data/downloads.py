"""Files fetched by address: verified by digest and kept by pooch, resumed where they broke off by what is here.

Pooch starts over after every break. What has arrived is kept beside the file's final name, which it gets from pooch when
its digest is right: what has a final name is whole.
"""

import functools
import os
import re
import time
import urllib.parse
from pathlib import Path

import pooch
import requests
from filelock import FileLock
from tqdm.auto import tqdm

from regvit.data.packages import DownloadFailed

ATTEMPTS = 5  # connections; each goes on where the last broke off
PAUSE = 1.0  # seconds before the second attempt, doubled before each later one
TIMEOUT = 60.0  # seconds without a byte
BLOCK = 1 << 16  # bytes received at once; what a break leaves of the last one is fetched again
pooch.get_logger().setLevel("WARNING")  # the bar says what it does
DIGEST = re.compile("sha256:[0-9a-f]{64}|md5:[0-9a-f]{32}")


def fetch_file(url: str, digest: str, cache_dir: Path | str, label: str | None = None) -> Path:
    """The verified file at an address, from the cache or the network.

    Args:
        url: http or https.
        digest: `sha256:<hex>` or, where publishers give no better one, `md5:<hex>`.
        cache_dir: where verified files are kept; made if missing. One put there by hand under its name is taken too.
        label: of the progress bar; None shows none.
    Returns:
        Its path: `<first 16 digits of the digest>-<last part of the address>`.
    Raises:
        ValueError: the address or the digest has another form.
        DownloadFailed: no attempt succeeded, or what came has another digest.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ValueError(f"{url!r} is not an http or https address; for files on disk use folder:<path>")
    if not DIGEST.fullmatch(digest):
        raise ValueError(f"digest {digest!r} is not sha256:<64 hexadecimal digits> or md5:<32>, in lower case")
    algorithm, _, expected = digest.partition(":")
    cache_dir = Path(cache_dir).absolute()
    cache_dir.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^\w.+-]", "_", urllib.parse.unquote(parts.path.rsplit("/", 1)[-1])) or "file"
    final = cache_dir / f"{expected[:16]}-{name}"
    part = cache_dir / f".{final.name}.part"
    with FileLock(cache_dir / f".{expected[:16]}.lock"):
        for kept in (final, cache_dir / name):
            if kept.is_file() and pooch.file_hash(str(kept), alg=algorithm) == expected:
                return kept
        resumed = part.exists()
        download = functools.partial(_download, part=part, label=label)
        try:
            try:
                pooch.retrieve(url, digest, final.name, cache_dir, downloader=download)
            except ValueError:
                if not resumed:  # else the part may have been one of another file
                    raise
                pooch.retrieve(url, digest, final.name, cache_dir, downloader=download)
        except (requests.RequestException, ValueError) as error:
            kept = ". What has arrived is kept, and the next attempt goes on from there" if part.exists() else ""
            raise DownloadFailed(f"{url} could not be fetched: {str(error).rstrip('.')}; check address, digest and network, "
                                 f"or put the file into {cache_dir} as {name} by hand{kept}") from error  # fmt: skip
    return final


def _download(url: str, output_file: str, _pooch: object, part: Path, label: str | None) -> None:
    """A downloader of pooch's: brings `part` up to the whole file and hands it over."""
    for attempt in range(ATTEMPTS):
        try:
            _receive(url, part, label)
            break
        except requests.RequestException as error:
            status = error.response.status_code if error.response is not None else 503
            lasting = 400 <= status < 500 and status not in (408, 429)
            if lasting or attempt == ATTEMPTS - 1:
                raise
            time.sleep(PAUSE * 2**attempt)
    os.replace(part, output_file)


def _receive(url: str, part: Path, label: str | None) -> None:
    """One connection, from where `part` ends.

    Raises:
        RequestException: it failed or broke off; `part` keeps what came.
    """
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "regvit", "Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if response.status_code == 416:  # nothing is missing, or the part is longer than the file
            if response.headers.get("Content-Range") != f"bytes */{have}":
                part.unlink()
                _receive(url, part, label)
            return
        response.raise_for_status()
        if not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            have = 0  # the server sends the whole file
        total = have + int(response.headers.get("Content-Length", 0)) or None
        with (
            open(part, "r+b" if have else "wb") as file,
            tqdm(total=total, initial=have, desc=label, unit="B", unit_scale=True, disable=label is None) as bar,
        ):
            file.seek(have)
            for block in response.iter_content(BLOCK):
                file.write(block)
                bar.update(len(block))
