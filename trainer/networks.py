"""The trained networks, a row each: another one would be another row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

UNET, TEXT_ENCODER = "unet", "text encoder"


@dataclass(frozen=True)
class Network:
    """The names of one network; its key in `NETWORKS` is its name in logs and checkpoints."""

    attribute: str
    """Attribute of `Models` and `OptimizerConfig`, and prefix of its adapter weights."""
    section: str
    """Section of the optimizer file."""
    short: str
    """Name on the progress line."""


NETWORKS = {
    UNET: Network("unet", "base", "unet"),
    TEXT_ENCODER: Network("text_encoder", "text_encoder_overrides", "text"),
}


def by_network(owner: Any) -> dict[str, Any]:
    """Return the networks' attributes of `owner`, such as `Models` or `OptimizerConfig`, by name."""
    return {name: getattr(owner, network.attribute) for name, network in NETWORKS.items()}
