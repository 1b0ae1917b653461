"""Decoding in bounded processes: the package's pixels, and no picture harms the next one.

Holds `ftlib.deploy.decoding` and `decoder_process`.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest

from ftlib import picture
from ftlib.deploy import decoding
from ftlib.deploy.decoding import Decoders, cost, lanes
from ftlib.deploy.errors import RequestError
from ftlib.picture import Header, Preprocessing
from tests.picture_files import REFUSED, TAKEN, file, scene

META = {"size": 32, "short": 40, "background": [10, 200, 30], "depth_bits": 12}
OWN = Path(picture.__file__)
FAKE = """
import os
import numpy as np

class PictureError(ValueError):
    pass

class Preprocessing:
    def __init__(self, meta):
        self.size = meta["size"]

    def __call__(self, data):
        if data == b"never ends":
            while True:
                pass
        if data == b"crashes":
            os.abort()
        if data == b"is huge":
            np.ones(1 << 30)
        return np.full((self.size, self.size, 3), data[0], np.uint8)
"""


def run(
    work: Callable[[Decoders], Awaitable[None]], code: Path = OWN, meta: dict[str, object] = META
) -> None:
    async def main() -> None:
        decoders = Decoders(code, meta, cpus=1)
        try:
            await work(decoders)
        finally:
            await decoders.close()

    asyncio.run(main())


def test_every_kind_of_file_has_the_packages_pixels() -> None:
    async def work(decoders: Decoders) -> None:
        for name, make in TAKEN.items():
            data = make()
            seen = await decoders.decode(data, picture.header(data))
            np.testing.assert_array_equal(seen, Preprocessing(META)(data), err_msg=name)

    run(work)


def test_refused_files_are_explained_as_the_package_does() -> None:
    async def work(decoders: Decoders) -> None:
        for make, _, says in REFUSED.values():
            data = make()
            with pytest.raises(RequestError, match=says) as caught:
                await decoders.decode(data, Header("PNG", (64, 48)))
            assert caught.value.status == 400

    run(work)


@pytest.mark.parametrize(
    ("data", "status"), [(b"never ends", 400), (b"crashes", 400), (b"is huge", 413)]
)
def test_a_harmful_picture_costs_only_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, status: int
) -> None:
    (tmp_path / "picture.py").write_text(FAKE)
    quick = [dataclasses.replace(lane, cpu_seconds=0.3) for lane in lanes(50, 1)]
    monkeypatch.setattr(decoding, "lanes", lambda *_: quick)

    async def work(decoders: Decoders) -> None:
        small = Header("PNG", (64, 48))
        with pytest.raises(RequestError) as caught:
            await decoders.decode(data, small)
        assert caught.value.status == status
        assert (await decoders.decode(b"\x07", small)).tolist() == [[[7] * 3] * 32] * 32

    run(work, tmp_path / "picture.py")


def test_a_sleeping_decoder_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = FAKE.replace("while True:\n                pass", "import time; time.sleep(60)")
    (tmp_path / "picture.py").write_text(code)
    quick = [dataclasses.replace(lane, wall_seconds=0.3) for lane in lanes(50, 1)]
    monkeypatch.setattr(decoding, "lanes", lambda *_: quick)

    async def work(decoders: Decoders) -> None:
        small = Header("PNG", (64, 48))
        with pytest.raises(RequestError, match="took too long") as caught:
            await decoders.decode(b"never ends", small)
        assert caught.value.status == 503
        assert (await decoders.decode(b"\x01", small)).max() == 1

    run(work, tmp_path / "picture.py")


def test_over_the_budget_of_pixels_it_is_refused_at_once() -> None:
    async def work(decoders: Decoders) -> None:
        data, large = file(scene(), "PNG"), Header("PNG", (7000, 7000))
        results = await asyncio.gather(
            *(decoders.decode(data, large) for _ in range(5)), return_exceptions=True
        )
        refused = [r for r in results if isinstance(r, RequestError)]
        assert [r.status for r in refused] == [429] * 3
        assert (await decoders.decode(data, large)).shape == (32, 32, 3)

    run(work)


def test_large_pictures_do_not_wait_before_small_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = FAKE.replace("while True:\n                pass", "import time; time.sleep(60)")
    (tmp_path / "picture.py").write_text(code)

    async def work(decoders: Decoders) -> None:
        large = asyncio.ensure_future(decoders.decode(b"never ends", Header("PNG", (7000, 7000))))
        await asyncio.sleep(0.1)
        assert (await decoders.decode(b"\x01", Header("PNG", (64, 48)))).max() == 1
        assert not large.done()
        large.cancel()
        with pytest.raises(asyncio.CancelledError):
            await large

    run(work, tmp_path / "picture.py")


def test_photos_of_phones_are_cheap_and_huge_pngs_are_not() -> None:
    assert cost(Header("JPEG", (4000, 3000)), 4_000_000, 256) < decoding.FAST_MEGAPIXELS
    assert cost(Header("JPEG", (4000, 3000), True), 4_000_000, 256) > decoding.FAST_MEGAPIXELS
    assert cost(Header("PNG", (7000, 7000)), 142_000, 256) == pytest.approx(49)
    assert cost(Header("HEIF", None), 1000, 256) > 40
