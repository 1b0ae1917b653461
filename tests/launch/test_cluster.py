"""What fits on a cluster, and which clusters are refused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlib.config import Cluster, Run
from ftlib.launch import cluster
from ftlib.launch.cluster import Capacity, Node, placement
from ftlib.launch.errors import LaunchError
from ftlib.settings import ConfigError

LAPTOP = Capacity((Node(8, 0),))
BOX = Capacity((Node(16, 4),))
FLEET = Capacity((Node(0, 0), Node(8, 1), Node(8, 1), Node(8, 1)))


@pytest.mark.parametrize(
    ("asked", "where", "low", "high", "gpus", "cpus"),
    [
        (Cluster(), LAPTOP, 1, 1, 0, 8),
        (Cluster(workers="3"), LAPTOP, 3, 3, 0, 2),
        (Cluster(workers="1:3"), LAPTOP, 1, 3, 0, 2),
        (Cluster(workers="1:100"), LAPTOP, 1, 100, 0, 1),
        (Cluster(), BOX, 1, 1, 1, 16),
        (Cluster(workers="4"), BOX, 4, 4, 1, 4),
        (Cluster(workers="4", cpus_per_worker=2), BOX, 4, 4, 1, 2),
        (Cluster(workers="2", gpus_per_worker=0), BOX, 2, 2, 0, 8),
        (Cluster(workers="8", gpus_per_worker=0.5), BOX, 8, 8, 0.5, 2),
        (Cluster(workers="3"), FLEET, 3, 3, 1, 8),
        (Cluster(workers="1:8"), FLEET, 1, 8, 1, 8),
    ],
)
def test_placements(asked, where, low, high, gpus, cpus):
    found = placement(asked, where)
    assert (found.low, found.high, found.gpus, found.cpus) == (low, high, gpus, cpus)


@pytest.mark.parametrize(
    ("asked", "where", "said"),
    [
        (Cluster(gpus_per_worker=1), LAPTOP, "there is no GPU here. Set it to 0"),
        (
            Cluster(workers="9"),
            LAPTOP,
            r"only 8 fit on this cluster \(8 CPUs and 0 GPUs on 1 node\). Set cluster.workers to 8",
        ),
        (Cluster(workers="5"), BOX, "5 with 1 GPU and 1 CPU each: only 4 fit"),
        (Cluster(workers="4"), FLEET, "only 3 fit"),
        (Cluster(workers="1", cpus_per_worker=9), LAPTOP, "Ask for less per worker"),
    ],
)
def test_what_does_not_fit_is_refused_before_ray_waits_for_it(asked, where, said):
    with pytest.raises(LaunchError, match=said):
        placement(asked, where)


def test_what_an_autoscaler_may_start_counts():
    head = (Node(4, 0),)
    with pytest.raises(LaunchError):
        placement(Cluster(workers="2", gpus_per_worker=1), Capacity(head))
    found = placement(Cluster(workers="2"), Capacity(head, growing=(Node(8, 1),) * 2))
    assert (found.gpus, found.cpus) == (1, 8)
    assert (
        placement(Cluster(workers="64", gpus_per_worker=1), Capacity(head, unknown=True)).low == 64
    )


def test_a_node_that_an_autoscaler_has_started_counts_once():
    head, growing = Node(8, 0, head=True), (Node(8.0, 0.0),) * 2
    for started in range(3):
        where = Capacity((head, *growing[:started]), growing)
        assert placement(Cluster(workers="24", cpus_per_worker=1), where).low == 24
        with pytest.raises(LaunchError, match="only 24 fit .* on 3 nodes"):
            placement(Cluster(workers="25", cpus_per_worker=1), where)
        assert where.can_grow, "it starts a lost node again"


def test_workers_are_not_put_on_cpus_because_no_gpu_node_has_started_yet():
    """On Kubernetes the autoscaler's limits cannot be seen, and the head has no CPUs to give."""
    empty = Capacity((Node(0, 0),), unknown=True)
    with pytest.raises(LaunchError, match="--cluster.gpus-per-worker 1"):
        placement(Cluster(workers="1:4"), empty)
    assert placement(Cluster(workers="1:4", gpus_per_worker=0), empty).gpus == 0
    started = Capacity((Node(0, 0), Node(7, 1)), unknown=True)
    assert placement(Cluster(workers="1:4"), started).gpus == 1


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 64), st.integers(0, 8)), min_size=1, max_size=6),
    st.integers(1, 16),
    st.sampled_from([0.0, 0.5, 1.0, 2.0]),
)
def test_a_placement_fits_the_nodes(nodes, workers, gpus):
    """Packing the promised bundles onto the nodes succeeds, and one more CPU each would not."""
    where = Capacity(tuple(Node(c, g) for c, g in nodes))
    try:
        found = placement(Cluster(workers=str(workers), gpus_per_worker=gpus), where)
    except LaunchError:
        assert sum(min(c, int(g / gpus) if gpus else c) for c, g in nodes) < workers
        return

    def packed(cpus):
        return sum(min(c // cpus, int(g / gpus) if gpus else c // cpus) for c, g in nodes)

    assert packed(found.cpus) >= workers > packed(found.cpus + 1)


@pytest.mark.parametrize(
    ("address", "closed"),
    [
        ("127.0.0.1", True),
        ("127.8.0.1", True),
        ("::1", True),
        ("localhost", True),
        ("10.0.0.4", False),
        ("192.168.1.2", False),
        ("0.0.0.0", False),
        ("host", False),
    ],
)
def test_which_addresses_are_closed(address, closed):
    assert cluster._loopback(address) == closed


def test_an_open_cluster_is_refused(monkeypatch):
    import ray

    class Context:
        gcs_address = "10.0.0.4:6379"

    def nodes_at(*addresses):
        nodes = [{"NodeManagerAddress": a, "Alive": True} for a in addresses]
        monkeypatch.setattr(ray, "nodes", lambda: nodes)

    monkeypatch.setattr(ray, "get_runtime_context", Context)
    monkeypatch.setattr(cluster.ray_address, "asks_for_token", lambda address: False)
    nodes_at("127.0.0.1")
    cluster.refuse_open(False)
    nodes_at("127.0.0.1", "10.0.0.4")
    with pytest.raises(
        LaunchError, match=r"\(10.0.0.4\) is open.*RAY_AUTH_MODE=token.*--cluster.allow-open"
    ):
        cluster.refuse_open(False)
    cluster.refuse_open(True)
    monkeypatch.setattr(cluster.ray_address, "asks_for_token", lambda address: True)
    cluster.refuse_open(False)


def test_what_ray_says_of_a_cluster_is_passed_on(monkeypatch):
    import ray

    def refused(**settings):
        raise ConnectionError("no\nmore lines")

    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(ray, "init", refused)
    with pytest.raises(
        LaunchError, match=r"RAY_ADDRESS = auto: no Ray cluster answers there \(no\)"
    ):
        cluster.connect()


# --- training in the job's own process ---


@pytest.mark.parametrize(
    ("asked", "address", "local"),
    [
        (Cluster(), "", True),
        (Cluster(), "10.0.0.4:6379", False),
        (Cluster(local="true"), "10.0.0.4:6379", True),
        (Cluster(local="false"), "", False),
        (Cluster(workers="2"), "", False),
        (Cluster(workers="1:4"), "", False),
    ],
)
def test_one_worker_without_a_cluster_trains_in_the_job_s_own_process(
    monkeypatch, asked, address, local
):
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(cluster, "_initialized", lambda: False)
    assert cluster.trains_locally(asked) is local


def test_several_workers_cannot_train_in_one_process():
    with pytest.raises(ConfigError, match="workers = 2 need a cluster. Leave local at auto"):
        Run(cluster=Cluster(workers="2", local="true"))
