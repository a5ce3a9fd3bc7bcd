"""Where a feature store lies: a folder, or a prefix of an object storage. Both answer the same few questions.

Object storage is named by a URL, `s3://bucket/key.zarr` (`gs://` and `az://` go the same way and were not tried), and is
reached through obstore, an optional dependency. Its options are obstore's: `endpoint`, `region`, `access_key_id`, …;
what is not given comes from the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, …) or from the machine's role.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from types import ModuleType

from zarr.abc.store import Store
from zarr.storage import LocalStore

SCHEMES = ("s3", "gs", "az")


class StorageError(OSError):
    """The object storage refused or could not be reached; the message names the URL, the reason and the cure."""


class AlreadyThere(StorageError):
    """An object that should be made is there already."""


class Changed(StorageError):
    """An object is another than the one that should be replaced."""


@dataclass(frozen=True)
class Object:
    """What was stored under a key: its bytes, the tag that names this version of them, when the server got them."""

    content: bytes
    tag: str
    modified: datetime


@dataclass(frozen=True)
class Folder:
    """A store in a folder."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def exists(self) -> bool:
        return self.path.exists()

    def zarr(self) -> Store:
        """The folder as zarr reads it."""
        return LocalStore(self.path, read_only=True)

    def sizes(self) -> dict[str, int]:
        """Size in bytes of every file, by its path below the folder, in order of the paths."""
        files = sorted(path for path in self.path.rglob("*") if path.is_file())
        return {file.relative_to(self.path).as_posix(): file.stat().st_size for file in files}

    def read(self, key: str) -> bytes:
        """One file."""
        return (self.path / key).read_bytes()

    def digest(self, key: str) -> str:
        """SHA-256 (hex) of one file."""
        with open(self.path / key, "rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()


@dataclass(frozen=True)
class Bucket:
    """A store under a prefix of an object storage; it can be sent to another process, its options with it.

    Args:
        url: `s3://bucket/prefix`.
        options: of `obstore.store.from_url`.
    Raises:
        StorageError: by every method, where the storage refuses or cannot be reached.
    """

    url: str
    options: Mapping = field(default_factory=dict, repr=False)  # may hold a secret

    def __str__(self) -> str:
        return self.url

    def exists(self) -> bool:
        """Whether there is any object under the prefix."""
        with self._told():
            return any(batch for batch in _obstore().list(self._store, chunk_size=1))

    def zarr(self) -> Store:
        """The prefix as zarr reads it."""
        from zarr.storage import ObjectStore  # needs obstore

        return ObjectStore(self._store, read_only=True)

    def sizes(self) -> dict[str, int]:
        """Size in bytes of every object, by its key below the prefix, in order of the keys."""
        return {key: size for key, (size, _) in self.objects().items()}

    def objects(self) -> dict[str, tuple[int, str]]:
        """Size in bytes and tag of every object, by its key below the prefix, in order of the keys."""
        with self._told():
            found = [entry for batch in _obstore().list(self._store) for entry in batch]
        # Joined by "/", a key sorts as its parts do, which is how paths sort.
        return {
            entry["path"]: (entry["size"], entry["e_tag"])
            for entry in sorted(found, key=lambda entry: entry["path"].split("/"))
        }

    def read(self, key: str) -> bytes:
        """One object's bytes.

        Raises:
            FileNotFoundError: there is none.
        """
        return self.get(key).content

    def digest(self, key: str) -> str:
        """SHA-256 (hex) of one object."""
        return hashlib.sha256(self.read(key)).hexdigest()

    def get(self, key: str) -> Object:
        """One object.

        Raises:
            FileNotFoundError: there is none.
        """
        with self._told():
            answer = _obstore().get(self._store, key)
            return Object(bytes(answer.bytes()), answer.meta["e_tag"], answer.meta["last_modified"])

    def put(self, key: str, content: bytes) -> str:
        """Stores an object, whatever was there; whole or not at all. Returns: its tag."""
        with self._told():
            return _obstore().put(self._store, key, content, use_multipart=False)["e_tag"]

    def create(self, key: str, content: bytes) -> str:
        """Stores an object where there is none. Returns: its tag.

        Raises:
            AlreadyThere: there is one.
        """
        with self._told():
            return _obstore().put(self._store, key, content, mode="create", use_multipart=False)["e_tag"]

    def replace(self, key: str, content: bytes, tag: str) -> str:
        """Stores an object in the place of the one with that tag. Returns: the new tag.

        Raises:
            Changed: there is none, or one with another tag.
        """
        try:
            with self._told():
                return _obstore().put(self._store, key, content, mode={"e_tag": tag}, use_multipart=False)["e_tag"]
        except FileNotFoundError as error:
            raise Changed(str(error)) from error

    def delete(self, keys: Iterable[str]) -> None:
        """Deletes objects; those that are not there are deleted already."""
        if keys := list(keys):
            with self._told():
                _obstore().delete(self._store, keys)

    @cached_property
    def _store(self) -> object:
        try:
            return _obstore().store.from_url(self.url, **self.options)
        except (TypeError, *_obstore_errors()) as error:
            raise StorageError(
                f"{self.url}: {_first_line(error)}; give a URL such as s3://bucket/key.zarr and options that obstore "
                "knows (endpoint, region, access_key_id, secret_access_key, …)"
            ) from None  # its text may repeat a secret

    def __getstate__(self) -> dict:
        return {"url": self.url, "options": self.options}  # without the open connection

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Turns obstore's errors, which are pages long, into ours."""
        errors = _obstore().exceptions
        try:
            yield
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise StorageError(f"{self.url}: there is no such bucket; make it, or correct the URL") from error
            raise FileNotFoundError(f"{self.url}: {_first_line(error)}") from error
        except errors.AlreadyExistsError as error:
            raise AlreadyThere(f"{self.url}: {_first_line(error)}") from error
        except errors.PreconditionError as error:
            raise Changed(f"{self.url}: {_first_line(error)}") from error
        except errors.BaseError as error:
            raise StorageError(
                f"{self.url}: {_first_line(error)}; look at the URL, the credentials (AWS_… in the environment, or "
                "storage_options) and the network"
            ) from error


def is_url(path: Path | str) -> bool:
    """Whether a store's name is a URL of an object storage.

    Raises:
        ValueError: it is a URL of another kind.
    """
    scheme, parted, _ = str(path).partition("://")
    if isinstance(path, Path) or not parted:
        return False
    if scheme not in SCHEMES:
        raise ValueError(f"{path} has the scheme {scheme!r}; expected one of {', '.join(SCHEMES)}, or a folder")
    return True


def place_of(path: Path | str, options: Mapping | None = None) -> Folder | Bucket:
    """Where a store of that name lies.

    Args:
        path: of a folder, or a URL.
        options: of the object storage; a folder has none.
    Raises:
        ValueError: a URL of an unknown scheme, or options for a folder.
    """
    if is_url(path):
        return Bucket(str(path).rstrip("/"), dict(options or {}))
    if options:
        raise ValueError(f"{path} is a folder, which has no storage options (given: {', '.join(options)})")
    return Folder(Path(path))


def _obstore() -> ModuleType:
    """obstore, imported when a URL is first opened: stores in folders do without it.

    Raises:
        StorageError: it is not installed.
    """
    try:
        import obstore
        import obstore.exceptions
        import obstore.store
    except ImportError as error:
        raise StorageError(
            "object storage needs obstore, which is not installed; pip install 'regvit[cluster]', or pip install obstore"
        ) from error
    return obstore


def _obstore_errors() -> tuple[type[Exception], ...]:
    return (_obstore().exceptions.BaseError,)


def _first_line(error: Exception) -> str:
    """What an error of obstore says, without its dump; a refusal's XML is cut."""
    return str(error).partition("\n")[0].partition("<?xml")[0].strip().rstrip(":")
