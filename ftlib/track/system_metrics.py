"""System metrics, sampled here and sent through the journal.

MLflow's own sampler writes to the store from every node and stops when the server does. Names and
sections are those of MLflow's "System metrics" page (`system/<node>/cpu_utilization_percentage` and
so on); a point's step counts the sampling periods since the run's start.
"""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from ftlib.track.journal import opening
from ftlib.track.writer import Writer

EVERY_SECONDS = 10.0


class Gpus:
    """NVIDIA GPUs of this machine through NVML; none where there is no driver."""

    def __init__(self) -> None:
        self._nvml: Any = None
        self._devices: list[Any] = []
        with contextlib.suppress(Exception):
            import pynvml

            pynvml.nvmlInit()
            self._nvml = pynvml
            self._devices = [
                pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())
            ]

    def sample(self) -> dict[str, float]:
        out: dict[str, float] = {}
        for number, device in enumerate(self._devices):
            gpu = f"gpu_{number}"
            with contextlib.suppress(Exception):
                memory = self._nvml.nvmlDeviceGetMemoryInfo(device)
                out[f"{gpu}_memory_usage_megabytes"] = memory.used / 1e6
                out[f"{gpu}_memory_usage_percentage"] = 100 * memory.used / memory.total
                utilization = self._nvml.nvmlDeviceGetUtilizationRates(device)
                out[f"{gpu}_utilization_percentage"] = float(utilization.gpu)
                out[f"{gpu}_power_usage_watts"] = self._nvml.nvmlDeviceGetPowerUsage(device) / 1000
        return out


class SystemSampler:
    """Samples this machine every few seconds from a daemon thread, until closed. One per machine.

    Args:
        node: names the machine in the UI, such as node_0.
        disk: a path whose file system is watched.
    """

    def __init__(
        self,
        writer: Writer,
        node: str = "node_0",
        every_seconds: float = EVERY_SECONDS,
        disk: str = "/",
    ) -> None:
        self.writer, self.node, self.every_seconds, self.disk = writer, node, every_seconds, disk
        self._gpus = Gpus()
        self._network = psutil.net_io_counters()
        self._stop = threading.Event()
        location = writer.location
        known = opening(Path(location.folder) / writer.name) if location.is_local else None
        # A restarted run goes on instead of drawing over its first part.
        self._since = known["t"] / 1000 if known else time.time()
        psutil.cpu_percent()  # the first call only starts the measurement
        self._thread = threading.Thread(target=self._loop, name="ftlib-system-metrics", daemon=True)
        self._thread.start()

    def __enter__(self) -> SystemSampler:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(5)

    def sample(self) -> dict[str, float]:
        """Percent, megabytes and watts, by MLflow's names without the `system/` prefix."""
        memory, disk = psutil.virtual_memory(), psutil.disk_usage(self.disk)
        network = psutil.net_io_counters()
        out = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": memory.percent,
            "disk_usage_megabytes": disk.used / 1e6,
            "disk_usage_percentage": disk.percent,
            "disk_available_megabytes": disk.free / 1e6,
        }
        if network and self._network:
            out |= {
                "network_receive_megabytes": (network.bytes_recv - self._network.bytes_recv) / 1e6,
                "network_transmit_megabytes": (network.bytes_sent - self._network.bytes_sent) / 1e6,
            }
        return {name: round(value, 2) for name, value in {**out, **self._gpus.sample()}.items()}

    def _loop(self) -> None:
        while not self._stop.wait(self.every_seconds):
            with contextlib.suppress(Exception):
                step = round((time.time() - self._since) / self.every_seconds)
                self.writer.metrics(
                    {f"system/{self.node}/{name}": value for name, value in self.sample().items()},
                    step,
                )
