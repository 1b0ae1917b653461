"""Names, fingerprints and the lease."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from ftlib.config import NAME, Cluster, Model, Run, Train
from ftlib.launch import run_record
from ftlib.launch.errors import LaunchError
from ftlib.launch.run_record import (
    Lease,
    RunRecord,
    default_name,
    fingerprint,
    refuse_other_settings,
)
from ftlib.settings import override, to_dict

RUN = Run(stage="phase1")


@pytest.mark.parametrize(
    "change",
    [
        {"name": "x"},
        {"cluster.workers": "4"},
        {"track.experiment": "e"},
        {"checkpoint.every_steps": 7},
        {"data.path": "elsewhere"},
        {"data.loader_workers": 3},
        {"train.log_every": 1},
        {"gates.val_top1": 90.0},
    ],
)
def test_how_a_run_is_carried_out_does_not_change_what_it_is(change):
    assert fingerprint(override(RUN, change), "d", None) == fingerprint(RUN, "d", None)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"model.dropout": 0.1},
        {"optimizer": "SGD"},
        {"train.epochs": 7},
        {"data.subset": 0.5},
        {"stage": "other"},
        {"model.init_from": "imagenet"},
    ],
)
def test_what_it_computes_does(change):
    assert fingerprint(override(RUN, change), "d", None) != fingerprint(RUN, "d", None)


def test_data_and_starting_weights_count_by_their_contents():
    start = override(RUN, {"model.init_from": "phase1"})
    same = override(RUN, {"model.init_from": "run:phase1-x"})
    assert fingerprint(start, "d", "w") == fingerprint(same, "d", "w")
    assert (
        len(
            {
                fingerprint(start, "d", "w"),
                fingerprint(start, "d", "v"),
                fingerprint(start, "e", "w"),
            }
        )
        == 3
    )


@pytest.mark.parametrize("data", ["digits", "my pictures (2024)", "a/b", "--", "x" * 300])
def test_default_names_are_names(data):
    assert NAME.fullmatch(default_name(RUN, data, "0123456789ab"))


def test_a_record_reads_back_and_other_settings_are_refused(tmp_path):
    print_ = fingerprint(RUN, "d", None)
    record = RunRecord(to_dict(RUN), print_, {"name": "digits", "digest": "d"})
    record.write(str(tmp_path))
    found = RunRecord.read(str(tmp_path))
    assert found == record
    refuse_other_settings(RUN, str(tmp_path), found, print_, "d")
    other = dataclasses.replace(
        RUN, name="x", seed=1, train=Train(epochs=3), cluster=Cluster(workers="2")
    )
    with pytest.raises(
        LaunchError,
        match=r"taken by a run with other settings: seed was 42, now 1, train.epochs was 50, now 3\.",
    ):
        refuse_other_settings(other, str(tmp_path), found, fingerprint(other, "d", None), "d")
    with pytest.raises(LaunchError, match="trained on other data"):
        refuse_other_settings(RUN, str(tmp_path), found, fingerprint(RUN, "e", None), "e")


def test_a_recipe_of_another_version_is_refused_in_words(tmp_path):
    record = RunRecord({**to_dict(RUN), "gone": 1}, "0", {"name": "digits", "digest": "d"})
    with pytest.raises(LaunchError, match="another version"):
        refuse_other_settings(RUN, str(tmp_path), record, "1", "d")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '"x"'])
def test_a_damaged_record_is_an_error_that_says_so(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(LaunchError, match="run.json cannot be read"):
        RunRecord.read(str(tmp_path))


def test_no_record():
    assert RunRecord.read("/nowhere/at/all") is None


# --- the lease --------------------------------------------------------------------------------------------------------------------

HOLD = """
import sys, time
sys.path.insert(0, {root!r})
from ftlib.launch.run_record import Lease
with Lease({folder!r}, "r"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lease of tmp_path."""
    root = str(run_record.Path(run_record.__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(root=root, folder=str(tmp_path))],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_writer_is_refused_and_told_who_it_is(tmp_path, holder):
    with pytest.raises(LaunchError, match=f"trained already, by process {holder.pid} on"):
        Lease(str(tmp_path), "r").take()


def test_the_lease_of_a_killed_process_is_taken_at_once(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    started = time.monotonic()
    with Lease(str(tmp_path), "r"):
        assert time.monotonic() - started < 1
        assert json.loads((tmp_path / "lease.json").read_text())["pid"] == os.getpid()
    assert os.listdir(tmp_path) == []


def test_a_reused_process_number_is_not_the_holder(tmp_path):
    (tmp_path / "lease.json").write_text(
        json.dumps({**run_record._me(), "token": "old", "started": 1.0, "renewed": time.time()})
    )
    with Lease(str(tmp_path), "r"):
        pass


def test_a_torn_lease_file_does_not_block_a_run(tmp_path):
    (tmp_path / "lease.json").write_text("{")
    with Lease(str(tmp_path), "r"):
        pass


def test_a_lease_elsewhere_is_waited_out_and_one_that_moves_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(run_record, "EXPIRE_SECONDS", 1.5)
    file = tmp_path / "lease.json"
    elsewhere = {"token": "t", "machine": "another", "host": "another", "pid": 1, "started": 0}
    file.write_text(json.dumps({**elsewhere, "renewed": time.time()}))
    started = time.monotonic()
    with Lease(str(tmp_path), "r"):
        assert time.monotonic() - started >= 1.5

    file.write_text(json.dumps({**elsewhere, "renewed": 1.0}))
    monkeypatch.setattr(
        run_record.time,
        "sleep",
        lambda s: file.write_text(json.dumps({**elsewhere, "renewed": 2.0})),
    )
    monkeypatch.setattr(run_record.time, "time", lambda: 2.0)
    with pytest.raises(LaunchError, match="on another"):
        Lease(str(tmp_path), "r").take()


def test_many_at_once_one_gets_it(tmp_path):
    """Eight processes start at one moment upon a dead lease."""
    (tmp_path / "lease.json").write_text(
        json.dumps({**run_record._me(), "token": "old", "started": 1.0, "renewed": time.time()})
    )
    code = HOLD.replace(
        'print("held", flush=True)\n    time.sleep(60)',
        'print("held", flush=True)\n    sys.stdin.read()',
    )
    code = "import sys; sys.stdin.readline()\n" + code.replace(
        "import sys, time\n", "import time\n"
    )
    code = code.format(
        root=str(run_record.Path(run_record.__file__).parents[2]), folder=str(tmp_path)
    )
    crowd = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for _ in range(8)
    ]
    for p in crowd:
        p.stdin.write("\n")
        p.stdin.flush()
    losers = [p for p in crowd]
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and sum(p.poll() is None for p in crowd) > 1:
        time.sleep(0.1)
    losers = [p for p in crowd if p.poll() is not None]
    out = [p.communicate()[0] for p in crowd]
    assert len(losers) == 7 and out.count("held\n") == 1


def test_resuming_needs_the_model_it_began_with():
    assert fingerprint(
        dataclasses.replace(RUN, model=Model(init_from="file:/a")), "d", "w"
    ) == fingerprint(dataclasses.replace(RUN, model=Model(init_from="phase1")), "d", "w")
