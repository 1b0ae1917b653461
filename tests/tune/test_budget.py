import math
import time

import pytest

from ftlib.settings import ConfigError
from ftlib.tune.budget import TimeBudget
from ftlib.tune.options import SweepOptions, seconds
from ftlib.tune.trial_store import Trial, TrialStore


@pytest.fixture
def store(tmp_path):
    made = TrialStore(str(tmp_path), "s")
    made.open({}, {})
    return made


def done(store, number, wall):
    store.add(Trial(number, {}, "tpe", "completed", result={"wall_seconds": wall}))


def test_times_are_read_with_their_units():
    assert [
        seconds(t) for t in ("2h", "90m", "1h30m", "45s", "0.5h", "1H 30M".replace(" ", ""))
    ] == [
        7200,
        5400,
        5400,
        45,
        1800,
        5400,
    ]
    assert seconds("") == math.inf and SweepOptions().budget_seconds == math.inf
    for wrong in ("2", "h", "2 days", "1m2h", "0h", "1.2.3h", "-1h"):
        with pytest.raises(ConfigError, match="needs a time such as 2h"):
            SweepOptions(budget=wrong)


def test_a_trial_starts_only_if_it_is_expected_to_end_in_time(store, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    budget = TimeBudget(store, 100)
    assert budget.allows_another()
    done(store, 0, 40.0)
    clock[0] = 55
    assert budget.allows_another() and not budget.refused
    clock[0] = 65
    assert not budget.allows_another() and budget.refused


def test_the_time_of_all_starts_counts(store, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    first = TimeBudget(store, 100)
    clock[0] = 70
    first.ended(Trial(0, {}, "tpe"), None)
    again = TrialStore(store.uri.rsplit("/", 1)[0], "s")
    again.read()
    second = TimeBudget(again, 100)
    assert second.spent == 70 and second.allows_another()
    clock[0] = 105
    assert second.spent == 105 and not second.allows_another()
    assert TimeBudget(again, math.inf).allows_another()
