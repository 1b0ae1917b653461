"""What all jobs share: their help, their exit codes, --quiet and --json, and quick answers.

Modules: jobs/*.py, ftlib.checks, ftlib.flags, ftlib.launch.train_job.
"""

import json
import math
import os
import re
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from ftlib import checks, recipes
from ftlib.cli import ResultOptions, _all_recipe_flags, reporting
from ftlib.config import Run
from ftlib.flags import flags_of
from ftlib.launch.train_job import train_job
from ftlib.settings import ConfigError, override
from jobs import export
from tests.test_cli import ROOT, run_job

JOBS = sorted(path.stem for path in (ROOT / "jobs").glob("[!_]*.py"))
HEAVY = ("torch", "ray", "mlflow", "pyarrow", "matplotlib", "optuna", "sklearn")
WITH_RESULT = [job for job in JOBS if job not in ("serve", "track")]

WRONG = {
    "audit": ["flwers"],
    "benchmark": ["--what", "laoder"],
    "compare": ["shapes-run", "shapes-rum"],
    "estimate": ["phase9"],
    "evaluate": ["shapes-rum"],
    "export": ["shapes-rum", "--out", "x", "--formats", "torch"],
    "find_lr": ["phase1", "--data.path", "flwers"],
    "finetune": ["--data.path", "flwers"],
    "from_scratch_long": ["--data.path", "flwers"],
    "from_scratch_short": ["--data.path", "flwers"],
    "phase1": ["--data.path", "flwers"],
    "phase2": ["--data.path", "flowers", "--model.arch", "resnet19"],
    "phase3": ["--data.path", "flowers"],
    "predict": ["--model", "/nowhere", "--source", "/nowhere", "--out", "x.parquet"],
    "prepare": ["--verify", "flwers"],
    "preview": ["phase1", "--data.path", "flwers"],
    "probe": ["flwers"],
    "promote": ["quick-phase9"],
    "replay": ["shapes-rum", "--step", "1"],
    "sample": ["stray"],
    "serve": ["--model", "/nowhere"],
    "sweep": ["--recipe", "phase2", "--space", "quikc"],
    "track": ["dleiver"],
}
"""Per job, a command line with a typing error or with something that does not exist."""
SAID = {
    "audit": "Did you mean flowers?",
    "evaluate": "Did you mean shapes-run?",
    "export": "Did you mean shapes-run?",
    "find_lr": "Did you mean flowers?",
    "finetune": "Did you mean flowers?",
    "from_scratch_long": "Did you mean flowers?",
    "from_scratch_short": "Did you mean flowers?",
    "phase1": "Did you mean flowers?",
    "phase2": "Did you mean resnet18?",
    "phase3": "there is no finished phase2 run on the data set 'flowers'",
    "predict": "--model /nowhere: there is no such folder",
    "prepare": "Did you mean flowers?",
    "preview": "Did you mean flowers?",
    "sweep": "Did you mean quick?",
    "track": "Did you mean deliver?",
}


@pytest.fixture(scope="module")
def filled_home(shapes, tmp_path_factory):
    """A home with the data set flowers and the run shapes-run."""
    home = tmp_path_factory.mktemp("home")
    (home / "data").mkdir()
    (home / "data" / "flowers").symlink_to(shapes.path)
    run = home / "runs" / "shapes-run"
    run.mkdir(parents=True)
    (run / "run.json").write_text("{}")
    return home


def environment(home, **changes):
    return {**os.environ, "FTLIB_HOME": str(home), **changes}


@pytest.mark.parametrize("job", JOBS)
def test_help_has_one_form_and_imports_nothing_heavy(job):
    done = run_job(job, "--help", heavy=HEAVY, cwd="/")
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert lines[0].startswith(f"usage: python jobs/{job}.py") and "HEAVY []" in lines[-1]
    assert max(map(len, lines)) <= 100
    assert "\x1b" not in done.stdout and "│" not in done.stdout


@pytest.mark.parametrize("job", JOBS)
def test_every_flag_has_a_help_text(job):
    lines = run_job(job, "--help-all").stdout.splitlines()
    for line, following in pairwise(lines):
        if line.startswith("  -") and len(line.split("  ")) == 2:
            assert following.startswith(" " * 30), line


@pytest.mark.parametrize("job", JOBS)
def test_an_unknown_option_is_wrong_input(job):
    done = run_job(job, *WRONG[job][:0], "--no-such-option", heavy=HEAVY)
    assert done.returncode == 2 and done.stderr.startswith("error: "), done.stderr
    assert "Traceback" not in done.stderr and "HEAVY []" in done.stdout


@pytest.mark.parametrize("job", JOBS)
def test_wrong_input_ends_with_2_and_a_hint_before_anything_heavy_is_imported(job, filled_home):
    """A typing error, or the name of something that does not exist."""
    env = environment(filled_home)
    done = run_job(job, *WRONG[job], heavy=("torch", "ray", "mlflow"), env=env, cwd=filled_home)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert SAID.get(job, "") in done.stderr
    assert done.stdout == "HEAVY []\n"


@pytest.mark.parametrize("job", JOBS)
def test_each_job_ends_through_the_shared_rule(job):
    """`ftlib.cli.job` turns what happens into the exit code; test_cli tests it for each case."""
    text = (ROOT / "jobs" / f"{job}.py").read_text()
    assert re.search(r'\nif __name__ == "__main__":\n    job\(main(, .*)?\)\n$', text)
    assert "argparse" not in text and "sys.exit" not in text


@pytest.mark.parametrize("job", WITH_RESULT)
def test_each_job_with_a_result_has_quiet_and_json(job):
    text = run_job(job, "--help").stdout
    assert "  --quiet " in text and "  --json [FILE.json] " in text


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_job_through_its_cleanup(number, code):
    program = (
        "import signal, time\nfrom ftlib.cli import job\n"
        # Tests that run in the background of a script inherit an ignored SIGINT.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def main():\n"
        "    try:\n        print('started', flush=True); time.sleep(60)\n"
        "    finally:\n        print('cleaned up', flush=True)\n"
        "job(main)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "started\n"
        process.send_signal(number)
        out, err = process.communicate()
    assert process.returncode == code and out == "cleaned up\n" and "Traceback" not in err


def test_a_console_that_lacks_a_character_does_not_end_a_finished_job():
    program = "from ftlib.cli import job\njob(lambda: print('Tür \\u2713 done'))"
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and done.stdout == "T\\xfcr \\u2713 done\n"


def test_a_file_that_cannot_be_written_is_a_failure_without_a_traceback():
    program = "from ftlib.cli import job\njob(lambda: open('/proc/x', 'w'))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: /proc/x: ")


def test_prepare_prints_its_result_as_json_and_nothing_else(filled_home, tmp_path):
    env = environment(tmp_path)
    words = ("--verify", str(filled_home / "data" / "flowers"))
    done = run_job("prepare", *words, "--json", env=env)
    found = json.loads(done.stdout.replace("HEAVY []", ""))
    assert found["verified"] and found["classes"] == 3 and found["pictures"]["train"] > 0
    assert "every file has the size" in done.stderr
    file = tmp_path / "found.json"
    quiet = run_job("prepare", *words, "--json", str(file), "--quiet", env=env)
    assert quiet.stdout == "HEAVY []\n" and quiet.stderr == ""
    assert json.loads(file.read_text()) == found


def test_a_result_is_printed_although_the_job_ends_with_1(capsys):
    with pytest.raises(SystemExit), reporting(ResultOptions(json="-")) as result:
        print("for people")
        result["count"] = 3
        raise SystemExit(1)
    out = capsys.readouterr()
    assert json.loads(out.out) == {"count": 3} and out.err == "for people\n"


def test_a_result_is_valid_json_whatever_it_holds(capsys):
    with reporting(ResultOptions(json="-")) as result:
        result.update(
            nothing=float("nan"),
            number=np.float32(0.5),
            path=Path("x"),
            pair=(1, math.inf),
            options=ResultOptions(quiet=True),
            map={3: np.int64(4)},
        )
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "nothing": None,
        "number": 0.5,
        "path": "x",
        "pair": [1, None],
        "options": {"quiet": True, "json": ""},
        "map": {"3": 4},
    }


def test_a_job_that_fails_prints_no_result(capsys):
    with pytest.raises(ZeroDivisionError), reporting(ResultOptions(json="-")) as result:
        result["half"] = 1
        raise ZeroDivisionError
    assert capsys.readouterr().out == ""


def test_a_folder_in_use_is_no_place_for_a_package(tmp_path):
    """Said at once, not after the model was scored."""
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"is not empty.*Name another"):
        export.Options(run="r", out=str(tmp_path), formats=("mlflow",))
    beside = export.Options(run="r", out=str(tmp_path), formats=("torch", "mlflow"))
    assert beside.package == tmp_path / "package"


# --- checks ---------------------------------------------------------------------------------------


def test_the_known_architectures_are_torchvisions():
    import torchvision

    assert checks.torchvision_names() == sorted(
        torchvision.models.list_models(module=torchvision.models)
    )


def test_the_known_timm_architectures_are_timms_and_no_name_of_timm_is_refused():
    import timm
    from timm.models._registry import _deprecated_models

    assert set(timm.list_models()) == set(checks._registered_names("timm")[0])
    for name in [*timm.list_models(), *_deprecated_models]:
        checks._check_architecture(f"timm/{name}")
    checks._check_architecture("timm/convnext_atto.d2_in1k")
    with pytest.raises(ConfigError, match=r"Did you mean timm/convnext_atto\?"):
        checks._check_architecture("timm/convnext_ato")


def test_a_data_set_at_an_address_is_left_to_the_loader():
    assert checks.check_data("s3://bucket/set") is None


def test_a_missing_stage_names_runs_on_other_data_and_published_weights(filled_home, monkeypatch):
    monkeypatch.setenv("FTLIB_HOME", str(filled_home))
    run = override(recipes.load("phase2"), {"data.path": "flowers"})
    with pytest.raises(ConfigError) as error:
        checks.check_recipe(run)
    for words in ("no finished phase1 run", "jobs/phase1.py --data.path", "--model.init-from"):
        assert words in str(error.value)
    with pytest.raises(ConfigError, match="Did you mean scratch?"):
        checks.check_recipe(override(run, {"model.init_from": "scrach"}))
    checks.check_recipe(override(run, {"model.init_from": "scratch"}))
    checks.check_recipe(override(run, {"name": "resumed"}))


def test_a_models_address_is_left_to_mlflow(tmp_path):
    checks.check_model("models:/NAME@champion")
    checks.check_model(str(tmp_path))
    with pytest.raises(ConfigError, match="no such folder"):
        checks.check_model(str(tmp_path / "x"))


def test_the_training_job_checks_before_it_launches(home, capsys):
    with pytest.raises(ValueError, match="there is no such data set"):
        train_job(recipes.load("phase1"), "about", ["--data.path", "nothing"])


# --- flags ----------------------------------------------------------------------------------------


def test_every_setting_of_a_recipe_is_a_flag_that_sets_it():
    from ftlib.cli import parse

    for flag in flags_of(Run, Run()):
        words = [str(flag.default)] if flag.hint in (int, float, str) and flag.default else []
        if words:
            assert parse(Run(), [flag.name, *words]) == Run(), flag.name


def test_a_job_takes_its_own_flags_and_the_recipes_in_any_order():
    from ftlib.cli import options_and_recipe
    from jobs.preview import Options

    def load(asked):
        return recipes.load(asked.recipe)

    for words in (
        ["phase2", "--step", "3", "--mix.off-epochs", "2", "--optimizer", "sgd"],
        ["--optimizer", "sgd", "--mix.off-epochs", "2", "phase2", "--step", "3"],
        [
            "--augment.no-trivialaugment",
            "optimizer:sgd",
            "--mix.off_epochs=2",
            "phase2",
            "--step=3",
        ],
    ):
        asked, run = options_and_recipe(Options, "", load, words)
        assert (asked.recipe, asked.step, run.mix.off_epochs) == ("phase2", 3, 2)
        assert type(run.optimizer).__name__ == "SGD"


# --- the documentation ----------------------------------------------------------------------------

COMMANDS = sorted(
    {
        (page.name, " ".join(found.split()))
        for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
        for found in re.findall(
            r"jobs/\w+\.py(?:[ \t]+(?!#)(?:'[^'\n]*'|[^\s`#|)&;]+))*", page.read_text()
        )
        if " --" in found
    }
)


def flags_in_help(job, cache={}):  # noqa: B006
    if job not in cache:
        texts = [run_job(job, "--help-all").stdout]
        if job == "track":
            texts += [run_job(job, c, "--help").stdout for c in ("ui", "status", "deliver", "reap")]
        cache[job] = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", "\n".join(texts)))
    return cache[job]


def test_the_documentation_uses_flags_that_exist():
    kinds = {name for flag in _all_recipe_flags() for name in flag.names}
    wrong = []
    for page, command in COMMANDS:
        job = command.split()[0].removeprefix("jobs/").removesuffix(".py")
        if job not in JOBS:
            wrong.append(f"{page}: there is no {command.split()[0]}")
            continue
        known = flags_in_help(job)
        if "--model.arch" in known:
            known = known | kinds | {"--optimizer", "--loss", "--schedule", "--help"}
        for word in command.split()[1:]:
            flag = word.split("=")[0].rstrip(".,:")
            if flag.startswith("--") and flag not in known:
                wrong.append(f"{page}: {command}: {flag}")
    assert len(COMMANDS) > 20 and not wrong, "\n".join(wrong)
