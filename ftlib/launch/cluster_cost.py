"""What an epoch takes and costs on the node types of a cluster.yaml, by number of workers.

A step is m microbatches, shared by W workers: the busiest one trains ceil(m / W) of them, and then
all wait until the gradients are summed. The time of a microbatch is measured on this machine, so
the numbers hold for nodes that are like it. The traffic is counted as if none of it overlapped with
training, although ftlib starts it during the last backward pass: the real efficiency is higher.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlib.launch.cluster import Capacity, Node, workers_that_fit
from ftlib.launch.prices import AS_OF, SPOT_SHARE, Price, price_of
from ftlib.launch.progress import duration_short
from ftlib.settings import ConfigError
from ftlib.text import percent, wrapped

EFFICIENT = 0.8
"""Below this share of its time spent on training, a worker is not worth its price."""


@dataclass(frozen=True)
class Workload:
    """What was measured of a run. Seconds and bytes."""

    microbatches: int
    """Microbatches in a step, over all workers."""
    microbatch_s: float
    """Time of one, loading included."""
    gradient_bytes: int
    """Bytes that the workers sum in every step."""
    steps_per_epoch: int
    checkpoint_s: float = 0.0
    """Training time that a checkpoint costs, once an epoch."""
    strict: bool = False
    """Whether every microbatch's gradients are gathered, for cluster.strict_elastic."""


@dataclass(frozen=True)
class NodeType:
    """A kind of worker node in a cluster.yaml."""

    name: str
    instance: str
    price: Price
    spot: bool
    """Whether the file asks for spot instances."""
    node: Node
    max_nodes: int


@dataclass(frozen=True)
class ClusterTypes:
    """What a cluster.yaml can start."""

    file: str
    head: str
    """Instance type of the head."""
    head_price: Price
    workers: tuple[NodeType, ...]


@dataclass(frozen=True)
class EpochCost:
    """An epoch with a number of workers on one node type."""

    workers: int
    nodes: int
    epoch_s: float
    efficiency: float
    """Share of the workers' time that is spent on training, compared with one worker alone."""
    usd: float
    """All nodes on demand, the head included."""
    usd_spot: float
    """The same with spot instances as workers, at `SPOT_SHARE` of the price."""


# --- reading cluster.yaml ---


def read_cluster(file: str) -> ClusterTypes:
    """The node types of a cluster.yaml as `ray up` takes it.

    Raises ConfigError where it cannot be read, has no worker nodes, or names an instance type
    whose price is not known.
    """
    settings = _yaml(file)
    kinds = settings.get("available_node_types")
    if not isinstance(kinds, dict) or settings.get("head_node_type") not in kinds:
        raise ConfigError(
            f"--cluster {file}: needs available_node_types and head_node_type, as the cluster.yaml "
            "of `ray up` has them"
        )
    head = settings["head_node_type"]
    limit = int(settings.get("max_workers", 2**31))
    workers = tuple(
        _node_type(file, name, kind, limit) for name, kind in kinds.items() if name != head
    )
    if not workers:
        raise ConfigError(f"--cluster {file}: has no node type but the head's ({head})")
    instance = _instance(file, head, kinds[head])
    price = price_of(instance, f"--cluster {file}: {head}:")
    return ClusterTypes(file, instance, price, workers)


def _yaml(file: str) -> dict[str, Any]:
    import yaml

    try:
        settings = yaml.safe_load(Path(file).expanduser().read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"--cluster {file}: cannot be read as YAML ({reason})") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"--cluster {file}: is not a cluster.yaml as `ray up` takes it")
    return settings


def _instance(file: str, name: str, kind: dict[str, Any]) -> str:
    instance = (kind.get("node_config") or {}).get("InstanceType")
    if not instance:
        raise ConfigError(f"--cluster {file}: {name} has no node_config.InstanceType to be priced")
    return str(instance)


def _node_type(file: str, name: str, kind: dict[str, Any], limit: int) -> NodeType:
    instance = _instance(file, name, kind)
    price = price_of(instance, f"--cluster {file}: {name}:")
    resources = kind.get("resources") or {}
    market = (kind["node_config"].get("InstanceMarketOptions") or {}).get("MarketType")
    return NodeType(
        name=name,
        instance=instance,
        price=price,
        spot=market == "spot",
        node=Node(resources.get("CPU", 0), resources.get("GPU", price.gpus)),
        max_nodes=min(int(kind.get("max_workers", limit)), limit),
    )


# --- the model ---


def traffic_s(work: Workload, workers: int, nodes: int, network_gbps: float) -> float:
    """Seconds that the gradients of a step take between nodes.

    A ring all-reduce takes 2 (W - 1) / W times the gradients through every node's network. With
    `strict`, each worker receives W - 1 others' for every microbatch of its own instead. Traffic
    within a node is not counted.
    """
    if nodes == 1 or not network_gbps:
        return 0.0
    if work.strict:
        copies: float = -(-work.microbatches // workers) * (workers - 1)
    else:
        copies = 2 * (workers - 1) / workers
    return copies * work.gradient_bytes * 8 / (network_gbps * 1e9)


def efficiency(work: Workload, workers: int, nodes: int, network_gbps: float) -> float:
    """Training time of one worker alone, divided by the time of all `workers` together."""
    alone = work.microbatches * work.microbatch_s
    return alone / (workers * step_s(work, workers, nodes, network_gbps))


def step_s(work: Workload, workers: int, nodes: int, network_gbps: float) -> float:
    """Seconds of a step."""
    busiest = -(-work.microbatches // workers)
    return busiest * work.microbatch_s + traffic_s(work, workers, nodes, network_gbps)


def nodes_for(kind: NodeType, workers: int, gpus: float, cpus: int) -> int:
    """How many nodes of that kind hold the workers; 0 where not even one worker fits."""
    each = workers_that_fit((kind.node,), gpus, cpus)
    return -(-workers // each) if each else 0


def epoch_costs(
    work: Workload, kind: NodeType, head_price: Price, *, gpus: float, cpus: int
) -> list[EpochCost]:
    """An epoch with 1, 2, 3, ... workers, as far as nodes and microbatches go."""
    found = []
    for workers in range(1, work.microbatches + 1):
        nodes = nodes_for(kind, workers, gpus, cpus)
        if not nodes or nodes > kind.max_nodes:
            break
        step = step_s(work, workers, nodes, kind.price.network_gbps)
        epoch = work.steps_per_epoch * step + work.checkpoint_s
        hours = epoch / 3600
        found.append(
            EpochCost(
                workers=workers,
                nodes=nodes,
                epoch_s=epoch,
                efficiency=efficiency(work, workers, nodes, kind.price.network_gbps),
                usd=hours * (nodes * kind.price.usd_per_hour + head_price.usd_per_hour),
                usd_spot=hours * (nodes * kind.price.spot_usd_per_hour + head_price.usd_per_hour),
            )
        )
    return found


def most_efficient_workers(costs: list[EpochCost]) -> int:
    """The largest number of workers that keeps the efficiency at or above `EFFICIENT`."""
    return max(cost.workers for cost in costs if cost.efficiency >= EFFICIENT)


def capacity_of(kind: NodeType) -> Capacity:
    """A cluster of one head and all the nodes of that kind."""
    return Capacity((Node(0, 0),), growing=(kind.node,) * min(kind.max_nodes, 1000))


# --- text ---


def table(kind: NodeType, costs: list[EpochCost]) -> list[str]:
    """The costs as lines for a person; of many numbers of workers, the powers of two."""
    limit = most_efficient_workers(costs)
    shown = [c for c in costs if len(costs) <= 8 or _is_shown(c.workers, limit, len(costs))]
    market = "spot" if kind.spot else "on demand"
    lines = [
        wrapped(
            f"{kind.name}: {kind.instance} ({kind.price.what}, {kind.price.network_gbps:g} "
            f"Gbit/s), asked for {market}, up to {kind.max_nodes} nodes"
        ),
        "  workers  nodes  an epoch  efficiency  USD an epoch    spot",
    ]
    for cost in shown:
        lines.append(
            f"  {cost.workers:>7}  {cost.nodes:>5}  {duration_short(cost.epoch_s):>8}  "
            f"{100 * cost.efficiency:>8.0f} %  {cost.usd:>12.3f}  {cost.usd_spot:>6.3f}"
        )
    lines.append(f"  {_limit_text(costs, limit)}")
    return lines


def _is_shown(workers: int, limit: int, last: int) -> bool:
    return workers in (limit, limit + 1, last) or workers & (workers - 1) == 0


def _limit_text(costs: list[EpochCost], limit: int) -> str:
    if limit < costs[-1].workers:
        return f"more than {limit} workers: below {percent(EFFICIENT)} efficiency"
    return f"{limit} workers, the most there can be, stay above {percent(EFFICIENT)} efficiency"


def notes(cluster: ClusterTypes) -> str:
    """What the numbers rest on."""
    return (
        f"Prices of {AS_OF}, us-east-1, with one {cluster.head} as head; spot taken as "
        f"{percent(SPOT_SHARE)} of on demand.\n"
        "A microbatch takes as long as on this machine, and no traffic overlaps with training.\n"
        "Evaluations and waiting for nodes come on top."
    )
