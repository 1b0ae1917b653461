"""Each point reaches MLflow once, also when steps are repeated after a lost checkpoint."""

import math
import re

import pytest

from ftlib.config import Track
from ftlib.track import journal
from ftlib.track.journal import Owners, State, journal_file
from ftlib.track.leftovers import requeue_folder
from ftlib.track.run_delivery import RunDelivery, SentPoints
from ftlib.track.tracking import open_tracking


def record(step, t=1, **values):
    values = {key.replace("__", "/"): value for key, value in values.items()}
    return {"op": "metrics", "step": step, "values": values, "t": t}


def values_of(sent, *records):
    return [(new or {"values": {}})["values"] for new in map(sent.new, records)]


def test_a_repeated_point_is_new_only_if_its_value_changed():
    sent = SentPoints()
    assert values_of(
        sent,
        record(1, val__top1=60.0, train__loss=1.0),
        record(1, 2, val__top1=60.0, train__loss=1.5),
        record(2, val__top1=60.0),
    ) == [{"val/top1": 60.0, "train/loss": 1.0}, {"train/loss": 1.5}, {"val/top1": 60.0}]


def test_speeds_of_a_repeated_step_are_left_out_and_nan_equals_nan():
    sent = SentPoints()
    assert values_of(
        sent,
        record(5, step__images_per_s=100.0, train__epoch_s=3.0, train__loss=math.nan),
        record(5, 2, step__images_per_s=90.0, train__epoch_s=4.0, train__loss=math.nan),
    ) == [
        record(5, step__images_per_s=100.0, train__epoch_s=3.0, train__loss=math.nan)["values"],
        {},
    ]


def test_system_metrics_are_always_sent():
    sent = SentPoints()
    point = {"op": "metrics", "step": 1, "values": {"system/node_0/cpu": 5.0}, "t": 1}
    assert sent.new(point) == sent.new(point) == point


@pytest.mark.parametrize("restart", [False, True])
def test_steps_repeated_after_a_lost_checkpoint_are_drawn_once(store, mlflow, tmp_path, restart):
    def train(run, steps):
        for step in steps:
            speed = 100.0 + len(list(journal.read(run.path)))
            run.writer().metrics({"step/loss": 1 / step, "step/images_per_s": speed}, step)

    folder = tmp_path / "journal"
    with open_tracking(Track(uri=store), experiment="e", journal_dir=folder) as tracking:
        run = tracking.start_run("r", tags={}, params={})
        train(run, range(1, 21))
        if not restart:
            train(run, range(17, 31))  # a worker was lost
        run.finish("completed")
    if restart:
        with open_tracking(Track(uri=store), experiment="e", journal_dir=folder) as tracking:
            run = tracking.start_run("r", tags={}, params={})
            train(run, range(17, 31))
            run.finish("completed")
    for key in ("step/loss", "step/images_per_s"):
        steps = [point.step for point in mlflow.get_metric_history(run.run_id, key)]
        assert sorted(steps) == list(range(1, 31))


def test_a_rejected_point_that_is_tried_again_is_sent(store, mlflow, tmp_path):
    folder = tmp_path / "journal"
    with open_tracking(Track(uri=store), experiment="e", journal_dir=folder) as tracking:
        run = tracking.start_run("r", tags={}, params={})
        run.writer().metrics({"bad@#key": 1.0, "good": 1.0}, 1)
        run.finish("completed")
    path = journal_file(folder, "r")
    assert requeue_folder(folder) == 1
    delivery = RunDelivery(path, store)
    while delivery.is_pending:
        delivery.deliver(mlflow)
    assert delivery.state.rejected == 2  # it was tried, and refused again


def test_what_was_sent_is_read_again_from_the_journal_after_an_error(store, mlflow, tmp_path):
    folder = tmp_path / "journal"
    with open_tracking(Track(uri=store), experiment="e", journal_dir=folder) as tracking:
        run = tracking.start_run("r", tags={}, params={})
        for step in range(1, 6):
            run.writer().metrics({"m": step}, step)
        run.finish("completed")
    path = journal_file(folder, "r")
    journal.journal_at(path).append(journal.encode(record(3, 99, m=3.0)))
    delivery = RunDelivery(path, store)

    class Failing:
        """A client whose every call fails."""

        def __getattr__(self, name):
            raise ConnectionError("away")

    delivery.deliver(Failing())  # nothing new in it, so nothing is sent
    journal.journal_at(path).append(journal.encode(record(6, 99, m=6.0)))
    with pytest.raises(ConnectionError):
        delivery.deliver(Failing())
    delivery.deliver(mlflow)
    journal.close_journal(path)
    points = [(p.step, p.value) for p in mlflow.get_metric_history(run.run_id, "m")]
    assert sorted(points) == [(s, float(s)) for s in range(1, 7)]


def test_a_new_token_makes_earlier_ones_late():
    """Lines without a token are of earlier versions, or repairs: they always count."""
    owners = Owners()
    lines = ["", "a", "a", "", "b", "a", "", "b", "a", "c", "b", "c", "a"]
    late = [owners.is_late({"op": "tags", "owner": owner} if owner else {}) for owner in lines]
    assert [i for i, is_late in enumerate(late) if is_late] == [5, 8, 10, 12]
    assert owners.late == 4


@pytest.mark.parametrize("has_tokens", [True, False])
def test_a_launch_that_lost_the_run_cannot_damage_its_successor(
    store, mlflow, tmp_path, caplog, has_tokens
):
    """Its machine was paused; the successor has resumed the run when its last lines are written."""
    folder, cfg = tmp_path / "journal", Track(uri=store)
    first = open_tracking(cfg, experiment="e", journal_dir=folder, owner="first")
    late = first.start_run("r", tags={}, params={}).writer()
    late.metrics({"val/top1": 50.0}, 1)
    assert first.drain()
    first.abandon()
    with open_tracking(cfg, experiment="e", journal_dir=folder, owner="second") as second:
        run = second.start_run("r", tags={}, params={})
        run.writer().metrics({"val/top1": 60.0}, 2)
        late.metrics({"val/top1": 10.0}, 2)
        late.tags({"best": "10"})
        late.put({"op": "end", "outcome": "failed", "tags": {"reason": "late"}})
        assert journal.is_open(run.path)
        run.finish("completed")
        assert not journal.is_open(run.path)
    if not has_tokens:  # as an earlier version wrote it, delivered from the start
        lines = [dict(line, owner="") for line in journal.read_all(run.path)]
        run.path.write_bytes(b"".join(map(journal.encode, lines)))
        journal.state_file(run.path).unlink()
        RunDelivery(run.path, store).deliver(mlflow)
    found = mlflow.get_run(run.run_id)
    points = mlflow.get_metric_history(run.run_id, "val/top1")
    assert {p.value for p in points} == ({50.0, 60.0} if has_tokens else {50.0, 60.0, 10.0})
    assert (found.info.status, found.data.tags["outcome"]) == ("FINISHED", "completed")
    assert ("best" in found.data.tags, "reason" in found.data.tags) == (not has_tokens,) * 2
    said = "3 records in .*r.jsonl were written by a launch after it had lost the run"
    assert len(re.findall(said, caplog.text)) == 1
    assert State.load(run.path).late == (3 if has_tokens else 0)
