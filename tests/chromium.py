"""A headless Chromium, driven over the pipe of its DevTools protocol: no package and no port is needed."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
START_S, CALL_S = 60.0, 30.0


def find_browser() -> str | None:
    """The path of a browser of this machine, or None. CONVOY_CHROMIUM names another one."""
    names = [os.environ.get("CONVOY_CHROMIUM", ""), *BROWSERS]
    return next((path for name in names if name and (path := shutil.which(name))), None)


@dataclass(slots=True)
class Tab:
    """One page of the browser. `events` are all that the protocol told, oldest first."""

    browser: Browser
    session: str
    events: list[dict[str, Any]] = field(default_factory=list)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the protocol to this page."""
        return self.browser.call(method, self.session, parameters)

    def open(self, path: Path) -> None:
        """Load a local file, and wait until it is drawn."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Page.navigate", url=path.absolute().as_uri())
        deadline_s = time.monotonic() + CALL_S
        while not self.told("Page.loadEventFired"):
            assert time.monotonic() < deadline_s, "the page did not load"
            self.browser.read(1.0)

    def evaluate(self, expression: str) -> Any:
        """The value of some JavaScript, which the page itself would not run."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def press(self, key: str, code: int) -> None:
        """Press and let go a key."""
        text = {"Enter": "\r"}.get(key, "")
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code,
                text=text if kind == "keyDown" else "",
            )  # fmt: skip

    def show_as(self, theme: str, *, media: str = "") -> None:
        """A light or dark screen, or paper."""
        self.call(
            "Emulation.setEmulatedMedia",
            media=media,
            features=[{"name": "prefers-color-scheme", "value": theme}],
        )

    def resize(self, width_px: int, height_px: int) -> None:
        """Another size of the window."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width_px,
            height=height_px,
            deviceScaleFactor=1,
            mobile=False,
        )

    def screenshot(self) -> str:
        """What is seen, as a PNG in base 64."""
        data: str = self.call("Page.captureScreenshot", format="png")["data"]
        return data

    def told(self, method: str) -> list[dict[str, Any]]:
        """The parameters of all events of a kind."""
        return [event["params"] for event in self.events if event["method"] == method]


class Browser:
    """The running process, and the two ends of its pipe."""

    def __init__(self, process: subprocess.Popen[bytes], write_fd: int, read_fd: int) -> None:
        self._process, self._write_fd, self._read_fd = process, write_fd, read_fd
        self._buffer = b""
        self._number = 0
        self._answers: dict[int, dict[str, Any]] = {}
        self._tabs: dict[str, Tab] = {}

    def tab(self) -> Tab:
        """A new page."""
        target = self.call("Target.createTarget", "", {"url": "about:blank"})["targetId"]
        attached = self.call("Target.attachToTarget", "", {"targetId": target, "flatten": True})
        tab = Tab(self, attached["sessionId"])
        self._tabs[tab.session] = tab
        return tab

    def call(self, method: str, session: str, parameters: dict[str, Any]) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        os.write(self._write_fd, json.dumps(message).encode() + b"\0")
        deadline_s = time.monotonic() + START_S
        while self._number not in self._answers:
            assert time.monotonic() < deadline_s, f"no answer to {method}"
            self.read(1.0)
        answer = self._answers.pop(self._number)
        assert "error" not in answer, answer["error"]
        result: dict[str, Any] = answer["result"]
        return result

    def read(self, timeout_s: float) -> None:
        """Take what has come, for a moment at most."""
        ready, _, _ = select.select([self._read_fd], [], [], timeout_s)
        if not ready:
            assert self._process.poll() is None, "the browser has ended"
            return
        self._buffer += os.read(self._read_fd, 1 << 20)
        *messages, self._buffer = self._buffer.split(b"\0")
        for text in messages:
            message = json.loads(text)
            if "id" in message:
                self._answers[message["id"]] = message
            elif message.get("sessionId") in self._tabs:
                self._tabs[message["sessionId"]].events.append(message)


@contextmanager
def running_browser(path: str, folder: Path) -> Iterator[Browser]:
    """Start a browser whose profile lies in a folder, and end it."""
    to_browser, from_us = os.pipe()
    to_us, from_browser = os.pipe()
    command = [
        path, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--disable-extensions", "--disable-background-networking", "--disable-component-update", "--no-proxy-server",
        "--remote-debugging-pipe", f"--user-data-dir={folder / 'profile'}", "--window-size=1100,900",
    ]  # fmt: skip
    # The browser reads descriptor 3 and writes descriptor 4.
    script = f'exec 3<&{to_browser} 4>&{from_browser}; exec "$@"'
    process = subprocess.Popen(
        ["bash", "-c", script, "bash", *command],
        pass_fds=(to_browser, from_browser),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_browser)
    os.close(from_browser)
    try:
        yield Browser(process, from_us, to_us)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(from_us)
        os.close(to_us)
