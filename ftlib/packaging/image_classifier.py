"""The code inside a packaged model: picture files in, class names and calibrated probabilities out.

This file is copied into every package and runs without ftlib. It needs mlflow, numpy, pillow and torch. Beside it lie
`program.pt2` (torch.export: uint8[b, S, S, 3] -> logits float32[b, C], normalisation inside) and `meta.json` (class names, S, how
pictures are cut, the temperature). Nothing in a package is a pickle, and one that was smuggled in is refused.

    model = mlflow.pyfunc.load_model("models:/NAME@champion")
    model.predict([open("cat.jpg", "rb").read()], params={"top_k": 3})
    -> [{"class": "cat", "probability": 0.93, "top": [{"class": "cat", "probability": 0.93}, ...]}]

A picture is bytes (JPEG, PNG, WebP, BMP, TIFF, GIF or PPM), a `pathlib.Path`, or a base64 text, which is what comes over HTTP:
`POST /invocations` with {"inputs": ["<base64>"], "params": {"top_k": 3}}. A plain text is never taken for a path, so that a server
does not read files for whoever asks.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import os
import warnings
import zipfile
from pathlib import Path
from typing import Any, Union

import mlflow.pyfunc
import numpy as np
import torch
from PIL import Image, ImageOps

MAX_MEGAPIXELS = 50
"""Larger pictures are refused from their header, before they are decoded."""
BATCH = 32
"""Pictures per forward pass."""
KINDS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")


class PictureError(ValueError):
    """A picture that cannot be classified; the message says why."""


def read(picture: Any) -> bytes:
    """The bytes of a picture given as bytes, path or base64 text."""
    if isinstance(picture, (bytes, bytearray, memoryview)):
        return bytes(picture)
    if isinstance(picture, os.PathLike):
        try:
            return Path(picture).read_bytes()
        except OSError as error:
            raise PictureError(f"{os.fspath(picture)} cannot be read: {error.strerror}") from None
    if isinstance(picture, str):
        try:
            return base64.b64decode(
                "".join(
                    picture.partition("base64,")[2 if picture.startswith("data:") else 0].split()
                ),
                validate=True,
            )
        except (binascii.Error, ValueError):
            raise PictureError(
                "the text is not base64. For a file pass pathlib.Path(...) or its bytes"
            ) from None
    raise PictureError(
        f"a picture must be bytes, a pathlib.Path or base64 text, not {type(picture).__name__}"
    )


def pixels(
    data: bytes, size: int, short: int, background: tuple[int, int, int] = (255, 255, 255)
) -> np.ndarray:
    """uint8[size, size, 3]: upright, in RGB, the shorter side resized to `short` pixels, then the centre, aspect ratio kept."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _pixels(data, size, short, background)
    except PictureError:
        raise
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error, zlib.error ... on damaged files
        kind = (
            "no picture of a known kind"
            if isinstance(error, Image.UnidentifiedImageError)
            else f"damaged ({error})"
        )
        raise PictureError(
            f"the {len(data):,} bytes are {kind}. Send a whole {', '.join(KINDS[:-1])} or {KINDS[-1]} file"
        ) from None


def _pixels(data: bytes, size: int, short: int, background: tuple[int, int, int]) -> np.ndarray:
    image: Image.Image = Image.open(io.BytesIO(data), formats=KINDS)
    width, height = image.size
    if width * height > MAX_MEGAPIXELS * 1e6:
        raise PictureError(
            f"{width} x {height} pixels are more than {MAX_MEGAPIXELS} megapixels. Send a smaller picture"
        )
    if getattr(image, "n_frames", 1) > 1:
        raise PictureError(
            f"an animation of {image.n_frames} frames; which of them is meant is not known. Send one"
        )  # type: ignore[attr-defined]
    # Far larger JPEGs are decoded at a half, quarter or eighth, exactly where evaluation does it.
    shrink = max(s for s in (1, 2, 4, 8) if s == 1 or s <= 0.5 * min(width, height) / short)
    image.draft(None, (width // shrink, height // shrink))
    turned = image.getexif().get(274, 1) in (5, 6, 7, 8)
    if turned:
        width, height = height, width
    image = _rgb(ImageOps.exif_transpose(image), background)
    rows, columns = (
        (short, int(short * width / height))
        if height <= width
        else (int(short * height / width), short)
    )
    top, left = round((rows - size) / 2), round((columns - size) / 2)
    y, x = image.height / rows, image.width / columns
    box = (left * x, top * y, (left + size) * x, (top + size) * y)
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))


def _rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode in ("F", "I"):
        raise PictureError(
            f"its pixels have 32 bits (mode {image.mode}). Convert it to 8 bits, choosing the range"
        )
    if image.mode.startswith("I;16"):
        wide = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(
            ((wide * 255 + 32767) // 65535).astype(np.uint8)
        )  # PIL's own conversion clips to white
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image)
    return image.convert("RGB")


def program(path: str | Path) -> torch.nn.Module:
    """The exported program, after a look that it holds no pickle."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.filename.endswith("_config.json"):
                config = json.loads(archive.read(entry))["config"]
                if any(payload["use_pickle"] for payload in config.values()):
                    raise ValueError(
                        f"{path} holds pickled tensors and is not loaded: a pickle can run any code"
                    )
            elif "/sample_inputs/" in entry.filename and entry.file_size:
                raise ValueError(
                    f"{path} holds pickled sample inputs and is not loaded: a pickle can run any code"
                )
    return torch.export.load(str(path)).module()


class ImageClassifier(mlflow.pyfunc.PythonModel):
    """The MLflow model. `predict` gives one entry per picture."""

    def load_context(self, context: Any) -> None:
        self.meta: dict[str, Any] = json.loads(Path(context.artifacts["meta"]).read_text("utf-8"))
        self.classes: list[str] = self.meta["classes"]
        self.program = program(context.artifacts["program"])

    @torch.inference_mode()
    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """Calibrated probabilities float64[b, C] of prepared pixels uint8[b, S, S, 3]."""
        logits = self.program(torch.from_numpy(np.ascontiguousarray(images))).double()
        return torch.softmax(logits / self.meta["temperature"], dim=1).numpy()

    def prepare(self, picture: Any) -> np.ndarray:
        """uint8[S, S, 3] of a picture in any accepted form. Raises PictureError."""
        return pixels(
            read(picture), self.meta["size"], self.meta["short"], tuple(self.meta["background"])
        )

    def predict(
        self,
        context: Any,
        model_input: list[Union[bytes, str]],
        params: dict[str, Any] | None = None,
    ):  # type: ignore[no-untyped-def]  # mlflow warns about a result type with Any
        """A list with one dict per picture: class, probability, and `top`, a list of such pairs. params: `top_k` (5), how many classes to name; `on_error` ("raise"): with "row" a picture that cannot be read gives
        {"error": why} and the others go on."""
        options = {"top_k": 5, "on_error": "raise", **(params or {})}
        top_k = min(int(options["top_k"]), len(self.classes))
        if top_k < 1 or options["on_error"] not in ("raise", "row"):
            raise ValueError(
                f"params = {params}: top_k must be 1 or more, on_error must be raise or row"
            )
        out: list[dict[str, Any]] = []
        for start in range(0, len(model_input), BATCH):
            prepared, places = [], []
            for place, picture in enumerate(model_input[start : start + BATCH], start):
                out.append({})
                try:
                    prepared.append(self.prepare(picture))
                    places.append(place)
                except PictureError as error:
                    if options["on_error"] == "raise":
                        raise PictureError(f"picture {place}: {error}") from None
                    out[place] = {"error": str(error)}
            if prepared:
                for place, p in zip(places, self.probabilities(np.stack(prepared))):
                    best = np.argsort(-p, kind="stable")[:top_k]
                    named = [{"class": self.classes[i], "probability": float(p[i])} for i in best]
                    out[place] = {**named[0], "top": named}
        return out


mlflow.models.set_model(ImageClassifier())
