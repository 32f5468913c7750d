"""A headless Chromium by the WebDriver protocol, as far as these tests need it.

Source: w3.org/TR/webdriver2; chromedriver's goog/cdp/execute for the DevTools protocol.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from tests.running import DEADLINE_S, eventually

#: As root, in a container, without a GPU; and no call home.
_FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--hide-scrollbars", "--force-color-profile=srgb"),
)
#: axe looks at each element of a hundred cards, on a machine that does other things, too.
_SCRIPT_S = 4 * DEADLINE_S
#: axe-core's axe.min.js; `make test-page` installs it.
_AXE = Path(os.environ.get("SOCKETPROTECTOR_AXE", "node_modules/axe-core/axe.min.js"))


class Browser:
    """One window.  Close it."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="sp-chromium-")
        self._process = subprocess.Popen(
            ["chromedriver", "--port=0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={"HOME": self._folder.name, "PATH": "/usr/bin:/bin", "TMPDIR": self._folder.name},
        )
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if found := re.search(r"started successfully on port (\d+)", line):
                self._port = int(found[1])
                break
        options = {"args": [*_FLAGS, f"--user-data-dir={self._folder.name}/profile"]}
        browser = {"browserName": "chrome", "goog:chromeOptions": options}
        wanted = {"alwaysMatch": {**browser, "timeouts": {"script": int(1000 * _SCRIPT_S)}}}
        self._session = ""
        self._session = (
            "/session/" + self._ask("POST", "/session", capabilities=wanted)["sessionId"]
        )

    def close(self) -> None:
        try:
            if self._session:
                self._ask("DELETE", "")
        finally:
            self._process.terminate()
            self._process.wait(DEADLINE_S)
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._folder.cleanup()

    def _ask(self, method: str, path: str, **body: Any) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=_SCRIPT_S * 2)
        try:
            data = json.dumps(body) if method == "POST" else None
            connection.request(method, self._session + path, data)
            found = json.loads(connection.getresponse().read())["value"]
        finally:
            connection.close()
        if isinstance(found, dict) and "error" in found:
            raise AssertionError(f"{found['error']}: {found.get('message')}")
        return found

    def devtools(self, command: str, **parameters: Any) -> Any:
        """Give a command of the DevTools protocol."""
        return self._ask("POST", "/goog/cdp/execute", cmd=command, params=parameters)

    def open(self, address: str) -> None:
        self._ask("POST", "/url", url=address)

    def run(self, script: str, *arguments: Any) -> Any:
        """Return what a function's body returns."""
        return self._ask("POST", "/execute/sync", script=script, args=list(arguments))

    def wait(self, script: str, *arguments: Any) -> Any:
        """Return what an asynchronous function's body passes to its last argument."""
        return self._ask("POST", "/execute/async", script=script, args=list(arguments))

    def until(self, expression: str, what: str = "") -> None:
        """Wait until an expression is true in the page."""
        eventually(lambda: bool(self.run(f"return ({expression})")), what or expression)

    def text(self, selector: str) -> str:
        return str(
            self.run("return document.querySelector(arguments[0])?.textContent ?? ''", selector)
        )

    def keys(self, *keys: str) -> None:
        """Press keys one after the other: a character, or one of WebDriver's code points."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._ask("POST", "/actions", actions=[{"type": "key", "id": "k", "actions": actions}])

    def looks(self, width: int, height: int, *, dark: bool = True, mobile: bool = False) -> None:
        """Be of this size in CSS pixels, and of a colour scheme."""
        self.devtools(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=mobile,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        still = {"name": "prefers-reduced-motion", "value": "reduce"}
        self.devtools("Emulation.setEmulatedMedia", features=[scheme, still])

    def shot(self, path: Path) -> None:
        """Save what is in the window, as a PNG or a WebP by the file's name."""
        quality = {"quality": 82} if path.suffix == ".webp" else {}
        found = self.devtools("Page.captureScreenshot", format=path.suffix[1:], **quality)
        path.write_bytes(base64.b64decode(found["data"]))

    def violations(self) -> list[str]:
        """Return what axe-core finds wrong with the page as it is now."""
        assert _AXE.exists(), f"there is no {_AXE}: npm install axe-core, or `make test-page`"
        self.run(_AXE.read_text(encoding="utf-8") + "; window.axe = axe;")
        found = self.wait(
            "const done = arguments[0];"
            "axe.run(document, {resultTypes: ['violations']}).then(r => done(r.violations.map("
            "v => v.id + ': ' + v.nodes.map(n => n.target + ' ' + n.failureSummary).join('; '))))"
        )
        assert isinstance(found, list)
        return found
