import contextlib
import gc
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from ftlib import config
from ftlib.data import loader
from ftlib.data.augment import EvalTransform, TrainTransform
from ftlib.data.fork_server import LoaderProcessError
from ftlib.data.loader import Batches, LoadError, eval_batches, train_batches
from ftlib.data.sampler import step_plan, steps_per_epoch
from ftlib.data.shards import Dataset
from ftlib.launch.worker import is_final
from ftlib.preparation.prepare import prepare
from ftlib.settings import override

RUN = config.Run(
    seed=7,
    augment=config.Augment(
        size=32, randaugment_n=2, randaugment_m=9, randaugment_p=0.8, erasing_p=0.3
    ),
    train=config.Train(epochs=3, batch_size=8, microbatch_size=4),
)
ROWS = np.arange(1, 20)  # 19 of 20: two steps of two microbatches and one of three images per epoch
STEPS = 3 * 3


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A prepared set of 2 classes, 20 training and 6 validation pictures, cut from photographs."""
    root = tmp_path_factory.mktemp("pictures")
    photos = {"china": load_sample_image("china.jpg"), "flower": load_sample_image("flower.jpg")}
    for split, count in (("train", 10), ("val", 3)):
        for name, photo in photos.items():
            folder = root / "source" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(photo[10 * i : 10 * i + 90, 30 * i : 30 * i + 120 + i]).save(
                    folder / f"{i}.jpg", quality=90
                )
    return prepare(root / "source", root / "set", engine="local", workers=1, progress=False).dataset


@pytest.fixture(scope="module")
def expected(dataset):
    """Every microbatch of the run, made one image after the other without the loader."""
    split, transform = dataset.split("train"), TrainTransform(RUN.augment, RUN.seed)
    return {
        (mb.step, mb.index): (
            mb,
            np.stack([transform(split.image(int(r)), mb.epoch, int(r)) for r in mb.rows]),
            split.labels[mb.rows],
        )
        for step in range(STEPS)
        for mb in step_plan(RUN.seed, step, ROWS, 8, 4)
    }


def same(batch, found):
    mb, images, labels = found
    assert (batch.step, batch.epoch, batch.index, batch.images_in_step) == (
        mb.step,
        mb.epoch,
        mb.index,
        mb.images_in_step,
    )
    assert (
        batch.images.dtype == torch.uint8 and batch.labels.dtype == batch.rows.dtype == torch.int64
    )
    return (
        np.array_equal(batch.rows, mb.rows)
        and np.array_equal(batch.labels, labels)
        and np.array_equal(batch.images, images)
    )


def loader_threads():
    return [t for t in threading.enumerate() if t.name == "ftlib-loader" and t.is_alive()]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_follow_the_plan_for_any_number_of_processes(dataset, expected, workers):
    assert steps_per_epoch(len(ROWS), 8) == 3
    with train_batches(
        dataset, ROWS, RUN, rank=0, world=1, start_step=0, stop_step=STEPS, workers=workers
    ) as batches:
        found = list(batches)
    assert [(b.step, b.index) for b in found] == sorted(expected)
    assert all(same(b, expected[b.step, b.index]) for b in found)


def test_memory_is_reused_but_not_while_a_batch_is_held(dataset, expected):
    """Forty steps in a handful of places; and what is held, however much, keeps its pixels."""
    places = set()
    with train_batches(
        dataset, ROWS, RUN, rank=0, world=1, start_step=0, stop_step=40, workers=1
    ) as batches:
        for batch in batches:
            places.add(batch.images.data_ptr())
    assert len(places) <= 6
    with train_batches(
        dataset, ROWS, RUN, rank=0, world=1, start_step=0, stop_step=STEPS, workers=1
    ) as batches:
        parts = [(b.step, b.index, b.images[1:, ::2]) for b in batches]
    assert all(np.array_equal(part, expected[step, k][1][1:, ::2]) for step, k, part in parts)


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_divide_the_plan_and_a_later_start_gives_the_rest(dataset, expected, workers):
    for rank in range(2):
        with train_batches(
            dataset, ROWS, RUN, rank=rank, world=2, start_step=4, stop_step=STEPS, workers=workers
        ) as batches:
            found = list(batches)
        assert [(b.step, b.index) for b in found] == [
            at for at in sorted(expected) if at[0] >= 4 and at[1] % 2 == rank
        ]
        assert all(same(b, expected[b.step, b.index]) for b in found)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_keeps_the_order_and_adds_no_padding(dataset, workers):
    split, transform = dataset.split("val"), EvalTransform(24, 0.875)
    rows = np.array([5, 0, 3, 1, 4])
    with eval_batches(split, rows, size=24, crop=0.875, batch_size=2, workers=workers) as batches:
        found = list(batches)
    assert [len(b.rows) for b in found] == [2, 2, 1] and [b.index for b in found] == [0, 1, 2]
    assert np.concatenate([b.rows for b in found]).tolist() == rows.tolist()
    assert np.array_equal(np.concatenate([b.labels for b in found]), split.labels[rows])
    assert np.array_equal(
        np.concatenate([b.images for b in found]),
        np.stack([transform(split.image(int(r))) for r in rows]),
    )


def test_an_empty_plan_gives_no_batches(dataset):
    for workers in (0, 1):
        assert (
            list(
                train_batches(
                    dataset, ROWS, RUN, rank=0, world=1, start_step=5, stop_step=5, workers=workers
                )
            )
            == []
        )
        assert (
            list(
                eval_batches(
                    dataset.split("val"),
                    np.array([], np.int64),
                    size=24,
                    crop=1.0,
                    batch_size=2,
                    workers=workers,
                )
            )
            == []
        )


def test_loading_leaves_torchs_random_state_alone(dataset):
    torch.manual_seed(3)
    expected_draw = torch.rand(1)
    for workers in (0, 1):
        torch.manual_seed(3)
        with train_batches(
            dataset, ROWS, RUN, rank=0, world=1, start_step=0, stop_step=2, workers=workers
        ) as batches:
            list(batches)
            assert torch.equal(torch.rand(1), expected_draw)


# --- errors ---------------------------------------------------------------------------------------


@pytest.fixture
def damaged(dataset, tmp_path):
    """The set with a byte of one training picture altered in its shard; and where that is."""
    split = dataset.split("train")
    row = 7
    for file in Path(dataset.path).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shard = tmp_path / split.shards[0].file
    data = bytearray(shard.read_bytes())
    at = data.index(bytes(split.image(row)))
    data[at + 600] ^= 0x55
    shard.write_bytes(data)
    return Dataset.open(str(tmp_path)), row, split.path(row)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_picture_is_an_error_that_names_shard_row_and_file(damaged, workers):
    dataset, row, name = damaged
    with (
        pytest.raises(LoadError) as error,
        train_batches(
            dataset, ROWS, RUN, rank=0, world=1, start_step=0, stop_step=STEPS, workers=workers
        ) as batches,
    ):
        seen = [int(r) for b in batches for r in b.rows]
        assert row not in seen
    for part in ("train-00000.parquet", f"row {row}", name):
        assert part in str(error.value)
    assert "Traceback" not in str(error.value)
    assert list(batches) == []  # closed


def test_an_undecodable_picture_is_an_error_that_says_why(dataset):
    class Broken:
        def image(self, row):
            return b"<html>"

        def where(self, row):
            return f"shard-1, row {row} (a/b.jpg)"

    with pytest.raises(LoadError, match=r"shard-1, row 2 \(a/b\.jpg\): not a JPEG.*restore"):
        next(eval_batches(Broken(), np.array([2]), size=24, crop=1.0, batch_size=2, workers=0))


def test_an_error_in_the_plan_reaches_the_caller(dataset):
    with pytest.raises(LoadError, match="needs at least 2"):
        next(
            train_batches(
                dataset, ROWS[:1], RUN, rank=0, world=1, start_step=0, stop_step=1, workers=0
            )
        )


def test_negative_workers_are_refused(dataset):
    with pytest.raises(ValueError, match="needs 0"):
        train_batches(dataset, ROWS, RUN, rank=0, world=1, start_step=0, stop_step=1, workers=-1)


# --- nothing is left behind -----------------------------------------------------------------------


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    return False


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "still there"
        time.sleep(0.05)


@pytest.mark.parametrize("drop", ["close", "forget", "exhaust"])
def test_processes_end_with_the_iterator(dataset, drop):
    batches = train_batches(
        dataset,
        ROWS,
        RUN,
        rank=0,
        world=1,
        start_step=0,
        stop_step=2 if drop == "exhaust" else 3000,
        workers=2,
    )
    next(batches)
    pids = batches.process_ids
    assert all(map(alive, pids))
    if drop == "close":
        batches.close()
        batches.close()
        assert list(batches) == []
    elif drop == "exhaust":
        list(batches)
    else:
        del batches
        gc.collect()
    wait_until(lambda: not any(map(alive, pids)))


@pytest.mark.parametrize("drop", ["close", "forget", "exhaust"])
def test_the_thread_ends_with_the_iterator(dataset, drop):
    batches = train_batches(
        dataset,
        ROWS,
        RUN,
        rank=0,
        world=1,
        start_step=0,
        stop_step=2 if drop == "exhaust" else 3000,
        workers=0,
    )
    next(batches)
    time.sleep(0.2)  # it is ahead now, and waiting for room
    if drop == "close":
        batches.close()
        batches.close()
        assert list(batches) == []
    elif drop == "exhaust":
        list(batches)
    else:
        del batches
        gc.collect()
    wait_until(lambda: not loader_threads())


@pytest.mark.parametrize("whom", ["one", "all"])
def test_the_same_batches_follow_after_a_process_was_killed(dataset, expected, whom, caplog):
    """And a batch that is held keeps its pixels."""
    with train_batches(
        dataset, ROWS, RUN, rank=0, world=1, start_step=0, stop_step=STEPS, workers=2
    ) as batches:
        found = [next(batches)]
        for pid in batches.process_ids[: 1 if whom == "one" else 2]:
            os.kill(pid, signal.SIGKILL)
        found += batches
    assert [(b.step, b.index) for b in found] == sorted(expected)
    assert all(same(b, expected[b.step, b.index]) for b in found)
    assert re.search(r"died \(killed by SIGKILL\); started again.*loader_workers", caplog.text)


def test_killing_a_process_during_evaluation_changes_nothing(dataset):
    rows, split = np.array([5, 0, 3, 1, 4]), dataset.split("val")
    undisturbed = list(eval_batches(split, rows, size=24, crop=0.875, batch_size=1, workers=0))
    with eval_batches(split, rows, size=24, crop=0.875, batch_size=1, workers=1) as batches:
        found = [next(batches)]
        os.kill(batches.process_ids[0], signal.SIGKILL)
        found += batches
    for ours, theirs in zip(found, undisturbed, strict=True):
        assert torch.equal(ours.images, theirs.images) and torch.equal(ours.rows, theirs.rows)


def test_repeated_deaths_are_an_error_that_max_failures_retries(dataset, monkeypatch):
    monkeypatch.setattr(loader, "RESTARTS", 1)
    with (
        pytest.raises(LoaderProcessError, match=r"as 1 times before .*data\.loader_workers") as e,
        train_batches(
            dataset, ROWS, RUN, rank=0, world=1, start_step=0, stop_step=3000, workers=1
        ) as batches,
    ):
        for _ in batches:
            os.kill(batches.process_ids[0], signal.SIGKILL)
    assert not isinstance(e.value, ValueError) and not is_final(e.value)
    assert is_final(LoadError("damaged"))


def test_a_shard_truncated_while_it_is_mapped_is_named(dataset, tmp_path, capfd):
    """Reading it ends the process by SIGBUS."""
    for file in Path(dataset.path).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shard = tmp_path / dataset.split("train").shards[0].file
    with (
        pytest.raises(LoadError) as error,
        train_batches(
            Dataset.open(str(tmp_path)),
            ROWS,
            RUN,
            rank=0,
            world=1,
            start_step=0,
            stop_step=40,
            workers=1,
        ) as batches,
    ):
        next(batches)
        os.truncate(shard, 0)
        list(batches)
    for part in ("SIGBUS", shard.name, "has 0 bytes, the manifest says", "Restore the file"):
        assert part in str(error.value)
    assert "shared memory" not in capfd.readouterr().err  # torch's guess at the cause


def test_a_bus_error_without_damage_is_survived_and_explained(dataset, expected, caplog):
    with train_batches(
        dataset, ROWS, RUN, rank=0, world=1, start_step=0, stop_step=STEPS, workers=1
    ) as batches:
        found = [next(batches)]
        os.kill(batches.process_ids[0], signal.SIGBUS)
        found += batches
    assert all(same(b, expected[b.step, b.index]) for b in found) and len(found) == len(expected)
    assert re.search(r"SIGBUS.*check the disk or the network file system", caplog.text)


def test_a_killed_training_process_leaves_no_loader_process(dataset, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent("""
        import sys, time
        import numpy as np
        from ftlib import config
        from ftlib.data.loader import train_batches
        from ftlib.data.shards import Dataset

        open(sys.argv[2], "a").write("imported\\n")
        if __name__ == "__main__":
            train = config.Train(epochs=9, batch_size=8, microbatch_size=4)
            run = config.Run(augment=config.Augment(size=32), train=train)
            dataset, share = Dataset.open(sys.argv[1]), {"rank": 0, "world": 1}
            steps = {"start_step": 0, "stop_step": 3000}
            batches = train_batches(dataset, np.arange(20), run, **share, **steps, workers=2)
            next(batches)
            print(*batches.process_ids, flush=True)
            time.sleep(60)
    """)
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    imported = tmp_path / "imported"
    training = subprocess.Popen(
        [sys.executable, str(script), dataset.path, str(imported)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    try:
        pids = [int(p) for p in training.stdout.readline().split()]
        assert len(pids) == 2 and all(map(alive, pids))
    finally:
        training.kill()
        training.wait()
        training.stdout.close()
    wait_until(lambda: not any(map(alive, pids)), 10)
    assert (
        imported.read_text() == "imported\n"
    )  # loader processes did not run the main module again


def test_batches_that_never_started_can_be_dropped():
    with pytest.raises(ValueError):
        Batches(None, [], 1, -1)


def test_wrong_settings_are_refused_before_processes_start(dataset):
    with pytest.raises(ValueError, match="no op sheer_x"):
        train_batches(
            dataset,
            ROWS,
            override(RUN, {"augment.randaugment_ops": ("sheer_x",)}),
            rank=0,
            world=1,
            start_step=0,
            stop_step=1,
            workers=2,
        )
