"""A headless Chromium over its debugging pipe: no driver package, no network. For tests of pages.

    with Browser() as browser:
        page = browser.open("file:///…", width=900)
        page.run("document.title")
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed; pages are tested in it here")

_SWITCHES = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--hide-scrollbars", "--remote-debugging-pipe", "--disable-dev-shm-usage",
)
#: What a request may be for: the page itself and what is inside it.
_INSIDE = ("file:", "data:", "about:", "blob:")


class Browser:
    """One Chromium process. Its pages are tabs."""

    def __init__(self) -> None:
        self._profile = tempfile.TemporaryDirectory(prefix="vmlab-chromium-", ignore_cleanup_errors=True)
        to_browser, self._to = os.pipe()
        self._from, from_browser = os.pipe()
        # Chromium reads descriptor 3 and writes 4.
        start = ("import os, sys; a, b = (os.dup(os.dup(os.dup(os.dup(int(f))))) for f in sys.argv[1:3]); "
                 "os.dup2(a, 3); os.dup2(b, 4); os.execv(sys.argv[3], sys.argv[3:])")
        command = [str(CHROMIUM), *_SWITCHES, f"--user-data-dir={self._profile.name}", "about:blank"]
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-c", start, str(to_browser), str(from_browser), *command],
            pass_fds=(to_browser, from_browser), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(to_browser)
        os.close(from_browser)
        self._buffer, self._number = b"", 0
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with contextlib.suppress(OSError):
            os.write(self._to, json.dumps({"id": 0, "method": "Browser.close"}).encode() + b"\0")
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
        os.close(self._to)
        os.close(self._from)
        self._profile.cleanup()

    def _message(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                raise TimeoutError("Chromium does not answer")
            data = os.read(self._from, 1 << 20)
            if not data:
                raise ConnectionError("Chromium has gone")
            self._buffer += data
        raw, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(raw)
        return message

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """One command; events that come meanwhile are kept in :attr:`events`."""
        self._number += 1
        number = self._number
        command = {"id": number, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        os.write(self._to, json.dumps(command).encode() + b"\0")
        until = time.monotonic() + 60
        while True:
            message = self._message(until)
            if message.get("id") == number:
                assert "error" not in message, (method, message["error"])
                found: dict[str, Any] = message["result"]
                return found
            if "method" in message:
                self.events.append(message)

    def open(self, url: str, *, width: int = 900, height: int = 1000, ready: str = "document.readyState === 'complete'") -> Page:
        """A new tab at ``url``, shown once the expression ``ready`` is true."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.call(f"{domain}.enable")
        page.resize(width, height)
        page.call("Page.navigate", url=url)
        page.wait(ready)
        return page


class Page:
    """One tab."""

    def __init__(self, browser: Browser, session: str) -> None:
        self.browser, self.session = browser, session

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **parameters)

    def resize(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression, which must be JSON."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression: str, seconds: float = 30) -> None:
        """Until the expression is true."""
        until = time.monotonic() + seconds
        while not self.run(expression):
            assert time.monotonic() < until, f"never became true: {expression}"
            time.sleep(0.02)

    def press(self, key: str, times: int = 1) -> None:
        """Press a key, as ``ArrowRight``, ``Tab``, ``Enter``."""
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39,
                 "ArrowDown": 40}
        for _ in range(times):
            text = {"Enter": "\r", " ": " "}.get(key)
            extra = {"text": text} if text else {}
            self.call("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=codes[key], **extra)
            self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=codes[key])

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def complaints(self) -> list[str]:
        """What the console said in anger, and every request for something outside of the file."""
        self.run("0")  # collect what is under way
        said = []
        for event in self.browser.events:
            if event.get("sessionId") != self.session:
                continue
            detail = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                said.append(str(detail["exceptionDetails"]))
            elif event["method"] == "Runtime.consoleAPICalled" and detail["type"] in ("error", "warning", "assert"):
                said.append(str(detail["args"]))
            elif event["method"] == "Log.entryAdded" and detail["entry"]["level"] in ("error", "warning"):
                said.append(str(detail["entry"]))
            elif event["method"] == "Network.requestWillBeSent" and not detail["request"]["url"].startswith(_INSIDE):
                said.append("request: " + detail["request"]["url"])
        return said
