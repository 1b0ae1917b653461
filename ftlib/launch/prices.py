"""What machines cost. The one place with prices, and with the date that they are of."""

from __future__ import annotations

from dataclasses import dataclass

from ftlib.settings import ConfigError, nearest

AS_OF = "2025"
"""Year of the prices below. They change: --price takes today's for one machine."""
SPOT_SHARE = 0.4
"""Assumed price of a spot instance, as a share of its price on demand. Spot prices differ by zone
and follow demand: `aws ec2 describe-spot-price-history` has today's."""


@dataclass(frozen=True)
class Price:
    """A machine to rent."""

    usd_per_hour: float
    """On demand."""
    gpus: int
    what: str
    network_gbps: float = 0.0
    """Bandwidth that it sustains, in gigabits per second; 0 where it is not known."""

    @property
    def spot_usd_per_hour(self) -> float:
        """The assumed price of a spot instance."""
        return SPOT_SHARE * self.usd_per_hour


PRICES = {
    "g4dn.xlarge": Price(0.526, 1, "AWS, 1 T4, 4 vCPU", 5),
    "g4dn.2xlarge": Price(0.752, 1, "AWS, 1 T4, 8 vCPU", 10),
    "g4dn.12xlarge": Price(3.912, 4, "AWS, 4 T4, 48 vCPU", 50),
    "g5.xlarge": Price(1.006, 1, "AWS, 1 A10G, 4 vCPU", 2.5),
    "g5.2xlarge": Price(1.212, 1, "AWS, 1 A10G, 8 vCPU", 5),
    "g5.12xlarge": Price(5.672, 4, "AWS, 4 A10G, 48 vCPU", 40),
    "g6.xlarge": Price(0.805, 1, "AWS, 1 L4, 4 vCPU", 2.5),
    "g6.2xlarge": Price(0.978, 1, "AWS, 1 L4, 8 vCPU", 5),
    "p4d.24xlarge": Price(21.96, 8, "AWS, 8 A100, 96 vCPU", 400),
    "p5.48xlarge": Price(55.04, 8, "AWS, 8 H100, 192 vCPU", 3200),
    "c7i.4xlarge": Price(0.714, 0, "AWS, 16 vCPU, no GPU", 6.25),
    "m6i.xlarge": Price(0.192, 0, "AWS, 4 vCPU, no GPU", 1.562),
}
"""On demand in us-east-1, in USD. The bandwidth is the baseline, not what "up to" promises for
minutes."""


def price_of(name: str, where: str = "--machine") -> Price:
    """Raises ConfigError with the nearest name; `where` says where the name comes from."""
    if name not in PRICES:
        instead = "; or give --price USD_PER_HOUR" if where == "--machine" else ""
        raise ConfigError(
            f"{where} {name}: its price is not known.{nearest(name, list(PRICES))} "
            f"There are {', '.join(PRICES)}{instead}"
        )
    return PRICES[name]
