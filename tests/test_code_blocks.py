"""Every code block of README and docs is run as it is printed, or says here why it cannot be.

The names that the blocks use are real here: a run is called RUN, a registered model NAME, a folder
of pictures FOLDER. README's way from a folder to a served model: tests/test_readme.py. Servers:
tests/packaging/test_mlflow_commands.py, tests/deploy.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ftlib.paths import jobs_folder
from tests.columns import too_wide
from tests.deploy import made
from tests.test_docs import FENCE, PAGES, relative

CLUSTER, LONG = "needs machines that are not here", "trains or measures for long"
SERVER, SHOWN = "a server; its test types it", "shows what a command prints"
ELSEWHERE = "run by tests/test_readme.py"
NOT_RUN = {
    "make run": ELSEWHERE,
    "Done in 0:01:40": SHOWN,
    "source .venv/bin/activate": ELSEWHERE,
    "python jobs/prepare.py --source /data/imagenet": LONG,
    "ray ": CLUSTER,
    "export RAY_AUTH_MODE": CLUSTER,
    "docker build": CLUSTER,
    "sbatch": CLUSTER,
    "git clone": "installs",
    "# The cut, from Debian's package": "reads a package that is not everywhere",
    ".venv/bin/python -m pytest": "is a test itself",
    "Source: /data/kaggle": SHOWN,
    "manifest.json": SHOWN,
    "python jobs/serve.py": SERVER,
    "python jobs/prepare.py --source FOLDER --val-fraction 0.2 --out pets": ELSEWHERE,
    "python jobs/prepare.py --source FOLDER --val-fraction 0.4 --out pool": LONG,
    "python jobs/finetune.py": LONG,
    "phase3-digits-e75826: resnet18": SHOWN,
    "python jobs/find_lr.py": LONG,
    "python jobs/sweep.py --recipe finetune": LONG,
    "python jobs/benchmark.py": LONG,
    "python jobs/track.py ui": SERVER,
    "run = ftlib.train": LONG,
    "import ftlib": ELSEWHERE,
}
"""Beginning of a block -> why it is not run here."""
OTHER_FOLDER = {
    "python jobs/prepare.py --source DIR --val-fraction 0.1": ("DIR", "FOLDER"),
    'dataset = Dataset.open("/data/flowers")': ("/data/flowers", "SET"),
}
"""Lines whose names stand for another thing than the same names elsewhere."""
SPACE, TRACKED = (
    '"""First line: what it is for."""',
    "from ftlib.track.tracking import open_tracking",
)
MADE_BEFORE = {
    TRACKED: """
from pathlib import Path
from ftlib.config import Run
from ftlib.track.lineage import run_tags
from ftlib.track.logged_params import params_of
run, folder, epoch = Run(name="tracked"), Path("tracked"), 1
""",
}
"""What a Python block takes from the text around it."""


def blocks():
    """(page, language, block) of all pages but the generated one."""
    for page in PAGES:
        if page.name != "settings.md":
            for language, block in FENCE.findall(page.read_text("utf-8")):
                yield relative(page), language, block


def run_here():
    for page, language, block in blocks():
        if not any(block.startswith(start) for start in NOT_RUN):
            yield pytest.param(language, block, id=f"{page}: {block.splitlines()[0][:50]}")


def test_every_reason_is_of_a_block():
    found = [block for _, _, block in blocks()]
    unused = [s for s in NOT_RUN if not any(block.startswith(s) for block in found)]
    assert not unused, f"no block begins with {unused}"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which the names that the pages use are there, and the environment to use it."""
    place = tmp_path_factory.mktemp("place")
    (place / "jobs").symlink_to(jobs_folder())
    rng = np.random.default_rng(0)
    for number, split in enumerate(("DIR/train", "DIR/val", "DIR/test", "FOLDER", "MORE")):
        for kind in made.CLASSES:
            (place / split / kind).mkdir(parents=True)
            for i in range(10):
                picture = Image.fromarray(made.drawing(kind, rng, side=64))
                picture.save(place / split / kind / f"{number}-{i}.jpg")
    shutil.copy(place / "FOLDER/disc/3-0.jpg", place / "cat.jpg")
    env = {
        **{k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")},
        "FTLIB_HOME": str(place / "home"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    for line in (
        "prepare --source DIR --out DATA",
        "prepare --source DIR --out other",
        "prepare --source FOLDER --val-fraction 0.1 --out SET",
        "phase1 --name RUN --data.path DATA --data.subset 1 --data.tuning-fraction 0.2 "
        "--model.arch resnet18 --augment.size 32 --train.epochs 1 --train.batch-size 8 "
        "--train.microbatch-size 8 --gates.val-top1 0",
        "export RUN --out registered --formats mlflow --register NAME --alias champion",
    ):
        job, _, options = line.partition(" ")
        typed(f"python jobs/{job}.py {options}", place, env)
    (place / "SET").symlink_to(place / "home/data/SET")
    return place, env


def typed(script, place, env):
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", script],
        cwd=place,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    assert not too_wide(done.stdout), script
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("language, block", list(run_here()))
def test_a_code_block_runs_as_it_is_printed(language, block, place):
    folder, env = place
    lines = []
    for line in block.splitlines():
        code = line.split("  #")[0].rstrip()
        old, new = OTHER_FOLDER.get(code, ("", ""))
        lines.append(line.replace(old, new) if old else line)
    block = "\n".join(lines)
    if language != "python":
        before = block.split("mlflow models serve")[0]
        typed(before, folder, env)
        return
    if block.startswith(SPACE):
        (folder / "mine.py").write_text(block)
        block = "from ftlib.tune import spaces\nprint(spaces.load('mine.py').describe())"
    start = block.splitlines()[0]
    typed(
        f"eval \"$(python jobs/track.py env)\"\npython - <<'END'\n"
        f"{MADE_BEFORE.get(start, '')}{block}\nEND",
        folder,
        env,
    )


def test_blocks_of_shells_have_no_prompt():
    """They are pasted whole."""
    prompts = [b for _, language, b in blocks() if re.search(r"^\s*[$>] ", b, re.MULTILINE)]
    assert not prompts
