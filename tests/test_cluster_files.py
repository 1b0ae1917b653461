"""Dockerfile, .dockerignore, rayjob.yaml and raycluster.yaml, checked without an engine.

cluster.yaml and slurm.sh have tests of their own.
"""

import fnmatch
import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from ftlib import cli, recipes
from ftlib.launch.cluster import Capacity, Node, placement

ROOT = Path(__file__).parents[1]
CUDA = {"torch", "torchvision", "triton"}


def version_of(name):
    pins = (ROOT / "requirements.txt").read_text()
    return re.search(rf"^{name}(?:\[.*?\])?==(\S+)", pins, re.M)[1]


# --- the image ---


def instructions():
    """[(instruction, arguments)] of the Dockerfile, with lines joined and comments left out."""
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", text)
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def all_of(name):
    return [arguments for instruction, arguments in instructions() if instruction == name]


def run_steps():
    """The shell commands of the RUN steps, without Docker's own options."""
    return [re.sub(r"^(--\S+\s+)+", "", step) for step in all_of("RUN")]


def is_sent_to_the_builder(path):
    """Whether .dockerignore lets a path through: the last line that matches decides."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip().removeprefix("!").removeprefix("**/")
        if pattern and not pattern.startswith("#"):
            parts = [str(parent) for parent in (Path(path), *Path(path).parents)]
            names = parts + [Path(part).name for part in parts] if "**/" in line else parts
            if any(fnmatch.fnmatch(name, pattern) for name in names if name != "."):
                sent = line.startswith("!")
    return sent


def test_instructions_are_known_and_in_order():
    names = [name for name, _ in instructions()]
    known = {"ARG", "CMD", "COPY", "ENV", "FROM", "HEALTHCHECK", "RUN", "SHELL", "USER", "WORKDIR"}
    assert set(names) <= known
    assert names[:3] == ["ARG", "FROM", "SHELL"], "the steps below are written for bash"
    assert names.index("SHELL") < names.index("RUN")


def test_every_run_step_is_valid_bash():
    shell = json.loads(all_of("SHELL")[0])
    assert shell[0] == "/bin/bash" and len(run_steps()) == 3
    health = re.sub(r"^.*?\bCMD ", "", all_of("HEALTHCHECK")[0])
    for step in (*run_steps(), health):
        subprocess.run(["bash", "-n", "-c", step], check=True)


@pytest.mark.skipif(not Path("/usr/bin/shellcheck").exists(), reason="shellcheck is not installed")
def test_shellcheck_finds_nothing_in_the_run_steps():
    # SC2086: the one list of packages is split on purpose.
    command = ["shellcheck", "--shell=bash", "--exclude=SC2086", "-"]
    for step in run_steps():
        done = subprocess.run(command, input=step, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_every_copied_file_exists_and_is_sent_to_the_builder():
    copied = [word for arguments in all_of("COPY") for word in arguments.split()[:-1]]
    assert copied == ["requirements.txt", "requirements-dev.txt", "requirements.lock"]
    for name in copied:
        assert (ROOT / name).is_file() and is_sent_to_the_builder(name)


def test_what_the_package_is_built_from_is_sent_to_the_builder_and_nothing_else():
    build = ("pyproject.toml", "README.md", "LICENSE", "ftlib/cli.py", "jobs/phase2.py")
    for name in (*build, "tune_spaces/quick.py"):
        assert (ROOT / name).is_file() and is_sent_to_the_builder(name), name
    for name in (".git/config", ".venv/bin/python", "tests/conftest.py", "docs/data.md", "out/x"):
        assert not is_sent_to_the_builder(name), name
    assert not is_sent_to_the_builder("ftlib/data/__pycache__/cache.pyc")


def test_image_has_the_lock_s_python_and_ends_as_another_user_than_root():
    python = next(a for a in all_of("ARG") if a.startswith("PYTHON=")).partition("=")[2]
    assert f"Python {python}." in (ROOT / "requirements.lock").read_text().splitlines()[0]
    assert all_of("USER") == ["ray"]
    assert "--uid 1000" in run_steps()[0], "the user of rayjob.yaml and of AWS's Ubuntu images"


STAND_IN = """#!/bin/bash
echo "$(basename "$0") $*" >> "$LOG"
"""


@pytest.fixture
def execute(tmp_path):
    """Run a RUN step with stand-ins for all that installs; returns what they were called with."""
    for name in ("apt-get", "useradd", "mkdir", "chown", "rm", "pip", "uv", "ftlib"):
        (tmp_path / name).write_text(STAND_IN)
        (tmp_path / name).chmod(0o755)
    folder = tmp_path / "context"
    folder.mkdir()
    for name in ("requirements.txt", "requirements-dev.txt", "requirements.lock"):
        (folder / name).write_text((ROOT / name).read_text())

    def run(step, **settings):
        log = tmp_path / "log"
        log.write_text("")
        env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(log), **settings}
        command = [*json.loads(all_of("SHELL")[0]), step]
        subprocess.run(command, env=env, cwd=folder, check=True)
        return log.read_text().splitlines(), folder

    return run


def test_gpu_image_installs_the_whole_lock_with_hashes(execute):
    calls, folder = execute(run_steps()[1], DEVICE="gpu", CLOUD_PACKAGES="")
    assert len(calls) == 1 and "--require-hashes" in calls[0]
    assert calls[0].endswith("-r requirements.lock")
    assert not (folder / "requirements-cpu.lock").exists()


def test_cpu_image_installs_torch_alone_and_the_lock_without_cuda(execute):
    calls, folder = execute(run_steps()[1], DEVICE="cpu", CLOUD_PACKAGES="boto3==1 other==2")
    torch = f"torch=={version_of('torch')} torchvision=={version_of('torchvision')}"
    assert any(c.startswith("uv pip") and c.endswith(f"--no-deps {torch}") for c in calls)
    assert any(c.endswith("--only-binary :all: -r requirements-cpu.lock") for c in calls)
    assert calls[-1] == "pip install --constraint requirements.txt boto3==1 other==2"
    whole, kept = (
        dict(re.findall(r"^([\w.-]+)==(.*(?:\n +.*)*)", (folder / name).read_text(), re.M))
        for name in ("requirements.lock", "requirements-cpu.lock")
    )
    left_out = set(whole) - set(kept)
    assert left_out >= CUDA
    assert all(n.startswith(("nvidia-", "cuda-")) for n in left_out - CUDA), left_out
    assert "nvidia-ml-py" in kept, "it is imported on every machine"
    assert kept == {name: entry for name, entry in whole.items() if name in kept}, "hashes, too"


@pytest.mark.parametrize(("device", "compiler"), [("gpu", True), ("cpu", False)])
def test_image_has_what_ray_up_and_kuberay_call(execute, device, compiler):
    calls, _ = execute(run_steps()[0], DEVICE=device)
    packages = next(call for call in calls if " install " in call).split()
    assert {"openssh-client", "rsync", "wget"} <= set(packages)
    assert ("g++" in packages) is compiler, "for train.compile"


def test_a_failed_download_fails_the_image(execute, tmp_path):
    (tmp_path / "pip").write_text("#!/bin/bash\nexit 1\n")
    with pytest.raises(subprocess.CalledProcessError):
        execute(run_steps()[1], DEVICE="gpu", CLOUD_PACKAGES="")


def test_health_check_asks_the_port_that_ray_s_agent_answers_without_a_token():
    from ray._private import ray_constants
    from ray.dashboard import http_server_agent

    health = all_of("HEALTHCHECK")[0]
    port, path = re.search(r"127\.0\.0\.1:(\d+)(/\S+)", health).groups()
    assert int(port) == ray_constants.DEFAULT_DASHBOARD_AGENT_LISTEN_PORT
    assert path in http_server_agent.PUBLIC_EXACT_PATHS


# --- Kubernetes ---


def documents(name):
    return list(yaml.safe_load_all((ROOT / name).read_text()))


@pytest.fixture
def job():
    return next(d for d in documents("rayjob.yaml") if d["kind"] == "RayJob")


def pods(cluster):
    """The pod specs of the head and the workers."""
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def test_standing_cluster_is_the_cluster_of_the_job(job):
    (cluster,) = documents("raycluster.yaml")
    assert (cluster["apiVersion"], cluster["kind"]) == ("ray.io/v1", "RayCluster")
    assert cluster["spec"] == job["spec"]["rayClusterSpec"]


def test_cluster_is_closed_and_of_the_pinned_ray(job):
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["rayVersion"] == version_of("ray")
    for pod in pods(cluster):
        assert pod["containers"][0]["image"].endswith(f":ray-{version_of('ray')}-py311-gpu")
        assert pod["securityContext"]["runAsUser"] == 1000 and pod["securityContext"]["fsGroup"]


def test_head_has_no_share_in_training_and_workers_come_from_zero(job):
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0", "num-gpus": "0"}
    (group,) = cluster["workerGroupSpecs"]
    assert (group["minReplicas"], group["replicas"]) == (0, 0) and group["maxReplicas"] > 1


def test_every_pod_has_shared_memory_and_every_mount_its_volume(job):
    for pod in pods(job["spec"]["rayClusterSpec"]):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {m["mountPath"]: m["name"] for m in pod["containers"][0]["volumeMounts"]}
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        assert set(mounts.values()) == set(volumes)


def test_storage_and_tracking_come_from_a_config_map_and_a_secret(job):
    (settings,) = (d for d in documents("rayjob.yaml") if d["kind"] == "ConfigMap")
    assert "MLFLOW_TRACKING_URI" in settings["data"]
    for pod in pods(job["spec"]["rayClusterSpec"]):
        sources = pod["containers"][0]["envFrom"]
        assert sources[0]["configMapRef"]["name"] == settings["metadata"]["name"]
        assert sources[1]["secretRef"] == {"name": "ftlib-storage", "optional": True}


def test_command_is_one_of_ftlib_s_and_fits_the_worker_group(job):
    program, recipe, *flags = shlex.split(job["spec"]["entrypoint"])
    assert program == "ftlib"
    run = cli.parse(recipes.load(recipe), [f.replace("<bucket>", "bucket") for f in flags])
    # What the autoscaler may start cannot be seen before it does.
    found = placement(run.cluster, Capacity((Node(0, 0),), unknown=True))
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert found.resources == {"CPU": float(limits["cpu"]), "GPU": float(limits["nvidia.com/gpu"])}
    assert found.high == group["maxReplicas"]


def test_a_deleted_job_has_time_for_its_checkpoint(job):
    variables = yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"]
    assert float(variables["RAY_JOB_STOP_WAIT_TIME_S"]) >= 30
    assert job["spec"]["shutdownAfterJobFinishes"] is True
