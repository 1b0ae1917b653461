"""Names, fingerprints and the record of a run."""

import dataclasses
import json

import pytest

from ftlib.config import NAME, NOT_IN_FINGERPRINT_AT_DEFAULT, Cluster, Model, Run, Train
from ftlib.data import ops
from ftlib.data.policy import FIRST_OPS, op_versions
from ftlib.launch.errors import LaunchError
from ftlib.launch.run_record import (
    RunRecord,
    default_name,
    fingerprint,
    recorded_ops,
    refuse_other_settings,
    with_ops,
)
from ftlib.settings import flat, from_dict, override, to_dict

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


RANDAUGMENT = override(
    Run(stage="phase2"),
    {
        "augment.randaugment_n": 2,
        "augment.randaugment_m": 9.0,
        "augment.randaugment_p": 0.3,
        "mix.mixup_alpha": 0.2,
    },
)


@pytest.mark.parametrize(
    ("run", "init", "expected"),
    [
        (RUN, None, "d4aeb5d551b2a0b87a446c1964ab832747080e87f337f369f04574b83c8de908"),
        (RANDAUGMENT, "w", "4b512bccd74e179fa4e726cc15e28ee8658240cd62720dbb58002dc1113c7109"),
        (
            override(RANDAUGMENT, {"augment.randaugment_ops": ("rotate", "blur", "hue")}),
            None,
            "6e7fd688dfe921533ac17bfdba550cf49b14def0a1516bd3dd661b461cbbc148",
        ),
        (
            override(RUN, {"augment.trivialaugment": True}),
            None,
            "b438b5da83090a13fba3e635e4c8329b6b19585ce074e205ff167d28abee8b61",
        ),
    ],
)
def test_runs_of_fingerprint_version_1_keep_their_fingerprint(run, init, expected):
    """The values are those of the code before version 2, whatever ops have come since."""
    first = op_versions(run.augment, FIRST_OPS)
    assert fingerprint(run, "d", init, first) == expected


def test_settings_added_later_count_only_where_they_are_set():
    for path in NOT_IN_FINGERPRINT_AT_DEFAULT:
        assert path in flat(RUN)
    for change in ({"augment.vflip": 0.5}, {"augment.rotate90": 0.5}):
        assert fingerprint(override(RUN, change), "d", None) != fingerprint(RUN, "d", None)


def test_the_contents_of_a_pipeline_count_and_not_its_file(tmp_path):
    prints = set()
    for name, p in (("a.json", 0.5), ("b.json", 0.5), ("c.json", 0.7)):
        file = tmp_path / name
        transform = {"__class_fullname__": "RandomFog", "p": p}
        file.write_text(json.dumps({"__version__": "2.0.8", "transform": transform}))
        prints.add(fingerprint(override(RUN, {"augment.pipeline": str(file)}), "d", None))
    assert len(prints) == 2 and fingerprint(RUN, "d", None) not in prints


def test_a_run_keeps_its_pipeline_when_the_file_is_gone(tmp_path):
    file = tmp_path / "p.json"
    file.write_text('{"transform": {"__class_fullname__": "RandomFog", "p": 0.5}}')
    run = override(RUN, {"augment.pipeline": str(file)})
    RunRecord(to_dict(run), "f", {"name": "digits", "digest": "d"}).write(str(tmp_path))
    file.unlink()
    again = from_dict(Run, RunRecord.read(str(tmp_path)).run)
    assert again == run and fingerprint(again, "d", None) == fingerprint(run, "d", None)


@pytest.fixture
def grown_table(monkeypatch):
    """The table of ops of 2026-11 that becomes one with one more op and another `blur`."""
    known = [op for op in ops.OPS if op.name in ops.TABLE_2026_11]
    monkeypatch.setattr(ops, "OPS", tuple(known))
    changed = [dataclasses.replace(op, version=2) if op.name == "blur" else op for op in known]
    new = dataclasses.replace(ops.OPS[0], name="twirl")
    return lambda table=(*changed, new): monkeypatch.setattr(ops, "OPS", tuple(table))


@pytest.mark.parametrize("version", [1, 2])
def test_a_run_keeps_the_ops_it_began_with_when_the_table_grows(tmp_path, grown_table, version):
    before = fingerprint(RANDAUGMENT, "d", None)
    record = RunRecord(to_dict(RANDAUGMENT), before, {"name": "digits", "digest": "d"})
    if version == 2:
        record.fingerprint_version, record.ops = 2, list(recorded_ops(RANDAUGMENT, None))
    record.write(str(tmp_path))
    found = RunRecord.read(str(tmp_path))

    grown_table([*ops.OPS, dataclasses.replace(ops.OPS[0], name="twirl")])
    assert fingerprint(RANDAUGMENT, "d", None) != before  # a new run has the new op
    kept = recorded_ops(RANDAUGMENT, found)
    assert fingerprint(RANDAUGMENT, "d", None, kept) == before
    resumed = with_ops(RANDAUGMENT, kept)
    assert resumed.augment.randaugment_ops == ops.TABLE_2026_11
    assert with_ops(RUN, recorded_ops(RUN, found if version == 1 else None)) == RUN


def test_a_run_whose_ops_have_changed_is_refused(grown_table):
    record = RunRecord(to_dict(RANDAUGMENT), "", {"name": "digits", "digest": "d"})
    grown_table()
    with pytest.raises(LaunchError, match=r"that this version of ftlib does not have: blur\. "):
        with_ops(RANDAUGMENT, recorded_ops(RANDAUGMENT, record))
    chosen = override(RANDAUGMENT, {"augment.randaugment_ops": ("rotate", "zoom", "hue")})
    assert with_ops(chosen, recorded_ops(chosen, record)) == chosen


def test_a_new_run_records_the_versions_of_its_ops(grown_table):
    grown_table()
    ops_of_run = recorded_ops(RANDAUGMENT, None)
    assert {"blur@2", "twirl", "rotate"} <= set(ops_of_run) and "blur" not in ops_of_run
    assert recorded_ops(RUN, None) == ()
    assert with_ops(RANDAUGMENT, ops_of_run) == RANDAUGMENT


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
        match=r"a run with other settings: seed was 42, now 1, train.epochs was 50, now 3\.",
    ):
        refuse_other_settings(other, str(tmp_path), found, fingerprint(other, "d", None), "d")
    with pytest.raises(LaunchError, match="taken by a run with other data"):
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


def test_resuming_needs_the_model_it_began_with():
    assert fingerprint(
        dataclasses.replace(RUN, model=Model(init_from="file:/a")), "d", "w"
    ) == fingerprint(dataclasses.replace(RUN, model=Model(init_from="phase1")), "d", "w")
