"""A user's own Albumentations pipeline (`augment.pipeline`), built from its serialized form."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import albumentations as A
import numpy as np

from ftlib.data.rng import AUGMENT, Randomness, key
from ftlib.settings import ConfigError


class Pipeline:
    """uint8[S, S, 3] -> uint8[S, S, 3] through the transforms of a file in the form of `A.to_dict`.

    It draws all its randomness from the generators of the call; a `seed` in the file is ignored.
    """

    def __init__(self, text: str) -> None:
        """`text`: JSON, as `config.pipeline_text` gives it. Raises ConfigError: cannot be built."""
        pipeline = json.loads(text)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of arguments that its own `to_dict` writes, too
                self._transform = A.from_dict(pipeline)
                built = A.to_dict(self._transform)
        except Exception as error:
            raise ConfigError(
                f"augment.pipeline: Albumentations {A.__version__} cannot build it "
                f"({type(error).__name__}: {_short(error)}). Write the file again with "
                "albumentations.save, or correct it"
            ) from None
        if unknown := list(_unknown_arguments(pipeline["transform"], built["transform"])):
            raise ConfigError(
                f"augment.pipeline: Albumentations {A.__version__} does not know the argument "
                f"{unknown[0]}. Correct its name, or leave it out"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Class names of its transforms, in their order."""
        return tuple(
            type(transform).__name__
            for transform in getattr(self._transform, "transforms", [self._transform])
        )

    def __call__(self, image: np.ndarray, randomness: Randomness) -> np.ndarray:
        """uint8[S, S, 3] -> uint8[S, S, 3]. Raises ValueError for another shape or type."""
        self._transform.set_random_state(randomness.generator, randomness.python)
        result = self._transform(image=image)["image"]
        if not isinstance(result, np.ndarray):
            found = type(result).__name__
        elif result.dtype != np.uint8 or result.shape != image.shape:
            found = f"{result.dtype}{list(result.shape)}"
        else:
            return result
        raise ValueError(
            f"augment.pipeline turns uint8{list(image.shape)} into {found}; it must keep size and "
            "type. Leave out transforms that resize, normalize or make tensors: ftlib does that"
        )

    def check(self, size: int) -> None:
        """Try it on pictures of `size` pixels a side.

        Raises ConfigError when it fails, or gives other pictures from the same random numbers.
        """
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
            if not np.array_equal(results[0], results[1]):
                raise ConfigError(
                    "augment.pipeline gives different pictures from the same random numbers, so a "
                    "resumed run would be another run. Leave out the transform that draws random "
                    "numbers of its own"
                )


def _unknown_arguments(written: Mapping[str, Any], built: Mapping[str, Any]) -> Iterator[str]:
    """Arguments in the file that the transforms built from it do not have.

    Albumentations only warns of them.
    """
    for name, value in written.items():
        if name not in built:
            yield f"{name} of {written['__class_fullname__']}"
        elif name == "transforms":
            for inner, built_inner in zip(value, built[name]):
                yield from _unknown_arguments(inner, built_inner)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
