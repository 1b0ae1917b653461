"""Make the pictures of docs/images that show a run's report, an audit and a learning-rate test.

make docs-images     # about two minutes on 2 cores; needs Chromium

The jobs run as a user types them, on the built-in digits, in $FTLIB_HOME or a temporary folder.
"""

import argparse
import base64
import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from tests.deploy.browser import CHROMIUM, Browser

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
RUN = "docs"
TRAINING = f"""
    phase1 --name {RUN} --data.path digits --data.subset 0.9 --model.arch resnet18
    --augment.size 32 --augment.flip 0 --train.epochs 12 --train.batch-size 32
    --train.ema-decay 0.98 --gates.val-top1 0
"""
WIDTH = 1000
"""Of the pages, in pixels."""
LARGEST = 120_000
"""Bytes of a picture, so that the repository stays small."""


def run_job(home: Path, line: str) -> None:
    name, *words = line.split()
    print(f"python jobs/{name}.py {' '.join(words)}", flush=True)
    command = [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *words]
    environment = {**os.environ, "FTLIB_HOME": str(home), "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, env=environment, cwd=home, stdout=subprocess.DEVNULL)


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
    run_job(home, "prepare --source digits")
    run_job(home, TRAINING)
    run_job(home, f"evaluate {RUN} --no-track")
    report = home / "runs" / RUN / "report" / "report.html"
    screenshot(report, "report.png", height=1320)
    screenshot(report, "mistakes.png", heading="Worst mistakes", height=532)
    run_job(home, f"audit digits --out {home / 'audit'}")
    screenshot(home / "audit" / "audit.html", "audit.png", height=1200)
    small = "--data.path digits --model.arch resnet18 --augment.size 32"
    run_job(home, f"find_lr phase1 {small} --figure {home / 'lr.png'}")
    save((home / "lr.png").read_bytes(), "lr.png")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    if CHROMIUM is None:
        raise SystemExit("Chromium is missing: install it, for example apt install chromium")
    with tempfile.TemporaryDirectory() as temporary:
        make(Path(os.environ.get("FTLIB_HOME") or temporary).absolute())
