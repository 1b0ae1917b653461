"""A headless Chromium, driven through its DevTools protocol."""

import base64
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
import urllib.request
from pathlib import Path

from websockets.sync.client import connect

CHROMIUM = next(
    (
        found
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (found := shutil.which(name))
    ),
    None,
)

GIVE = """
(async () => {
  const data = new DataTransfer();
  for (const [name, text] of %s)
    data.items.add(new File([Uint8Array.from(atob(text), c => c.charCodeAt(0))], name));
  const event = "%s" === "drop"
    ? new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true})
    : new ClipboardEvent("paste", {clipboardData: data, bubbles: true});
  document.getElementById("drop").dispatchEvent(event);
  return true;
})()
"""
"""Files for the serving page, by drag and drop or from the clipboard."""


class Browser:
    """One page of `width` x `height`."""

    def __init__(self, profile: Path, width: int = 900, height: int = 760) -> None:
        self.stack = contextlib.ExitStack()
        log = self.stack.enter_context((profile / "stderr").open("w"))
        self.process = subprocess.Popen(
            [
                CHROMIUM,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--hide-scrollbars",
                "--use-fake-device-for-media-stream",
                "--use-fake-ui-for-media-stream",
                "--remote-debugging-port=0",
                f"--user-data-dir={profile / 'profile'}",
                f"--window-size={width},{height}",
                "about:blank",
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,
        )
        port = self._port(profile)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as reply:
            page = next(t for t in json.load(reply) if t["type"] == "page")
        self.socket = self.stack.enter_context(
            connect(page["webSocketDebuggerUrl"], max_size=None, proxy=None)
        )
        self.number = 0
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def _port(self, profile: Path) -> str:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if found := re.search(r"ws://127\.0\.0\.1:(\d+)/", (profile / "stderr").read_text()):
                return found[1]
            time.sleep(0.2)
        raise TimeoutError("Chromium did not start")

    def call(self, method: str, **parameters):
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv(timeout=60))
            if message.get("id") == self.number:
                return message["result"]

    def evaluate(self, script: str):
        found = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, condition: str, seconds: float = 60):
        deadline = time.monotonic() + seconds
        while not self.evaluate(condition):
            assert time.monotonic() < deadline, (
                f"{condition} never came true: {self.evaluate('document.body.innerText')}"
            )
            time.sleep(0.2)

    def give(self, files, how="drop"):
        """Give the serving page (name, bytes) of pictures: `drop` or `paste`."""
        texts = [[name, base64.b64encode(data).decode()] for name, data in files]
        self.evaluate(GIVE % (json.dumps(texts), how))

    def screenshot(self, path: Path) -> None:
        path.write_bytes(
            base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        )

    def close(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.stack.close()
