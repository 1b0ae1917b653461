"""Ask the head at RAY_ADDRESS whether a job may join its cluster from here.

Ray itself would try for minutes, and only warn from its C++ core.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ftlib.launch.errors import LaunchError

PROBE_SECONDS = 5.0
"""Time for a cluster's head to answer, and for a node that is starting here to join it."""

_NO_PROXY = ("grpc.enable_http_proxy", 0)
"""Ray's own connections do not go through a proxy either."""


def check(address: str) -> None:
    """Raise LaunchError unless a driver on this machine can join the cluster at HOST:PORT.

    Its head must answer, accept our token and run our version of Ray, and this machine must be one
    of its nodes. ray://HOST:PORT is a head's server for clients, whose drivers run on the head.
    `auto` and `local` are left to Ray.
    """
    if address in ("auto", "local"):
        return
    at = address.removeprefix("ray://").rstrip("/")
    host, _, port = at.rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        raise LaunchError(
            f"RAY_ADDRESS = {address}: it must be the HOST:PORT at which a cluster's head listens "
            "(6379 by default), or auto"
        )
    from ray._private.grpc_utils import init_grpc_channel  # with our token, and TLS if configured

    with _explained(address), init_grpc_channel(at, [_NO_PROXY]) as channel:
        if address.startswith("ray://"):
            _ping_client_server(channel)
        else:
            _check_version(address, _alive(channel).ray_version)
            _check_node_here(address, channel)


def asks_for_token(address: str) -> bool:
    """Whether the head at HOST:PORT refuses those who have no token.

    Where no answer comes from there, what this process was told (RAY_AUTH_MODE) must do.
    """
    import grpc
    from ray import _raylet

    try:
        with grpc.insecure_channel(address, [_NO_PROXY]) as channel:
            _alive(channel)
    except grpc.RpcError as error:
        call, raylet = _any(error), _any(_raylet)
        if call.code() == grpc.StatusCode.UNAUTHENTICATED:
            return True
        return bool(raylet.get_authentication_mode() == raylet.AuthenticationMode.TOKEN)
    return False


def no_cluster(address: str, reason: str) -> LaunchError:
    """The error of an address where no cluster answers."""
    return LaunchError(
        f"RAY_ADDRESS = {address}: no Ray cluster answers there ({reason}). Start one "
        "(ray start --head), or unset RAY_ADDRESS to train on this machine alone"
    )


def _check_version(address: str, version: str) -> None:
    import ray

    if version != ray.__version__:
        raise LaunchError(
            f"RAY_ADDRESS = {address}: that cluster runs Ray {version}, and this process Ray "
            f"{ray.__version__}. Install the same version on every machine"
        )


def _check_node_here(address: str, channel: Any) -> None:
    """Raise LaunchError where none of the cluster's nodes is on this machine."""
    from ray._private import services
    from ray.core.generated import gcs_service_pb2

    request = _any(gcs_service_pb2).GetAllNodeInfoRequest()
    deadline = time.monotonic() + PROBE_SECONDS
    while True:
        nodes = _nodes_service(channel).GetAllNodeInfo(request, timeout=PROBE_SECONDS)
        here = set(_any(services).find_node_ids())
        if any(node.node_id.hex() in here for node in nodes.node_info_list):
            return
        if time.monotonic() > deadline:
            raise LaunchError(
                f"RAY_ADDRESS = {address}: this machine is no node of that cluster. Send the job "
                "there (ray job submit --address http://HEAD:8265), or make this machine a node "
                f"(ray start --address {address})"
            )
        time.sleep(0.5)


@contextmanager
def _explained(address: str) -> Iterator[None]:
    """Turn what a call to the head raises into a LaunchError."""
    import grpc
    import ray

    try:
        yield
    except ray.exceptions.AuthenticationError:
        raise _token_error(address, "RAY_AUTH_MODE=token is set here, but no token is") from None
    except grpc.RpcError as error:
        call = _any(error)
        code, reason = call.code(), str(call.details())
        if code == grpc.StatusCode.UNAUTHENTICATED:
            raise _token_error(
                address,
                "it refuses the token that is set here"
                if os.environ.get("RAY_AUTH_MODE") == "token"
                else "it asks for a token, and RAY_AUTH_MODE=token is not set here",
            ) from None
        if code == grpc.StatusCode.UNIMPLEMENTED or "HTTP/2" in reason:
            reason = "what listens there is not a Ray head, whose port is 6379 by default"
        if code == grpc.StatusCode.DEADLINE_EXCEEDED:
            reason = f"no answer within {PROBE_SECONDS:g} s"
        raise no_cluster(address, reason.rpartition("last error: ")[2]) from None


def _token_error(address: str, reason: str) -> LaunchError:
    return LaunchError(
        f"RAY_ADDRESS = {address}: this cluster cannot be joined: {reason}. Set "
        "RAY_AUTH_MODE=token, and copy ~/.ray/auth_token from the cluster's head (chmod 600) or "
        "set RAY_AUTH_TOKEN"
    )


# --- calls, the first that Ray itself makes; the modules are generated and have no types ---


def _alive(channel: Any) -> Any:
    """A head's answer to whether it is alive; it names its version of Ray."""
    from ray.core.generated import gcs_service_pb2

    request = _any(gcs_service_pb2).CheckAliveRequest()
    return _nodes_service(channel).CheckAlive(request, timeout=PROBE_SECONDS)


def _nodes_service(channel: Any) -> Any:
    from ray.core.generated import gcs_service_pb2_grpc

    return _any(gcs_service_pb2_grpc).NodeInfoGcsServiceStub(channel)


def _ping_client_server(channel: Any) -> None:
    from ray.core.generated import ray_client_pb2, ray_client_pb2_grpc

    messages = _any(ray_client_pb2)
    request = messages.ClusterInfoRequest(type=messages.ClusterInfoType.PING)
    stub = _any(ray_client_pb2_grpc).RayletDriverStub(channel)
    stub.ClusterInfo(request, timeout=PROBE_SECONDS)


def _any(value: object) -> Any:
    return value
