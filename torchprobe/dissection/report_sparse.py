"""What a page says of units that are not those of the layer, and how often latents are active."""

from __future__ import annotations

from typing import Any

from torchprobe.dissection.sparse import Density
from torchprobe.rendering.page import Fact
from torchprobe.rendering.tables import Column, number, percent

DENSITY_COLUMNS = (
    Column("density", "density", "share of the positions of all images where the latent is active", "share"),
    Column("dead_share", "silent in", "share of the images in which the latent is active nowhere", "share"),
)

ACTIVE = "Above 0. Density counts positions; a dead latent is active at no position of any image."
"""When a latent is active."""

UNITS_OF = {"units": "Units", "directions": "Directions", "latents": "Latents"}


def kind_of(basis: Any) -> str:
    """ "units", "directions" or "latents", from the metadata of a basis."""
    return "latents" if isinstance(basis, dict) else "directions" if basis else "units"


def density_facts(density: Density | None) -> list[Fact]:
    """For the head of a page; nothing without a density."""
    if density is None:
        return []
    found = density.summary()
    return [
        Fact("Dead latents", number(found["dead"]), f"{percent(found['dead_latents'])}: active in none of the images"),
        Fact("Density", percent(found["median"]), f"median over latents; mean {percent(found['mean'])}"),
    ]
