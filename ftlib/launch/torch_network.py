"""Which network card workers exchange gradients over: that of the address that Ray knows them by.

Left alone, gloo binds to what the machine's own name resolves to. On Debian that is 127.0.1.1, and
127.0.0.1 where the name does not resolve: workers of other machines are then refused.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import psutil

from ftlib.gc_pause import gc_paused

# Workers and their controller import torch here, before anything else of ftlib's.
with gc_paused():
    from ray.train.torch import TorchConfig


@dataclass
class NodeNetworkConfig(TorchConfig):  # type: ignore[misc]  # Ray has no types
    """Ray's TorchConfig, whose workers first choose their network card."""

    @property
    def backend_cls(self) -> type[Any]:
        base: Any = TorchConfig().backend_cls

        class NodeNetworkBackend(base):  # type: ignore[misc]
            def on_start(self, worker_group: Any, backend_config: Any) -> None:
                worker_group.execute(_choose_card)
                super().on_start(worker_group, backend_config)

        return NodeNetworkBackend


def card_of(address: str) -> str:
    """Name of the network card that has this IP address; "" for none, or the loopback."""
    if address.startswith("127.") or address == "::1":
        return ""
    cards = psutil.net_if_addrs().items()
    return next((name for name, has in cards if any(a.address == address for a in has)), "")


def _choose_card() -> None:
    """For gloo, in a worker; a choice of the user's (GLOO_SOCKET_IFNAME) stays."""
    import ray

    if card := card_of(ray.util.get_node_ip_address()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", card)
