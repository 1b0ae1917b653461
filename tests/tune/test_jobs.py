"""Holds the tests of the command lines of sweep, promote and compare."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ftlib import recipes
from ftlib.config import Run
from ftlib.settings import ConfigError, to_json

ROOT = Path(__file__).resolve().parents[2]


def job(name, *arguments):
    return subprocess.run(
        [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("name", ["sweep", "promote", "compare"])
def test_help_imports_nothing_heavy(name):
    file = str(ROOT / "jobs" / f"{name}.py")
    code = f"""
import runpy, sys
sys.argv = ["x", "--help"]
try:
    runpy.run_path({file!r}, run_name="__main__")
except SystemExit:
    pass
print(sorted({{"torch", "ray", "mlflow", "optuna", "matplotlib"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.rstrip().endswith("[]"), done.stdout + done.stderr
    assert "usage: python jobs/" in done.stdout and f"python jobs/{name}.py" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--recipe", "phase9", "--space", "quick"), "unknown recipe phase9. Did you mean phase"),
        (("--recipe", "phase2", "--space", "quikc"), "unknown space quikc. Did you mean quick?"),
        (
            ("--recipe", "phase2", "--space", "quick", "--set", "mix.mixup_alpa=1"),
            "unknown setting mix.mixup_alpa. Did you mean mix.mixup_alpha?",
        ),
        (("--recipe", "phase2", "--space", "quick", "--trials", "0"), "--trials 0: at least 1"),
    ],
)
def test_bad_input_is_one_clear_message(arguments, message):
    done = job("sweep", *arguments)
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: ")
        and message.split("?")[0] in done.stderr
        and "Traceback" not in done.stderr
    ), done.stderr


def test_compare_and_promote_name_what_is_not_there():
    done = job("compare", "a", "b")
    assert done.returncode == 2 and "there is no run a" in done.stderr
    done = job("promote", "nothing")
    assert done.returncode == 2 and "there is no sweep nothing" in done.stderr


def test_recipes_by_name_file_and_setting(tmp_path):
    phase2 = recipes.load(
        "phase2",
        [
            "mix.off_epochs=2",
            "optimizer=SGD",
            "optimizer.lr=0.2",
            "model.init-from=scratch",
            "augment.crop_scale=[0.2,1]",
        ],
    )
    assert (
        phase2.stage == "phase2"
        and phase2.mix.off_epochs == 2
        and phase2.optimizer.lr == 0.2
        and phase2.model.init_from == "scratch"
        and phase2.augment.crop_scale == (0.2, 1)
    )
    file = tmp_path / "mine.json"
    file.write_text(to_json(phase2))
    assert recipes.load(str(file)) == phase2
    file.write_text('{"train": {"epohcs": 3}}')
    with pytest.raises(
        ConfigError,
        match=r"mine.json: unknown setting train.epohcs. Did you mean (train.)?epochs\?",
    ):
        recipes.load(str(file))
    with pytest.raises(ConfigError, match="PATH=VALUE"):
        recipes.load("phase2", ["mix.off_epochs"])
    assert "phase2" in recipes.available() and isinstance(recipes.load("phase3"), Run)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_exit_code_says_which_signal_ended_a_sweep(number, code):
    from ftlib.tune import ray_tune

    with ray_tune._signals():
        signal.raise_signal(number)
    ray_tune._interrupt.clear()
    assert ray_tune.exit_code() == code
