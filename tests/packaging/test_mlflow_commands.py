"""`mlflow models predict` and `serve` answer for a package, typed as docs/delivery.md says."""

import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch

from ftlib.config import Augment, Model, Run
from ftlib.packaging.package import example, load, package
from ftlib.packaging.register import register
from ftlib.track.store import client, ensure_experiment, ensure_store, resolve_uri
from ftlib.training import models

ROOT = Path(__file__).parents[2]
RUN = Run(name="named", model=Model(arch="resnet18"), augment=Augment(size=32))
SETUP = f'eval "$({sys.executable} {ROOT}/jobs/track.py env)"'
REQUEST = {"inputs": [base64.b64encode(example()).decode()], "params": {"top_k": 3}}


@pytest.fixture
def answer(home, tmp_path, monkeypatch):
    """What the package registered as models:/zoo@champion in the home's store answers."""
    uri = resolve_uri()
    ensure_store(uri)
    mlflow = client(uri)
    experiment = ensure_experiment(mlflow, "zoo", uri)
    run = mlflow.create_run(experiment).info.run_id
    torch.manual_seed(0)
    model = models.build(RUN.model, 3).eval()
    folder = package(model, RUN, ("a", "b", "c"), {}, 1.0, tmp_path / "model")
    register(folder, "zoo", "champion", uri=uri, run_id=run, experiment_id=experiment)
    return load(str(folder)).predict([example()], params={"top_k": 3})


def shell(command, cwd, **options):
    """A user's shell: not activated, with the home but without a tracking address."""
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    environment["PATH"] = os.defpath
    return subprocess.Popen(
        ["bash", "-c", f"{SETUP}; {command}"], cwd=cwd, env=environment, **options
    )


@pytest.mark.slow
def test_mlflow_models_predict_answers_as_the_package_does(answer, tmp_path):
    (tmp_path / "request.json").write_text(json.dumps(REQUEST))
    command = (
        "mlflow models predict -m models:/zoo@champion --env-manager local "
        "-i request.json -o answer.json"
    )
    process = shell(command, tmp_path, stderr=subprocess.PIPE, text=True)
    errors = process.communicate()[1]
    assert process.returncode == 0, errors
    assert json.loads((tmp_path / "answer.json").read_text())["predictions"] == answer
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.slow
def test_mlflow_models_serve_answers_over_http(answer, tmp_path):
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = open(tmp_path / "log", "wb")  # noqa: SIM115 - open as long as the server
    process = shell(
        f"exec mlflow models serve -m models:/zoo@champion --env-manager local -p {port}",
        tmp_path,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations",
        data=json.dumps(REQUEST).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        reply = None
        deadline = time.monotonic() + 120
        while reply is None and time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(OSError):
                reply = json.load(urllib.request.urlopen(request, timeout=30))
            time.sleep(0.5)
        assert reply is not None, (tmp_path / "log").read_text()[-2000:]
        assert reply["predictions"] == answer
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.close()
