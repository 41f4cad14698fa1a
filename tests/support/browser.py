"""A headless Chromium that a test opens pages in, over its DevTools protocol."""

import base64
import contextlib
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import websocket

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
    "--disable-component-update",
    "--disable-sync", "--hide-scrollbars", "--remote-debugging-port=0", "--remote-allow-origins=*",
)  # fmt: skip


class Tab:
    """One page. complaints: what the page's console, its policy and its scripts have said."""

    def __init__(self, url: str):
        self.socket, self.sent, self.complaints = websocket.create_connection(url, timeout=600), 0, []
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict:
        self.sent += 1
        self.socket.send(json.dumps({"id": self.sent, "method": method, "params": parameters}))
        while (message := json.loads(self.socket.recv())).get("id") != self.sent:
            self._told(message)
        assert "error" not in message, message["error"]
        return message["result"]

    def _told(self, message: dict) -> None:
        told = message.get("params", {})
        if message["method"] == "Log.entryAdded":
            self.complaints.append(told["entry"]["text"])
        elif message["method"] == "Runtime.exceptionThrown":
            self.complaints.append(told["exceptionDetails"].get("exception", {}).get("description", "an exception"))
        elif message["method"] == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning"):
            self.complaints.append(" ".join(str(one.get("value", "")) for one in told["args"]))

    def open(self, path: Path, width: int, height: int = 900, dark: bool = False) -> None:
        """A file, in a window of this size; returns when it has loaded."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.complaints.clear()
        self.call("Page.navigate", url=path.as_uri())
        self.wait(f"location.href === {json.dumps(path.as_uri())} && document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, condition: str, seconds: float = 600, again: Callable[[], None] = lambda: None) -> None:
        """Until an expression is true; `again` is done before each look, for what a page that is busy may miss."""
        end = time.monotonic() + seconds
        while again() or not self.run(condition):
            assert time.monotonic() < end, f"never true: {condition}"
            time.sleep(0.1)

    def move(self, x: float, y: float) -> None:
        """Put the pointer there."""
        for step in (3, 0):  # a pointer that does not move is over nothing
            self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x + step, y=y)

    def click(self, x: float, y: float) -> None:
        """Press and let go at a place of the window, as a mouse does."""
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def picture(self, path: Path) -> None:
        """A picture of the whole page."""
        height = self.run("document.documentElement.scrollHeight")
        width = self.run("innerWidth")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Tab]:
    """A browser with one tab. profile: a new folder for what it keeps."""
    assert CHROMIUM
    process = subprocess.Popen(
        [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"], stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr
        line = next(line for line in process.stderr if "DevTools listening on" in line)
        port = line.rpartition("ws://")[2].split("/")[0].rpartition(":")[2]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=600) as answer:
            page = next(one for one in json.load(answer) if one["type"] == "page")
        tab = Tab(page["webSocketDebuggerUrl"])
        try:
            yield tab
        finally:
            tab.socket.close()
    finally:
        process.kill()
        process.wait()
