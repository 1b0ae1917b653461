"""A packaged model behind HTTP: pictures are POSTed as they are, answers are JSON.

    GET  /          a page that takes pictures by drag and drop, paste and camera
    POST /predict   body: a picture file, or a form; ?top_k=5
                    -> {"class", "probability", "top": [...]}
    POST /explain   body: a picture file; ?class=NAME
                    -> PNG, Grad-CAM laid over what the network sees
    GET  /health    200 once the model answers
    GET  /about     what is served
    GET  /metrics   Prometheus text: requests by route and status, pictures and seconds of batches

Errors are {"error": why} with 400 (no picture), 404, 405, 408 (sent too slowly), 413 (too large),
429 (too much at once) or 503 (decoding took too long). Pictures are judged by their headers and
decoded in separate processes (`ftlib.deploy.decoding`); requests that come together are computed as
one batch. `Service` knows nothing of servers: `ftlib.deploy.http_server` runs it in one process,
`ftlib.deploy.ray_server` puts it on Ray Serve.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response

from ftlib import picture
from ftlib.cpus import available_cpus
from ftlib.deploy.batcher import Batcher
from ftlib.deploy.decoding import STATUS, Decoders
from ftlib.deploy.errors import RequestError
from ftlib.deploy.request_body import BodyLimits, read_picture
from ftlib.picture import PictureError

PAGE = Path(__file__).with_name("serve_page.html")
PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; connect-src 'self'; img-src blob:; "
    "media-src blob: mediastream:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
"""The page loads nothing from elsewhere, and nobody may frame it."""
MAX_MEGABYTES = 20.0
"""Larger pictures are refused."""
BATCH = 32
"""Most pictures per batch."""
MAX_WAITING = 512
"""Most pictures that wait for the model; more are refused with 429."""
MAX_EXPLAINING = 4
"""Most explanations at once, waiting ones too."""
ROUTES = {
    "/": "GET",
    "/predict": "POST",
    "/explain": "POST",
    "/health": "GET",
    "/about": "GET",
    "/metrics": "GET",
}


class RefusalPacer:
    """Slows down clients that send nothing but bad requests, one after the other.

    A refusal is so quick that such a client would keep a whole CPU busy. Up to `per_second` are
    answered at once; beyond that each waits for its turn, at most `longest` seconds.
    """

    def __init__(self, per_second: float = 20.0, burst: int = 20, longest: float = 2.0) -> None:
        self._gap, self._burst, self._longest = 1 / per_second, burst, longest
        self._next = 0.0

    async def wait(self) -> None:
        now = time.monotonic()
        self._next = max(self._next, now - self._burst * self._gap) + self._gap
        await asyncio.sleep(min(self._longest, max(0.0, self._next - now)))


class Service:
    """The model and its routes. `respond` takes a Starlette request. Belongs to one event loop."""

    def __init__(
        self, model: str, tracking: str = "", max_megabytes: float = MAX_MEGABYTES
    ) -> None:
        from ftlib.packaging.package import load

        loaded = load(model, tracking)
        artifacts = loaded._model_impl.context.artifacts  # type: ignore[attr-defined]
        self.classifier = loaded.unwrap_python_model()
        self.meta: dict[str, Any] = self.classifier.meta
        self.weights = artifacts.get("weights", "")
        own = Path(artifacts["meta"]).parents[1] / "picture.py"  # older packages have none
        cpus = available_cpus()
        one_torch_thread()
        self.batcher = Batcher(self.classifier.probabilities, model_threads(cpus), BATCH)
        self.decoders = Decoders(own if own.exists() else Path(picture.__file__), self.meta, cpus)
        self.body = BodyLimits(int(max_megabytes * 1e6))
        self.max_megapixels = float(self.meta.get("max_megapixels", picture.MAX_MEGAPIXELS))
        self.requests: Counter[tuple[str, int]] = Counter()
        self.refusals = RefusalPacer()
        self.explaining = 0
        self._explainer: asyncio.Future[Any] | None = None

    async def start(self) -> None:
        """Start the decoding processes, try the model, and begin to load what explains."""
        await self.decoders.start()
        blank = np.zeros((self.meta["size"], self.meta["size"], 3), np.uint8)
        await asyncio.get_running_loop().run_in_executor(None, self.batcher.try_out, blank)
        self.load_explainer()

    async def close(self) -> None:
        """End the decoding processes and the model's threads."""
        await self.decoders.close()
        self.batcher.close()

    def load_explainer(self) -> asyncio.Future[Any]:
        """The explainer, being loaded in a thread."""
        if self._explainer is None:
            from ftlib.deploy.explainer import explainer

            loop = asyncio.get_running_loop()
            self._explainer = loop.run_in_executor(None, explainer, self.meta, self.weights)
        return self._explainer

    async def respond(self, request: Request) -> Response:
        """Answer one request; every fault becomes an answer."""
        path = request.scope.get("path", "/")
        root = request.scope.get("root_path", "")
        path = path.removeprefix(root) or "/"
        try:
            if path not in ROUTES:
                why = f"there is no {path[:200]} here. POST a picture to /predict"
                raise RequestError(404, why)
            if request.method != ROUTES[path]:
                raise RequestError(405, f"{path} takes {ROUTES[path]}")
            reply = await getattr(self, "get_page" if path == "/" else path[1:])(request)
        except RequestError as refused:
            reply = await self.refuse(refused)
        except ClientDisconnect:
            reply = Response(status_code=499)
        except Exception as error:
            reply = JSONResponse({"error": f"the server failed ({type(error).__name__})"}, 500)
        self.requests[path if path in ROUTES else "other", reply.status_code] += 1
        return reply

    async def refuse(self, refused: RequestError) -> Response:
        """An error, after a pause where there are many. Where the body was not read, it closes."""
        await self.refusals.wait()
        headers = {"connection": "close"} if refused.status in (408, 413, 429) else {}
        if refused.status == 429:
            headers["retry-after"] = "1"
        return JSONResponse({"error": str(refused)}, refused.status, headers)

    async def get_page(self, request: Request) -> Response:
        return HTMLResponse(PAGE.read_text("utf-8"), headers=PAGE_HEADERS)

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "model": self.meta["run"] or self.meta["arch"]})

    async def about(self, request: Request) -> Response:
        return JSONResponse(
            {
                "arch": self.meta["arch"],
                "run": self.meta["run"],
                "classes": len(self.meta["classes"]),
                "class_names": self.meta["classes"],
                "size": self.meta["size"],
                "scores": self.meta["scores"],
                "explains": await self.load_explainer() is not None,
                "max_megabytes": self.body.max_bytes / 1e6,
                "max_megapixels": self.max_megapixels,
            }
        )

    async def metrics(self, request: Request) -> Response:
        lines = ["# TYPE ftlib_requests_total counter"]
        lines += [
            f'ftlib_requests_total{{route="{route}",status="{status}"}} {count}'
            for (route, status), count in sorted(self.requests.items())
        ]
        for name, value in (
            ("pictures", self.batcher.pictures),
            ("batches", self.batcher.batches),
            ("batch_seconds", self.batcher.seconds),
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
        pixels = await self.pixels(request)
        if len(self.batcher) >= MAX_WAITING:
            raise RequestError(429, "too many pictures are waiting. Try again in a second")
        p = await self.batcher(pixels)
        best = np.argsort(-p, kind="stable")[:top_k].tolist()
        named = [{"class": self.meta["classes"][i], "probability": float(p[i])} for i in best]
        return Response(json.dumps({**named[0], "top": named}), media_type="application/json")

    async def explain(self, request: Request) -> Response:
        name = request.query_params.get("class", "")
        explain = await self.load_explainer()
        if explain is None:
            raise RequestError(
                404,
                "this package cannot be explained: it was made without its weights, or for an "
                "unknown architecture",
            )
        if name not in self.meta["classes"]:
            raise RequestError(400, f"there is no class {name[:200]!r}")
        if self.explaining >= MAX_EXPLAINING:
            raise RequestError(429, "too many explanations at once. Try again in a second")
        self.explaining += 1
        try:
            pixels = await self.pixels(request)
            number = self.meta["classes"].index(name)
            loop = asyncio.get_running_loop()
            png = await loop.run_in_executor(None, explain, pixels, number)
        finally:
            self.explaining -= 1
        return Response(png, media_type="image/png")

    async def pixels(self, request: Request) -> np.ndarray:
        """uint8[S, S, 3] of the picture in the body. Raises RequestError."""
        data = await read_picture(request, self.body)
        try:
            header = picture.header(data, self.max_megapixels)
            return await self.decoders.decode(data, header)
        except PictureError as error:
            raise RequestError(STATUS.get(error.reason, 400), error.detail) from None
        finally:
            self.body.held -= len(data)


def model_threads(cpus: int) -> int:
    """Batches that are computed at once: one CPU stays with the event loop and the decoders.

    With 32 clients on 2 cores a request then takes a sixth less CPU (docs/performance.md).
    """
    return max(1, min(8, cpus - 1))


def one_torch_thread() -> None:
    """Batches run side by side, each in one thread; threads within a batch would only wait."""
    import torch

    torch.set_num_threads(1)
