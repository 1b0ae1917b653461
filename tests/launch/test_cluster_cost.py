"""What an epoch costs on a cluster.yaml's node types, by arithmetic done by hand; and the prices.

Holds the tests of cluster_cost and prices.
"""

import dataclasses
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ftlib.config import Run, Train
from ftlib.launch import cluster_cost, estimate, prices
from ftlib.launch.cluster import Node
from ftlib.launch.cluster_cost import NodeType, Workload
from ftlib.launch.prices import Price
from ftlib.settings import ConfigError, override

FILE = Path(__file__).parents[2] / "cluster.yaml"
HEAD = Price(0.1, 0, "a head")
WORK = Workload(microbatches=8, microbatch_s=0.1, gradient_bytes=100_000_000, steps_per_epoch=3600)
ONE_GPU = NodeType(
    name="gpu",
    instance="made-up",
    price=Price(1.0, 1, "one GPU", network_gbps=8),  # 1 GB/s
    spot=True,
    node=Node(8, 1),
    max_nodes=8,
)


def costs(work=WORK, kind=ONE_GPU):
    return cluster_cost.epoch_costs(work, kind, HEAD, gpus=1, cpus=8)


# --- the model ---


def test_one_worker_has_no_traffic_and_pays_for_its_node_and_the_head():
    one = costs()[0]
    assert (one.workers, one.nodes, one.efficiency) == (1, 1, 1.0)
    assert one.epoch_s == pytest.approx(3600 * 0.8)
    assert one.usd == pytest.approx(0.8 * (1.0 + 0.1))
    assert one.usd_spot == pytest.approx(0.8 * (prices.SPOT_SHARE * 1.0 + 0.1))


def test_a_ring_sends_almost_twice_the_gradients_through_each_network():
    four = costs()[3]
    traffic = 2 * 3 / 4 * 0.1  # 100 MB at 1 GB/s
    assert four.epoch_s == pytest.approx(3600 * (0.2 + traffic))
    assert four.efficiency == pytest.approx(0.8 / (4 * (0.2 + traffic)))
    assert four.usd == pytest.approx((0.2 + traffic) * (4 * 1.0 + 0.1))


def test_strict_gathers_the_gradients_of_every_microbatch():
    strict = dataclasses.replace(WORK, strict=True)
    assert cluster_cost.traffic_s(strict, 4, 4, 8) == pytest.approx(2 * 3 * 0.1)


def test_workers_on_one_node_have_no_traffic_between_nodes():
    four_gpus = dataclasses.replace(ONE_GPU, node=Node(32, 4), max_nodes=2)
    found = costs(kind=four_gpus)
    assert [c.nodes for c in found] == [1, 1, 1, 1, 2, 2, 2, 2]
    assert found[3].efficiency == 1.0 and found[7].efficiency < 1.0


def test_microbatches_that_do_not_divide_evenly_cost_efficiency():
    quiet = dataclasses.replace(WORK, gradient_bytes=0)
    assert [c.efficiency for c in costs(quiet)] == pytest.approx(
        [1, 1, 8 / 9, 1, 8 / 10, 8 / 12, 8 / 14, 1]
    )


def test_nodes_and_microbatches_limit_the_workers():
    assert len(costs()) == 8
    assert len(costs(kind=dataclasses.replace(ONE_GPU, max_nodes=3))) == 3
    assert costs(kind=dataclasses.replace(ONE_GPU, node=Node(4, 1))) == []


@pytest.mark.parametrize(
    ("megabytes", "workers"),
    [
        (0, 8),
        (20, 4),  # at 4: 0.8 / (4 (0.2 + 0.03)) = 87 %; at 8: 0.8 / (8 (0.1 + 0.035)) = 74 %
        (60, 2),  # at 2: 0.8 / (2 (0.4 + 0.06)) = 87 %; at 4: 0.8 / (4 (0.2 + 0.09)) = 69 %
        (250, 1),  # at 2: 0.8 / (2 (0.4 + 0.25)) = 62 %
    ],
)
def test_the_most_workers_that_stay_efficient(megabytes, workers):
    work = dataclasses.replace(WORK, gradient_bytes=megabytes * 1_000_000)
    assert cluster_cost.most_efficient_workers(costs(work)) == workers


@given(
    microbatches=st.integers(1, 64),
    microbatch_s=st.floats(1e-3, 10),
    gradient_bytes=st.integers(0, 10**10),
)
def test_more_workers_are_never_more_than_efficient_and_one_always_is(
    microbatches, microbatch_s, gradient_bytes
):
    work = Workload(microbatches, microbatch_s, gradient_bytes, steps_per_epoch=10)
    found = costs(work)
    assert found[0].efficiency == pytest.approx(1)
    assert all(0 < c.efficiency <= 1 + 1e-9 for c in found)
    assert cluster_cost.most_efficient_workers(found) >= 1


def test_a_step_timed_as_one_of_several_workers_is_counted_by_its_own_microbatches():
    found = estimate.CostEstimate(
        steps_per_epoch=100,
        epochs=3,
        evaluations=2,
        workers=3,
        step_s=0.9,
        device_step_s=0.5,
        loader_step_s=0.25,
        checkpoint_s=0.1,
        evaluation_s=2.0,
        images_per_step=256,
        steps_timed=9,
        spread=0.01,
        gradient_bytes=1000,
    )
    run = Run(train=Train(batch_size=256, microbatch_size=32))
    work = estimate.workload(found, run)
    assert work == Workload(8, pytest.approx(0.3), 1000, 100, 0.1), "3 of 8 microbatches in 0.9 s"
    assert estimate.workload(found, override(run, {"cluster.strict_elastic": True})).strict


# --- cluster.yaml ---


def test_the_cluster_yaml_of_this_repository():
    found = cluster_cost.read_cluster(str(FILE))
    assert found.head == "m6i.xlarge"
    (gpu,) = found.workers
    assert (gpu.instance, gpu.spot, gpu.node, gpu.max_nodes) == (
        "g4dn.2xlarge",
        True,
        Node(8, 1),
        4,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s["available_node_types"]["gpu"]["node_config"].update(
                InstanceType="g4dn.3xlarge"
            ),
            r"gpu: g4dn\.3xlarge: its price is not known. Did you mean g4dn\.[12]*xlarge",
        ),
        (lambda s: s.pop("available_node_types"), "needs available_node_types"),
        (lambda s: s["available_node_types"].pop("gpu"), "has no node type but the head's"),
        (
            lambda s: s["available_node_types"]["gpu"].pop("node_config"),
            "gpu has no node_config.InstanceType",
        ),
    ],
)
def test_what_cannot_be_priced_is_refused(tmp_path, change, message):
    settings = yaml.safe_load(FILE.read_text())
    change(settings)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(ConfigError, match=message):
        cluster_cost.read_cluster(str(tmp_path / "c.yaml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "cannot be read"), ("a: [", "cannot be read as YAML"), ("- 1", "not a cluster.yaml")],
)
def test_a_file_that_is_no_cluster_yaml_is_refused(tmp_path, text, message):
    file = tmp_path / "c.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        cluster_cost.read_cluster(str(file))


# --- text ---


def test_the_table_names_the_limit_and_fits_a_terminal():
    lines = cluster_cost.table(ONE_GPU, costs(dataclasses.replace(WORK, gradient_bytes=6 * 10**7)))
    assert lines[-1] == "  more than 2 workers: below 80 % efficiency"
    assert len(lines) == 2 + 8 + 1 and max(map(len, lines)) <= 100
    quiet = dataclasses.replace(WORK, gradient_bytes=0)
    assert cluster_cost.table(ONE_GPU, costs(quiet))[-1] == (
        "  8 workers, the most there can be, stay above 80 % efficiency"
    )


def test_a_long_table_shows_powers_of_two_and_the_limit():
    many = dataclasses.replace(WORK, microbatches=48, gradient_bytes=50_000_000)
    kind = dataclasses.replace(ONE_GPU, max_nodes=100)
    found = costs(many, kind)
    limit = cluster_cost.most_efficient_workers(found)
    rows = [int(line.split()[0]) for line in cluster_cost.table(kind, found)[2:-1]]
    assert rows == [1, 2, 4, 8, 12, 13, 16, 32, 48] and limit == 12


# --- prices ---


def test_prices_name_the_nearest_machine_and_the_other_way():
    with pytest.raises(ConfigError, match=r"Did you mean g5\.xlarge.*or give --price"):
        prices.price_of("g5.xlagre")


def test_spot_is_cheaper_and_every_machine_has_a_network():
    for name, price in prices.PRICES.items():
        assert 0 < price.spot_usd_per_hour < price.usd_per_hour, name
        assert price.network_gbps > 0, name
