"""A packaged model behind HTTP: pictures are POSTed as they are, answers are JSON.

    GET  /          a page that takes a picture by drag and drop
    POST /predict   body: a picture file; ?top_k=5 -> {"class", "probability", "top": [...]}
    POST /explain   body: a picture file; ?class=NAME -> PNG, Grad-CAM laid over what the network sees
    GET  /health    200 once the model answers
    GET  /about     what is served
    GET  /metrics   Prometheus text: requests by route and status, pictures per batch, seconds per batch

Errors are {"error": why} with 400 (no picture), 404, 405 or 413 (too large). Requests that come together are answered as one batch.
`Service` knows nothing of Ray; `deployment` puts it on Ray Serve.
"""

from __future__ import annotations

import asyncio
import io
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response

PAGE = Path(__file__).with_name("serve_page.html")
MAX_MEGABYTES = 20.0
"""Larger bodies are refused."""
BATCH = 16
"""Most pictures per batch."""
WAIT_SECONDS = 0.005
"""How long a batch waits for company."""
ROUTES = {
    "/": "GET",
    "/predict": "POST",
    "/explain": "POST",
    "/health": "GET",
    "/about": "GET",
    "/metrics": "GET",
}


class RequestError(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class Service:
    """The model and its routes. `respond` takes a Starlette request."""

    def __init__(
        self, model: str, tracking: str = "", max_megabytes: float = MAX_MEGABYTES
    ) -> None:
        from ftlib.packaging.package import load

        loaded = load(model, tracking)
        self.classifier = loaded.unwrap_python_model()
        self.meta: dict[str, Any] = self.classifier.meta
        self.explainer = _explainer(self.meta, loaded)
        self.max_bytes = int(max_megabytes * 1e6)
        self.queue: asyncio.Queue[tuple[Any, asyncio.Future[Any]]] | None = None
        self.worker: asyncio.Task[None] | None = None
        self.requests: Counter[tuple[str, int]] = Counter()
        self.pictures = self.batches = 0
        self.seconds = 0.0

    async def respond(self, request: Request) -> Response:
        """Answer one request; every fault becomes an answer."""
        path = request.scope.get("path", "/")
        root = request.scope.get("root_path", "")
        path = path.removeprefix(root) or "/"
        try:
            if path not in ROUTES:
                raise RequestError(404, f"there is no {path} here. POST a picture to /predict")
            if request.method != ROUTES[path]:
                raise RequestError(405, f"{path} takes {ROUTES[path]}")
            reply = await getattr(self, "get_page" if path == "/" else path[1:])(request)
        except RequestError as refused:
            reply = JSONResponse({"error": str(refused)}, refused.status)
        except Exception as error:
            reply = JSONResponse({"error": f"the server failed ({type(error).__name__})"}, 500)
        self.requests[path if path in ROUTES else "other", reply.status_code] += 1
        return reply

    async def get_page(self, request: Request) -> Response:
        return HTMLResponse(PAGE.read_text("utf-8"))

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "model": self.meta["run"] or self.meta["arch"]})

    async def about(self, request: Request) -> Response:
        return JSONResponse(
            {
                "arch": self.meta["arch"],
                "run": self.meta["run"],
                "classes": len(self.meta["classes"]),
                "size": self.meta["size"],
                "scores": self.meta["scores"],
                "explains": self.explainer is not None,
                "max_megabytes": self.max_bytes / 1e6,
            }
        )

    async def metrics(self, request: Request) -> Response:
        lines = ["# TYPE ftlib_requests_total counter"]
        lines += [
            f'ftlib_requests_total{{route="{route}",status="{status}"}} {count}'
            for (route, status), count in sorted(self.requests.items())
        ]
        for name, value in (
            ("pictures", self.pictures),
            ("batches", self.batches),
            ("batch_seconds", self.seconds),
        ):
            lines += [f"# TYPE ftlib_{name}_total counter", f"ftlib_{name}_total {value:g}"]
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

    async def predict(self, request: Request) -> Response:
        try:
            top_k = int(request.query_params.get("top_k", 5))
        except ValueError:
            top_k = 0
        if top_k < 1:
            raise RequestError(400, "top_k must be a whole number, 1 or more")
        p = await self.probabilities(await self.prepared(request))
        best = sorted(range(len(p)), key=lambda i: -p[i])[:top_k]
        named = [{"class": self.meta["classes"][i], "probability": float(p[i])} for i in best]
        return JSONResponse({**named[0], "top": named})

    async def explain(self, request: Request) -> Response:
        name = request.query_params.get("class", "")
        if self.explainer is None:
            raise RequestError(
                404,
                "this package cannot be explained: it was made without its weights, or for an unknown architecture",
            )
        if name not in self.meta["classes"]:
            raise RequestError(400, f"there is no class {name!r}")
        pixels = await self.prepared(request)
        png = await asyncio.get_running_loop().run_in_executor(
            None, self.explainer, pixels, self.meta["classes"].index(name)
        )
        return Response(png, media_type="image/png")

    async def prepared(self, request: Request) -> Any:
        """uint8[S, S, 3] of the picture in the body."""
        tell = request.headers.get("content-length", "")
        if tell.isdigit() and int(tell) > self.max_bytes:
            raise RequestError(
                413,
                f"{int(tell) / 1e6:.1f} MB are more than {self.max_bytes / 1e6:g} MB. Send a smaller picture",
            )
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self.max_bytes:
                raise RequestError(
                    413, f"more than {self.max_bytes / 1e6:g} MB. Send a smaller picture"
                )
        try:
            return await asyncio.get_running_loop().run_in_executor(
                None, self.classifier.prepare, bytes(body)
            )
        except ValueError as error:
            raise RequestError(400, str(error)) from None

    async def probabilities(self, pixels: Any) -> Any:
        """float64[C], computed together with whatever else waits."""
        if self.queue is None or self.worker is None or self.worker.done():
            self.queue = asyncio.Queue()
            self.worker = asyncio.create_task(self._work(self.queue))
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        await self.queue.put((pixels, answer))
        return await answer

    async def _work(self, queue: asyncio.Queue[tuple[Any, asyncio.Future[Any]]]) -> None:
        import numpy as np

        while True:
            batch = [await queue.get()]
            await asyncio.sleep(WAIT_SECONDS)
            while len(batch) < BATCH and not queue.empty():
                batch.append(queue.get_nowait())
            started = time.perf_counter()
            try:
                found = await asyncio.get_running_loop().run_in_executor(
                    None, self.classifier.probabilities, np.stack([pixels for pixels, _ in batch])
                )
            except Exception as error:
                for _, answer in batch:
                    if not answer.done():
                        answer.set_exception(error)
                continue
            self.pictures, self.batches, self.seconds = (
                self.pictures + len(batch),
                self.batches + 1,
                self.seconds + time.perf_counter() - started,
            )
            for (_, answer), p in zip(batch, found):
                if not answer.done():  # its caller may have gone away
                    answer.set_result(p)


def _explainer(meta: dict[str, Any], loaded: Any) -> Any:
    """(uint8[S, S, 3], class) -> PNG bytes, or None where the package's weights do not make a model that ftlib knows."""
    import numpy as np
    import torch
    from PIL import Image
    from safetensors.torch import load_file

    from ftlib.config import Run
    from ftlib.report.gradcam import grad_cam, overlay, target_layer
    from ftlib.settings import from_dict
    from ftlib.training import models
    from ftlib.training.evaluate import normalize

    try:
        run = from_dict(Run, meta["recipe"])
        model = models.build(run.model, len(meta["classes"]), image_size=run.augment.size).eval()
        model.load_state_dict(load_file(loaded._model_impl.context.artifacts["weights"]))
        layer = target_layer(model, torch.zeros(1, 3, meta["size"], meta["size"]))
    except (ValueError, KeyError, RuntimeError, OSError, AttributeError):
        return None
    lock = threading.Lock()

    def explain(pixels: Any, index: int) -> bytes:
        with lock:  # hooks on the model's layers are not for two threads at once
            cam = grad_cam(
                model,
                normalize(torch.from_numpy(np.array(pixels)[None]), meta["mean"], meta["std"]),
                np.array([index]),
                layer,
            )[0]
        buffer = io.BytesIO()
        Image.fromarray(overlay(np.asarray(pixels), cam, 224)).save(buffer, "PNG")
        return buffer.getvalue()

    return explain


def deployment(
    model: str,
    tracking: str = "",
    *,
    replicas: int = 1,
    cpus: float = 1.0,
    gpus: float = 0.0,
    max_megabytes: float = MAX_MEGABYTES,
) -> Any:
    """A Ray Serve application of the service."""
    from ray import serve

    class Endpoint:
        def __init__(self) -> None:
            self.service = Service(model, tracking, max_megabytes)

        async def __call__(self, request: Request) -> Response:
            return await self.service.respond(request)

    made = serve.deployment(
        Endpoint,
        name="ftlib",
        num_replicas=replicas,
        max_ongoing_requests=4 * BATCH,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
    )
    return made.bind()
