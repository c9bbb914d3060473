"""A headless Chromium, spoken to over its DevTools pipe: no driver, no download, no port."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WHY_NOT = "no Chromium on this machine: install one (apt-get install chromium), or name it in LAYOUTWISE_CHROMIUM"


def find_chromium() -> str | None:
    """The browser in LAYOUTWISE_CHROMIUM, or the first that the path has."""
    named = os.environ.get("LAYOUTWISE_CHROMIUM")
    return shutil.which(named) if named else next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One page in one browser. Every request and every message of the console is kept."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="layoutwise-chromium-", ignore_cleanup_errors=True)
        (theirs_in, self.to), (self.back, theirs_out) = os.pipe(), os.pipe()
        # Chromium reads descriptor 3 and writes 4; ours must be neither while they are put there.
        high = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (theirs_in, theirs_out)]
        arguments = [
            str(find_chromium()), "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
            "--no-first-run", "--disable-background-networking", "--disable-extensions", "--disable-dev-shm-usage",
            "--hide-scrollbars", f"--user-data-dir={self.folder.name}", "about:blank",
        ]  # fmt: skip
        # A group of its own: Chromium is a family of processes, which ends together.
        self.process = os.posix_spawn(
            arguments[0], arguments, os.environ,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, high[0], 3), (os.POSIX_SPAWN_DUP2, high[1], 4),
                (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
            ],
            setpgroup=0,
        )  # fmt: skip
        for end in (theirs_in, theirs_out, *high):
            os.close(end)
        self.number, self.unread, self.session = 0, b"", ""
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.loaded = False
        page = next(t for t in self.send("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self.send("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the DevTools protocol and wait for its answer."""
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next(30)
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return dict(answer["result"])

    def _next(self, patience: float) -> dict[str, Any]:
        end = time.monotonic() + patience
        while b"\0" not in self.unread:
            ready, _, _ = select.select([self.back], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise TimeoutError("Chromium does not answer")
            read = os.read(self.back, 1 << 20)
            if not read:
                raise RuntimeError("Chromium has gone")
            self.unread += read
        line, self.unread = self.unread.split(b"\0", 1)
        event: dict[str, Any] = json.loads(line)
        self._keep(event.get("method", ""), event.get("params", {}))
        return event

    def _keep(self, method: str, what: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(what["request"]["url"])
        elif method == "Page.loadEventFired":
            self.loaded = True
        elif method == "Runtime.exceptionThrown":
            details = what["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Runtime.consoleAPICalled" and what["type"] in ("error", "warning", "assert"):
            self.errors.append(str([one.get("value", one.get("description")) for one in what["args"]]))
        elif method == "Log.entryAdded" and what["entry"]["level"] in ("error", "warning"):
            self.errors.append(what["entry"]["text"])

    def open(self, path: Path, width: int = 1200, height: int = 900, dark: bool = False, touch: bool = False) -> None:
        """Load a file in a window of this size, in the colours that the system asks for."""
        self.requests.clear()
        self.errors.clear()
        self.resize(width, height, touch)
        self.media(dark)
        self.loaded = False
        self.send("Page.navigate", url=path.resolve().as_uri())
        while not self.loaded:
            self._next(30)
        self.settle()

    def resize(self, width: int, height: int, touch: bool = False) -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=touch)
        self.send("Emulation.setTouchEmulationEnabled", enabled=touch, maxTouchPoints=5 if touch else 1)

    def media(self, dark: bool = False, kind: str = "") -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", media=kind, features=[scheme])

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; a promise is waited for."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"]["description"])
        return found["result"].get("value")

    def settle(self) -> None:
        """Two frames: what a script has asked to be drawn is drawn."""
        self.run("new Promise((r) => requestAnimationFrame(() => requestAnimationFrame(() => r(1))))")

    def touch(self, kind: str, *points: tuple[float, float]) -> None:
        given = [{"x": x, "y": y, "id": n} for n, (x, y) in enumerate(points)]
        self.send("Input.dispatchTouchEvent", type=kind, touchPoints=given)

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def key(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key)

    def screenshot(self, path: Path) -> None:
        """A PNG of the whole page."""
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        found = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(found["data"]))

    def pdf(self) -> bytes:
        """The page as it is printed, on A4."""
        found = self.send("Page.printToPDF", printBackground=True, paperWidth=8.27, paperHeight=11.69)
        return base64.b64decode(found["data"])

    def close(self) -> None:
        """End the browser and all its processes."""
        # A browser that is already gone takes no message.
        with contextlib.suppress(OSError, RuntimeError, TimeoutError):
            self.session = ""
            self.send("Browser.close")
        for end in (self.to, self.back):
            os.close(end)
        for _ in range(100):
            if os.waitpid(self.process, os.WNOHANG)[0]:
                break
            time.sleep(0.05)
        else:
            os.killpg(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)
        self.folder.cleanup()


if __name__ == "__main__":
    # python tests/reports/browser.py PAGE.html NAME: pictures of a page, to be looked at.
    browser, source, name = Browser(), Path(sys.argv[1]), sys.argv[2]
    try:
        for kind, width, dark in (("light", 1200, False), ("dark", 1200, True), ("phone", 375, False)):
            browser.open(source, width, 900, dark, touch=kind == "phone")
            browser.screenshot(Path(f"{name}-{kind}.png"))
            print(kind, browser.errors, [url[:60] for url in browser.requests])
        browser.open(source)
        Path(f"{name}-print.pdf").write_bytes(browser.pdf())
        # The same as a picture: a sheet of A4 within its margins.
        browser.resize(720, 1000)
        browser.media(kind="print")
        browser.run("dispatchEvent(new Event('beforeprint'))")
        browser.settle()
        browser.screenshot(Path(f"{name}-print.png"))
    finally:
        browser.close()
