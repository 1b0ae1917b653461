"""README's way from a folder of pictures to a served model, typed as it is printed."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ftlib.paths import jobs_folder
from tests.deploy import made

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
SECTION = README.split("\n## Your own pictures")[1].split("\n## ")[0]
PICTURES = 10
"""Per class."""


@pytest.fixture
def place(tmp_path, home, offline_hub, monkeypatch):
    """A folder to work in, with `python`, the jobs, and pictures in the folders README names."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jobs").symlink_to(jobs_folder())
    draw(tmp_path / "FOLDER")
    (tmp_path / "photos").symlink_to(tmp_path / "FOLDER")
    (tmp_path / "cat.jpg").write_bytes((tmp_path / "FOLDER/disc/0.jpg").read_bytes())
    return tmp_path


def draw(folder):
    rng = np.random.default_rng(0)
    for kind in made.CLASSES:
        (folder / kind).mkdir(parents=True)
        for i in range(PICTURES):
            pixels = made.drawing(kind, rng, side=64)
            Image.fromarray(pixels).resize((256, 256)).save(folder / kind / f"{i}.jpg")


def run(line):
    done = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_commands_lead_from_a_folder_to_a_served_model(place, home):
    block = re.search(r"^```\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL)[1]
    lines = [line.split("#")[0].strip() for line in block.splitlines()]
    assert lines.pop(0) == "source .venv/bin/activate"
    jobs = [line.split("jobs/")[1].split(".py")[0] for line in lines]
    assert " ".join(jobs) == "prepare audit probe finetune evaluate export predict serve"
    for line in lines[:-1]:
        found = [p.name for p in (home / "runs").glob("finetune-*")]
        out = run(line.replace("RUN", found[0] if found else "RUN"))
    assert "disc" in out
    answer = served(lines[-1], place / "cat.jpg")
    assert answer["class"] in made.CLASSES


def served(line, picture):
    """The answer of the server that `line` starts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(f"exec {line} --port {port}", shell=True)
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/predict", data=picture.read_bytes(), method="POST"
    )
    try:
        deadline = time.monotonic() + 200
        while server.poll() is None and time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(request, timeout=60) as reply:
                    return json.load(reply)
            except OSError:
                time.sleep(0.5)
        raise AssertionError(f"{line}: no answer (exit code {server.poll()})")
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_python_example_runs(place):
    block = re.search(r"^```python\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL)[1]
    script = f"{block}\nprint('ended with', run.passed, sorted(run.predict('cat.jpg')))\n"
    Path("example.py").write_text(script)
    for how in ("python - < example.py", "python example.py"):  # a notebook has no file either
        assert "ended with True ['class', 'probability', 'top']" in run(how)
