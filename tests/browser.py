"""A headless Chromium, spoken to over its debugging pipe: nothing is installed for it, and no port is opened.

Commands go to its file descriptor 3 and answers come from 4, JSON with a zero byte after each message (`--remote-debugging-pipe`
of the Chrome DevTools Protocol).
"""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PLACE = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]  # out of the way first
for end, place in zip(ends, (3, 4)):
    os.dup2(end, place)
os.execv(sys.argv[3], sys.argv[3:])
"""  # the two pipes where the browser looks for them
WAIT = 60  # seconds for one answer, on a machine that is busy


def find_chromium() -> str | None:
    """Path of the browser: `CHROMIUM` in the environment, else one of its names in PATH; None where there is none."""
    return next(filter(None, map(shutil.which, (os.environ.get("CHROMIUM", ""), *NAMES))), None)


class Browser:
    """One page in a browser of its own; to be used in `with`."""

    def __init__(self, program: str):
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._in, ours_to = os.pipe()
        ours_from, self._out = os.pipe()
        options = [
            "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe",
            "--no-first-run", "--disable-background-networking", f"--user-data-dir={self._folder.name}", "about:blank",
        ]  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-c", PLACE, str(self._in), str(self._out), program, *options],
            pass_fds=(self._in, self._out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(self._in)
        os.close(self._out)
        self._to, self._from, self._rest, self._count = ours_to, ours_from, b"", 0
        self._session: str | None = None
        self.events: list[dict] = []
        targets = self.call("Target.getTargets")["targetInfos"]
        target = next(each["targetId"] for each in targets if each["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._to)
        self._process.terminate()
        self._process.wait(WAIT)
        os.close(self._from)
        self._folder.cleanup()

    def call(self, method: str, **params: object) -> dict:
        """Result of a command; events that come before it are kept in `events`."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next(time.monotonic() + WAIT)
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def open(self, page: Path, width: int, dark: bool) -> None:
        """Loads a file in a window of `width` CSS pixels, in light or dark; forgets the events of what was open before."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.events.clear()
        self.call("Page.navigate", url=page.resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next(time.monotonic() + WAIT))

    def evaluate(self, expression: str) -> object:
        """Value of a JavaScript expression; a promise is waited for."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def press(self, key: str) -> None:
        """One key, as from a keyboard: `Tab`, `ArrowRight`, `Enter`, `Space`…"""
        codes = {"Tab": 9, "Enter": 13, "Space": 32, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39}
        text = {"Enter": "\r", "Space": " "}.get(key)
        both = {"key": " " if key == "Space" else key, "code": key, "windowsVirtualKeyCode": codes[key]}
        self.call("Input.dispatchKeyEvent", type="keyDown", **both, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **both)

    def screenshot(self, path: Path, x: float, y: float, width: float, height: float) -> None:
        """Writes a PNG of a rectangle of the page, in CSS pixels from its upper left corner, in sight or not."""
        clip = {"x": x, "y": y, "width": width, "height": height, "scale": 1}
        taken = self.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(taken["data"]))

    def errors(self) -> list[str]:
        """What the console was told, and exceptions, since the page was opened."""
        told = {"Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"}
        return [json.dumps(event["params"]) for event in self.events if event.get("method") in told]

    def requested(self) -> list[str]:
        """Addresses that the page asked for, itself and data: left out."""
        urls = [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [url for url in urls[1:] if not url.startswith("data:")]

    def _next(self, until: float) -> dict:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._from], [], [], max(0, until - time.monotonic()))
            if not ready:
                raise TimeoutError(f"the browser did not answer within {WAIT} s")
            part = os.read(self._from, 1 << 16)
            if not part:
                raise RuntimeError(f"the browser ended with {self._process.wait(WAIT)}")
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)
