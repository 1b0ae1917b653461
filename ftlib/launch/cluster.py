"""The one door to Ray: join a cluster or start one here, and work out what fits on it.

Under RAY_ADDRESS (which `ray job submit` sets) a job joins that cluster; otherwise it starts its
own on this machine. It never attaches to whatever else happens to run on the host.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import secrets
import sys
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ftlib.config import Cluster
from ftlib.cpus import available_cpus
from ftlib.launch import own_ray, ray_address
from ftlib.launch.errors import LaunchError
from ftlib.paths import environment_variables

ROOT = str(Path(__file__).resolve().parents[2])
"""Folder that holds ftlib: workers need it on their PYTHONPATH, wherever the job was started."""
BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")
"""Left on the head node by `ray up`: what the autoscaler may start."""

_TRAIN_DEFAULTS = {
    # A lost worker is noticed, and a report taken, this fast (Ray: 2 s).
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Ray asks for the lost node's resources once more before it looks again.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # it prints everything twice
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "NO_ALBUMENTATIONS_UPDATE": "1",  # its import would ask PyPI for a newer version
}


def connect(*, dashboard: bool = False) -> bool:
    """Join the cluster at RAY_ADDRESS or start one here. Returns whether this call did so.

    A cluster started here has its own token, kept in memory: Ray's ports listen on all interfaces,
    and without a token anybody who reaches them can run code. `dashboard` is needed where trials
    with their own worker groups are stopped early (Ray cleans up after them through it).

    Raises LaunchError where no cluster answers at RAY_ADDRESS or it cannot be joined, or none can
    be started here.
    """
    for name, value in _TRAIN_DEFAULTS.items():
        os.environ.setdefault(name, value)
    address = os.environ.get("RAY_ADDRESS", "")
    if address:
        ray_address.check(address)
    elif not _initialized():
        # It starts a process that waits for a notice that this machine is going.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        own_ray.check_shared_memory()
        if "RAY_AUTH_MODE" not in os.environ:
            _make_token()
    import ray

    if ray.is_initialized():
        own_ray.forget_unless(ray.get_runtime_context().gcs_address)
        return False
    path = os.pathsep.join(
        dict.fromkeys([ROOT, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))])
    )
    # Workers' warnings come through the driver's actor; what Ray's own processes print is of no use
    # to a user, and is in Ray's logs.
    common: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": False}
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    if address:
        with own_ray.keeping_sigterm_handler():
            _join(ray, address, path, common)
        own_ray.forget_unless(ray.get_runtime_context().gcs_address)
    else:
        # PYTHONPATH is not set by a runtime environment, for which Ray would not use the processes
        # that it has started beforehand.
        with environment_variables(PYTHONPATH=path):
            own_ray.start(ray, include_dashboard=dashboard, **common)
    return True


def trains_locally(cluster: Cluster) -> bool:
    """Whether a run trains in the job's own process: one worker and no cluster to join."""
    if cluster.local != "auto":
        return cluster.local == "true"
    return cluster.high == 1 and not os.environ.get("RAY_ADDRESS") and not _initialized()


def _make_token() -> None:
    """Turn token authentication on, with a token of this process's own."""
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    if "ray" in sys.modules:  # it has read its settings already
        from ray import _raylet

        raylet: Any = _raylet
        raylet.Config.initialize("")
        raylet.AuthenticationTokenLoader.instance().reset_cache()


def _join(ray: ModuleType, address: str, path: str, common: dict[str, Any]) -> None:
    variables = {"PYTHONPATH": path, "NO_ALBUMENTATIONS_UPDATE": "1"}
    try:
        ray.init(**common, runtime_env={"env_vars": variables})
    except ConnectionError as error:
        raise ray_address.no_cluster(address, str(error).splitlines()[0]) from None
    except RuntimeError as error:
        if "ersion mismatch" not in str(error):
            raise
        raise LaunchError(f"RAY_ADDRESS = {address}: {' '.join(str(error).split())}") from None
    except ValueError as error:
        if "env_vars" not in str(error) and "runtime_env" not in str(error):
            raise
        ray.init(**common)  # the job's own runtime environment already says what the workers see


def _initialized() -> bool:
    if "ray" not in sys.modules:
        return False
    import ray

    return bool(ray.is_initialized())


def refuse_open(allow_open: bool) -> None:
    """Raise LaunchError on a cluster that others can reach while token authentication is off."""
    import ray

    if allow_open or ray_address.asks_for_token(ray.get_runtime_context().gcs_address):
        return
    addresses = sorted({str(n["NodeManagerAddress"]) for n in ray.nodes() if n["Alive"]})
    outside = [a for a in addresses if not _loopback(a)]
    if outside:
        raise LaunchError(
            f"this Ray cluster ({', '.join(outside)}) is open: token authentication is off, so "
            "anybody who reaches its ports can run code on it. Restart it with RAY_AUTH_MODE=token "
            "(`ray get-auth-token --generate` makes the token) and set the same here, or add "
            "--cluster.allow-open if its network is closed to others"
        )


def _loopback(address: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(address.strip("[]")).is_loopback
    return address == "localhost"


# --- what fits ---


@dataclass(frozen=True)
class Node:
    """CPUs and GPUs of a node, taken or not."""

    cpus: float
    gpus: float
    head: bool = False
    """Whether it is the head of a cluster, which no autoscaler starts."""


@dataclass(frozen=True)
class Capacity:
    """What the cluster has, and what its autoscaler may add to it."""

    nodes: tuple[Node, ...]
    growing: tuple[Node, ...] = ()
    """Nodes that an autoscaler can start, those that it has started included."""
    unknown: bool = False
    """Whether an autoscaler is at work whose limits cannot be seen from here (Kubernetes)."""

    @property
    def reachable(self) -> tuple[Node, ...]:
        """All nodes, started or not. An autoscaler's started node is known by its size."""
        return self.nodes + tuple((Counter(self.growing) - Counter(self.nodes)).elements())

    @property
    def can_grow(self) -> bool:
        return bool(self.growing) or self.unknown


@dataclass(frozen=True)
class Placement:
    """How many workers, and what each reserves."""

    low: int
    high: int
    gpus: float
    cpus: int

    @property
    def resources(self) -> dict[str, float]:
        """What each worker reserves, in Ray's names."""
        return {k: v for k, v in {"CPU": float(self.cpus), "GPU": self.gpus}.items() if v}

    @property
    def num_workers(self) -> int | tuple[int, int]:
        return self.low if self.low == self.high else (self.low, self.high)


def capacity() -> Capacity:
    """Capacity of the cluster that this process is connected to."""
    import ray

    nodes = tuple(
        Node(
            n["Resources"].get("CPU", 0),
            n["Resources"].get("GPU", 0),
            head="node:__internal_head__" in n["Resources"],
        )
        for n in ray.nodes()
        if n["Alive"]
    )
    unknown = bool(os.environ.get("KUBERNETES_SERVICE_HOST") and os.environ.get("RAY_CLUSTER_NAME"))
    return Capacity(
        nodes,
        _autoscaler_nodes(BOOTSTRAP.expanduser()) if os.environ.get("RAY_ADDRESS") else (),
        unknown,
    )


def this_machine() -> Capacity:
    """Capacity of this machine alone, without Ray."""
    import torch

    return Capacity((Node(float(available_cpus()), float(torch.cuda.device_count())),))


def _autoscaler_nodes(file: Path) -> tuple[Node, ...]:
    """Worker nodes that the autoscaler may start, from the cluster's configuration if any."""
    if not file.is_file():
        return ()
    import yaml

    settings = yaml.safe_load(file.read_text())
    nodes: list[Node] = []
    for name, kind in settings.get("available_node_types", {}).items():
        if name != settings.get("head_node_type"):
            resources = kind.get("resources", {})
            node = Node(resources.get("CPU", 0), resources.get("GPU", 0))
            nodes += [node] * min(int(kind.get("max_workers", 0)), 1000)
    return tuple(nodes[: int(settings.get("max_workers", len(nodes)))])


def placement(cluster: Cluster, capacity: Capacity) -> Placement:
    """Turn cluster.workers, gpus_per_worker and cpus_per_worker into numbers.

    Raises LaunchError where they cannot be had.
    """
    nodes = capacity.reachable
    has_gpus = any(n.gpus for n in nodes)
    gpus = cluster.gpus_per_worker if cluster.gpus_per_worker >= 0 else float(has_gpus)
    if gpus and not has_gpus and not capacity.unknown:
        raise LaunchError(
            f"cluster.gpus_per_worker = {gpus:g}: there is no GPU here. Set it to 0 to train on "
            "CPUs, or submit the job to a cluster with GPUs"
        )
    if capacity.unknown:  # the autoscaler decides; ask for what was said
        if cluster.gpus_per_worker < 0 and not workers_that_fit(nodes, gpus, 1):
            raise LaunchError(
                "no worker node has started yet, so nobody can see here whether they have GPUs. "
                "Say what a worker reserves: --cluster.gpus-per-worker 1 (0 to train on CPUs) and "
                "--cluster.cpus-per-worker N"
            )
        return Placement(cluster.low, cluster.high, gpus, cluster.cpus_per_worker or 1)
    most = workers_that_fit(nodes, gpus, cluster.cpus_per_worker or 1)
    if most < cluster.low:
        raise _too_many_workers(cluster, nodes, gpus, most)
    workers = min(cluster.high, most)
    cpus = cluster.cpus_per_worker
    if not cpus:
        cpus = 1
        while cpus < 4096 and workers_that_fit(nodes, gpus, cpus + 1) >= workers:
            cpus += 1
    return Placement(cluster.low, cluster.high, gpus, cpus)


def _too_many_workers(
    cluster: Cluster, nodes: tuple[Node, ...], gpus: float, most: int
) -> LaunchError:
    each = f"{cluster.cpus_per_worker or 1} CPU"
    if gpus:
        each = f"{gpus:g} GPU and {each}"
    all_cpus, all_gpus = sum(n.cpus for n in nodes), sum(n.gpus for n in nodes)
    count = f"{len(nodes)} node{'s' if len(nodes) != 1 else ''}"
    advice = f"Set cluster.workers to {most}" if most else "Ask for less per worker"
    return LaunchError(
        f"cluster.workers = {cluster.workers} with {each} each: only {most} fit on this cluster "
        f"({all_cpus:g} CPUs and {all_gpus:g} GPUs on {count}). {advice}, or use a larger cluster"
    )


def workers_that_fit(nodes: tuple[Node, ...], gpus: float, cpus: int) -> int:
    """Workers with that many GPUs and CPUs that the nodes hold, if nothing else runs on them."""
    return sum(
        int(min(n.cpus // cpus, (n.gpus + 1e-9) // gpus if gpus else n.cpus // cpus)) for n in nodes
    )
