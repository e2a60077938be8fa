"""A browser without a window, spoken to over a pipe in the DevTools protocol: no driver, no port, no package."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
TIMEOUT = 60.0  # seconds for any answer
AXE = Path(__file__).resolve().parents[2] / "node_modules" / "axe-core" / "axe.min.js"
FOCUSED, STATUS = "document.activeElement.id", "document.getElementById('status').textContent"
PANEL = "document.getElementById('token').innerText"
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")


def found_browser() -> str | None:
    """Where one is installed."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One tab, and all that it complained of and asked for.

    Attributes:
        requests: addresses that were asked for.
        complaints: exceptions of scripts, and what the console and the security policy said.
    """

    def __init__(self, profile: Path, width: int = 1280, height: int = 900):
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._number, self._buffer = 0, b""
        read_by_it, self._write = os.pipe()
        self._read, written_by_it = os.pipe()
        high = [fcntl.fcntl(each, fcntl.F_DUPFD, 20) for each in (read_by_it, written_by_it)]
        options = (f"--user-data-dir={profile}", f"--window-size={width},{height}", "--remote-debugging-pipe")
        self._process = subprocess.Popen(
            [found_browser() or "", *FLAGS, *options, "about:blank"],
            preexec_fn=lambda: [os.dup2(each, number) for number, each in enumerate(high, 3)] and None,
            pass_fds=(3, 4),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for each in (read_by_it, written_by_it, *high):
            os.close(each)
        [page] = [each for each in self._ask("Target.getTargets")["targetInfos"] if each["type"] == "page"]
        attached = self._ask("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(TIMEOUT)
        os.close(self._write)
        os.close(self._read)

    def send(self, method: str, **parameters: Any) -> Any:
        """The tab's answer to a command."""
        return self._ask(method, self._session, **parameters)

    def open(self, path: Path, fragment: str = "") -> None:
        """Load a file, and wait until it has loaded and been painted."""
        self.requests.clear()
        self.complaints.clear()
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=path.as_uri() + fragment)
        self.until("location.protocol === 'file:' && document.readyState === 'complete'")
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def run(self, expression: str) -> Any:
        """The value of an expression in the page, awaited."""
        options = dict(expression=expression, awaitPromise=True, returnByValue=True)
        answer = self.send("Runtime.evaluate", **options)
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"])[:2000])
        return answer["result"].get("value")

    def until(self, expression: str) -> None:
        end = time.monotonic() + TIMEOUT
        while not self.run(expression):
            if time.monotonic() > end:
                raise TimeoutError(f"never true: {expression}")
            time.sleep(0.02)

    def press(self, key: str) -> None:
        """Press a key and let it go."""
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, "PageUp": 33, "PageDown": 34, "End": 35, "Home": 36}
        arrows = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        for kind in ("keyDown", "keyUp"):
            self.send(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=(codes | arrows)[key]
            )

    def point(self, selector: str, *, click: bool = False) -> None:
        """Move the pointer to an element, and click there."""
        self.run(f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'center'}})")
        box = f"document.querySelector({json.dumps(selector)}).getClientRects()[0]"
        place = self.run(f"(box => [box.x + box.width / 2, box.y + box.height / 2])({box})")
        spot = dict(x=place[0], y=place[1])
        self.send("Input.dispatchMouseEvent", type="mouseMoved", **spot)
        for kind in ("mousePressed", "mouseReleased") if click else ():
            self.send("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **spot)

    def picture(self, path: Path) -> None:
        """Write what is seen as a PNG."""
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))

    def _ask(self, method: str, session: str | None = None, **parameters: Any) -> Any:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self._take(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], TIMEOUT)[0]:
                raise TimeoutError("the browser does not answer")
            self._buffer += os.read(self._read, 1 << 20)
        line, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(line)
        return found

    def _take(self, event: dict[str, Any]) -> None:
        values = event.get("params", {})
        if event.get("method") == "Network.requestWillBeSent":
            self.requests.append(values["request"]["url"])
        elif event.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(values["exceptionDetails"])[:2000])
        elif event.get("method") == "Log.entryAdded":
            self.complaints.append(values["entry"]["text"])
        elif event.get("method") == "Runtime.consoleAPICalled":
            self.complaints.append(json.dumps(values["args"])[:2000])


def focus_text(browser: Browser) -> None:
    """Go to the first token of an inspection's page by Tab alone."""
    for _ in range(10):
        browser.press("Tab")
        if browser.run(FOCUSED) == "t0-0":
            return
    raise AssertionError("Tab does not reach the text")


def serious_violations(browser: Browser, scheme: str) -> list[tuple[str, str]]:
    """What axe-core finds wrong in the page as it is, in a light or dark scheme, and in which element."""
    browser.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    browser.run(AXE.read_text() + "; true")
    found = browser.run("axe.run().then(found => JSON.stringify(found.violations))")
    browser.send("Emulation.setEmulatedMedia", features=[])
    serious = [each for each in json.loads(found) if each["impact"] in ("serious", "critical")]
    return [(each["id"], each["nodes"][0]["html"]) for each in serious]
