"""The ten classes of the built-in data set, by their proportions."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BodyShape:
    """A vehicle's proportions. x is a share of the length from the nose, z a share of the height."""

    length: float  # metres
    width: float  # metres
    height: float  # metres
    clearance: float  # underside above the ground, metres
    wheel: float  # radius, metres
    nose: float  # z of the bonnet's front edge
    belt: float  # z where the glass begins
    cowl: float  # x of the windscreen's foot
    roof_front: float  # x of the windscreen's top
    roof_rear: float  # x of the rear window's top
    deck: float  # x of the rear window's foot
    tail: float  # z behind the deck: of the boot, cargo bed or box
    pillars: tuple[float, ...]  # shares of the way from cowl to deck, with glass between each two
    doors: int  # on each side; each ends at a pillar
    axles: tuple[float, ...] = (0.18, 0.80)  # x
    open_top: bool = False
    bed: bool = False  # a cargo bed, open behind the deck
    rails: bool = False  # on the roof
    cladding: bool = False  # dark plastic along the sill


# fmt: off
CLASSES: dict[str, BodyShape] = {
    # length, width, height, clearance, wheel, nose, belt, cowl, roof_front, roof_rear, deck, tail
    "convertible": BodyShape(
        4.30, 1.78, 1.38, 0.16, 0.32, 0.53, 0.64, 0.30, 0.40, 0.58, 0.72, 0.66,
        pillars=(0, 0.72), doors=1, open_top=True),
    "coupe": BodyShape(
        4.40, 1.80, 1.38, 0.16, 0.32, 0.53, 0.64, 0.28, 0.41, 0.63, 0.92, 0.66,
        pillars=(0, 0.60, 0.86), doors=1),
    "hatchback": BodyShape(
        4.10, 1.76, 1.48, 0.17, 0.31, 0.54, 0.61, 0.25, 0.37, 0.82, 0.95, 0.61,
        pillars=(0, 0.5, 0.95), doors=2),
    "liftback": BodyShape(
        4.50, 1.80, 1.41, 0.16, 0.32, 0.53, 0.63, 0.27, 0.40, 0.64, 0.93, 0.66,
        pillars=(0, 0.4, 0.80), doors=2),
    "minivan": BodyShape(
        4.60, 1.84, 1.73, 0.17, 0.32, 0.49, 0.57, 0.13, 0.32, 0.88, 0.97, 0.57,
        pillars=(0, 0.33, 0.66, 0.97), doors=2),
    "pickup": BodyShape(
        5.00, 1.86, 1.74, 0.25, 0.37, 0.56, 0.62, 0.25, 0.35, 0.52, 0.57, 0.60,
        pillars=(0, 0.97), doors=1, bed=True),
    "sedan": BodyShape(
        4.60, 1.80, 1.43, 0.16, 0.32, 0.53, 0.63, 0.26, 0.39, 0.66, 0.79, 0.66,
        pillars=(0, 0.46, 0.92), doors=2),
    "suv": BodyShape(
        4.50, 1.84, 1.66, 0.24, 0.37, 0.57, 0.63, 0.25, 0.35, 0.86, 0.96, 0.63,
        pillars=(0, 0.36, 0.7, 0.97), doors=2, rails=True, cladding=True),
    "van": BodyShape(
        4.70, 1.86, 1.80, 0.18, 0.32, 0.49, 0.57, 0.14, 0.31, 0.92, 0.98, 0.57,
        pillars=(0, 0.33), doors=1),
    "wagon": BodyShape(
        4.60, 1.80, 1.47, 0.16, 0.32, 0.53, 0.62, 0.25, 0.37, 0.86, 0.96, 0.62,
        pillars=(0, 0.36, 0.7, 0.97), doors=2),
}
# fmt: on

# Each image draws its proportions uniformly within this distance of its class's.
VARIATION = {
    "length": 0.25,
    "width": 0.05,
    "height": 0.08,
    "clearance": 0.02,
    "wheel": 0.02,
    "nose": 0.02,
    "belt": 0.02,
    "cowl": 0.015,
    "roof_front": 0.015,
    "roof_rear": 0.015,
    "deck": 0.015,
    "tail": 0.02,
}
