"""cluster.yaml passes Ray's own check, and says what docs/clusters.md promises of it."""

from pathlib import Path

import pytest
import yaml

from ftlib.config import Cluster
from ftlib.launch.cluster import Capacity, Node, _autoscaler_nodes, placement

FILE = Path(__file__).parents[1] / "cluster.yaml"


@pytest.fixture
def settings():
    return yaml.safe_load(FILE.read_text())


def prepared(settings):
    from ray.autoscaler._private.util import prepare_config

    return prepare_config(settings)


@pytest.mark.filterwarnings("ignore")  # boto3, where it is installed, warns about Python versions
def test_ray_accepts_it(settings):
    from ray.autoscaler._private.util import validate_config

    validate_config(prepared(settings))


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.update(max_worker=4),
        lambda s: s["available_node_types"]["gpu"].update(min_workers=9),
        lambda s: s["available_node_types"]["gpu"].pop("resources"),
        lambda s: s.update(head_node_type="nobody"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_the_check_is_not_empty(settings, change):
    from ray.autoscaler._private.util import validate_config

    change(settings)
    with pytest.raises(Exception):  # noqa: B017 - Ray raises several kinds, jsonschema's among them
        validate_config(prepared(settings))


@pytest.mark.filterwarnings("ignore")
def test_no_nightly_ray_is_installed(settings):
    commands = " ".join(
        str(prepared(settings)[k])
        for k in ("setup_commands", "head_setup_commands", "worker_setup_commands")
    )
    assert ".whl" not in commands and "pip install" not in commands


def test_head_is_on_demand_without_training_and_workers_are_spot(settings):
    kinds = settings["available_node_types"]
    assert "InstanceMarketOptions" not in kinds["head"]["node_config"] and kinds["head"][
        "resources"
    ] == {"CPU": 0}
    assert (
        kinds["gpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
        and kinds["gpu"]["min_workers"] == 0
    )


def test_it_is_closed_to_the_network(settings):
    assert "--env RAY_AUTH_MODE=token" in settings["docker"]["run_options"]
    starts = " ".join(settings["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in starts and "0.0.0.0" not in starts


def test_ray_and_python_are_the_pinned_ones(settings):
    pins = (FILE.parent / "requirements.txt").read_text()
    version = next(
        line.split("==")[1].split()[0] for line in pins.splitlines() if line.startswith("ray[")
    )
    assert version in settings["docker"]["image"]


def test_launch_counts_on_nodes_that_the_autoscaler_may_start(settings):
    nodes = _autoscaler_nodes(FILE)
    assert nodes == (Node(8, 1),) * 4
    found = placement(Cluster(workers="1:4"), Capacity(nodes=(Node(0, 0),), growing=nodes))
    assert (found.low, found.high, found.gpus, found.cpus) == (1, 4, 1.0, 8)
