"""Files fetched by address: verified by digest, resumed where they broke off, kept in a cache.

A file is written beside its final name and renamed when its digest is right, so what has a final name is whole.
"""

import contextlib
import fcntl
import hashlib
import http.client
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from regvit.data.progress import progress

ATTEMPTS = 5  # connections; each goes on where the last broke off
PAUSE = 1.0  # seconds before the second attempt, doubled before each later one
TIMEOUT = 60.0  # seconds without a byte
BLOCK = 1 << 20  # bytes read at once
LASTING = (400, 401, 403, 404, 405, 410, 451)  # HTTP answers that another attempt does not change


class DownloadFailed(RuntimeError):
    """A file could not be fetched, or is another one than was expected."""


def fetch_file(
    url: str,
    digest: str,
    cache_dir: Path | str,
    label: str | None = None,
    attempts: int = ATTEMPTS,
    pause: float = PAUSE,
    sleep: Callable[[float], None] = time.sleep,
) -> Path:
    """The verified file at an address, from the cache or the network.

    Args:
        url: http or https.
        digest: `sha256:<hex>` or, where publishers give no better one, `md5:<hex>`.
        cache_dir: where verified files are kept; made if missing. One put there by hand under its name is taken too.
        label: of progress; None is silent.
    Returns:
        Its path: `<first 16 digits of the digest>-<last part of the address>`.
    Raises:
        ValueError: the address or the digest has another form.
        DownloadFailed: no attempt succeeded, or what came has another digest.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ValueError(f"{url!r} is not an http or https address; for files on disk use folder:<path>")
    algorithm, _, expected = digest.partition(":")
    length = {"sha256": 64, "md5": 32}.get(algorithm)
    if length is None or not re.fullmatch(f"[0-9a-f]{{{length}}}", expected):
        raise ValueError(f"digest {digest!r} is not sha256:<64 hexadecimal digits> or md5:<32>, in lower case")
    cache_dir = Path(cache_dir)
    cache_dir.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^\w.+-]", "_", urllib.parse.unquote(parts.path.rsplit("/", 1)[-1])) or "file"
    by_hand, final = cache_dir / name, cache_dir / f"{expected[:16]}-{name}"
    with locked(cache_dir / f".{expected[:16]}.lock"):
        for there in (final, by_hand):
            if there.is_file() and file_digest(there, algorithm) == expected:
                return there
        partial = final.with_name(f".{final.name}.part")
        for attempt in range(attempts):
            if attempt:
                sleep(pause * 2 ** (attempt - 1))
            try:
                _receive(url, partial, label)
            except urllib.error.HTTPError as error:
                error.close()
                problem = f"HTTP {error.code} {error.reason}"
                if error.code in LASTING:
                    break
                continue
            except (OSError, http.client.HTTPException) as error:
                problem = str(getattr(error, "reason", "") or error) or type(error).__name__
                continue
            if (found := file_digest(partial, algorithm)) == expected:
                os.replace(partial, final)
                return final
            partial.unlink()  # going on with it would only give the same again
            problem = f"its {algorithm} is {found}, expected {expected}: another file lies at this address now"
    raise DownloadFailed(
        f"{url} could not be fetched: {problem}; check address, digest and network, or put the file into {cache_dir} "
        f"as {name} by hand. What has arrived is kept, and the next attempt goes on from there"
    )


def _receive(url: str, partial: Path, label: str | None) -> None:
    """Bring `partial` up to the whole file, from where it ends.

    Raises:
        OSError, HTTPException: the connection failed or broke off; `partial` keeps what came.
    """
    have = partial.stat().st_size if partial.exists() else 0
    headers = {"User-Agent": "regvit", "Accept-Encoding": "identity"}
    request = urllib.request.Request(url, headers=headers | ({"Range": f"bytes={have}-"} if have else {}))
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        whole = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", ""))
        if error.code != 416:
            raise
        error.close()
        if whole and int(whole[1]) == have:
            return  # nothing was missing
        partial.unlink()
        return _receive(url, partial, label)
    with response:
        sent = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
        if response.status != 206 or not sent or int(sent[1]) != have:
            have = 0  # the server sends the whole file
        length = int(response.headers.get("Content-Length", 0))
        with open(partial, "r+b" if have else "wb") as file, progress((have + length) >> 20, label, "MiB") as bar:
            file.seek(have)
            bar.skip(have >> 20)
            received = 0
            while block := response.read(BLOCK):
                file.write(block)
                received += len(block)
                bar.advance(((have + received) >> 20) - bar.done)
        if length and received < length:
            raise ConnectionError(f"the connection broke off after {have + received} of {have + length} bytes")


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Waits until no other process holds `file`, and holds it."""
    with open(file, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def file_digest(path: Path, algorithm: str) -> str:
    """Digest (hex) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()
