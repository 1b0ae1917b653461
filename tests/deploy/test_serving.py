"""The service over real HTTP, its page in a real browser, in one process and on Ray Serve.

Holds `ftlib.deploy.serving`, `explainer`, `errors` and `ray_server`.
"""

import asyncio
import concurrent.futures
import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ftlib.config import Augment, Data, Evaluate, Model, Run
from ftlib.data.augment import EvalTransform
from ftlib.deploy.http_server import bound_socket, close_idle
from ftlib.deploy.http_server import server as server_of
from ftlib.deploy.serving import Service, model_threads
from ftlib.packaging.package import load, package
from ftlib.training import models
from ftlib.training.evaluate import normalize
from tests.deploy.browser import CHROMIUM, Browser

CLASSES = ("ant", "bee", "cat", "dog", "eel", "<fox>")
RUN = Run(name="served", model=Model(arch="resnet18"), augment=Augment(size=64))


def picture(seed=0, kind="JPEG"):
    small = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize((240, 180), Image.Resampling.BICUBIC).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(3)
    return package(
        models.build(RUN.model, len(CLASSES)).eval(),
        RUN,
        CLASSES,
        {"val/top1": 50.0},
        0.2,
        tmp_path_factory.mktemp("p") / "model",
    )


@contextlib.contextmanager
def serving(folder, **limits):
    """(address, service) of a server in a thread of this process."""
    service = Service(str(folder), max_megabytes=0.5)
    for name, value in limits.items():
        setattr(service.body, name, value)
    bound, ready = bound_socket("127.0.0.1", 0), threading.Event()
    stop = []

    async def run():
        await service.start()
        running = server_of(service)
        stop.append(lambda: setattr(running, "should_exit", True))
        idle = asyncio.create_task(close_idle(running, IDLE))
        task = asyncio.create_task(running.serve(sockets=[bound]))
        while not running.started:
            await asyncio.sleep(0.01)
        ready.set()
        await task
        idle.cancel()
        await service.close()

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    assert ready.wait(60)
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}", service
    finally:
        stop[0]()
        thread.join(20)
        bound.close()


IDLE = 1.0


@pytest.fixture(scope="module")
def service_and_address(folder):
    threads = torch.get_num_threads()
    with serving(folder) as (address, service):
        yield service, address
    torch.set_num_threads(threads)


@pytest.fixture
def server(service_and_address):
    return service_and_address[1]


@pytest.fixture
def service(service_and_address):
    return service_and_address[0]


def ask(address, body=None, method=None):
    request = urllib.request.Request(
        address, data=body, method=method or ("POST" if body is not None else "GET")
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def test_the_server_answers_what_the_package_answers(server, folder):
    jpeg = picture()
    status, body = ask(f"{server}/predict?top_k=3", jpeg)
    answer, direct = json.loads(body), load(str(folder)).predict([jpeg], params={"top_k": 3})[0]
    assert status == 200 and [t["class"] for t in answer["top"]] == [
        t["class"] for t in direct["top"]
    ]
    assert answer["probability"] == pytest.approx(direct["probability"], abs=1e-5)
    assert ask(f"{server}/predict", picture(kind="PNG"))[0] == 200


def test_requests_that_come_together_are_answered_together_and_not_mixed_up(server, folder):
    jpegs = [picture(i) for i in range(24)]
    direct = load(str(folder)).predict(jpegs)
    before = counters(server)
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda j: json.loads(ask(f"{server}/predict", j)[1]), jpegs))
    after = counters(server)
    for a, d in zip(answers, direct):
        assert a["class"] == d["class"] and a["probability"] == pytest.approx(
            d["probability"], abs=1e-5
        )
    assert after["ftlib_pictures_total"] - before.get("ftlib_pictures_total", 0) == 24
    assert after["ftlib_batches_total"] - before.get("ftlib_batches_total", 0) < 24


def counters(server):
    return {
        name: float(value)
        for name, value in re.findall(
            r"^([a-z_]+(?:\{[^}]*\})?) (\S+)$", ask(f"{server}/metrics")[1].decode(), re.M
        )
    }


@pytest.mark.parametrize(
    ("path", "body", "method", "status", "says"),
    [
        ("/predict", b"not a picture", None, 400, "not a picture of a known kind"),
        ("/predict", b"", None, 400, "no bytes"),
        ("/predict", b"\xff\xd8" + bytes(600_000), None, 413, "more than 0.5 MB"),
        ("/predict?top_k=none", b"x", None, 400, "top_k must be"),
        ("/predict", None, "GET", 405, "takes POST"),
        ("/nowhere", None, None, 404, "there is no /nowhere"),
        ("/explain?class=unknown", b"x", None, 400, "no class 'unknown'"),
        ("/../etc/passwd", None, None, 404, "there is no"),
    ],
)
def test_bad_requests_are_explained(server, path, body, method, status, says):
    got, answer = ask(server + path, body, method)
    assert got == status and says in json.loads(answer)["error"]


def test_one_cpu_is_left_to_the_event_loop_and_the_decoders():
    assert [model_threads(cpus) for cpus in (1, 2, 4, 64)] == [1, 1, 3, 8]


def test_health_and_metrics(server):
    assert json.loads(ask(f"{server}/health")[1]) == {"status": "ok", "model": "served"}
    about = json.loads(ask(f"{server}/about")[1])
    assert about["classes"] == 6 and about["explains"] and about["size"] == 64
    ask(f"{server}/predict", b"x")
    assert counters(server)['ftlib_requests_total{route="/predict",status="400"}'] >= 1


def test_the_explanation_is_a_picture_and_depends_on_the_class(server):
    pictures = [ask(f"{server}/explain?class={c}", picture()) for c in ("ant", "bee")]
    shown = []
    for status, body in pictures:
        assert status == 200
        with Image.open(io.BytesIO(body)) as image:
            assert image.size == (224, 224)
            shown.append(np.asarray(image))
    assert not np.array_equal(*shown)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch", ["timm/resnet10t", "timm/vit_tiny_patch16_224", "timm/convnext_atto"]
)
def test_models_of_timm_are_served_with_their_own_answers_and_explanations(arch, tmp_path):
    half = (0.5, 0.5, 0.5)
    run = Run(
        name="served",
        model=Model(arch=arch),
        augment=Augment(size=64),
        data=Data(mean=half, std=half),
        evaluate=Evaluate(crop=0.9, interpolation="bicubic"),
    )
    torch.manual_seed(3)
    model = models.build(run.model, len(CLASSES), 64).eval()
    torch.nn.init.normal_(models.head(model).weight, std=0.5)
    folder = package(model, run, CLASSES, {}, 1.0, tmp_path / "model")
    jpeg = picture()
    with torch.inference_mode():
        pixels = EvalTransform(64, 0.9, "bicubic")(jpeg)
        logits = model(normalize(torch.from_numpy(pixels)[None], half, half))[0]
    expected = dict(zip(CLASSES, logits.softmax(0).tolist(), strict=True))
    threads = torch.get_num_threads()
    try:
        with serving(folder) as (server, _):
            status, body = ask(f"{server}/predict?top_k=6", jpeg)
            assert status == 200
            given = {t["class"]: t["probability"] for t in json.loads(body)["top"]}
            assert given == pytest.approx(expected, abs=2e-4)
            status, body = ask(f"{server}/explain?class=bee", jpeg)
            assert status == 200
            with Image.open(io.BytesIO(body)) as shown:
                assert shown.size == (224, 224)
    finally:
        torch.set_num_threads(threads)


CARDS = "document.querySelectorAll('.card').length"
NAMES = "[...document.querySelectorAll('.bar > span > span:first-child')].map(b => b.textContent)"
WIDTHS = "[...document.querySelectorAll('.bar u')].map(b => b.getBoundingClientRect().width)"
CAM = "document.querySelector('.cam')"


@pytest.fixture
def browser(server, tmp_path):
    if CHROMIUM is None:
        pytest.skip("needs a Chromium on the PATH (apt-get install chromium)")
    opened = Browser(tmp_path)
    try:
        opened.call("Page.navigate", url=server)
        opened.wait("document.getElementById('about')?.textContent.includes('6 classes')")
        yield opened
    finally:
        opened.close()


@pytest.mark.slow
def test_the_page_shows_classes_doubt_and_where_the_model_looked(browser, folder, tmp_path):
    keep = Path(os.environ.get("FTLIB_SHOTS", tmp_path))
    browser.give([("dropped.jpg", picture())])
    browser.wait(f"{CAM} && {CAM}.naturalWidth === 224")
    direct = load(str(folder)).predict([picture()], params={"top_k": 6})[0]
    assert browser.evaluate(NAMES) == [t["class"] for t in direct["top"][:5]]
    widths = browser.evaluate(WIDTHS)
    assert widths == sorted(widths, reverse=True) and widths[0] > 5
    said = browser.evaluate("document.querySelector('.doubt').textContent")
    assert f"about {100 * direct['probability']:.0f} of 100" in said
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    browser.screenshot(keep / "serve.png")
    first = browser.evaluate(f"{CAM}.src")
    browser.evaluate("document.querySelectorAll('.bar')[1].click()")
    browser.wait(f"{CAM}.src !== '{first}'")
    browser.evaluate("document.querySelector('.more').click()")
    assert browser.evaluate(NAMES) == [t["class"] for t in direct["top"]]
    known = browser.evaluate("document.getElementById('names').textContent")
    assert known == ", ".join(CLASSES), "names are shown as text, not as markup"


@pytest.mark.slow
def test_the_page_takes_several_pictures_and_says_what_is_none(browser, tmp_path):
    keep = Path(os.environ.get("FTLIB_SHOTS", tmp_path))
    browser.give([(f"{i}.jpg", picture(i)) for i in range(5)] + [("note.txt", b"no picture")])
    browser.wait(f"{CARDS} === 6 && document.getElementById('progress').hidden")
    assert browser.evaluate("document.querySelectorAll('.bars').length") == 5
    error = browser.evaluate("document.querySelector('.card .error').textContent")
    assert "not a picture of a known kind" in error
    browser.give([("", picture(7))], how="paste")
    browser.wait(f"{CARDS} === 7 && document.querySelectorAll('.bars').length === 6")
    browser.screenshot(keep / "serve-several.png")
    assert browser.evaluate("document.querySelectorAll('.hint').length") == 6
    browser.evaluate("document.getElementById('clear').click()")
    assert browser.evaluate(CARDS) == 0


@pytest.mark.slow
def test_the_page_takes_a_picture_of_the_camera(browser):
    browser.evaluate("document.getElementById('open-camera').click()")
    browser.evaluate("document.getElementById('shoot').click()")  # before it sends: nothing yet
    browser.wait("document.getElementById('video').videoWidth > 0")
    browser.evaluate("document.getElementById('shoot').click()")
    browser.wait("document.querySelectorAll('.bars').length === 1")
    assert browser.evaluate("document.querySelector('figcaption').textContent") == "camera.jpg"
    assert browser.evaluate("document.querySelector('.picture').naturalWidth > 100")
    assert browser.evaluate("document.getElementById('video').srcObject === null")


@pytest.mark.parametrize(
    "replicas", [1, pytest.param(2, marks=pytest.mark.slow, id="2 on Ray Serve")]
)
def test_the_job_serves_and_ends_with_ctrl_c(folder, replicas):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    temporary = tempfile.mkdtemp(prefix="s", dir="/tmp")
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {
        "RAY_TMPDIR": temporary,
        "PYTHONWARNINGS": "",
    }
    job = Path(__file__).parents[2] / "jobs" / "serve.py"
    process = subprocess.Popen(
        [
            *(sys.executable, str(job), "--model", str(folder)),
            *("--port", str(port), "--replicas", str(replicas)),
        ],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and process.poll() is None:
            try:
                if ask(f"http://127.0.0.1:{port}/health")[0] == 200:
                    break
            except OSError:
                time.sleep(1)
        status, body = ask(f"http://127.0.0.1:{port}/predict", picture())
        assert (
            status == 200
            and json.loads(body)["class"] == load(str(folder)).predict([picture()])[0]["class"]
        )
        assert ask(f"http://127.0.0.1:{port}/predict", b"x")[0] == 400
        assert b"What is in the picture" in ask(f"http://127.0.0.1:{port}/")[1]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        process.stdout.close()
        shutil.rmtree(temporary, ignore_errors=True)


def test_a_missing_model_is_reported_before_anything_starts(tmp_path):
    job = Path(__file__).parents[2] / "jobs" / "serve.py"
    done = subprocess.run(
        [sys.executable, str(job), "--model", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (
        done.returncode == 2
        and "is no packaged model" in done.stderr
        and "Traceback" not in done.stderr
    )
