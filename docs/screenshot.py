"""Opens an HTML page in headless Chromium without a network, says what it did, and takes its picture.

    python docs/screenshot.py outputs/ablate/<id>/report/report.html docs/images/report.png --width 1200

Prints JSON: ``problems`` (console messages of level warning or error, uncaught exceptions, refused requests),
``requests`` (to anything but the page itself and data: or blob: addresses), ``figures`` (id of each plotly container ->
number of traces that are drawn in it), ``width`` (of what is laid out, pixels). Ends with status 1 where there is a problem
or a request. Speaks the DevTools protocol over a pipe; needs the binary only.
"""

import argparse
import base64
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BINARIES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --disable-extensions "
    "--disable-background-networking --disable-component-update --hide-scrollbars --remote-debugging-pipe"
).split()
NO_NETWORK = "--host-resolver-rules=MAP * ~NOTFOUND"
# The protocol fixes descriptors 3 and 4; this moves ours there, by way of numbers that are in nobody's way.
START = """
import fcntl, os, sys
theirs = [fcntl.fcntl(int(text), fcntl.F_DUPFD, 10) for text in sys.argv[1:3]]
for number, descriptor in zip((3, 4), theirs):
    os.dup2(descriptor, number)
os.execv(sys.argv[3], sys.argv[3:])
"""
FIGURES = """Object.fromEntries([...document.querySelectorAll('.plotly-graph-div')].map(div => [div.id,
  div.querySelector('.main-svg') ? div.querySelectorAll('.scatterlayer .trace, .heatmaplayer .hm').length : 0]))"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path, nargs="?", help="a PNG; left out: no picture")
    parser.add_argument("--width", type=int, default=1200, help="pixels of the window")
    parser.add_argument("--height", type=int, help="pixels of the picture from the top; default: the whole page")
    parser.add_argument("--element", help="CSS selector of what the picture shows, instead of the whole page")
    options = parser.parse_args()
    binary = next(filter(None, map(shutil.which, BINARIES)), None)
    if binary is None:
        parser.error(f"no Chromium found; expected one of {', '.join(BINARIES)} on the path. Install it")
    with tempfile.TemporaryDirectory() as profile:
        browser = Browser(binary, profile)
        try:
            found = look(browser, options)
        finally:
            browser.close()
    print(json.dumps(found, indent=2))
    return 1 if found["problems"] or found["requests"] else 0


def look(browser: "Browser", options: argparse.Namespace) -> dict:
    target = browser.call("Target.createTarget", url="about:blank")["targetId"]
    browser.session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    for domain in ("Page", "Runtime", "Log", "Network"):
        browser.call(f"{domain}.enable")
    browser.call(
        "Emulation.setDeviceMetricsOverride", width=options.width, height=900, deviceScaleFactor=1, mobile=False
    )
    address = options.page.resolve().as_uri()
    browser.call("Page.navigate", url=address)
    browser.wait_for("Page.loadEventFired")
    figures = browser.settled(FIGURES)
    found = {
        "problems": [text for event in browser.events if (text := problem(event))],
        "requests": [url for event in browser.events if (url := requested(event)) and url != address],
        "figures": figures,
        "width": browser.evaluate("document.documentElement.scrollWidth"),
    }
    if options.picture:
        options.picture.write_bytes(photograph(browser, options))
    return found


def problem(event: dict) -> str | None:
    """What a user would see in red or yellow in the console, None where the event is no such message."""
    content = event["params"]
    if event["method"] == "Runtime.exceptionThrown":
        details = content["exceptionDetails"]
        return details.get("exception", {}).get("description") or details["text"]
    if event["method"] == "Runtime.consoleAPICalled" and content["type"] in ("error", "warning", "assert"):
        return " ".join(str(part.get("value", part.get("description"))) for part in content["args"])
    if event["method"] == "Log.entryAdded" and content["entry"]["level"] in ("error", "warning"):
        return content["entry"]["text"]
    return content["errorText"] if event["method"] == "Network.loadingFailed" else None


def requested(event: dict) -> str | None:
    """Address that the event asks for, None for what is inside the page."""
    url = event["params"]["request"]["url"] if event["method"] == "Network.requestWillBeSent" else "data:"
    return None if url.startswith(("data:", "blob:")) else url


def photograph(browser: "Browser", options: argparse.Namespace) -> bytes:
    rectangle = "document.documentElement"
    if options.element:
        rectangle = f"document.querySelector({json.dumps(options.element)})"
    box = browser.evaluate(
        f"(r => ({{x: r.x + scrollX, y: r.y + scrollY, width: r.width, height: r.height}}))"
        f"({rectangle}.getBoundingClientRect())"
    )
    box["height"] = min(options.height or box["height"], box["height"])
    picture = browser.call("Page.captureScreenshot", captureBeyondViewport=True, clip={**box, "scale": 1})
    return base64.b64decode(picture["data"])


class Browser:
    """A Chromium of its own, driven by JSON messages that end in a null byte.

    Attributes:
      events: All that the browser has reported so far.
      session: Of the page, once attached.
    """

    def __init__(self, binary: str, profile: str, *, patience: float = 60.0):
        self.events: list[dict] = []
        self.session: str | None = None
        self._patience = patience
        self._number, self._buffer = 0, b""
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-c", START, str(theirs_in), str(theirs_out), binary, *FLAGS, NO_NETWORK]
            + [f"--user-data-dir={profile}"],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(theirs_in)
        os.close(theirs_out)

    def call(self, method: str, **params) -> dict:
        """Sends a command and returns its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._number:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"Chromium refused {method}: {answer['error']['message']}")
        return answer["result"]

    def evaluate(self, expression: str):
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def wait_for(self, method: str) -> None:
        """Returns once the browser has reported an event."""
        while not any(event["method"] == method for event in self.events):
            self.events.append(self._read())

    def settled(self, expression: str):
        """The value of an expression once it has stayed the same for half a second."""
        before, value = None, self.evaluate(expression)
        while before != value:
            time.sleep(0.5)
            before, value = value, self.evaluate(expression)
        return value

    def close(self) -> None:
        """Ends the browser with all of its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def _read(self) -> dict:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], self._patience)
            chunk = os.read(self._in, 1 << 20) if ready else b""
            if not chunk:
                raise RuntimeError(f"Chromium has ended, or said nothing for {self._patience:.0f} s")
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


if __name__ == "__main__":
    sys.exit(main())
