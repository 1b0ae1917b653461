"""A user's own Albumentations pipeline (`augment.pipeline`), built from its serialized form."""

from __future__ import annotations

import json
import warnings

import albumentations as A
import numpy as np

from ftlib.data.rng import AUGMENT, Randomness, key
from ftlib.settings import ConfigError


class Pipeline:
    """uint8[S, S, 3] -> uint8[S, S, 3] through the transforms of a file in the form of `A.to_dict`.

    All its randomness is drawn from the generators it is called with; a `seed` in the file is ignored.
    """

    def __init__(self, text: str) -> None:
        """`text`: JSON, as `config.pipeline_text` gives it. Raises ConfigError when it cannot be built."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # Albumentations only warns of unknown arguments
                self._transform = A.from_dict(json.loads(text))
        except Exception as error:
            raise ConfigError(
                f"augment.pipeline: Albumentations {A.__version__} cannot build it "
                f"({type(error).__name__}: {_short(error)}). Write the file again with "
                "albumentations.save, or correct it"
            ) from None

    def __call__(self, image: np.ndarray, randomness: Randomness) -> np.ndarray:
        """uint8[S, S, 3] -> uint8[S, S, 3]. Raises ValueError when the result has another shape or type."""
        self._transform.set_random_state(randomness.generator, randomness.python)
        result = self._transform(image=image)["image"]
        if not isinstance(result, np.ndarray):
            found = type(result).__name__
        elif result.dtype != np.uint8 or result.shape != image.shape:
            found = f"{result.dtype}{list(result.shape)}"
        else:
            return result
        raise ValueError(
            f"augment.pipeline turns uint8{list(image.shape)} into {found}; it must keep size and type. "
            "Leave out transforms that resize, normalize or make tensors: ftlib does that itself"
        )

    def check(self, size: int) -> None:
        """Raise ConfigError when it fails on pictures of `size` pixels a side, or is not reproducible."""
        randomness = Randomness()
        for trial in range(4):
            randomness.rewind(key(AUGMENT, trial))
            image = randomness.generator.integers(0, 256, (size, size, 3), np.uint8)
            results = []
            for _ in range(2):
                randomness.rewind(key(AUGMENT, trial, 1))
                try:
                    results.append(self(image.copy(), randomness))
                except Exception as error:
                    raise ConfigError(f"augment.pipeline does not work: {_short(error)}") from None
            if not np.array_equal(*results):
                raise ConfigError(
                    "augment.pipeline gives different pictures from the same random numbers, so a "
                    "resumed run would not be the same run. Leave out the transform with a random "
                    "state of its own"
                )


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
