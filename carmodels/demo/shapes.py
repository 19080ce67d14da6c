"""Ten classes of cars by their proportions, and random ones beside them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class BodyShape:
    """A vehicle's proportions, nose to the left: x in shares of the length from the nose, z of the height."""

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
    tail: float  # z of all behind it: boot, cargo bed, box
    pillars: tuple[float, ...]  # shares of the side between cowl and deck, glass between each two
    doors: int  # on a side; each ends at a pillar
    axles: tuple[float, ...] = (0.18, 0.80)  # x
    open_top: bool = False
    bed: bool = False  # hollow behind the deck
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

# Each image draws a vehicle's proportions anew, evenly within so much to either side of its row.
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


def other_shapes(rng: np.random.Generator, count: int) -> list[BodyShape]:
    """`count` vehicles of random proportions, none `reachable` from one of `CLASSES`."""
    shapes: list[BodyShape] = []
    while len(shapes) < count:
        shape = _random_shape(rng)
        if not any(reachable(shape, row) for row in CLASSES.values()):
            shapes.append(shape)
    return shapes


def reachable(one: BodyShape, other: BodyShape) -> bool:
    """Whether the two may come to equal proportions in an image, whatever their pillars, doors and axles."""
    return all(abs(getattr(one, name) - getattr(other, name)) <= 2 * by for name, by in VARIATION.items())


def _random_shape(rng: np.random.Generator) -> BodyShape:
    height = rng.uniform(1.2, 3.2)
    belt = rng.uniform(0.45, 0.7)
    cowl = rng.uniform(0.03, 0.4)
    roof_front = cowl + rng.uniform(0.03, 0.15)
    deck = rng.uniform(roof_front + 0.15, 0.98)
    windows = int(rng.integers(1, 6))
    return BodyShape(
        length=height * rng.uniform(1.6, 3.6),
        width=1.3 + 0.3 * height,
        height=height,
        clearance=rng.uniform(0.13, 0.4),
        wheel=rng.uniform(0.26, 0.26 + 0.1 * height),
        nose=belt - rng.uniform(0.0, 0.15),
        belt=belt,
        cowl=cowl,
        roof_front=roof_front,
        roof_rear=rng.uniform(roof_front + 0.08, deck),
        deck=deck,
        tail=belt + rng.choice([0.0, 0.03, rng.uniform(-0.15, 0.5)]),
        pillars=tuple(np.linspace(0, rng.uniform(0.3, 0.97), windows + 1)),
        doors=int(rng.integers(0, min(windows, 3) + 1)),
        axles=(rng.uniform(0.1, 0.22), *np.sort(rng.uniform(0.5, 0.88, rng.choice([1, 2], p=[0.7, 0.3])))),
        open_top=bool(rng.random() < 0.15),
        bed=bool(rng.random() < 0.3),
        rails=bool(rng.random() < 0.3),
        cladding=bool(rng.random() < 0.3),
    )
