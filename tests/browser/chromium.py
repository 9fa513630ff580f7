"""A real Chromium without a window, for tests: driven over the DevTools protocol, through pipes.

``with Chromium() as browser: page = browser.open(path)`` starts Debian's ``chromium`` with an empty profile, and ends it
again. Every request, console message and error of a page is kept::

    python tests/browser/chromium.py install             install it where it is missing (Debian, root)
    python tests/browser/chromium.py PAGE PICTURE.png    take a picture of a page

https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import base64
import json
import os
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PACKAGE = "chromium"
TIMEOUT_S = 120.0  # for one answer: a busy machine is slow to start a browser
_OPTIONS = (
    "--headless",
    "--no-sandbox",  # root has none
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-sync",
    "--hide-scrollbars",
    "--no-default-browser-check",
    "--no-first-run",
    "--remote-debugging-pipe",
)
_KEYS = {
    "Tab": ("Tab", 9, ""),
    "Enter": ("Enter", 13, "\r"),
    " ": ("Space", 32, " "),
    "ArrowDown": ("ArrowDown", 40, ""),
    "ArrowUp": ("ArrowUp", 38, ""),
}


def program() -> str | None:
    """Return the browser's path, or None."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


def why_not() -> str:
    """Return why no browser can be started here, or an empty string."""
    return "" if program() else "no Chromium here: make test-browser installs it"


class BrowserError(Exception):
    """The browser did not do what it was told, or ended."""


class Chromium:
    """The browser, from ``with`` on."""

    def __enter__(self) -> Chromium:
        path = program()
        if path is None:
            raise BrowserError(why_not())
        self._folder = tempfile.mkdtemp(prefix="chromium-")
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()

        def pipes() -> None:  # the protocol's are 3 and 4
            read, write = os.dup(theirs_in), os.dup(theirs_out)
            high = max(read, write, 10)
            os.dup2(read, high + 1)
            os.dup2(write, high + 2)
            os.dup2(high + 1, 3)
            os.dup2(high + 2, 4)

        command = [path, *_OPTIONS, f"--user-data-dir={self._folder}", "about:blank"]
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(
            command, stdin=quiet, stdout=quiet, stderr=quiet, close_fds=False, preexec_fn=pipes, start_new_session=True
        )
        os.close(theirs_in)
        os.close(theirs_out)
        os.set_blocking(self._in, False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._in, selectors.EVENT_READ)
        self._rest, self._number = b"", 0
        self._answers: dict[int, dict[str, Any]] = {}
        self._pages: dict[str, Page] = {}
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.call("Browser.close")
        except BrowserError:
            pass
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._selector.close()
        os.close(self._in)
        os.close(self._out)
        shutil.rmtree(self._folder, ignore_errors=True)

    def open(self, path: Path | str, **look: Any) -> Page:
        """Open a file, or an address, in a new tab; ``look`` as of :meth:`Page.look`."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self._pages[session] = Page(self, target, session)
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.call(f"{domain}.enable")
        page.look(**look)
        page.go(path.resolve().as_uri() if isinstance(path, Path) else path)
        return page

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        try:
            os.write(self._out, json.dumps(message).encode() + b"\0")
        except OSError as error:
            raise BrowserError(f"the browser is gone: {error}") from error
        end = time.monotonic() + TIMEOUT_S
        while self._number not in self._answers:
            self.read(end - time.monotonic(), method)
        answer = self._answers.pop(self._number)
        if "error" in answer:
            raise BrowserError(f"{method}: {answer['error']['message']}")
        result: dict[str, Any] = answer["result"]
        return result

    def read(self, seconds: float, waiting: str) -> None:
        """Take in what the browser says."""
        if seconds <= 0 or not self._selector.select(seconds):
            raise BrowserError(f"{waiting}: no answer")
        part = os.read(self._in, 1 << 20)
        if not part:
            raise BrowserError(f"{waiting}: the browser ended")
        *messages, self._rest = (self._rest + part).split(b"\0")
        for text in messages:
            message = json.loads(text)
            if "id" in message:
                self._answers[message["id"]] = message
            elif page := self._pages.get(message.get("sessionId", "")):
                page.hear(message["method"], message["params"])


class Page:
    """A tab.

    Attributes:
        requests: every address that it asked for, in order.
        problems: console messages of every level, uncaught errors, and what the browser itself complains of.
    """

    def __init__(self, browser: Chromium, target: str, session: str) -> None:
        self.browser, self._target, self._session = browser, target, session
        self.requests: list[str] = []
        self.problems: list[str] = []
        self._loaded = 0

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command of this tab."""
        return self.browser.call(method, self._session, **parameters)

    def hear(self, event: str, about: dict[str, Any]) -> None:
        """Keep what a test asks about."""
        if event == "Page.loadEventFired":
            self._loaded += 1
        elif event == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])
        elif event == "Runtime.consoleAPICalled":
            told = " ".join(str(one.get("value", one.get("description"))) for one in about["args"])
            self.problems.append(f"console {about['type']}: {told}")
        elif event == "Runtime.exceptionThrown":
            details = about["exceptionDetails"]
            self.problems.append(str(details.get("exception", {}).get("description", details["text"])))
        elif event == "Log.entryAdded":
            self.problems.append(f"{about['entry']['level']}: {about['entry']['text']} {about['entry'].get('url', '')}")

    def look(self, width: int = 1280, height: int = 900, dark: bool = False, phone: bool = False) -> None:
        """Take the size of a screen, and a colour scheme."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def go(self, address: str) -> None:
        """Go to another page, and wait until it is loaded."""
        before = self._loaded
        answer = self.call("Page.navigate", url=address)
        if "errorText" in answer:
            raise BrowserError(f"{address}: {answer['errorText']}")
        if "loaderId" in answer:  # else the address is of the same page
            self.wait_loaded(before)

    def wait_loaded(self, before: int | None = None) -> None:
        """Wait until one more page is loaded than were ``before``; by default until this one is."""
        if before is None:
            self.until("document.readyState === 'complete'")
            return
        end = time.monotonic() + TIMEOUT_S
        while self._loaded <= before:
            self.browser.read(end - time.monotonic(), "load")

    def do(self, script: str) -> Any:
        """Run a script (an expression, or statements with ``return`` in a function body) and return its value."""
        body = script if "return " in script or script.rstrip().endswith(";") else f"return ({script});"
        answer = self.call(
            "Runtime.evaluate", expression=f"(async () => {{ {body} }})()", returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise BrowserError(f"{script}: {details.get('exception', {}).get('description', details['text'])}")
        return answer["result"].get("value")

    def until(self, script: str, seconds: float = 30.0) -> Any:
        """Wait until an expression is true, and return its value."""
        end = time.monotonic() + seconds
        while not (value := self.do(script)):
            if time.monotonic() > end:
                raise BrowserError(f"never true: {script}")
            time.sleep(0.05)
        return value

    def click(self, selector: str) -> None:
        """Click on an element with the mouse, where it lies on the screen."""
        place = self.do(
            f"const one = document.querySelector({json.dumps(selector)}); one.scrollIntoView({{block: 'center'}}); "
            "const box = one.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2];"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    def press(self, key: str, shift: bool = False) -> None:
        """Press a key and release it."""
        code, number, text = _KEYS[key]
        common = {"key": key, "code": code, "windowsVirtualKeyCode": number, "modifiers": 8 if shift else 0}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def choose(self, selector: str, value: str) -> None:
        """Choose an option of a ``select``, as a person's choice tells the page."""
        self.do(
            f"const one = document.querySelector({json.dumps(selector)}); one.value = {json.dumps(value)}; "
            f"if (one.value !== {json.dumps(value)}) throw new Error('no such option'); "
            "one.dispatchEvent(new Event('change', {bubbles: true}));"
        )

    def picture(self, path: Path, whole: bool = False, limit: int = 12000) -> Path:
        """Save what is seen, or the whole page, as PNG."""
        options: dict[str, Any] = {}
        if whole:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], limit), "scale": 1}
            options = {"captureBeyondViewport": True, "clip": clip}
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", **options)["data"]))
        return path

    def close(self) -> None:
        """Close the tab."""
        self.browser.call("Target.closeTarget", targetId=self._target)


def install() -> None:
    """Install the browser where it is missing.

    Raises:
        SystemExit: it cannot be installed here; the message says why.
    """
    if program():
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise SystemExit(f"{PACKAGE} is missing; as root on Debian: apt-get install {PACKAGE}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", PACKAGE]):
        if subprocess.run(["apt-get", "-q", *command], env=environment).returncode:
            raise SystemExit(f"apt-get {' '.join(command)} failed")


def _main(words: list[str]) -> None:
    if words == ["install"]:
        install()
    elif len(words) >= 2:
        page, hash_, rest = words[0].partition("#")
        with Chromium() as browser:
            size = [int(word) for word in words[2:] if word.isdigit()]
            look: dict[str, Any] = dict(zip(("width", "height"), size, strict=False))
            tab = browser.open(
                Path(page).resolve().as_uri() + hash_ + rest, dark="dark" in words, phone="phone" in words, **look
            )
            tab.picture(Path(words[1]), whole="whole" in words)
            print("\n".join(tab.problems))
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    _main(sys.argv[1:])
