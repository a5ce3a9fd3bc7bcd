"""The right to write under a prefix of an object storage, held by one process at a time.

Object storage knows no flock: nothing is let go when a process dies. So the holder keeps an object there that it
renews every few seconds, and one that was not renewed for a minute (by the server's clock alone) may be taken over.
Taking and renewing are conditional on what was last seen there, so that of two processes only one succeeds.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid

from regvit.durable import FolderLocked
from regvit.features.storage import AlreadyThere, Bucket, Changed, StorageError

SECONDS = 60.0  # that a holder may be silent: renewals every quarter of it survive some lost requests
KEY = "owner"


class Lease:
    """Held from `acquire` to `release`, and renewed by a thread of its own.

    Args:
        bucket: prefix that is written under; the object is `owner` below it.
        seconds: after which a silent holder counts as dead; all that may hold it must use the same.
    """

    def __init__(self, bucket: Bucket, seconds: float = SECONDS):
        self.bucket, self.seconds = bucket, seconds
        self._token = uuid.uuid4().hex
        self._beat = 0
        self._tag = ""
        self._lost = ""
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Takes the lease.

        Raises:
            FolderLocked: another process holds it; the message says which, and when it may be taken over.
        """
        while not self._tag:
            try:
                self._tag = self.bucket.create(KEY, self._content())
            except AlreadyThere:
                self._tag = self._take_over()
        self._renewed = time.monotonic()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Does nothing while the lease is held.

        Raises:
            FolderLocked: it was lost: another process took it over while this one was silent.
        """
        if self._lost:
            raise FolderLocked(f"{self.bucket} is not this process's to write any more: {self._lost}; run it again")

    def release(self) -> None:
        """Gives the lease back."""
        if self._thread is None:
            return
        self._ended.set()
        self._thread.join()
        self._thread = None
        if not self._lost:
            self.bucket.delete([KEY])

    def _take_over(self) -> str:
        """The tag of a lease whose holder fell silent; "" where it was given back meanwhile."""
        try:
            found = self.bucket.get(KEY)
        except FileNotFoundError:
            return ""
        try:
            holder = json.loads(found.content)["holder"]
        except (ValueError, KeyError, TypeError):  # of another program
            holder = "an unknown process"
        silent = (self._server_time() - found.modified).total_seconds()
        if silent < self.seconds:
            raise FolderLocked(
                f"{self.bucket} is being written by {holder}, last heard of {silent:.0f} s ago; wait for it, or, if it "
                f"was killed, run again in {self.seconds - silent:.0f} s"
            )
        try:
            return self.bucket.replace(KEY, self._content(), found.tag)
        except Changed:
            raise FolderLocked(
                f"{self.bucket} has just been taken over from {holder} by another process; wait for it"
            ) from None

    def _server_time(self):
        """Now, by the clock that also dates the lease."""
        key = f"clock-{self._token}"
        self.bucket.put(key, b"")
        now = self.bucket.get(key).modified
        self.bucket.delete([key])
        return now

    def _content(self) -> bytes:
        """Another one each time, as equal contents have equal tags."""
        self._beat += 1
        holder = f"process {os.getpid()} on {socket.gethostname()}"
        return json.dumps({"holder": holder, "token": self._token, "beat": self._beat}).encode()

    def _renew(self) -> None:
        while not self._ended.wait(self.seconds / 4):
            try:
                content = self._content()
                self._tag = self.bucket.replace(KEY, content, self._tag)
                self._renewed = time.monotonic()
            except Changed:
                # A request that arrived though its answer was lost is sent again, and then finds its own first copy.
                if not self._is_ours(content):
                    self._lost = "another process took it over"
                    return
            except (StorageError, FileNotFoundError) as error:
                if time.monotonic() - self._renewed > self.seconds:
                    self._lost = f"it could not be renewed for {self.seconds:.0f} s ({error})"
                    return

    def _is_ours(self, content: bytes) -> bool:
        """Whether the object holds what this process last sent; takes up its tag then."""
        try:
            found = self.bucket.get(KEY)
        except (StorageError, FileNotFoundError):
            return False
        if found.content != content:
            return False
        self._tag, self._renewed = found.tag, time.monotonic()
        return True
