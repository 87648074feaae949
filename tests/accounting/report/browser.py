"""Debian's Chromium, driven through its own protocol over a pipe: no driver, no port, no download."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.tools import browser

_FLAGS = (
    "--headless",
    "--no-sandbox",  # CI runs as root in a container
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
)


class Page:
    """A page that is open.

    `messages` are the lines of its console, `requests` the addresses that it asked for, `refused` those that its own
    policy forbade.
    """

    def __init__(self, commands: int, events: int) -> None:
        self._commands = commands
        self._events = os.fdopen(events, "rb", buffering=0)
        self._rest = b""
        self._last = 0
        self._session: str | None = None
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.refused: list[str] = []
        self._addresses: dict[str, str] = {}
        self._is_loaded = False

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result; events that come before it are noted."""
        self._last += 1
        command = {"id": self._last, "method": method, "params": parameters}
        if self._session:
            command["sessionId"] = self._session
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        while True:
            message = self._receive()
            if message.get("id") == self._last:
                assert "error" not in message, message["error"]
                result: dict[str, Any] = message["result"]
                return result

    def attach(self) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def open(self, address: str) -> None:
        """Go to an address and wait until it has loaded."""
        self._is_loaded = False
        self.call("Page.navigate", url=address)
        while not self._is_loaded:
            self._receive()

    def evaluate(self, expression: str) -> Any:
        """Return the value of an expression; one that throws fails the test."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def show(self, *, width: int, height: int, scheme: str = "light", is_phone: bool = False) -> None:
        """Set the size of the window and the colour scheme of the system."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": is_phone}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def click(self, selector: str) -> None:
        """Click in the middle of an element with the mouse, as a user does."""
        find = f"document.querySelector({json.dumps(selector)})"
        self.evaluate(f"{find}.scrollIntoView({{block: 'center', inline: 'center'}})")
        box = self.evaluate(f"{find}.getBoundingClientRect().toJSON()")
        middle = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **middle)

    def press(self, key: str, code: str, text: str = "") -> None:
        """Press a key and let it go."""
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, code=code, text=text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, code=code)

    def screenshot(self, path: Path) -> None:
        """Save a picture of the whole page."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        self._events.close()

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            block = self._events.read(1 << 20)
            assert block, "the browser has ended"
            self._rest += block
        text, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, method: str | None, parameters: dict[str, Any]) -> None:
        if method == "Page.loadEventFired":
            self._is_loaded = True
        elif method == "Network.requestWillBeSent":
            self._addresses[parameters["requestId"]] = parameters["request"]["url"]
            self.requests.append(parameters["request"]["url"])
        elif method == "Network.loadingFailed" and parameters.get("blockedReason") == "csp":
            self.requests.remove(self._addresses[parameters["requestId"]])
            self.refused.append(self._addresses[parameters["requestId"]])
        elif method == "Runtime.consoleAPICalled":
            self.messages.append(str(parameters["args"]))
        elif method == "Runtime.exceptionThrown":
            self.messages.append(str(parameters["exceptionDetails"]))
        elif method == "Log.entryAdded":
            self.messages.append(str(parameters["entry"]))
        elif method == "Page.javascriptDialogOpening":
            self.messages.append(f"dialog: {parameters['message']}")


@contextmanager
def browsing(profile: Path) -> Iterator[Page]:
    """Start a browser with a fresh profile; it is stopped in the end."""
    program = browser()
    assert program is not None
    commands_out, commands_in = os.pipe()
    events_out, events_in = os.pipe()
    # The browser reads commands from descriptor 3 and writes to 4; bash puts them there.
    line = [program, *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(
        ["bash", "-c", f'exec "$@" 3<&{commands_out} 4>&{events_in}', "bash", *line],
        pass_fds=(commands_out, events_in),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(commands_out)
    os.close(events_in)
    page = Page(commands_in, events_out)
    try:
        page.attach()
        yield page
    finally:
        os.close(commands_in)
        page.close()
        process.terminate()
        process.wait(timeout=20)
