"""What a search draws from: dimensions and what all trials share (`Space`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from carmodels.training.config import FIELDS, NAMES, TrialConfig, parse


@dataclass(frozen=True)
class Choice:
    """A dimension with a few values, drawn only where `when` = (other dimension, its values) holds."""

    options: tuple[Any, ...]
    when: tuple[str, tuple[Any, ...]] | None = None


@dataclass(frozen=True)
class Range:
    """A dimension of real numbers from low to high, drawn only where `when` holds."""

    low: float
    high: float
    log: bool = False
    when: tuple[str, tuple[Any, ...]] | None = None


Dimension = Choice | Range


@dataclass(frozen=True)
class Space:
    """Dimensions in the order they are drawn, and the fields of `TrialConfig` that every trial shares."""

    dimensions: Mapping[str, Dimension]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    trials: int | None = None  # configurations of a search without --data, --trials and --hours

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Space:
        """The space that study.json describes; ValueError where this version knows none like it."""
        try:
            dimensions = {name: _dimension(found) for name, found in values["dimensions"].items()}
            return cls(dimensions, dict(values["fixed"]))._checked("the space of study.json")
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"the space of study.json: {error!r}") from error

    @property
    def backbones(self) -> tuple[str, ...]:
        """The backbones a trial can draw."""
        return self._values("backbone")

    @property
    def image_sizes(self) -> tuple[int, ...]:
        """The sizes a trial can draw, pixels."""
        return self._values("image_size")

    @property
    def largest_size(self) -> int:
        """The largest that a trial can ask of an image, pixels."""
        tested = (
            self._values("eval_image_size") if "eval_image_size" in {*self.dimensions, *self.fixed} else ()
        )
        return max((*self.image_sizes, *tested))

    def _values(self, name: str) -> tuple[Any, ...]:
        dimension = self.dimensions.get(name)
        return dimension.options if isinstance(dimension, Choice) else (self.fixed[name],)

    def drawn(self, values: Mapping[str, Any]) -> dict[str, Dimension]:
        """The dimensions that a configuration with these values has drawn; conditions leave some out."""
        return {
            n: d for n, d in self.dimensions.items() if d.when is None or values.get(d.when[0]) in d.when[1]
        }

    def with_backbones(self, keep: tuple[str, ...]) -> Space:
        """The space with only these backbones, in the catalog's order. Raises ValueError if none is left."""
        options = tuple(b for b in self.backbones if b in keep)
        if not options:
            raise ValueError(f"no backbone of the space is left of {', '.join(self.backbones)}")
        return replace(self, dimensions={**self.dimensions, "backbone": Choice(options)})

    def with_override(self, text: str) -> Space:
        """The space with `NAME=V`, `NAME=V1,V2,...` or `NAME=LOW:HIGH` in place of what it says of NAME.

        Raises ValueError for an unknown name, a value of the wrong type or one that no configuration accepts.
        """
        name, _, written = text.partition("=")
        if name not in FIELDS or not written:
            raise ValueError(
                f"--set {text}: expected NAME=V, NAME=V1,V2 or NAME=LOW:HIGH with NAME one of {NAMES}"
            )
        if name == "epochs" and not written.isdecimal():
            raise ValueError(f"--set {text}: epochs must be one number, the same schedule for every trial")
        old = self.dimensions.get(name)
        when = old.when if old else _WHEN.get(name)
        if not old and when and when[0] not in self.dimensions:
            when = None
        others = {n: d for n, d in self.dimensions.items() if n != name}
        fixed = {n: v for n, v in self.fixed.items() if n != name}
        if ":" in written:
            low, high = (parse(name, part) for part in written.split(":", 1))
            if not (isinstance(low, float) and isinstance(high, float) and low < high):
                raise ValueError(f"--set {text}: LOW:HIGH is for a real number, with LOW below HIGH")
            log = old.log if isinstance(old, Range) else low > 0 and high / low >= 10
            new: Dimension = Range(low, high, log, when)
        else:
            options = tuple(parse(name, part) for part in written.split(","))
            if len(options) == 1:
                return replace(self, dimensions=others, fixed={**fixed, name: options[0]})._checked(
                    f"--set {text}"
                )
            if doubles := [v for n, v in enumerate(options) if v in options[:n]]:
                raise ValueError(f"--set {text}: {doubles[0]!r} is there more than once")
            new = Choice(options, when)
        dimensions: dict[str, Dimension] = {}
        for n, d in self.dimensions.items():
            if d.when and d.when[0] == name:  # what is drawn under a condition comes after it
                dimensions.setdefault(name, new)
            dimensions[n] = new if n == name else d
        return replace(self, dimensions=dimensions | {name: new}, fixed=fixed)._checked(f"--set {text}")

    def _checked(self, source: str) -> Space:
        """Itself, once every value makes a configuration; ValueError naming its source otherwise."""
        for name, dimension in self.dimensions.items():
            values = dimension.options if isinstance(dimension, Choice) else (dimension.low, dimension.high)
            for value in values if name not in _SIZES else ():
                _try_value(self, name, value, source)
        sizes = {name: self._values(name) for name in _SIZES if name in self.dimensions or name in self.fixed}
        for size in self.image_sizes:
            for backbone in self.backbones:
                shown = replace(self, fixed={**self.fixed, "backbone": backbone, "image_size": size})
                for name, options in sizes.items():
                    for value in options if name != "image_size" else (size,):
                        _try_value(shown, name, value, source)
        return self


# what one may be hangs on the others and on the backbone
_SIZES = ("image_size", "start_image_size", "eval_image_size")


def _dimension(values: Mapping[str, Any]) -> Dimension:
    when = (values["when"][0], tuple(values["when"][1])) if values["when"] else None
    if values["kind"] == "Choice":
        return Choice(tuple(values["options"]), when)
    return Range(values["low"], values["high"], values["log"], when)


def _try_value(space: Space, name: str, value: Any, source: str) -> None:
    start = {"backbone": space.backbones[0], "image_size": max(space.image_sizes), "epochs": 1}
    try:
        TrialConfig.from_dict({**start, **space.fixed, name: value})
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


OPEN = ("full", "head_first", "gradual")
HEADED = (1, 2, 3)

_WHEN = {  # where a dimension makes a difference, for one that its space does not have
    "head": ("head_depth", HEADED),
    "dropout": ("head_depth", HEADED),
    "layer_decay": ("unfreeze", OPEN),
    "start_image_size": ("unfreeze", OPEN),
}


def unfrozen_configs(space: Space) -> dict[str, list[TrialConfig]]:
    """For each backbone of a space a configuration of every size, largest first, everything open."""
    shared = {**space.fixed, "unfreeze": "full"}
    sizes = sorted(space.image_sizes, reverse=True)
    return {
        b: [TrialConfig.from_dict({**shared, "backbone": b, "image_size": s}) for s in sizes]
        for b in space.backbones
    }
