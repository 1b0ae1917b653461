"""What a job says of a RAY_ADDRESS that it cannot use, before Ray tries for minutes."""

import os
import shutil
import socket
import subprocess
import sys
from concurrent import futures
from pathlib import Path

import grpc
import pytest
import ray
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from ftlib.launch import cluster, ray_address
from ftlib.launch.errors import LaunchError
from ftlib.launch.train_job import train_job


class OpenHead(gcs_service_pb2_grpc.NodeInfoGcsServiceServicer):
    """Answers anybody like a head that has one node, on another machine."""

    version = ray.__version__

    def CheckAlive(self, request, context):  # the call's name
        return gcs_service_pb2.CheckAliveReply(ray_version=self.version)

    def GetAllNodeInfo(self, request, context):
        reply = gcs_service_pb2.GetAllNodeInfoReply()
        reply.node_info_list.add().node_id = b"7" * 28
        return reply


@pytest.fixture
def open_head():
    head = OpenHead()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    gcs_service_pb2_grpc.add_NodeInfoGcsServiceServicer_to_server(head, server)
    head.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield head
    server.stop(None).wait()


@pytest.fixture
def listening():
    """The address of a port that accepts connections and never says anything."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_a_training_job_asks_before_torch_is_imported(tiny, monkeypatch, free_port):
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    monkeypatch.setitem(sys.modules, "ftlib.launch.launch", None)  # its import fails
    with pytest.raises(LaunchError, match="no Ray cluster answers there"):
        train_job(tiny, "", [])
    with pytest.raises(ImportError):
        train_job(tiny, "", ["--cluster.local", "true"])


def test_an_address_where_nothing_listens_is_named_at_once(monkeypatch, free_port):
    """Ray is not asked: it would try for minutes."""
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    monkeypatch.setattr(ray, "init", lambda **settings: pytest.fail("ray.init was called"))
    with pytest.raises(LaunchError, match="no Ray cluster answers there .*refused.* unset RAY_ADD"):
        cluster.connect()


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_port_that_never_answers_is_given_up(monkeypatch, listening, scheme):
    monkeypatch.setattr(ray_address, "PROBE_SECONDS", 0.5)
    with pytest.raises(LaunchError, match=r"no Ray cluster answers there \(no answer within 0.5 s"):
        ray_address.check(f"{scheme}{listening}")


@pytest.mark.parametrize("address", ["somewhere", "http://127.0.0.1:8265", "127.0.0.1:ssh", ":"])
def test_what_is_no_address_is_refused(address):
    with pytest.raises(LaunchError, match="it must be the HOST:PORT at which a cluster's head"):
        ray_address.check(address)


@pytest.mark.parametrize("address", ["auto", "local"])
def test_what_ray_finds_by_itself_is_left_to_it(address):
    ray_address.check(address)


def test_a_cluster_of_another_ray_is_refused(open_head):
    open_head.version = "2.9.0"
    with pytest.raises(LaunchError, match="that cluster runs Ray 2.9.0, and this process Ray"):
        ray_address.check(open_head.address)


def test_a_machine_that_is_no_node_is_told_to_submit_or_join(monkeypatch, open_head):
    """Ray waits a minute for a raylet to appear here."""
    monkeypatch.setattr(ray_address, "PROBE_SECONDS", 0.5)
    with pytest.raises(LaunchError, match=r"is no node of that cluster.*ray job submit.*ray start"):
        ray_address.check(open_head.address)


def test_a_token_here_does_not_make_a_cluster_closed(monkeypatch, open_head):
    """A head without a token lets those in who have one, so our own setting proves nothing."""

    class Context:
        gcs_address = open_head.address

    import ray._raylet

    monkeypatch.setattr(
        ray._raylet, "get_authentication_mode", lambda: ray._raylet.AuthenticationMode.TOKEN
    )
    monkeypatch.setattr(ray, "get_runtime_context", Context)
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeManagerAddress": "10.0.0.4", "Alive": True}])
    with pytest.raises(LaunchError, match=r"\(10.0.0.4\) is open"):
        cluster.refuse_open(False)


# --- a real head with a token ---

TOKEN = "0123456789abcdef0123456789abcdef"
CHECK = """
import os
from ftlib.launch import ray_address
from ftlib.launch.errors import LaunchError
from ftlib.launch.train_job import train_job
try:
    ray_address.check(os.environ["RAY_ADDRESS"])
    print("joined, asks for a token:", ray_address.asks_for_token(os.environ["GCS"]))
except LaunchError as error:
    print(error)
"""


@pytest.fixture
def head(free_port, family):
    """(address for drivers, address for clients) of a head that asks for TOKEN."""
    folder = Path("/tmp") / f"fth{os.getpid()}"  # sockets need a short path
    port, client_port = str(free_port()), str(free_port())
    try:
        subprocess.run(
            [
                *(str(Path(sys.executable).with_name("ray")), "start", "--head"),
                *("--node-ip-address", "127.0.0.1", "--port", port),
                *("--ray-client-server-port", client_port, "--include-dashboard", "false"),
                *("--dashboard-agent-listen-port", str(free_port()), "--num-cpus", "1"),
                *("--temp-dir", str(folder), "--disable-usage-stats"),
            ],
            env=environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN),
            check=True,
            capture_output=True,
            timeout=180,
        )
        yield f"127.0.0.1:{port}", f"ray://127.0.0.1:{client_port}"
    finally:
        family(folder).end()
        shutil.rmtree(folder, ignore_errors=True)


def environment(**more):
    return {**{k: v for k, v in os.environ.items() if not k.startswith("RAY_")}, **more}


def test_tokens_and_ports_of_a_real_head(head, tmp_path):
    driver, client = head
    right = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    wrong = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN[::-1]}
    cases = [
        (driver, right, "joined, asks for a token: True"),
        (driver, wrong, "it refuses the token that is set here"),
        (driver, {}, "it asks for a token, and RAY_AUTH_MODE=token is not set here"),
        (driver, {"RAY_AUTH_MODE": "token"}, "RAY_AUTH_MODE=token is set here, but no token is"),
        (client, right, "joined, asks for a token: True"),
        (client, wrong, "it refuses the token that is set here"),
        (client.removeprefix("ray://"), right, "is not a Ray head, whose port is 6379 by default"),
    ]
    for address, variables, said in cases:
        done = subprocess.run(
            [sys.executable, "-c", CHECK],
            env=environment(HOME=str(tmp_path), RAY_ADDRESS=address, GCS=driver, **variables),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert said in done.stdout, (address, variables, done)
        assert "gcs_client.cc" not in done.stderr, "Ray was asked, and warns from its C++ core"
