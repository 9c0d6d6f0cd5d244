"""Chromium without a window, driven over a pipe: its DevTools protocol, messages of JSON that end with a zero byte."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe")
_SECONDS = 30


class Tab:
    """A page that a browser has loaded, and what went wrong in it. Raises TimeoutError where Chromium does not answer.

    Attributes:
        errors: exceptions that nothing caught, and what the console calls errors.
        requests: what the page wanted to load, itself included.
    """

    def __init__(self, to: int, answers: int) -> None:
        self._to, self._answers, self._read = to, answers, b""
        self._number, self._session = 0, ""
        self.errors: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def open(self, file: Path, width: int, height: int) -> None:
        self.errors, self.requests = [], []
        self.resize(width, height)
        self.call("Page.navigate", url=file.as_uri())
        self._take(lambda message: message.get("method") == "Page.loadEventFired")

    def resize(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def value(self, script: str) -> Any:
        """Of an expression; if it is a promise, what comes of it."""
        return self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)["result"].get(
            "value"
        )

    def mouse(self, what: str, x: float, y: float, clicks: int = 0) -> None:
        """what: `Moved`, `Pressed` or `Released`."""
        button = {"button": "left", "clickCount": clicks} if clicks else {}
        self.call("Input.dispatchMouseEvent", type=f"mouse{what}", x=x, y=y, **button)

    def click(self, x: float, y: float, clicks: int = 1) -> None:
        for count in range(1, clicks + 1):
            self.mouse("Pressed", x, y, count)
            self.mouse("Released", x, y, count)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        to_the_page = {"sessionId": self._session} if self._session else {}
        message = {"id": self._number, "method": method, "params": parameters, **to_the_page}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        answer = self._take(lambda message: message.get("id") == self._number)
        assert "error" not in answer, answer
        return dict(answer["result"])

    def _take(self, is_it: Any) -> dict[str, Any]:
        """The next message that is wanted. Those before it are events."""
        deadline = time.monotonic() + _SECONDS
        while True:
            while b"\0" not in self._read:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"Chromium has not answered within {_SECONDS} s")
                with contextlib.suppress(BlockingIOError):
                    part = os.read(self._answers, 1 << 20)
                    assert part, "Chromium has ended"
                    self._read += part
                    continue
                time.sleep(0.005)
            text, _, self._read = self._read.partition(b"\0")
            message = json.loads(text)
            self._note(message.get("method"), message.get("params", {}))
            if is_it(message):
                return dict(message)

    def _note(self, event: str | None, of: dict[str, Any]) -> None:
        if event == "Runtime.exceptionThrown":
            self.errors.append(str(of["exceptionDetails"].get("exception", of).get("description", of)))
        elif (event == "Runtime.consoleAPICalled" and of["type"] == "error") or (
            event == "Log.entryAdded" and of["entry"]["level"] == "error"
        ):
            self.errors.append(str(of))
        elif event == "Network.requestWillBeSent":
            self.requests.append(of["request"]["url"])


@contextlib.contextmanager
def new_tab(folder: Path) -> Iterator[Tab]:
    """folder: for what the browser keeps."""
    its, ours = os.pipe(), os.pipe()  # to it, from it
    at = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (its[0], ours[1])]  # it has them as 3 and 4
    line = f'exec "$@" 3<&{at[0]} 4>&{at[1]}'
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            ["bash", "-c", line, "bash", str(CHROMIUM), *_OPTIONS, f"--user-data-dir={folder / 'user'}"],
            pass_fds=at,
            stdout=log,
            stderr=log,
        )
    for end in (*at, its[0], ours[1]):
        os.close(end)
    os.set_blocking(ours[0], False)
    try:
        yield Tab(its[1], ours[0])
    finally:
        process.kill()
        process.wait()
        os.close(its[1])
        os.close(ours[0])
