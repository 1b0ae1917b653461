"""How others load the same pictures, each set up as its own project sets it up. timm, FFCV and DALI
are not needed: their functions raise ImportError where they are not installed.

A loader is given as `opened() -> context manager of an endless iterator over batch sizes`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Sampler

from ftlib.config import IMAGENET_MEAN, IMAGENET_STD

AHEAD = 2
"""Batches that each worker of a DataLoader is ahead (torch's prefetch_factor, its default)."""

Opened = Callable[[], AbstractContextManager[Iterator[int]]]


# --- torch's DataLoader over files ---


class Files(torch.utils.data.Dataset[Any]):
    """(transform(file), label) for each file."""

    def __init__(self, files: Sequence[Path], transform: Callable[[Path], Any]) -> None:
        self.files, self.transform = [str(f) for f in files], transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        return self.transform(Path(self.files[i])), i % 1000


class Endless(Sampler[int]):
    """One random order after the other."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng(0)
        while True:
            yield from random.permutation(self.n).tolist()


def one_thread(_: int) -> None:
    """In a new process of a DataLoader."""
    torch.set_num_threads(1)


def dataloader(
    files: Sequence[Path],
    transform: Callable[[Path], Any],
    batch_size: int,
    workers: int,
    collate: Any = None,
) -> Opened:
    """torch's DataLoader as everybody uses it."""
    return endless(
        lambda: DataLoader(
            Files(files, transform),
            batch_size,
            sampler=Endless(len(files)),
            num_workers=workers,
            prefetch_factor=AHEAD if workers else None,
            worker_init_fn=one_thread,
            collate_fn=collate,
        )
    )


def endless(make: Callable[[], DataLoader[Any]]) -> Opened:
    """The sizes of a DataLoader's batches, whose second part is as long as they are."""

    @contextlib.contextmanager
    def opened() -> Iterator[Iterator[int]]:
        batches: Any = iter(make())
        try:
            yield (len(batch[1]) for batch in batches)
        finally:
            if hasattr(batches, "_shutdown_workers"):
                batches._shutdown_workers()

    return opened


def _pil(path: Path) -> Image.Image:
    with open(path, "rb") as file:
        return Image.open(file).convert("RGB")


def _cv2(path: Path) -> Any:
    return cv2.imread(str(path))


def torchvision_reference(size: int) -> Callable[[Path], torch.Tensor]:
    """torchvision's references/classification, ClassificationPresetTrain with auto_augment="ra"
    (RandAugment(2, 9)), PIL backend."""
    from torchvision.transforms import v2

    chain = v2.Compose(
        [
            v2.RandomResizedCrop(size, interpolation=v2.InterpolationMode.BILINEAR, antialias=True),
            v2.RandomHorizontalFlip(0.5),
            v2.RandAugment(num_ops=2, magnitude=9, interpolation=v2.InterpolationMode.BILINEAR),
            v2.PILToTensor(),
            v2.ToDtype(torch.float, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            v2.ToPureTensor(),
        ]
    )
    return lambda path: chain(_pil(path))


def torchvision_plain(size: int) -> Callable[[Path], torch.Tensor]:
    """The same without RandAugment."""
    from torchvision.transforms import v2

    chain = v2.Compose(
        [
            v2.RandomResizedCrop(size, interpolation=v2.InterpolationMode.BILINEAR, antialias=True),
            v2.RandomHorizontalFlip(0.5),
            v2.PILToTensor(),
            v2.ToDtype(torch.float, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            v2.ToPureTensor(),
        ]
    )
    return lambda path: chain(_pil(path))


def timm_reference(
    size: int, files: Sequence[Path], batch_size: int, workers: int
) -> tuple[Opened, int]:
    """(loader, images it works ahead) of timm's train.py with --aa rand-m9-mstd0.5 and its
    prefetcher: bytes are collated, normalised on the device."""
    from timm.data import create_transform
    from timm.data.loader import fast_collate

    chain = create_transform(
        size,
        is_training=True,
        use_prefetcher=True,
        auto_augment="rand-m9-mstd0.5",
        interpolation="random",
        color_jitter=0.4,
        re_prob=0.0,
    )
    return dataloader(
        files, lambda path: chain(_pil(path)), batch_size, workers, fast_collate
    ), AHEAD * workers * batch_size


def full_size_chain(size: int) -> list[Any]:
    """Albumentations as its documentation suggests: the three groups (two of them, each with
    probability 0.3, of the ops that ftlib's table names, as Albumentations ships them) on the
    whole picture, then crop, flip, colour jitter."""
    import albumentations as A

    geometric = A.OneOf(
        [
            A.Affine(rotate=(-27, 27), p=1),
            A.Affine(shear=(-15, 15), p=1),
            A.Affine(translate_percent=(-0.27, 0.27), p=1),
            A.Affine(scale=(0.73, 1.37), p=1),
            A.Perspective(scale=(0.05, 0.11), p=1),
            A.ElasticTransform(p=1),
        ],
        p=0.3,
    )
    noise = A.OneOf(
        [
            A.GaussNoise(p=1),
            A.MultiplicativeNoise(p=1),
            A.GaussianBlur(p=1),
            A.MotionBlur(p=1),
            A.CoarseDropout(p=1),
        ],
        p=0.3,
    )
    colour = A.OneOf(
        [
            A.RandomBrightnessContrast(p=1),
            A.HueSaturationValue(p=1),
            A.Sharpen(p=1),
            A.RandomGamma(p=1),
            A.Posterize(p=1),
            A.Solarize(p=1),
            A.AutoContrast(p=1),
            A.Equalize(p=1),
        ],
        p=0.3,
    )
    return [
        A.SomeOf([geometric, noise, colour], n=2, replace=False, p=1),
        A.RandomResizedCrop((size, size), scale=(0.08, 1.0), p=1),
        A.HorizontalFlip(p=0.5),
        A.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.2),
    ]


def full_size_albumentations(size: int) -> Callable[[Path], torch.Tensor]:
    """`full_size_chain`, Normalize to float, ToTensorV2."""
    import albumentations as A
    from albumentations.pytorch import ToTensorV2

    chain = A.Compose(
        [*full_size_chain(size), A.Normalize(IMAGENET_MEAN, IMAGENET_STD), ToTensorV2()]
    )
    return lambda path: chain(image=cv2.cvtColor(_cv2(path), cv2.COLOR_BGR2RGB))["image"]


# --- FFCV and DALI: crop, flip, normalise ---


def ffcv(
    files: Sequence[Path], folder: Path, size: int, batch_size: int, workers: int
) -> tuple[Opened, int]:
    """FFCV as in its ImageNet example: pictures of this size, encoded by its own writer at
    quality 90. Its normalisation runs in the same threads."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, ToTensor, ToTorchImage
    from ffcv.writer import DatasetWriter

    stored = folder / "pictures.beton"
    if not stored.exists():
        many = [
            files[i % len(files)] for i in range(max(len(files), 64 * batch_size))
        ]  # each of its epochs starts anew, which few batches would have to pay for
        DatasetWriter(
            str(stored),
            {"image": RGBImageField(write_mode="jpg", jpeg_quality=90), "label": IntField()},
            num_workers=1,
        ).from_indexed_dataset(Files(many, lambda p: np.asarray(_pil(p))))

    @contextlib.contextmanager
    def opened() -> Iterator[Iterator[int]]:
        image = [
            RandomResizedCropRGBImageDecoder((size, size)),
            RandomHorizontalFlip(),
            # Without a GPU, normalization must come before tensors: after them FFCV's compiler
            # does not finish.
            NormalizeImage(np.array(IMAGENET_MEAN) * 255, np.array(IMAGENET_STD) * 255, np.float32),
            ToTensor(),
            ToTorchImage(),
        ]
        loader = Loader(
            str(stored),
            batch_size=batch_size,
            num_workers=workers,
            batches_ahead=3,
            order=OrderOption.RANDOM,
            os_cache=True,
            drop_last=True,
            pipelines={"image": image, "label": [IntDecoder(), ToTensor()]},
        )
        yield (len(batch[0]) for _ in iter(int, 1) for batch in loader)

    return opened, 3 * batch_size


def dali(files: Sequence[Path], size: int, batch_size: int, workers: int) -> tuple[Opened, int]:
    """DALI on the CPU as in NVIDIA's ResNet-50 example."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(
        batch_size=batch_size,
        num_threads=workers,
        device_id=None,
        seed=0,
        prefetch_queue_depth=AHEAD,
    )
    def pipeline() -> Any:
        jpegs, labels = fn.readers.file(
            files=[str(f) for f in files],
            labels=[0] * len(files),
            random_shuffle=True,
            name="files",
        )
        images = fn.decoders.image_random_crop(
            jpegs,
            device="cpu",
            output_type=types.RGB,
            random_aspect_ratio=[0.75, 1.3333],
            random_area=[0.08, 1.0],
        )
        images = fn.resize(
            images, size=[size, size], interp_type=types.INTERP_LINEAR, antialias=False
        )
        images = fn.crop_mirror_normalize(
            images,
            mirror=fn.random.coin_flip(),
            dtype=types.FLOAT,
            output_layout="CHW",
            mean=[m * 255 for m in IMAGENET_MEAN],
            std=[s * 255 for s in IMAGENET_STD],
        )
        return images, labels

    @contextlib.contextmanager
    def opened() -> Iterator[Iterator[int]]:
        built = pipeline()
        built.build()
        yield (len(built.run()[0]) for _ in iter(int, 1))

    return opened, AHEAD * batch_size
