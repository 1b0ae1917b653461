"""Joining or starting Ray, and what the cluster can carry.

Under RAY_ADDRESS (which `ray job submit` sets) a job joins that cluster; otherwise it starts its own on this machine. It never attaches to
whatever else happens to run on the host.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import secrets
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlib.config import Cluster
from ftlib.launch.errors import LaunchError
from ftlib.paths import environment

ROOT = str(Path(__file__).resolve().parents[2])
"""Folder that holds ftlib: workers need it on their PYTHONPATH, wherever the job was started from."""
BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")
"""Left on the head node by `ray up`: what the autoscaler may start."""

START_ATTEMPTS = 3
"""Times Ray may time out while it starts on this machine."""

_TRAIN_DEFAULTS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a lost worker is noticed, and a report taken, this fast (Ray: 2 s)
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",  # Ray asks for the lost node's resources once more before it looks again
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # it prints everything twice
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "NO_ALBUMENTATIONS_UPDATE": "1",  # its import would ask PyPI for a newer version
}


def connect(*, dashboard: bool = False) -> bool:
    """Join the cluster at RAY_ADDRESS or start one here, unless this process has one already. Returns whether it did.

    A cluster started here has its own token, kept in memory: Ray's ports listen on all interfaces, and without a token anybody who reaches them
    can run code. `dashboard` is needed where trials with their own worker groups are stopped early (Ray cleans up after them through it).
    """
    for name, value in _TRAIN_DEFAULTS.items():
        os.environ.setdefault(name, value)
    joining = bool(os.environ.get("RAY_ADDRESS"))
    if not joining:
        os.environ.setdefault(
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0"
        )  # a process that waits for a notice that this machine is going
    if not joining and "RAY_AUTH_MODE" not in os.environ and not _initialized():
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        if "ray" in sys.modules:  # it has read its settings already
            from ray import _raylet

            raylet: Any = _raylet
            raylet.Config.initialize("")
            raylet.AuthenticationTokenLoader.instance().reset_cache()
    import ray

    if ray.is_initialized():
        return False
    path = os.pathsep.join(
        dict.fromkeys([ROOT, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))])
    )
    # Workers' warnings come through the desk; what Ray's own processes print there is of no use to a user, and is in Ray's logs.
    common: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": False}
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    if not joining:
        # Not as a runtime environment, for which Ray would not use the processes that it has started beforehand.
        with environment(PYTHONPATH=path):
            _start(ray, include_dashboard=dashboard, **common)
        return True
    try:
        ray.init(
            **common,
            runtime_env={"env_vars": {"PYTHONPATH": path, "NO_ALBUMENTATIONS_UPDATE": "1"}},
        )
    except ConnectionError as error:
        raise LaunchError(
            f"RAY_ADDRESS = {os.environ['RAY_ADDRESS']}: no Ray cluster answers there ({str(error).splitlines()[0]}). "
            "Start one (ray start --head), or unset RAY_ADDRESS to train on this machine alone"
        ) from None
    except ValueError as error:
        if "env_vars" not in str(error) and "runtime_env" not in str(error):
            raise
        ray.init(**common)  # the job's own runtime environment already says what the workers see
    return True


def _start(ray: Any, **settings: Any) -> None:
    """A Ray of this machine's own; on one that is busy the first attempt may time out, and the second finds the files in memory."""
    for attempt in range(START_ATTEMPTS):
        try:
            ray.init(address="local", **settings)
            return
        except Exception as error:
            if "timed out" not in str(error):
                raise
            ray.shutdown()
            if attempt + 1 == START_ATTEMPTS:
                raise LaunchError(
                    f"Ray did not start on this machine within its time, {START_ATTEMPTS} times over ({str(error).splitlines()[0]}). "
                    "Other programs may be taking all of its CPU or memory: wait for them, or see the newest folder of /tmp/ray for Ray's own logs"
                ) from None


def _initialized() -> bool:
    if "ray" not in sys.modules:
        return False
    import ray

    return bool(ray.is_initialized())


def refuse_open(allow_open: bool) -> None:
    """Raise LaunchError on a cluster that others on the network reach although Ray's token authentication is off."""
    import ray
    from ray import _raylet

    raylet: Any = _raylet
    if allow_open or raylet.get_authentication_mode() == raylet.AuthenticationMode.TOKEN:
        return
    addresses = sorted({str(n["NodeManagerAddress"]) for n in ray.nodes() if n["Alive"]})
    outside = [a for a in addresses if not _loopback(a)]
    if outside:
        raise LaunchError(
            f"this Ray cluster ({', '.join(outside)}) is open: token authentication is off, so anybody who reaches its ports can run code on it. "
            "Restart it with RAY_AUTH_MODE=token (`ray get-auth-token --generate` makes the token) and set the same here, "
            "or add --cluster.allow-open if its network is closed to others"
        )


def _loopback(address: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(address.strip("[]")).is_loopback
    return address == "localhost"


# --- what fits --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Node:
    """CPUs and GPUs of a node, taken or not."""

    cpus: float
    gpus: float


@dataclass(frozen=True)
class Capacity:
    """What the cluster has, and what its autoscaler may add to it."""

    nodes: tuple[Node, ...]
    growing: tuple[Node, ...] = ()
    """Nodes that an autoscaler can start."""
    unknown: bool = False
    """An autoscaler is at work whose limits cannot be seen from here (Kubernetes)."""

    @property
    def reachable(self) -> tuple[Node, ...]:
        return self.nodes + self.growing

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
        return {k: v for k, v in {"CPU": float(self.cpus), "GPU": self.gpus}.items() if v}

    @property
    def num_workers(self) -> int | tuple[int, int]:
        return self.low if self.low == self.high else (self.low, self.high)


def capacity() -> Capacity:
    """Of the cluster this process is connected to."""
    import ray

    nodes = tuple(
        Node(n["Resources"].get("CPU", 0), n["Resources"].get("GPU", 0))
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
    """Of this process alone, without Ray."""
    import torch

    return Capacity((Node(float(len(os.sched_getaffinity(0))), float(torch.cuda.device_count())),))


def _autoscaler_nodes(file: Path) -> tuple[Node, ...]:
    """Worker nodes that the cluster's configuration lets the autoscaler start; none where there is no such file."""
    if not file.is_file():
        return ()
    import yaml

    settings = yaml.safe_load(file.read_text())
    nodes: list[Node] = []
    for name, kind in settings.get("available_node_types", {}).items():
        if name != settings.get("head_node_type"):
            resources = kind.get("resources", {})
            nodes += [Node(resources.get("CPU", 0), resources.get("GPU", 0))] * min(
                int(kind.get("max_workers", 0)), 1000
            )
    return tuple(nodes[: int(settings.get("max_workers", len(nodes)))])


def placement(cluster: Cluster, capacity: Capacity) -> Placement:
    """Turn cluster.workers, gpus_per_worker and cpus_per_worker into numbers, or raise LaunchError where they cannot be had."""
    nodes = capacity.reachable
    has_gpus = any(n.gpus for n in nodes)
    gpus = cluster.gpus_per_worker if cluster.gpus_per_worker >= 0 else float(has_gpus)
    if gpus and not has_gpus and not capacity.unknown:
        raise LaunchError(
            f"cluster.gpus_per_worker = {gpus:g}: there is no GPU here. Set it to 0 to train on CPUs, or submit the job to a cluster with GPUs"
        )
    if capacity.unknown:  # the autoscaler decides; ask for what was said
        return Placement(cluster.low, cluster.high, gpus, cluster.cpus_per_worker or 1)
    most = _fit(nodes, gpus, cluster.cpus_per_worker or 1)
    if most < cluster.low:
        each = " and ".join(
            filter(None, [f"{gpus:g} GPU" if gpus else "", f"{cluster.cpus_per_worker or 1} CPU"])
        )
        total = f"{sum(n.cpus for n in nodes):g} CPUs and {sum(n.gpus for n in nodes):g} GPUs on {len(nodes)} node{'s' if len(nodes) != 1 else ''}"
        advice = f"Set cluster.workers to {most}" if most else "Ask for less per worker"
        raise LaunchError(
            f"cluster.workers = {cluster.workers} with {each} each: only {most} fit on this cluster ({total}). {advice}, or use a larger cluster"
        )
    workers = min(cluster.high, most)
    cpus = cluster.cpus_per_worker
    if not cpus:
        cpus = 1
        while cpus < 4096 and _fit(nodes, gpus, cpus + 1) >= workers:
            cpus += 1
    return Placement(cluster.low, cluster.high, gpus, cpus)


def _fit(nodes: tuple[Node, ...], gpus: float, cpus: int) -> int:
    """Workers of that size that the nodes hold, if nothing else runs on them."""
    return sum(
        int(min(n.cpus // cpus, (n.gpus + 1e-9) // gpus if gpus else n.cpus // cpus)) for n in nodes
    )
