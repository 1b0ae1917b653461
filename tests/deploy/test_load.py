"""Load tests: hostile clients get refusals, good ones get answers, and memory comes back.

Also `ftlib.benchmark.http_load` and `ftlib.benchmark.serving`, which the tests drive. Times are
measured by `jobs/benchmark.py --what serve` and asserted nowhere.
"""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from ftlib import picture
from ftlib.benchmark.http_load import large_png, many_pages, photo, truncated_photo
from ftlib.benchmark.measure import Cost
from ftlib.benchmark.serving import (
    ALONE,
    HOSTILE,
    Load,
    ServedModel,
    make_package,
    ratios,
    served,
)
from ftlib.picture import PictureError


def test_the_bodies_are_what_they_are_meant_to_be() -> None:
    with Image.open(io.BytesIO(photo())) as image:
        image.load()
        assert image.size == (500, 375)
    with pytest.raises(PictureError, match="end is missing"):
        picture.header(truncated_photo())
    large = large_png(700)
    assert picture.header(large).size == (700, 700) and len(large) < 20_000
    with Image.open(io.BytesIO(large)) as image:
        image.load()
    with Image.open(io.BytesIO(many_pages(50))) as image:
        assert image.size == (8, 8) and image.n_frames == 50
    with pytest.raises(PictureError, match="more than one frame or page"):
        picture.header(many_pages())


def test_ratios_compare_within_a_round() -> None:
    busy, quiet, beside = (
        Load(Cost(0.003, wall), 0.1, p99, {})
        for wall, p99 in ((0.004, 0.2), (0.010, 0.1), (0.012, 0.25))
    )
    found = ratios({ALONE: [Cost(0.002, 0.002)]}, [busy], {"beside large": [(quiet, beside)]})
    assert [round(r.median, 3) for r in found] == [1.5, 2.0, 1.2, 2.5]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("load")
    with served(make_package(folder, "resnet18", 64), folder / "server.log") as made:
        yield made


@pytest.mark.slow
def test_hostile_clients_are_refused_and_good_ones_are_all_answered(server: ServedModel) -> None:
    server.load(5, good=8)
    before = server.memory()
    found = server.load(20, good=8, **HOSTILE)
    after = server.load(5, good=8)
    assert set(found.statuses["good"]) == {"200"}
    assert set(found.statuses["pages"]) == set(found.statuses["truncated"]) == {"400"}
    assert "429" in found.statuses["large"] and set(found.statuses["large"]) <= {"200", "429"}
    assert found.statuses["idle"] == {} and set(found.statuses["slow"]) <= {"408"}
    assert set(after.statuses["good"]) == {"200"}
    assert server.memory() < before + 200, "what large pictures took came back"


@pytest.mark.slow
def test_memory_is_flat_over_thousands_of_requests(server: ServedModel) -> None:
    server.load(15, good=16)
    before = server.memory()
    found = server.load(60, good=16)
    assert found.statuses["good"]["200"] > 1000
    assert server.memory() < before + 50
    assert Path(f"/proc/{server.process.pid}/fd").exists()
    assert server.process.num_fds() < 100, "connections are closed"
