"""launch(run) in local mode, from a recipe to a finished run, and what is refused before it.

Holds the tests of launch, prepared_run, active_run, outcome, finalize, preflight and summary.
"""

import dataclasses
import json
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest

from ftlib.config import Gates, Model
from ftlib.data.shards import DataError, Dataset
from ftlib.launch import finalize, lease, preflight
from ftlib.launch.errors import LaunchError, LeaseLostError, RunFailedError, StoppedError
from ftlib.launch.launch import launch, prepare_run
from ftlib.preparation.prepare import prepare
from ftlib.report import evaluation
from ftlib.settings import ConfigError, override
from ftlib.storage import StorageError
from ftlib.training import seen_rows
from ftlib.training.initial_weights import load_run_model
from tests.columns import too_wide


def once(send):
    """A report hook that sends this process a signal at the first epoch only.

    A run that is stopping reports once more.
    """
    sent = []

    def hook(metrics):
        if not sent:
            sent.append(os.kill(os.getpid(), send))

    return hook


class Recorder:
    """Stands for tracking: keeps what it is told."""

    run_id, experiment_id, url, uri = "id", "1", "http://x", "uri"

    def __init__(self):
        self.metrics_seen, self.tag_values, self.outcomes, self.started, self.texts, self.files = (
            [],
            {},
            [],
            [],
            {},
            [],
        )

    def start_run(self, name, **settings):
        self.started.append((name, settings))
        return self

    def writer(self):
        return self

    charts_url = "http://x/charts"
    opened_by = ""

    def view_url(self, view):
        return f"http://x/{view.key}"

    def artifact_link(self, path):
        return f"http://x/{path}"

    def finish(self, outcome="completed", note=None):
        self.outcomes.append((outcome, note))

    def metrics(self, values, step, timestamp_ms=None):
        self.metrics_seen.append((step, dict(values)))

    def tags(self, values):
        self.tag_values |= values

    def json(self, value, file):
        self.texts[file] = value

    def artifact(self, path, folder=""):
        self.files.append((Path(path).name, folder))

    def image(self, image, key, step): ...

    def dataset(self, *about): ...

    def put(self, record): ...


@pytest.fixture
def tracking():
    return Recorder()


def run_it(run, tracking, **more):
    return launch(run, local=True, tracking=tracking, quiet=True, **more)


def test_from_recipe_to_result_and_the_next_phase(tiny, tracking, home, capsys):
    first = launch(
        dataclasses.replace(tiny, gates=Gates(val_top1=10.0)), local=True, tracking=tracking
    )
    said = capsys.readouterr().out
    assert not too_wide(said)
    folder = home / "runs" / first.name
    assert (
        first.status == "completed"
        and first.run_dir == str(folder)
        and first.name.startswith("phase1-prepared-")
    )
    assert sorted(p.name for p in folder.iterdir()) == [
        "best",
        "checkpoints",
        "report",
        "result.json",
        "run.json",
        "seen_rows.json",
    ]

    result, record = (
        json.loads((folder / "result.json").read_text()),
        json.loads((folder / "run.json").read_text()),
    )
    assert (
        result["status"] == "completed"
        and result["epochs"] == 3
        and result["step"] == 6
        and result["metrics"] == first.metrics
    )
    assert (folder / result["best"] / "model.safetensors").is_file() and str(
        folder / result["best"]
    ) == first.best_dir
    assert result["gates"] == {
        "passed": True,
        "gates": [
            {
                "name": "val_top1",
                "wanted": 10.0,
                "got": first.metrics["best/val_top1"],
                "passed": True,
            }
        ],
    }
    assert (
        record["data"]["classes"] == ["left", "right"]
        and record["mlflow"] == {"uri": "uri", "experiment_id": "1", "run_id": "id"}
        and record["launches"] == 1
    )
    seen = seen_rows.of_run(str(folder), str(home / "runs"))
    assert seen.runs == (first.name,)
    images = seen.count(record["data"]["digest"])
    assert images and record["seen"] == {"images": images, "digest": seen.digest}
    assert load_run_model(str(folder)).classes == ("left", "right")

    assert (
        [o for o, _ in tracking.outcomes] == ["completed"]
        and tracking.tag_values["gates"] == "passed"
        and "gates.json" in tracking.texts
    )
    assert (
        tracking.metrics_seen[-1] == (0, first.metrics)
        and tracking.texts["run.json"]["seed"] == 42
        and ("curves.png", "figures") in tracking.files
    )
    assert {"stage": "phase1", "kind": "train", "run_name": first.name}.items() <= tracking.started[
        0
    ][1]["tags"].items()
    assert (
        "finished in" in said
        and "passed  best validation top-1 at least 10" in said
        and first.best_dir in said
    )

    again = launch(
        dataclasses.replace(tiny, gates=Gates(val_top1=10.0)), local=True, tracking=tracking
    )
    assert (
        again.status == "finished"
        and again.metrics == first.metrics
        and again.best_dir == first.best_dir
    )
    assert "is finished already" in capsys.readouterr().out and len(tracking.started) == 1

    second = run_it(
        override(tiny, {"stage": "phase2", "model.init_from": "phase1", "gates.gain": -50.0}),
        tracking,
    )
    assert second.start_top1 == first.metrics["best/val_top1"] and second.name.startswith("phase2-")
    assert (
        json.loads((Path(second.run_dir) / "run.json").read_text())["init"]["about"]["run"]
        == first.name
    )
    assert ("phases.png", "figures") in tracking.files and tracking.metrics_seen[-1][1][
        "best/gain"
    ] == second.metrics["best/val_top1"] - second.start_top1


def test_the_test_split_is_scored_once_by_the_final_model(tiny, tracking, shapes_with_test, capsys):
    run = override(tiny, {"data.path": shapes_with_test, "track.log_model": True})
    first = launch(run, local=True, tracking=tracking)
    assert first.test.images == 16 and first.test.scores["top1"].value < 70
    shown = f"test split  top-1 {first.test.scores['top1'].show()} %"
    assert shown in capsys.readouterr().out
    logged = {key: v for _, values in tracking.metrics_seen for key, v in values.items()}
    assert {k: v for k, v in logged.items() if k.startswith("test/")} == first.test.metrics
    assert first.test.metrics["test/top1_low"] == first.test.scores["top1"].low
    assert logged["report/top1"] == first.metrics["best/val_top1"]
    page = (Path(first.run_dir) / "report" / "report.html").read_text()
    assert "Scored once, by the final model" in page and first.test.scores["top1"].show() in page
    assert "test split: top-1" in tracking.outcomes[-1][1]
    table = evaluation.score(evaluation.load(first.run_dir), Dataset.open(shapes_with_test), "test")
    assert table.before == first.test.scores

    again = launch(run, local=True, tracking=tracking)
    assert again.status == "finished" and again.test == first.test
    assert again.figures == first.figures
    said = capsys.readouterr().out
    assert shown in said and "/report/report.html" in said and not too_wide(said)


def test_a_run_whose_score_chooses_never_sees_the_test_split(tiny, tracking, shapes_with_test):
    run = override(tiny, {"data.path": shapes_with_test, "train.epochs": 1})
    for kind in ("trial", "confirmation", "comparison"):
        outcome = run_it(dataclasses.replace(run, name=kind), tracking, kind=kind)
        assert outcome.test is None
    assert not any(key.startswith("test/") for _, v in tracking.metrics_seen for key in v)


def test_a_large_test_split_is_left_to_a_machine_with_a_gpu(
    tiny, tracking, shapes_with_test, capsys, monkeypatch
):
    monkeypatch.setattr(finalize, "MOST_WITHOUT_GPU", 15)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    run = override(tiny, {"data.path": shapes_with_test, "train.epochs": 1})
    assert launch(run, local=True, tracking=tracking).test is None
    assert "16 test pictures are many" in capsys.readouterr().out


def test_a_run_that_failed_its_gates_stops_the_next_phase(tiny, tracking):
    first = run_it(
        override(tiny, {"train.epochs": 1, "gates.val_top1": 100.0, "optimizer.lr": 1e-6}), tracking
    )
    assert not first.passed and tracking.tag_values["gates"] == "failed"
    following = override(tiny, {"stage": "phase2", "train.epochs": 1, "model.init_from": "phase1"})
    with pytest.raises(LaunchError, match="failed its success criteria"):
        run_it(following, tracking)
    forced = run_it(override(following, {"gates.force": "a test"}), tracking)
    assert (
        forced.status == "completed"
        and "because: a test" in tracking.started[-1][1]["tags"]["forced_gate"]
    )


def test_a_run_is_not_scored_on_images_that_its_weights_were_trained_on(tiny, tracking):
    first = run_it(override(tiny, {"train.epochs": 1, "data.subset": 0.75}), tracking)
    after = {"stage": "phase2", "train.epochs": 1, "model.init_from": f"run:{first.name}"}
    seen = override(tiny, {**after, "data.tuning_fraction": 0.25})
    with pytest.raises(LaunchError, match=rf"tuning images {first.name} had trained on .*reserve"):
        run_it(seen, tracking)
    forced = run_it(override(seen, {"gates.force": "a test"}), tracking)
    assert "because: a test" in tracking.started[-1][1]["tags"]["forced_gate"]
    unseen = run_it(override(seen, {"data.tuning_source": "reserve"}), tracking)
    assert forced.status == unseen.status == "completed"
    assert not tracking.started[-1][1]["tags"].get("forced_gate")


def test_validation_images_that_the_weights_were_trained_on_are_refused(tiny, tracking, tmp_path):
    """A set that was prepared again, with another division."""
    first = run_it(override(tiny, {"train.epochs": 1}), tracking)
    known = Dataset.open(tiny.data.path)
    for split, source in (("train", "val"), ("val", "train")):
        part = known.split(source)
        for row, label in enumerate(part.labels):
            folder = tmp_path / "pictures" / split / known.classes[label]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{row}.jpg").write_bytes(part.image(row))
    prepare(tmp_path / "pictures", str(tmp_path / "set"), engine="local", progress=False)
    swapped = {"data.path": str(tmp_path / "set"), "model.init_from": f"run:{first.name}"}
    with pytest.raises(LaunchError, match=r"of the 48 validation images .* had trained on 48"):
        run_it(override(tiny, {**swapped, "stage": "phase2"}), tracking)


def test_interrupted_and_resumed_is_the_undisturbed_run(tiny, tracking):
    whole = run_it(dataclasses.replace(tiny, name="whole"), tracking)

    part = dataclasses.replace(tiny, name="part")
    with pytest.raises(StoppedError) as stopped:
        run_it(part, tracking, on_report=once(signal.SIGTERM))
    assert (
        stopped.value.code == 143
        and tracking.outcomes[-1][0] == "killed"
        and "stopped at step" in tracking.outcomes[-1][1]
    )
    assert not (Path(whole.run_dir).parent / "part" / "result.json").exists()
    assert not (Path(whole.run_dir).parent / "part" / "lease.json").exists()

    resumed = run_it(part, tracking)
    assert tracking.started[-1][1]["run_id"] == "id"  # the same MLflow run
    assert resumed.metrics == whole.metrics
    first, second = (
        load_run_model(whole.run_dir).model.state_dict(),
        load_run_model(resumed.run_dir).model.state_dict(),
    )
    assert all(np.array_equal(first[k], second[k]) for k in first)
    assert json.loads((Path(resumed.run_dir) / "run.json").read_text())["launches"] == 2


def test_ctrl_c_is_130(tiny, tracking):
    with pytest.raises(StoppedError) as stopped:
        run_it(tiny, tracking, on_report=once(signal.SIGINT))
    assert stopped.value.code == 130


def test_handlers_are_put_back(tiny, tracking):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    run_it(override(tiny, {"train.epochs": 1}), tracking)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_it_trains_in_a_thread_as_tune_has_it(tiny, tracking):
    got = []
    thread = threading.Thread(
        target=lambda: got.append(run_it(override(tiny, {"train.epochs": 1}), tracking))
    )
    thread.start()
    thread.join(120)
    assert got[0].status == "completed"


def test_a_hook_that_raises_prunes_the_run(tiny, tracking):
    class EnoughError(Exception):
        pass

    def hook(metrics):
        assert {"epoch", "val/top1", "train/loss"} <= metrics.keys()
        raise EnoughError

    with pytest.raises(EnoughError):
        run_it(tiny, tracking, on_report=hook)
    assert [o for o, _ in tracking.outcomes] == ["pruned"]
    step, last = tracking.metrics_seen[-1]
    assert step == 0 and {"best/val_top1", "best/epoch"} == set(last)


def test_a_failure_ends_the_mlflow_run_as_failed_and_frees_the_name(tiny, tracking):
    with pytest.raises(Exception, match=r"not finite.*Lower optimizer.lr"):
        run_it(
            override(
                tiny,
                {
                    "optimizer.lr": 1e30,
                    "train.clip_norm": 0.0,
                    "train.max_nonfinite": 0,
                    "train.epochs": 20,
                    "name": "boom",
                },
            ),
            tracking,
        )
    assert tracking.outcomes[-1][0] == "failed" and "not finite" in tracking.outcomes[-1][1]
    with pytest.raises(LaunchError, match="other settings: optimizer.lr was 1e\\+30"):
        run_it(dataclasses.replace(tiny, name="boom"), tracking)


def test_a_resumed_run_keeps_its_starting_weights_although_phase_1_has_better_ones_now(
    tiny, tracking
):
    run_it(override(tiny, {"train.epochs": 1}), tracking)
    second = override(tiny, {"stage": "phase2", "model.init_from": "phase1", "name": "two"})
    with pytest.raises(StoppedError):
        run_it(second, tracking, on_report=once(signal.SIGTERM))
    began = prepare_run(second).source
    better = run_it(override(tiny, {"seed": 1}), tracking)
    if better.metrics["best/val_top1"] > began.top1:
        assert prepare_run(dataclasses.replace(second, name="")).source.sha256 != began.sha256
    assert prepare_run(second).source.sha256 == began.sha256
    assert run_it(second, tracking).status == "completed"


# --- what is refused before anything starts ---


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"data.path": ""}, ConfigError, "data.path is empty.*jobs/prepare.py"),
        ({"data.path": "nothing-here"}, DataError, "no such data set.*jobs/prepare.py"),
        (
            {"model.init_from": "phase9"},
            ConfigError,
            "no finished phase9 run on the data set 'prepared'.*python jobs/phase9.py",
        ),
        ({"model.init_from": "run:never"}, ConfigError, "never"),
        ({"model.init_from": "file:/nowhere"}, ConfigError, "/nowhere"),
        ({"model.init_from": "what:ever"}, ConfigError, "use scratch, pretrained"),
        ({"model.arch": "resnet5"}, ConfigError, "resnet50"),
        ({"model.arch": "vgg11_bn", "model.drop_path": 0.1}, ConfigError, "drop_path"),
        ({"augment.randaugment_n": 1, "augment.randaugment_ops": ["Rotat"]}, ConfigError, "Rotat"),
        (
            {"data.subset": 0.05, "data.tuning_fraction": 0.1},
            ConfigError,
            "data.tuning_fraction = 0.1: of 2 images it leaves none to score",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_starts(tiny, tracking, home, change, kind, said):
    with pytest.raises(kind, match=said):
        run_it(override(tiny, change), tracking)
    assert not tracking.started and not (home / "runs").exists()


def test_storage_that_cannot_be_written(tiny, tracking, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        run_it(override(tiny, {"checkpoint.storage": str(tmp_path / "file" / "runs")}), tracking)


def test_storage_that_is_nearly_full(tiny, tracking, monkeypatch):
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: type("U", (), {"free": 10})())
    with pytest.raises(LaunchError, match="are free, but this run's checkpoints need up to .* GB"):
        run_it(tiny, tracking)


def test_a_taken_name_and_a_running_one(tiny, tracking):
    run_it(override(tiny, {"name": "mine", "train.epochs": 1}), tracking)
    with pytest.raises(
        LaunchError, match="taken by a run with other settings: train.epochs was 1, now 2"
    ):
        run_it(override(tiny, {"name": "mine", "train.epochs": 2}), tracking)
    free = override(tiny, {"name": "busy"})
    with (
        lease.Lease(prepare_run(free).run_dir, "busy"),
        pytest.raises(LaunchError, match="being trained already, by process"),
    ):
        run_it(free, tracking)


def test_other_classes_need_a_new_head(tiny, tracking, tmp_path):
    import cv2

    first = run_it(override(tiny, {"train.epochs": 1}), tracking)
    for split, count in (("train", 6), ("val", 2)):
        for name in ("a", "b", "c"):
            (tmp_path / "p" / split / name).mkdir(parents=True)
            for i in range(count):
                cv2.imwrite(
                    str(tmp_path / "p" / split / name / f"{i}.jpg"),
                    np.random.default_rng(i).integers(0, 255, (16, 16, 3), dtype=np.uint8),
                )
    prepare(str(tmp_path / "p"), str(tmp_path / "abc"), engine="local", progress=False)
    other = override(
        tiny,
        {
            "data.path": str(tmp_path / "abc"),
            "train.epochs": 1,
            "stage": "phase2",
            "model.init_from": f"run:{first.name}",
            "gates": Gates(),
        },
    )
    with pytest.raises(ConfigError, match="classes differ.*--model.reset-head"):
        run_it(other, tracking)
    assert run_it(override(other, {"model.reset_head": True}), tracking).status == "completed"
    with pytest.raises(ConfigError, match="phase1 runs on other data: .*name one as run:NAME"):
        run_it(
            dataclasses.replace(other, model=Model(arch=tiny.model.arch, init_from="phase1")),
            tracking,
        )


# --- losing the lease ---


def test_a_launch_that_lost_its_run_stops_writes_nothing_and_leaves_the_mlflow_run_open(
    tiny, tracking, home, monkeypatch
):
    """As after a suspension on another machine: a successor has put its own lease there."""
    monkeypatch.setattr(lease, "MISSING_LOOKS", 1)
    file = home / "runs" / "lost" / "lease.json"

    def hook(metrics):
        values = {**json.loads(file.read_text()), "token": "successor", "host": "elsewhere"}
        new = file.with_name("lease.new")
        new.write_text(json.dumps(values))
        new.replace(file)  # as a successor does: a half-written lease would count as a missing one

    run = override(tiny, {"name": "lost", "train.epochs": 50})
    with pytest.raises(LeaseLostError, match="on elsewhere has taken it over"):
        run_it(run, tracking, on_report=hook)
    steps = sorted(p.name for p in (file.parent / "checkpoints").glob("step-*"))
    assert steps in ([], ["step-00000002"]), "at most the checkpoint that was being written"
    assert tracking.outcomes == [] and not (file.parent / "result.json").exists()
    assert json.loads(file.read_text())["token"] == "successor"


def test_storage_that_fails_for_a_while_is_tried_again_from_the_newest_checkpoint(
    tiny, tracking, monkeypatch
):
    """In the job's own process as on a cluster, up to cluster.max_failures times."""
    from ftlib.training.loop import Training

    whole = run_it(override(tiny, {"name": "whole"}), tracking)
    real, failed = Training.finish_epoch, []

    def finish_epoch(self):
        real(self)
        if len(failed) < 2:
            failed.append(self.state.step)
            raise StorageError("the disk is away")

    monkeypatch.setattr(Training, "finish_epoch", finish_epoch)
    torn = run_it(override(tiny, {"name": "torn"}), tracking)
    assert torn.metrics == whole.metrics and len(failed) == 2
    failed.clear()
    with pytest.raises(StorageError):
        run_it(override(tiny, {"name": "over", "cluster.max_failures": 1}), tracking)


def test_loader_processes_that_die_are_survived_and_damaged_data_is_a_failure(
    tiny, tracking, monkeypatch
):
    """A dead process or damaged data is a failure of the run (exit code 1), not wrong input (2)."""
    from ftlib.data.fork_server import LoaderProcessError
    from ftlib.data.loader import LoadError
    from ftlib.training.loop import Training

    real, errors = Training.finish_epoch, []

    def finish_epoch(self):
        real(self)
        if errors:
            raise errors.pop()

    monkeypatch.setattr(Training, "finish_epoch", finish_epoch)
    errors.append(LoaderProcessError("killed by SIGKILL"))
    assert run_it(override(tiny, {"name": "dead"}), tracking).status == "completed"
    errors.append(LoadError("picture 7 of shard 3 is damaged"))
    with pytest.raises(RunFailedError, match="picture 7 of shard 3") as failed:
        run_it(override(tiny, {"name": "damaged"}), tracking)
    assert not isinstance(failed.value, ValueError)
    assert tracking.outcomes[-1][0] == "failed"


def test_a_run_that_is_stopped_while_it_finishes_is_finished_by_the_same_command(
    tiny, tracking, monkeypatch
):
    """Trained to its last step, but not yet reported and packaged: that is done again."""
    from ftlib.launch import finalize

    real, stops = finalize.log_end, [143]

    def log_end(*given):
        if stops:
            raise StoppedError(stops.pop() - 128, "stopped")
        return real(*given)

    monkeypatch.setattr(finalize, "log_end", log_end)
    run = override(tiny, {"name": "late", "train.epochs": 1})
    with pytest.raises(StoppedError):
        run_it(run, tracking)
    assert tracking.outcomes[-1][0] == "killed"
    done = run_it(run, tracking)
    assert done.status == "completed" and tracking.outcomes[-1][0] == "completed"
    assert run_it(run, tracking).status == "finished"
