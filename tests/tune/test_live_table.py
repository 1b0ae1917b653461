import io

from ftlib.launch.progress import duration
from ftlib.tune.live_table import TrialTable
from ftlib.tune.ray_tune import TrialEnd
from ftlib.tune.trial_store import Trial


class Terminal(io.StringIO):
    def isatty(self):
        return True


def trial(number, outcome="", scores=(), **more):
    return Trial(
        number,
        {"model.dropout": 0.02, "mix.mixup_alpha": 0.4},
        "tpe" if number else "recipe",
        outcome,
        history=[{"epoch": e, "score": s, "seconds": 1.0} for e, s in enumerate(scores, 1)],
        **more,
    )


NAMES = {"model.dropout": "dropout", "mix.mixup_alpha": "mixup_alpha"}


def test_plain_lines_where_there_is_no_terminal():
    out = io.StringIO()
    trials = {0: trial(0)}
    with TrialTable(trials, NAMES, total=3, epochs=2, slots=1, split="tuning", out=out) as table:
        table.started(trials[0])
        trials[0].record({"epoch": 1, "score": 50.0})
        table.progressed(trials[0], trials[0].history[-1])
        trials[0].outcome = "completed"
        table.ended(trials[0], TrialEnd("completed"))
        trials[1] = trial(1, "failed", reason="NaN")
        table.ended(trials[1], TrialEnd("failed", "NaN"))
    text = out.getvalue()
    assert "t00  starts  the recipe: dropout 0.02, mixup_alpha 0.4" in text
    assert "t00  epoch 1/2  top-1 50.00 %  best 50.00 % (t00)  0 of 3 done" in text
    assert "t01  failed    NaN" in text and "\x1b" not in text


def test_the_live_table_shows_trials_values_epoch_score_best_and_time_left():
    trials = {n: trial(n, "completed" if n else "", (40.0 + n, 45.0 + n)) for n in range(30)}
    out = Terminal()
    with TrialTable(trials, NAMES, total=40, epochs=2, slots=2, split="tuning", out=out) as table:
        table.started(trials[0])
        table.spent = [10.0, 20.0]
        from rich.console import Console

        shown = Console(file=io.StringIO(), width=160)
        shown.print(table.render())
    text = shown.file.getvalue()
    for wanted in (
        "best 74.00 % (t29)",
        "dropout",
        "mixup_alpha",
        "2/2",
        "running",
        "about 0:01",
        "more",
        "tuning split",
    ):
        assert wanted in text, wanted
    rows = text[text.index("t00 recipe") :]
    assert rows.index("t00 recipe") < rows.index("t29") < rows.index("t28"), (
        "running first, then the best"
    )


def test_time_left_waits_for_the_first_trial():
    table = TrialTable({}, NAMES, total=10, epochs=2, slots=2, split="tuning", out=io.StringIO())
    assert table.seconds_left() is None
    table.spent = [60.0]
    assert table.seconds_left() == 300.0
    assert duration(3725) == "1:02:05"


def test_time_left_of_a_running_trial_is_its_own_pace_from_where_it_went_on(monkeypatch):
    clock = iter((0.0, 0.0, 30.0))  # made, trial started, asked
    monkeypatch.setattr("ftlib.tune.live_table.time.monotonic", lambda: next(clock))
    trials = {7: trial(7, scores=(40.0,) * 4)}
    table = TrialTable(
        trials, NAMES, total=1, epochs=20, slots=2, split="tuning", out=io.StringIO()
    )
    table.started(trials[7])  # after epoch 4, of an earlier start
    table.spent = [8.0]  # the others were stopped early
    assert table.seconds_left() == 4.0  # no epoch of its own yet: half of a trial
    for epoch in range(5, 11):
        trials[7].record({"epoch": epoch, "score": 50.0})
    assert table.seconds_left() == 50.0  # 6 epochs in 30 s, 10 to go, on one slot
