"""From folders to a set, whole: results, refusals, kills, full disks and bad storage.

Holds the tests of `prepare`, `executor`, `shard_task` and `report`; sources have their own.

Modules: prepare, executor, shard_task, shard_writer, report.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs
import pytest
import simplejpeg
from PIL import Image

from ftlib import storage
from ftlib.data.shards import DataError, Dataset
from ftlib.preparation import executor, sandbox, shard_task
from ftlib.preparation import prepare as preparing
from ftlib.preparation.options import PrepareOptions
from ftlib.preparation.prepare import prepare
from ftlib.preparation.report import next_steps
from ftlib.preparation.sandbox import DecoderSandbox
from tests.failing_writes import FailingWrites, whole

ROOT = Path(__file__).resolve().parents[2]


def jpeg(seed: int) -> bytes:
    return simplejpeg.encode_jpeg(
        np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8),
        quality=90,
        colorspace="RGB",
    )


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """2 classes, 30 + 6 pictures each."""
    for split, each in (("train", 30), ("val", 6)):
        for label, name in enumerate(("ant", "bee")):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            for i in range(each):
                (folder / f"{i:02d}.jpg").write_bytes(
                    jpeg(1000 * label + i + (500 if split == "val" else 0))
                )
    return tmp_path / "pictures"


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_task, "ROWS_PER_SHARD", 10)


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Name -> (inode, mtime), of the shards."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.glob("*.parquet")}


def test_what_comes_out(
    pictures: Path, tmp_path: Path, small_shards: None, capsys: pytest.CaptureFixture[str]
) -> None:
    done = prepare(pictures, tmp_path / "set")
    manifest = done.dataset.manifest
    assert (
        not done.already_done
        and manifest["schema"] == 1
        and manifest["classes"] == ["ant", "bee"]
        and manifest["name"] == "set"
    )
    assert manifest["splits"]["train"]["per_class"] == [30, 30] and manifest["splits"]["val"][
        "per_class"
    ] == [6, 6]
    assert [s["rows"] for s in manifest["splits"]["train"]["shards"]] == [10] * 6
    assert (
        manifest["made"]["rules"]["max_megapixels"] == 50
        and "simplejpeg" in manifest["made"]["versions"]
    )
    assert manifest["report"]["files"] == 72 and manifest["report"]["refused"] == 0
    everything = (
        np.concatenate(
            [
                simplejpeg.decode_jpeg(done.dataset.split("train").image(i)).reshape(-1, 3)
                for i in range(60)
            ]
        )
        / 255
    )
    np.testing.assert_allclose(manifest["statistics"]["mean"], everything.mean(axis=0), atol=1e-3)
    np.testing.assert_allclose(manifest["statistics"]["std"], everything.std(axis=0), atol=1e-3)
    assert manifest["statistics"]["width"] == {
        "min": 16,
        "p5": 16,
        "median": 16,
        "p95": 16,
        "max": 16,
    }
    done.dataset.verify(deep=True)
    left = {p.name for p in (tmp_path / "set").iterdir()} - set(files(tmp_path / "set"))
    assert left == {
        ".lock",
        "manifest.json",
        "report.json",
        "report.csv",
        "train.index.npy",
        "val.index.npy",
    }
    assert re.search(r"preparing pictures: 72 of 72 files, [\d,]+ files/s", capsys.readouterr().err)


def test_the_digest_is_of_the_contents(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(pictures, tmp_path / "one", progress=False).dataset.digest
    shutil.copytree(pictures, tmp_path / "moved")  # another place, another time
    os.utime(tmp_path / "moved" / "train" / "ant" / "00.jpg")
    assert prepare(tmp_path / "moved", tmp_path / "two", progress=False).dataset.digest == first
    (tmp_path / "moved" / "train" / "ant" / "00.jpg").write_bytes(jpeg(77))
    assert prepare(tmp_path / "moved", tmp_path / "three", progress=False).dataset.digest != first
    os.rename(tmp_path / "moved" / "train" / "ant", tmp_path / "moved" / "train" / "gnat")
    os.rename(tmp_path / "moved" / "val" / "ant", tmp_path / "moved" / "val" / "gnat")
    assert (
        prepare(tmp_path / "moved", tmp_path / "four", progress=False).dataset.digest
        != prepare(
            tmp_path / "moved", tmp_path / "five", rules=PrepareOptions(quality=50), progress=False
        ).dataset.digest
    )


def test_again_is_nothing_to_do_and_other_inputs_are_refused(
    pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "set"
    first = prepare(pictures, out, progress=False)
    before = files(out)
    again = prepare(pictures, out, progress=False)
    assert (
        again.already_done
        and files(out) == before
        and again.dataset.digest == first.dataset.digest
        and again.report["files"] == 72
    )
    (pictures / "train" / "ant" / "new.jpg").write_bytes(jpeg(9))
    with pytest.raises(
        DataError, match=r"made from other files or with other options.*--overwrite"
    ):
        prepare(pictures, out, progress=False)
    with pytest.raises(DataError, match=r"--overwrite"):
        prepare(pictures, out, rules=PrepareOptions(quality=80), progress=False)
    assert files(out) == before
    new = prepare(pictures, out, overwrite=True, progress=False)
    assert not new.already_done and len(new.dataset.split("train")) == 61


def test_overwrite_repairs_a_damaged_set_and_removes_old_shards(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "set"
    with monkeypatch.context() as patch:
        patch.setattr(shard_task, "ROWS_PER_SHARD", 10)
        prepare(pictures, out, progress=False)
    (out / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"not valid JSON.*--overwrite"):
        prepare(pictures, out, progress=False)
    prepare(pictures, out, overwrite=True, progress=False)
    assert set(files(out)) == {"train-00000.parquet", "val-00000.parquet"}


# --- refusals and repairs ---


def spoil(pictures: Path) -> None:
    good = (pictures / "train" / "ant" / "00.jpg").read_bytes()
    (pictures / "train" / "ant" / "01.jpg").write_bytes(good[: len(good) // 2])
    (pictures / "train" / "bee" / "02.jpg").write_bytes(b"<html>404</html>")
    buffer = io.BytesIO()
    Image.new("RGBA", (20, 20), (255, 0, 255, 0)).save(buffer, "PNG")
    (pictures / "train" / "bee" / "03.jpg").write_bytes(buffer.getvalue())
    os.symlink("/etc/hostname", pictures / "val" / "bee" / "host.jpg")


def test_the_report_names_every_refused_and_repaired_file(pictures: Path, tmp_path: Path) -> None:
    spoil(pictures)
    done = prepare(
        pictures,
        tmp_path / "set",
        max_bad_fraction=0.1,
        rules=PrepareOptions(background=(0, 0, 255)),
        progress=False,
    )
    report = json.loads((tmp_path / "set" / "report.json").read_text())
    assert report == done.report
    assert report["refused"] == 3 and report["refused_by_reason"] == {
        "link": 1,
        "damaged": 1,
        "not_a_picture": 1,
    }
    assert {r["file"]: r["reason"] for r in report["refused_files"]} == {
        "val/bee/host.jpg": "link",
        "train/ant/01.jpg": "damaged",
        "train/bee/02.jpg": "not_a_picture",
    }
    assert report["repaired_files"] == [
        {
            "file": "train/bee/03.jpg",
            "split": "train",
            "class": "bee",
            "repairs": "wrong_extension from_png alpha",
        }
    ]
    rows = list(csv.DictReader((tmp_path / "set" / "report.csv").read_text().splitlines()))
    assert [row["action"] for row in rows] == ["refused"] * 3 + ["repaired"]
    assert "transparent pixels laid over the background color" in rows[-1]["detail"]
    train = done.dataset.split("train")
    assert len(train) == 58 and done.dataset.manifest["splits"]["train"]["per_class"] == [29, 29]
    row = [train.path(i) for i in range(58)].index("train/bee/03.jpg")
    np.testing.assert_allclose(
        simplejpeg.decode_jpeg(train.image(row))[10, 10], (0, 0, 255), atol=4
    )


def test_too_many_bad_files_stop_it_and_the_work_is_kept(pictures: Path, tmp_path: Path) -> None:
    spoil(pictures)
    with pytest.raises(
        DataError,
        match=r"3 of 73 files were refused \(4.11 %\), more than --max-bad-fraction 0.01.*"
        r"val/bee/host.jpg.*report.csv.*raise --max-bad-fraction",
    ):
        prepare(pictures, tmp_path / "set", progress=False)
    assert "not_a_picture" in (tmp_path / "set" / "report.csv").read_text()
    before = files(tmp_path / "set")
    prepare(pictures, tmp_path / "set", max_bad_fraction=0.05, progress=False)
    assert files(tmp_path / "set") == before


def test_a_class_with_nothing_usable_is_an_error_whatever_is_allowed(
    pictures: Path, tmp_path: Path
) -> None:
    for file in (pictures / "train" / "bee").iterdir():
        file.write_bytes(b"")
    with pytest.raises(
        DataError, match=r"no usable training picture is left of 1 of 2 classes \(bee\).*no bytes"
    ):
        prepare(pictures, tmp_path / "set", max_bad_fraction=0.9, progress=False)
    assert not (tmp_path / "set" / "manifest.json").exists()


def test_val_pictures_that_are_also_in_train_are_noticed(pictures: Path, tmp_path: Path) -> None:
    shutil.copy(pictures / "train" / "ant" / "05.jpg", pictures / "val" / "ant" / "leak.jpg")
    shutil.copy(pictures / "train" / "ant" / "06.jpg", pictures / "train" / "bee" / "wrong.jpg")
    done = prepare(pictures, tmp_path / "set", progress=False)
    assert (
        done.report["identical"]["in_train_and_val"] == 1
        and done.report["identical"]["under_two_labels"] == 1
    )
    leak, wrong = done.report["warnings"]
    assert leak.startswith(
        "1 picture of val also in train, byte for byte (first: train/ant/05.jpg = val/ant/leak.jpg)"
    )
    assert "in two classes" in wrong and "train/ant/06.jpg = train/bee/wrong.jpg" in wrong


def test_a_set_without_val(pictures: Path, tmp_path: Path) -> None:
    done = prepare(pictures / "train", tmp_path / "set", val_fraction=0, progress=False)
    assert (
        len(done.dataset.split("val")) == 0
        and done.dataset.split("val").labels.shape == (0,)
        and done.dataset.split("val").sizes.shape == (0, 2)
    )
    assert "no validation pictures" in done.report["warnings"][0]


def test_names_of_all_kinds(tmp_path: Path) -> None:
    root = tmp_path / "odd"
    for name in ("a b", "ünï #1%?", "日本"):
        (root / name).mkdir(parents=True)
        for i in range(2):
            (root / name / f"p '{i}' ß.jpg").write_bytes(jpeg(i + 7 * len(name)))
    with open(os.path.join(os.fsencode(root), b"a b", b"\xff\xfe.jpg"), "wb") as f:
        f.write(jpeg(99))
    done = prepare(root, tmp_path / "set", val_fraction=0, progress=False)
    assert (
        done.dataset.classes == ("a b", "ünï #1%?", "日本")
        and len(done.dataset.split("train")) == 7
    )
    assert "a b/\ufffd\ufffd.jpg" in [done.dataset.split("train").path(i) for i in range(7)]


# --- kills, full disks, bad storage ---

KILLED_AFTER = """
import os, sys
sys.path.insert(0, {root!r})
from ftlib.preparation import executor, shard_task
shard_task.ROWS_PER_SHARD = 10
seen = 0
original = executor.build
def build(task, sandbox, tick, stopped):
    def counted(n):
        global seen
        seen += n
        if seen >= {after}:
            os.kill(os.getpid(), 9)
        tick(n)
    return original(task, sandbox, counted, stopped)
executor.build = build
from ftlib.preparation.prepare import prepare
prepare({source!r}, {out!r}, workers=1, engine="local", progress=False)
"""


def test_killed_it_goes_on_where_it_stopped(
    pictures: Path, tmp_path: Path, small_shards: None
) -> None:
    undisturbed = prepare(pictures, tmp_path / "undisturbed", progress=False).dataset
    out = tmp_path / "set"
    kept: dict[str, tuple[int, int]] = {}
    for after in (25, 48):
        code = KILLED_AFTER.format(root=str(ROOT), after=after, source=str(pictures), out=str(out))
        assert (
            subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
        )
        with pytest.raises(DataError, match=r"not prepared to the end"):
            Dataset.open(str(out))
        now = files(out)
        assert len(now) == after // 10 and kept.items() <= now.items()
        kept = now
    (out / "train-00001.parquet").write_bytes(
        (out / "train-00001.parquet").read_bytes()[:-1] + b"!"
    )  # and a finished one is altered
    done = prepare(pictures, out, progress=False)
    assert done.dataset.digest == undisturbed.digest
    done.dataset.verify(deep=True)
    after_all = files(out)
    assert {name for name in kept if after_all[name] == kept[name]} == set(kept) - {
        "train-00001.parquet"
    }
    assert not list(out.glob(".tmp-*")) and not (out / ".parts").exists()


def test_a_full_disk_is_a_clear_error_and_nothing_is_lost(
    pictures: Path, tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in (
        pictures / "train" / "bee"
    ).iterdir():  # the later shards are larger than the limit, the earlier ones are not
        file.write_bytes(
            simplejpeg.encode_jpeg(
                np.random.default_rng(3).integers(0, 256, (80, 80, 3), dtype=np.uint8),
                quality=98,
                colorspace="RGB",
            )
        )
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    try:
        with pytest.raises(
            DataError,
            match=r"cannot write .*set: files may not grow that large.*choose another --out. "
            r"What is finished is kept",
        ):
            prepare(pictures, tmp_path / "set", workers=1, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    kept = files(tmp_path / "set")
    assert len(kept) == 3 and not list((tmp_path / "set").glob(".tmp-*"))
    assert (
        kept.items()
        <= (prepare(pictures, tmp_path / "set", progress=False) and files(tmp_path / "set")).items()
    )


class InThisProcess(DecoderSandbox):
    """Decodes here: starting a process for each of a hundred preparations takes too long."""

    def _ask(self, what: str, file: str | bytes, name: str) -> Any:
        answer = sandbox._answer(self._rules, what, file, name)
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.mark.parametrize("length", [1, 6], ids=["once", "for a while"])
def test_every_write_rename_and_sync_may_fail(
    tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    """Each fails in turn: an error says so, and nothing half-made is read as a set. The same
    command then makes the set that it would have made, byte for byte."""
    monkeypatch.setattr(executor, "DecoderSandbox", InThisProcess)
    source = tmp_path / "pictures"
    for i, place in enumerate(("train/ant", "train/bee", "val/ant", "val/bee")):
        (source / place).mkdir(parents=True)
        (source / place / "00.jpg").write_bytes(jpeg(i))
    spoil(source)
    faults = FailingWrites(monkeypatch)

    def prepared(out: Path) -> dict[str, bytes]:
        done = prepare(source, out, workers=1, progress=False, max_bad_fraction=0.9)
        done.dataset.verify(deep=True)
        manifest = json.loads((out / "manifest.json").read_text())
        del manifest["made"]["at"], manifest["checksum"], manifest["name"]
        found = whole(out, but=("manifest.json", ".lock", ".parts"))
        return found | {"manifest.json": json.dumps(manifest).encode()}

    expected = prepared(tmp_path / "undisturbed")
    writes = faults.count
    assert writes > 30 and "report.csv" in expected
    for first in range(writes):
        out = tmp_path / f"set-{first}"
        faults.count = 0
        faults.wanted = lambda number, path, k=first: k <= number < k + length
        try:
            prepare(source, out, workers=1, progress=False, max_bad_fraction=0.9)
        except DataError as error:
            assert "cannot write" in str(error) and "the disk is full" in str(error), first
            if (out / "manifest.json").exists():  # only the last sync has failed
                Dataset.open(str(out)).verify(deep=True)
            else:
                with pytest.raises(DataError, match="not prepared to the end|no manifest.json"):
                    Dataset.open(str(out))
        faults.wanted = lambda number, path: False
        assert prepared(out) == expected, f"write {first} of {writes} failed"


def test_no_room_is_said_before_anything_is_decoded(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        preparing.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000)
    )
    with pytest.raises(DataError, match=r"about 0.0 GB are needed and 0.0 GB are free"):
        prepare(pictures, tmp_path / "set", progress=False)
    assert not files(tmp_path / "set")


def test_storage_that_cannot_be_written(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match=r"cannot write .*a part of the path is a file"):
        prepare(pictures, tmp_path / "file" / "set", progress=False)
    with pytest.raises(DataError, match=r"cannot write /proc/set"):
        prepare(pictures, "/proc/set", progress=False)


def test_out_must_be_its_own_folder(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds the source pictures"):
        prepare(pictures, tmp_path, progress=False)
    with pytest.raises(DataError, match=r"lies within the source folder"):
        prepare(pictures, pictures / "train" / "set", progress=False)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.tex").write_text("x")
    with pytest.raises(DataError, match=r"is not empty and holds no prepared set .thesis.tex"):
        prepare(pictures, tmp_path / "used", progress=False)


def test_two_at_once_are_kept_apart(pictures: Path, tmp_path: Path) -> None:
    with (
        preparing._writing(str(tmp_path / "set")),
        pytest.raises(DataError, match=r"another process is preparing"),
    ):
        prepare(pictures, tmp_path / "set", progress=False)


def test_a_file_that_cannot_be_read_stops_it(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def vanish(*arguments: object) -> list[dict[str, object]]:
        (pictures / "train" / "bee" / "07.jpg").unlink()
        return real(*arguments)  # type: ignore[arg-type]

    real = executor.run
    monkeypatch.setattr(executor, "run", vanish)
    with pytest.raises(
        DataError, match=r"train/bee/07.jpg cannot be read .No such file.*goes on where it stopped"
    ):
        prepare(pictures, tmp_path / "set", progress=False)


def test_remote_storage(
    pictures: Path, tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bucket").mkdir()
    remote = pyarrow.fs.SubTreeFileSystem(str(tmp_path / "bucket"), pyarrow.fs.LocalFileSystem())
    monkeypatch.setattr(
        storage, "filesystem", lambda uri: (remote, uri.removeprefix("s3://bucket/"))
    )
    spoil(pictures)
    done = prepare(pictures, "s3://bucket/sets/one", max_bad_fraction=0.1, progress=False)
    assert (
        done.dataset.digest
        == prepare(
            pictures, tmp_path / "local", max_bad_fraction=0.1, progress=False
        ).dataset.digest
    )
    done.dataset.verify(deep=True)
    assert not (tmp_path / "bucket" / "sets" / "one" / ".parts").exists()
    assert prepare(pictures, "s3://bucket/sets/one", progress=False).already_done
    assert (
        prepare(
            pictures, "s3://bucket/sets/one", overwrite=True, max_bad_fraction=0.1, progress=False
        ).dataset.digest
        == done.dataset.digest
    )


# --- the built-in sample, Ray, the command ---


def test_digits(home: Path) -> None:
    done = prepare("digits", progress=False)
    assert done.path == str(home / "data" / "digits")
    assert len(done.dataset.split("train")) == 1078 and len(done.dataset.split("val")) == 719
    assert done.report["refused"] == done.report["repaired"] == 0
    assert prepare("digits", progress=False).already_done
    for file in (home / "sources" / "digits").rglob("*.jpg"):
        os.utime(file, (1, 1))  # as in a copied home
    assert prepare("digits", progress=False).already_done
    with pytest.raises(DataError, match="with other options"):
        prepare("digits", rules=PrepareOptions(quality=50), progress=False)


def test_ray_tasks_make_the_same_set(
    pictures: Path, tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray")
    spoil(pictures)
    here = prepare(pictures, tmp_path / "here", max_bad_fraction=0.1, progress=False).dataset
    folder = tempfile.mkdtemp(prefix="ftlib-ray-", dir="/tmp")
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        object_store_memory=80 << 20,
        _temp_dir=folder,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    )
    try:
        there = prepare(
            pictures, tmp_path / "there", max_bad_fraction=0.1, engine="ray", progress=False
        ).dataset
        elsewhere = shard_task.ShardTask(
            "train-00000", str(tmp_path / "gone"), str(tmp_path / "x"), ("a",), (), PrepareOptions()
        )
        with pytest.raises(
            DataError, match=r"is not there on node .*storage that all of them share"
        ):
            executor.run([elsewhere], "ray", 0, lambda n: None)
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
    assert there.digest == here.digest and there.manifest["splits"] == here.manifest["splits"]


def test_ray_is_taken_only_on_request_or_where_a_cluster_is_named(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert executor.choose("auto") == "local" and executor.choose("ray") == "ray"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert executor.choose("auto") == "ray" and executor.choose("local") == "local"
    with pytest.raises(DataError, match=r"--engine spark: needs to be one of auto, local, ray"):
        prepare(pictures, tmp_path / "set", engine="spark")
    with pytest.raises(DataError, match=r"has not connected to Ray.*--engine local"):
        prepare(pictures, tmp_path / "set", engine="ray", progress=False)


def job(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "prepare.py"), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("pictures_in_train", "commands"),
    [
        (300, ["probe.py pets", "finetune.py --data.path pets"]),
        (1_281_167, ["phase1.py --data.path pets"]),
    ],
)
def test_the_next_commands_fit_the_size_of_the_set(
    home: Path, pictures_in_train: int, commands: list[str]
) -> None:
    class FakeSet:
        def split(self, name: str) -> range:
            return range(pictures_in_train)

    lines = next_steps(str(home / "data" / "pets"), FakeSet())  # type: ignore[arg-type]
    assert [line.partition("jobs/")[2] for line in lines] == commands
    elsewhere = next_steps("/mnt/my sets/pets", FakeSet())  # type: ignore[arg-type]
    assert "'/mnt/my sets/pets'" in elsewhere[0]


def test_names_that_would_be_formulas_are_quoted_in_the_table(
    pictures: Path, tmp_path: Path
) -> None:
    (pictures / "train" / "ant" / "x.jpg").write_bytes(b"")
    (pictures / "train" / "ant").rename(pictures / "train" / "=cmd()")
    (pictures / "val" / "ant").rename(pictures / "val" / "=cmd()")
    prepare(pictures, tmp_path / "set", max_bad_fraction=0.1, progress=False)
    row = (tmp_path / "set" / "report.csv").read_text().splitlines()[1]
    assert row.startswith("refused,train/=cmd()/x.jpg,train,'=cmd(),empty_file,")


def test_the_command(pictures: Path, tmp_path: Path) -> None:
    shown = job("--source", "pictures", "--out", str(tmp_path / "set"), cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "60 training and 12 validation pictures of 2 classes (30 each in train)" in shown.stdout
    assert "refused 0 of 72 files" in shown.stdout
    first, second = shown.stdout.splitlines()[-2:]
    assert first.startswith("Next: ") and first.endswith(f"jobs/probe.py {tmp_path / 'set'}")
    assert second.endswith(f"jobs/finetune.py --data.path {tmp_path / 'set'}")
    assert (
        "Already prepared"
        in job("--source", "pictures", "--out", str(tmp_path / "set"), cwd=tmp_path).stdout
    )
    assert (
        "every file has the size and sha256"
        in job("--verify", str(tmp_path / "set"), cwd=tmp_path).stdout
    )
    look = job("--source", "pictures", "--dry-run", "--out", "looked", cwd=tmp_path)
    assert look.returncode == 0 and not (tmp_path / "looked").exists()
    assert "train 60 pictures (train/)" in look.stdout and "Nothing was written" in look.stdout
    wrong = job("--source", "pictures/train", cwd=tmp_path)
    assert (
        wrong.returncode == 2
        and wrong.stderr.startswith("error: ")
        and "Traceback" not in wrong.stderr
    )
    assert "background" in job("--source", "digits", "--background", "1,2,900", cwd=tmp_path).stderr
