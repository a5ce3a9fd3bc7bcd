"""How far a long task is: a bar on a terminal, a plain line every few seconds in a log."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from typing import TextIO

BAR_EVERY = 0.1  # seconds between two drawings of the bar; faster is not seen
LINE_EVERY = 5.0  # seconds between two lines in a log


class progress:  # lower case, as it is called like a function: `with progress(10, "decode") as bar`
    """Progress of `total` units of work, written to stderr; use it in a `with` block.

    Args:
        total: units in the whole task; with 0 there is nothing to measure, and only `line` shows anything.
        label: what is being done; None shows nothing at all.
        unit: what is counted, in the plural.
        stream: where to write; stderr if None. A terminal gets a bar, anything else plain lines.
        clock: seconds from any origin, for tests.
    Raises:
        ValueError: `total` is negative.
    """

    def __init__(
        self,
        total: int,
        label: str | None,
        unit: str = "images",
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        if total < 0:
            raise ValueError(f"total is {total}; expected 0 or more {unit}")
        self.total, self.label, self.unit = total, label, unit
        self.done = self._skipped = 0
        self._stream = sys.stderr if stream is None else stream
        self._terminal = self._stream.isatty()
        self._clock = clock
        self._began = clock()
        self._drawn = self._began if not self._terminal else float("-inf")  # a log starts with work done, a bar at once
        self._shown: int | None = None

    def __enter__(self) -> progress:
        self._show()
        return self

    def __exit__(self, *_: object) -> None:
        """Shows the final state, also after an error."""
        if self.done and self._shown != self.done:
            self._show(force=True)
        if self._terminal and self.total:
            self._write("\n")

    def advance(self, n: int = 1) -> None:
        """Counts `n` more units as done."""
        self.done += n
        self._show()

    def skip(self, n: int) -> None:
        """Counts `n` units that an earlier run did: they move the bar and leave the rate alone."""
        self._skipped += n
        self.advance(n)

    def line(self, text: str) -> None:
        """Writes a line of its own, above the bar where there is one."""
        self._write(f"\r\x1b[K{text}\n" if self._terminal else f"{text}\n")
        if self._terminal:
            self._show(force=True)

    def status(self) -> str:
        """Counts, rate and time left, as `12/40 images  6.0 images/s  0:04 left`."""
        parts = [f"{self.done}/{self.total} {self.unit}"]
        elapsed, worked = self._clock() - self._began, self.done - self._skipped
        if worked and elapsed > 0:
            rate = worked / elapsed
            parts.append(f"{rate:.1f} {self.unit}/s")
            remaining = self.total - self.done
            parts.append(f"{duration(remaining / rate)} left" if remaining > 0 else f"in {duration(elapsed)}")
        return "  ".join(parts)

    def _show(self, force: bool = False) -> None:
        if self.label is None or not self.total:
            return
        now = self._clock()
        if not force and now - self._drawn < (BAR_EVERY if self._terminal else LINE_EVERY):
            return
        self._drawn, self._shown = now, self.done
        if self._terminal:
            self._write(f"\r\x1b[K{self._bar(shutil.get_terminal_size().columns - 1)}")
        else:
            self._write(f"{self.label}: {self.status()}\n")

    def _bar(self, width: int) -> str:
        """Label, bar and status in at most `width` characters; the bar takes what the texts leave."""
        status = self.status()
        room = min(30, width - len(self.label) - len(status) - 5)
        if room < 5:
            return f"{self.label}  {status}"[:width]
        full = min(room, room * self.done // self.total)
        return f"{self.label} [{'#' * full}{'-' * (room - full)}] {status}"

    def _write(self, text: str) -> None:
        if self.label is None:
            return
        self._stream.write(text)
        self._stream.flush()


def duration(seconds: float) -> str:
    """Seconds as `m:ss`, or `h:mm:ss` from one hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
