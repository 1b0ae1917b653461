"""The command line of a recipe, its help, and how a job ends.

The jobs themselves: tests/test_jobs.py.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from ftlib import recipes
from ftlib.cli import job, parse
from ftlib.config import SGD, AdamW, Focal, Gates, OneCycle, Run
from ftlib.settings import ConfigError, flat, to_json

ROOT = Path(__file__).parents[1]
BASE = Run(stage="phase2", optimizer=SGD(lr=0.3, momentum=0.8), schedule=OneCycle())


def answer(capsys, *argv):
    """(exit code, all that was printed) of a command line that ends the process."""
    with pytest.raises(SystemExit) as ended:
        parse(BASE, argv)
    out = capsys.readouterr()
    return ended.value.code, " ".join((out.out + out.err).replace("│", " ").split())


def test_no_flags_give_the_recipe():
    assert parse(BASE, []) == BASE


@pytest.mark.parametrize(
    ("argv", "path", "value"),
    [
        (["--optimizer.lr", "1"], "optimizer.lr", 1.0),
        (["--model.dropout_in=head", "--model.dropout=.1"], "model.dropout_in", "head"),
        (["--train.no-channels-last"], "train.channels_last", False),
        (["--augment.crop-scale", "0.2", "0.9"], "augment.crop_scale", (0.2, 0.9)),
        (["--cluster.workers", "1:4"], "cluster.workers", "1:4"),
        (["--gates.force", "the data are new"], "gates.force", "the data are new"),
    ],
)
def test_a_flag_replaces_one_leaf(argv, path, value):
    changed = flat(parse(BASE, argv))
    before = flat(BASE)
    assert changed[path] == value
    assert {p for p in before if before[p] != changed[p]} <= {path, "model.dropout"}


@pytest.mark.parametrize(
    "argv",
    [["--optimizer", "adamw"], ["optimizer:adamw"], ["optimizer:adam-w"], ["--optimizer=AdamW"]],
)
def test_another_kind_comes_with_its_own_defaults(argv):
    assert parse(BASE, argv).optimizer == AdamW()
    assert parse(BASE, [*argv, "--optimizer.lr", "7"]).optimizer == AdamW(lr=7)
    assert parse(BASE, ["--optimizer.lr", "7", *argv]).optimizer == AdamW(lr=7)


def test_naming_the_kind_it_has_keeps_the_recipes_values():
    assert parse(BASE, ["--optimizer", "sgd"]).optimizer == BASE.optimizer


def test_two_kinds_in_any_order():
    assert isinstance(parse(BASE, ["schedule:step", "loss:focal", "--loss.gamma", "3"]).loss, Focal)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--mixup-alpha", "2"], "--mix.mixup-alpha"),
        (["--modle.dropout", ".1"], "--model.dropout"),
        (["--optimizer.momentun", ".1"], "--optimizer.momentum"),
        (["--optimizer", "adm"], "Did you mean adam?"),
        (["--optimizer"], "--optimizer needs a value"),
        (["--optimizer.betas", ".9", ".99"], "Add --optimizer adamw"),
        (["--loss.gamma", "1"], "Focal has it. Add --loss focal"),
        (["--model.dropout", "1.5"], "model.dropout = 1.5: must be at least 0 and below 1"),
        (["--train.epochs", "x"], "--train.epochs x: needs a whole number"),
        (["--cluster.workers", "9"], "more workers than microbatches"),
        (
            ["--train.batch-size", "100"],
            "it is not a multiple of train.microbatch_size (32). Set it to 96",
        ),
        (["--name", "../x"], "use letters, digits"),
        (["stray"], "unexpected word 'stray'"),
        (["--train.compile", "yes"], "--train.no-compile is its opposite"),
        (["--augment.crop-scale", "1"], "--augment.crop-scale needs 2 values"),
        (["--model.dropout-in", "haed"], "needs one of both, blocks, head. Did you mean head?"),
        (["--name", "x" * 300], "at most 128"),
        (["--recipe", "/nowhere/x.json"], "cannot be read"),
    ],
)
def test_a_mistake_is_answered_with_what_to_do(capsys, argv, said):
    code, text = answer(capsys, *argv)
    assert code == 2
    assert said in text
    assert "Traceback" not in text


def test_recipe_file_is_the_new_base_and_flags_go_on_top(tmp_path):
    file = tmp_path / "r.json"
    file.write_text(to_json(Run(stage="promoted", seed=7)))
    run = parse(BASE, ["--recipe", str(file), "--seed", "8"])
    assert (run.stage, run.seed, run.optimizer) == ("promoted", 8, AdamW())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "line 1"),
        ('{"modle": {}}', "Did you mean model?"),
        ('{"optimizer": {"type": "Lion"}}', "needs one of AdamW"),
    ],
)
def test_a_damaged_recipe_file_is_named(capsys, tmp_path, text, said):
    file = tmp_path / "r.json"
    file.write_text(text)
    code, out = answer(capsys, "--recipe", str(file))
    assert code == 2 and said in out and "r.json" in out


def test_show_prints_a_recipe_that_reads_back(capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        parse(BASE, ["--optimizer", "adam", "--show"])
    assert ended.value.code == 0
    file = tmp_path / "r.json"
    file.write_text(capsys.readouterr().out)
    assert parse(Run(), ["--recipe", str(file)]) == parse(BASE, ["--optimizer", "adam"])


def run_job(name, *words, heavy=(), **kwargs):
    """A job in a process of its own. stdout ends with the imported modules that are in `heavy`."""
    code = (
        f"import sys, runpy; sys.argv = [{str(ROOT / 'jobs' / name)!r} + '.py', *{list(words)!r}]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        f"finally: print('HEAVY', sorted(set({list(heavy)!r}) & set(sys.modules)))"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **kwargs)


@pytest.mark.parametrize("phase", ["phase1", "phase2", "phase3"])
def test_help_is_complete_and_needs_neither_torch_nor_ray(phase):
    """From another folder, and without importing anything heavy."""
    heavy = ("torch", "ray", "mlflow", "numpy", "pyarrow")
    short = run_job(phase, "--help", heavy=heavy, cwd="/")
    full = run_job(phase, "--help-all", heavy=heavy, cwd="/")
    for done in (short, full):
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"usage: python jobs/{phase}.py [OPTIONS]\n")
        assert done.stdout.endswith("HEAVY []\n")
        assert f"    python jobs/{phase}.py" in done.stdout and "--optimizer KIND" in done.stdout
        assert max(map(len, done.stdout.splitlines())) <= 100
        assert not re.search(r"[│╭╰\x1b]", done.stdout)
    assert len(short.stdout.splitlines()) < 100
    run = flat(recipes.load(phase))
    for path in run:
        name = path.replace("_", "-")
        switch = name
        if run[path] is True:
            section, _, leaf = name.rpartition(".")
            switch = f"{section}.no-{leaf}"
        if path not in ("loss", "optimizer", "schedule"):
            assert f"--{switch} " in full.stdout or f"--{switch}\n" in full.stdout, path
    assert "(default: 42)" in full.stdout


def test_help_of_one_section(capsys):
    code, text = answer(capsys, "--help-all", "mix")
    assert code == 0 and "--mix.mixup-alpha" in text and "--train.epochs" not in text
    code, text = answer(capsys, "--help-all", "mixx")
    assert code == 2 and "Did you mean mix?" in text


class ExplainedError(ValueError):
    """Stands for an exception that ftlib defines."""


ExplainedError.__module__ = "ftlib.somewhere"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ConfigError("model.x = 3: no"), 2, "error: model.x = 3: no\n"),
        (ExplainedError("the disk is full"), 2, "error: the disk is full\n"),
        (KeyboardInterrupt(), 130, "Interrupted"),
        (SystemExit(143), 143, ""),
        (ZeroDivisionError("odd"), 1, "Traceback"),
    ],
)
def test_exit_codes(capsys, error, code, said):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        job(main)
    assert ended.value.code == code
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [("RayGoneError('raylet', 'it trained')", 1), ("StoppedError(15, '', ends_at_once=True)", 143)],
)
def test_a_job_whose_ray_is_gone_ends_without_exit_handlers(error, code):
    """Ray's own wait for a dead Ray."""
    program = f"""
import atexit
from ftlib.cli import job
from ftlib.launch.errors import RayGoneError, StoppedError
def main():
    atexit.register(print, "an exit handler")
    print("a line")
    raise {error}
job(main, deliver_leftovers=False)
"""
    ended = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert (ended.returncode, ended.stdout) == (code, "a line\n")


def test_a_failed_job_has_no_traceback_unless_asked(capsys, monkeypatch):
    monkeypatch.setenv("FTLIB_TRACEBACK", "1")

    def main():
        raise ConfigError("no")

    with pytest.raises(SystemExit):
        job(main)
    assert "Traceback" in capsys.readouterr().err


def test_a_job_of_another_checkout_is_refused(tmp_path):
    """Editing one checkout and running another one's code would go unnoticed."""
    (tmp_path / "ftlib").mkdir()
    (tmp_path / "ftlib" / "cli.py").touch()
    (tmp_path / "jobs").mkdir()
    copy = tmp_path / "jobs" / "phase1.py"
    copy.write_text((ROOT / "jobs" / "phase1.py").read_text())
    done = subprocess.run([sys.executable, str(copy), "--show"], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert f"this job is of the checkout {tmp_path}" in done.stderr
    assert f"ftlib comes from {ROOT}" in done.stderr and "make install" in done.stderr


@pytest.mark.parametrize("job", sorted(path.stem for path in (ROOT / "jobs").glob("*.py")))
def test_no_job_changes_the_import_path(job):
    assert "sys.path" not in (ROOT / "jobs" / f"{job}.py").read_text()


def phase(name):
    return recipes.load(name)


def test_the_phases_are_those_of_the_plan():
    """The table of phases, field by field."""
    one, two, three = (flat(phase(n)) for n in ("phase1", "phase2", "phase3"))
    for run in (one, two, three):
        assert (
            run["model.arch"] == "resnet50"
            and run["train.batch_size"] == 128
            and run["train.microbatch_size"] == 32
            and run["train.clip_norm"] == 1.0
        )
        assert (
            run["augment.crop_scale"] == (0.08, 1.0)
            and run["augment.flip"] == 0.5
            and run["augment.color_jitter"] == (0.4, 0.4, 0.4, 0.1)
            and run["augment.color_jitter_p"] == 0.2
        )
        assert (
            run["loss"] == "CrossEntropy"
            and run["loss.label_smoothing"] == 0.1
            and run["data.mean"] == (0.485, 0.456, 0.406)
        )
    assert (
        one["data.subset"],
        one["data.subset_seed"],
        two["data.subset"],
        two["data.subset_seed"],
        three["data.subset"],
    ) == (0.2, 42, 0.2, 42, 1.0)
    assert (one["augment.size"], two["augment.size"], three["augment.size"]) == (128, 224, 224)
    assert (one["model.dropout"], two["model.dropout"]) == (0.0, 0.02)
    assert (one["model.init_from"], two["model.init_from"], three["model.init_from"]) == (
        "scratch",
        "phase1",
        "phase2",
    )
    assert (one["mix.mixup_alpha"], one["mix.cutmix_alpha"], one["augment.randaugment_n"]) == (
        0,
        0,
        0,
    )
    assert (
        two["mix.mixup_alpha"],
        two["mix.cutmix_alpha"],
        two["mix.cutmix_share"],
        two["mix.p"],
    ) == (0.2, 1.0, 0.5, 1.0)
    assert (
        two["augment.randaugment_n"],
        two["augment.randaugment_m"],
        two["augment.randaugment_p"],
    ) == (2, 9, 0.3)
    assert (
        one["optimizer"],
        one["optimizer.lr"],
        two["optimizer"],
        two["optimizer.lr"],
        two["optimizer.weight_decay"],
    ) == ("Adam", 1e-3, "AdamW", 1e-4, 1e-4)
    assert (
        one["schedule"],
        one["schedule.peak"] * one["optimizer.lr"],
        one["schedule.up"],
        one["schedule.div"],
        one["schedule.final_div"],
    ) == ("OneCycle", 3e-3, 0.3, 5, 1000)
    assert (two["schedule"], two["schedule.min_lr"], three["schedule"]) == (
        "Cosine",
        1e-6,
        "Cosine",
    )
    assert (
        (one["train.epochs"], two["train.epochs"]) == (30, 50)
        and 60 <= three["train.epochs"] <= 90
        and three["train.ema_decay"] > 0
    )
    assert phase("phase2").gates == Gates(val_top1=65, max_gap=10, gain=10)


def test_the_sample_differs_only_in_size_and_in_what_digits_need():
    """Model, picture size, length, batch, data, success criteria, what it was measured on; and no
    mirroring."""
    allowed = {
        "data.path",
        "data.subset",
        "model.arch",
        "augment.size",
        "augment.flip",
        "train.epochs",
        "train.batch_size",
        "train.microbatch_size",
        "train.ema_decay",
        "gates.val_top1",
        "gates.max_gap",
        "gates.gain",
    }
    for name in ("phase1", "phase2", "phase3"):
        small, full = phase(f"sample-{name}"), phase(name)
        changed = {p for p in flat(full) if flat(full)[p] != flat(small)[p]}
        assert {p for p in changed if not p.startswith("measured.")} <= allowed
