import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from ray import tune

from ftlib.tune import spaces
from ftlib.tune.optuna_journal import OptunaJournal
from ftlib.tune.ray_tune import TrialEnd
from ftlib.tune.trial_store import Trial

SPACE = spaces.build(
    "s",
    {
        "optimizer.lr": tune.loguniform(1e-4, 1e-2),
        "mix.mixup_alpha": tune.quniform(0.5, 1, 0.1),
        "schedule": tune.choice(["Cosine", "OneCycle"]),
    },
)


def trial(number, outcome, score=60.0, **values):
    known = {"optimizer.lr": 1e-3, "mix.mixup_alpha": 0.6, "schedule": "Cosine", **values}
    history = [{"epoch": e, "score": score - 3 + e} for e in (1, 2, 3)]
    return Trial(number, known, "tpe", outcome, history=history if score else [])


def load(file):
    storage = JournalStorage(JournalFileBackend(str(file)))
    return optuna.load_study(study_name="s", storage=storage)


def test_optuna_opens_the_trials_that_have_ended(tmp_path):
    file = tmp_path / "optuna.journal"
    journal = OptunaJournal(file, "s", SPACE)
    # The recipe's own values may lie outside the space.
    recipe = trial(0, "completed", **{"mix.mixup_alpha": 0.2, "optimizer.lr": 0.5})
    journal.start([recipe, trial(1, "")])
    journal.ended(trial(1, "completed", 70.0), TrialEnd("completed"))
    journal.ended(trial(2, "pruned"), TrialEnd("pruned"))
    journal.ended(trial(3, "failed", 0.0), TrialEnd("failed"))
    journal.ended(trial(4, ""), TrialEnd("interrupted"))
    study = load(file)
    assert [t.state.name for t in study.trials] == ["COMPLETE", "COMPLETE", "PRUNED", "FAIL"]
    assert [t.user_attrs["trial"] for t in study.trials] == ["t00", "t01", "t02", "t03"]
    assert study.best_value == 70.0 and study.trials[0].params["mix.mixup_alpha"] == 0.2
    assert study.trials[2].intermediate_values == {1: 58.0, 2: 59.0, 3: 60.0}


def test_a_restart_begins_the_file_anew(tmp_path):
    file = tmp_path / "optuna.journal"
    for _ in range(2):
        OptunaJournal(file, "s", SPACE).start([trial(0, "completed"), trial(1, "completed")])
    assert len(load(file).trials) == 2


def test_a_journal_that_cannot_be_written_stops_nothing(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    journal = OptunaJournal(tmp_path / "file" / "optuna.journal", "s", SPACE)
    journal.start([trial(0, "completed")])
    journal.ended(trial(1, "completed"), TrialEnd("completed"))
    assert "is not written" in caplog.text
