"""The code inside a packaged model: picture files in, class names and calibrated probabilities out.

This file and `picture.py` (`ftlib.picture`) are copied into every package and run without ftlib.
They need mlflow, numpy, pillow and torch. Beside them lie `program.pt2` (torch.export: uint8[b,
S, S, 3] -> logits float32[b, C], normalization inside) and `meta.json` (class names, S, how
pictures are read and cut, the temperature). Nothing in a package is a pickle, and one that was
smuggled in is refused.

    model = mlflow.pyfunc.load_model("models:/NAME@champion")
    model.predict([open("cat.jpg", "rb").read()], params={"top_k": 3})
    -> [{"class": "cat", "probability": 0.93, "top": [{"class": "cat", "probability": 0.93}, ...]}]

A picture is the bytes of a file (JPEG, PNG, WebP, BMP, TIFF, GIF, AVIF, JPEG 2000, PPM, or HEIC
where pillow-heif is installed), a `pathlib.Path`, or a base64 text, which is what comes over
HTTP: `POST /invocations` with {"inputs": ["<base64>"], "params": {"top_k": 3}}. A plain text is
never taken for a path, so that a server does not read files for whoever asks.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import importlib
import importlib.util
import json
import os
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Union

import mlflow.pyfunc
import numpy as np
import torch

BATCH = 32
"""Pictures per forward pass."""


def _picture_module() -> ModuleType:
    """The copy of `picture.py` beside this file; ftlib's own where this file is ftlib's own.

    Each copy is loaded under a name of its own, so that packages of different versions keep their
    own pixels in one process.
    """
    beside = Path(__file__).with_name("picture.py")
    if not beside.exists():
        return importlib.import_module("ftlib.picture")
    name = f"_package_picture_{hashlib.sha256(beside.read_bytes()).hexdigest()[:16]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, beside)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


if TYPE_CHECKING:
    from ftlib import picture as pictures
else:
    pictures = _picture_module()

PictureError = pictures.PictureError
"""A picture that cannot be classified; the message says why."""


def read(source: Any) -> bytes:
    """The bytes of a picture given as bytes, path or base64 text."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if isinstance(source, os.PathLike):
        try:
            return Path(source).read_bytes()
        except OSError as error:
            why = f"{os.fspath(source)} cannot be read: {error.strerror}"
            raise PictureError("unreadable", why) from None
    if isinstance(source, str):
        text = source.partition("base64,")[2] if source.startswith("data:") else source
        try:
            return base64.b64decode("".join(text.split()), validate=True)
        except (binascii.Error, ValueError):
            why = "the text is not base64. For a file pass pathlib.Path(...) or its bytes"
            raise PictureError("not_base64", why) from None
    why = f"a picture must be bytes, a pathlib.Path or base64 text, not {type(source).__name__}"
    raise PictureError("wrong_type", why)


def program(path: str | Path) -> torch.nn.Module:
    """The exported program, after checking that it holds no pickle. Raises ValueError."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.filename.endswith("_config.json"):
                config = json.loads(archive.read(entry))["config"]
                if any(payload["use_pickle"] for payload in config.values()):
                    raise ValueError(_pickled(path, "tensors"))
            elif "/sample_inputs/" in entry.filename and entry.file_size:
                raise ValueError(_pickled(path, "sample inputs"))
    return torch.export.load(str(path)).module()


def _pickled(path: str | Path, what: str) -> str:
    return f"{path} holds pickled {what} and is not loaded: a pickle can run any code"


class ImageClassifier(mlflow.pyfunc.PythonModel):  # type: ignore[name-defined]
    """The MLflow model. `predict` gives one entry per picture."""

    def load_context(self, context: Any) -> None:
        self.meta: dict[str, Any] = json.loads(Path(context.artifacts["meta"]).read_text("utf-8"))
        self.classes: list[str] = self.meta["classes"]
        self.preprocessing = pictures.Preprocessing(self.meta)
        self.program = program(context.artifacts["program"])

    @torch.inference_mode()
    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """Calibrated probabilities float64[b, C] of prepared pixels uint8[b, S, S, 3]."""
        logits = self.program(torch.from_numpy(np.ascontiguousarray(images))).double()
        return torch.softmax(logits / self.meta["temperature"], dim=1).numpy()

    def prepare(self, picture: Any) -> np.ndarray:
        """uint8[S, S, 3] of a picture in any accepted form. Raises PictureError."""
        return self.preprocessing(read(picture))

    def predict(
        self,
        context: Any,
        model_input: list[Union[bytes, str]],
        params: dict[str, Any] | None = None,
    ):  # type: ignore[no-untyped-def]  # mlflow warns about a result type with Any
        """A list with one dict per picture: class, probability, and `top`, a list of such pairs.

        params: `top_k` (5), how many classes to name; `on_error` ("raise"): with "row" a picture
        that cannot be read gives {"error": why} and the others go on.
        """
        options = {"top_k": 5, "on_error": "raise", **(params or {})}
        top_k = min(int(options["top_k"]), len(self.classes))
        if top_k < 1 or options["on_error"] not in ("raise", "row"):
            raise ValueError(
                f"params = {params}: top_k must be 1 or more, on_error must be raise or row"
            )
        answers: list[dict[str, Any]] = []
        for start in range(0, len(model_input), BATCH):
            images = []
            for number, picture in enumerate(model_input[start : start + BATCH], start):
                answers.append({})
                try:
                    images.append((number, self.prepare(picture)))
                except PictureError as error:
                    if options["on_error"] == "raise":
                        why = f"picture {number}: {error.detail}"
                        raise PictureError(error.reason, why) from None
                    answers[number] = {"error": error.detail}
            if images:
                found = self.probabilities(np.stack([pixels for _, pixels in images]))
                for (number, _), p in zip(images, found):
                    answers[number] = self.answer(p, top_k)
        return answers

    def answer(self, p: np.ndarray, top_k: int) -> dict[str, Any]:
        """The most likely classes of probabilities float64[C]; ties go to the first class."""
        best = np.argsort(-p, kind="stable")[:top_k]
        named = [{"class": self.classes[i], "probability": float(p[i])} for i in best]
        return {**named[0], "top": named}


mlflow.models.set_model(ImageClassifier())
