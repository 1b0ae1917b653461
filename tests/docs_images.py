"""Make the pictures of docs/images that show pages: reports, MLflow, a sweep, an audit, a server.

make docs-images     # about ten minutes on 2 cores; needs Chromium

The jobs run as a user types them, on the built-in digits, in $FTLIB_HOME or a temporary folder.
"""

import argparse
import base64
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from ftlib.data.shards import Dataset
from ftlib.report.metrics import softmax
from ftlib.track.links import experiment_page
from ftlib.track.views import PHASES, view_key
from tests.deploy.browser import CHROMIUM, Browser

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
SWEEP = "quick-sample-phase2"
IN_THE_WAY = ("assistant.chat_panel.close", "shared_view.dismiss")
"""What MLflow shows over or beside the charts: buttons that close it."""
WIDTH, CHARTS_WIDTH = 1000, 1200
"""Of our pages and of MLflow's, in pixels."""
LARGEST = 120_000
"""Bytes of a picture, so that the repository stays small."""


def start_job(home: Path, line: str) -> subprocess.Popen[bytes]:
    name, *words = line.split()
    print(f"python jobs/{name}.py {' '.join(words)}", flush=True)
    command = [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *words]
    environment = {**os.environ, "FTLIB_HOME": str(home), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL)


def run_job(home: Path, line: str) -> None:
    assert start_job(home, line).wait() == 0, f"{line} failed"


@contextlib.contextmanager
def served(home: Path, line: str) -> Iterator[str]:
    """The address of the server that this job starts, while it is entered."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = start_job(home, f"{line} --port {port}")
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health"):
                break
            time.sleep(0.5)
        yield address
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)


def charts(address: str, image: str, *, drawn: int, height: int) -> None:
    """Write `image`: an MLflow page of charts once `drawn` of them are there."""
    with tempfile.TemporaryDirectory() as profile:
        browser = Browser(Path(profile), width=CHARTS_WIDTH, height=height)
        try:
            browser.call("Page.navigate", url=address)
            browser.wait(f"document.querySelectorAll('.main-svg').length >= {2 * drawn}", 120)
            for button in IN_THE_WAY:
                browser.evaluate(
                    f"document.querySelector('[data-component-id$=\"{button}\"]')?.click()"
                )
            time.sleep(10)  # charts are drawn again, for more room
            taken = browser.call("Page.captureScreenshot", format="png")
        finally:
            browser.close()
    save(base64.b64decode(taken["data"]), image)


def search_and_phases(home: Path, phase3: Path) -> None:
    """The sample's phases in MLflow, a sweep around its second one, and the sweep's report."""
    run_job(home, f"sweep --recipe sample-phase2 --space quick --trials 8 --name {SWEEP}")
    screenshot(home / "runs" / SWEEP / "report" / "index.html", "search-report.png", height=1830)
    experiment = json.loads((phase3 / "run.json").read_text())["mlflow"]["experiment_id"]
    with served(home, "track ui") as address:
        page = experiment_page(experiment, PHASES)
        charts(f"{address}/{page}", "mlflow-phases.png", drawn=6, height=900)
        page = experiment_page(experiment, f"{view_key(SWEEP)}-all")
        charts(f"{address}/{page}", "search-mlflow-view.png", drawn=3, height=1400)


def report(home: Path, phase3: Path) -> None:
    run_job(home, f"evaluate {phase3.name} --no-track")
    page = phase3 / "report" / "report.html"
    screenshot(page, "report.png", height=1320)
    screenshot(page, "mistakes.png", heading="Worst mistakes", height=532)


def serving_page(home: Path, phase3: Path) -> None:
    """The page with the digit that the model is least sure of."""
    with np.load(phase3 / "predictions.npz") as scored:
        logits = scored["logits"].astype(np.float32)
        unsure = int(scored["rows"][softmax(logits).max(axis=1).argmin()])
    picture = bytes(Dataset.open(str(home / "data/digits")).split("val").image(unsure))
    with (
        served(home, f"serve --model {phase3 / 'model'}") as address,
        tempfile.TemporaryDirectory() as profile,
    ):
        browser = Browser(Path(profile), height=920)
        try:
            browser.call("Page.navigate", url=address)
            browser.wait("document.getElementById('about')?.textContent.includes('10 classes')")
            browser.give([("digit.jpg", picture)])
            browser.wait("document.querySelector('.cam')?.naturalWidth > 0")
            taken = browser.call("Page.captureScreenshot", format="png")
        finally:
            browser.close()
    save(base64.b64decode(taken["data"]), "serve.png")


def audit_and_rate(home: Path) -> None:
    run_job(home, f"audit digits --out {home / 'audit'}")
    screenshot(home / "audit" / "audit.html", "audit.png", height=1200)
    small = "--data.path digits --train.batch-size 32 --train.microbatch-size 32"
    figure = f"--model.arch resnet18 --augment.size 32 --figure {home / 'lr.png'}"
    run_job(home, f"find_lr phase1 {small} {figure}")
    save((home / "lr.png").read_bytes(), "lr.png")


def screenshot(page: Path, image: str, *, heading: str = "", height: int) -> None:
    """Write `image`: the first `height` pixels of the page, or of its section with this heading."""
    with tempfile.TemporaryDirectory() as profile:
        browser = Browser(Path(profile), width=WIDTH)
        try:
            light = [{"name": "prefers-color-scheme", "value": "light"}]
            browser.call("Emulation.setEmulatedMedia", features=light)
            browser.call("Page.navigate", url=page.as_uri())
            browser.wait("document.readyState === 'complete' && !!document.querySelector('h1')")
            clip = browser.evaluate(BOUNDS.replace("HEADING", repr(heading)))
            clip["height"] = min(clip["height"], height)
            taken = browser.call(
                "Page.captureScreenshot",
                format="png",
                captureBeyondViewport=True,
                clip={**clip, "scale": 1},
            )
        finally:
            browser.close()
    save(base64.b64decode(taken["data"]), image)


BOUNDS = """(() => {
  const box = e => e.getBoundingClientRect();
  const end = box(document.querySelector('main')).bottom + 16;
  const heads = [...document.querySelectorAll('h2')];
  const first = heads.findIndex(h => h.textContent === HEADING);
  const top = first < 0 ? 0 : box(heads[first]).top + 8;
  const next = first < 0 ? null : heads[first + 1];
  return {x: 0, y: top, width: innerWidth, height: (next ? box(next).top - 32 : end) - top};
})()"""
"""What to cut out of a page: the section below HEADING, or all of it."""


def save(data: bytes, image: str) -> None:
    """With 128 colors, which pages and figures do not miss."""
    picture = Image.open(io.BytesIO(data)).convert("RGB").quantize(128)
    picture.save(IMAGES / image, optimize=True)
    size = (IMAGES / image).stat().st_size
    print(f"  {image}: {picture.width} x {picture.height}, {size // 1000} kB", flush=True)
    assert size < LARGEST, f"{image} has {size} bytes"


def make(home: Path) -> None:
    home.mkdir(parents=True, exist_ok=True)
    run_job(home, "sample")
    (phase3,) = (home / "runs").glob("phase3-digits-*")
    search_and_phases(home, phase3)
    report(home, phase3)
    serving_page(home, phase3)
    audit_and_rate(home)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    if CHROMIUM is None:
        raise SystemExit("Chromium is missing: install it, for example apt install chromium")
    with tempfile.TemporaryDirectory() as temporary:
        make(Path(os.environ.get("FTLIB_HOME") or temporary).absolute())
