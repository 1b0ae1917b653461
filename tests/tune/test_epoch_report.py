"""What of an epoch reaches the search."""

import queue

from ftlib.tune.epoch_report import TrainReportCallback, epoch_point, epoch_seconds

EPOCH = {
    "epoch": 3.0,
    "val/top1": 71.0,
    "val/loss": 0.5,
    "val/seconds": 2.0,
    "train/top1": 80.0,
    "train/epoch_s": 5.0,
    "train/images_per_s": 900.0,
}


def test_a_point_holds_the_score_and_the_curves_only():
    assert epoch_point(EPOCH, "val") == {
        "score": 71.0,
        "val/top1": 71.0,
        "val/loss": 0.5,
        "train/top1": 80.0,
    }


def test_an_epoch_takes_training_and_evaluation():
    assert epoch_seconds(EPOCH, "val") == 7.0
    assert epoch_seconds({"val/top1": 1.0}, "val") == 0.0


def test_workers_report_scored_epochs_and_an_error_never_reaches_the_run():
    callback = TrainReportCallback.__new__(TrainReportCallback)
    callback.split, callback.last = "val", 0.0
    callback._training_actor_item_queue = queue.Queue()
    callback.after_report(None, [EPOCH], None)
    callback.after_report(None, [{"train/top1": 1.0, "epoch": 4}], None)  # not scored
    callback.after_report(None, [], None)
    got = callback._training_actor_item_queue.get_nowait()
    assert got.pop("seconds") > 0
    assert got == {**epoch_point(EPOCH, "val"), "epoch": 3}
    assert callback._training_actor_item_queue.empty()
