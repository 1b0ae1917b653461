"""Workers exchange gradients over the card of their node's address, not over the loopback."""

import subprocess
import sys

import psutil
import pytest
import ray

from ftlib.launch import torch_network


def addresses(loopback):
    return [
        (name, a.address)
        for name, has in psutil.net_if_addrs().items()
        for a in has
        if a.family.name == "AF_INET" and a.address.startswith("127.") == loopback
    ]


def test_each_address_has_its_card():
    for name, address in addresses(loopback=False):
        assert torch_network.card_of(address) == name
    for _, address in addresses(loopback=True):
        assert torch_network.card_of(address) == ""
    assert torch_network.card_of("192.0.2.1") == "", "kept for documentation by RFC 5737"


@pytest.mark.parametrize(
    ("before", "after"), [(None, "rack0"), ("mine", "mine")], ids=["unset", "set by the user"]
)
def test_gloo_is_told_the_card(monkeypatch, before, after):
    import os
    import types

    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.2")
    cards = {"lo": [types.SimpleNamespace(address="127.0.0.1")]}
    cards["rack0"] = [types.SimpleNamespace(address="10.0.0.2")]
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: cards)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    if before:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", before)
    torch_network._choose_card()
    assert os.environ["GLOO_SOCKET_IFNAME"] == after
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")


def test_what_a_driver_imports_for_a_cluster_keeps_nothing_of_its_callers():
    """The caller may be a notebook, whose objects the collector must go on to free."""
    code = "import gc; import ftlib.launch.torch_network; print(gc.get_freeze_count())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "0", done.stderr
