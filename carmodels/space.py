"""Search spaces: what a search draws (`Choice`, `Range`) and what all its trials share (`Space.fixed`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from carmodels.catalog import SIZES, UNFREEZE
from carmodels.models.facts import facts_of
from carmodels.training.config import FIELDS, TrialConfig, parse_value

Condition = tuple[str, tuple[Any, ...]]  # (another dimension, the values of it for which this one is drawn)


@dataclass(frozen=True)
class Choice:
    """A categorical dimension."""

    options: tuple[Any, ...]
    when: Condition | None = None


@dataclass(frozen=True)
class Range:
    """A dimension of real numbers."""

    low: float
    high: float
    log: bool = False
    when: Condition | None = None


Dimension = Choice | Range

FINE_TUNING = tuple(name for name, row in UNFREEZE.items() if row.head_only_epochs is not None)
HEAD_DEPTHS = (1, 2, 3)  # those with a block, to which `head` and `dropout` apply

_CONDITIONS: dict[str, Condition] = {  # of dimensions that an override adds to a space
    "head": ("head_depth", HEAD_DEPTHS),
    "dropout": ("head_depth", HEAD_DEPTHS),
    "lr_ratio": ("unfreeze", FINE_TUNING),
    "start_image_size": ("unfreeze", FINE_TUNING),
}
_SIZES = ("image_size", "start_image_size", "eval_image_size")  # whose values depend on one another


@dataclass(frozen=True)
class Space:
    """Dimensions in the order they are drawn, and the fields of `TrialConfig` that all trials share."""

    dimensions: Mapping[str, Dimension]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    trials: int | None = None  # of a search without --data, --trials and --hours

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Space:
        """The space in study.json. Raises ValueError if this version cannot read it."""
        source = "the space of study.json"
        try:
            dimensions = {name: _dimension(content) for name, content in values["dimensions"].items()}
            return cls(dimensions, dict(values["fixed"]))._validated(source)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{source}: {error!r}") from error

    @property
    def backbones(self) -> tuple[str, ...]:
        """The backbones that can be drawn."""
        return self._values("backbone")

    @property
    def image_sizes(self) -> tuple[int, ...]:
        """The values of `image_size` that can be drawn, pixels."""
        return self._values("image_size")

    @property
    def largest_size(self) -> int:
        """The largest side that a trial can train or evaluate on, pixels."""
        names = [name for name in ("image_size", "eval_image_size") if self._has(name)]
        sizes = {size for name in names for size in self._values(name)}
        return max(_fit(backbone, size) for backbone in self.backbones for size in sizes)

    @property
    def largest_batch_size(self) -> int:
        """The largest batch that a trial can train on, images."""
        return max(self._values("batch_size")) if self._has("batch_size") else TrialConfig.batch_size

    def _has(self, name: str) -> bool:
        return name in self.dimensions or name in self.fixed

    def _values(self, name: str) -> tuple[Any, ...]:
        """A Choice's options, or a fixed value. Raises KeyError for a field that the space leaves out."""
        dimension = self.dimensions.get(name)
        return dimension.options if isinstance(dimension, Choice) else (self.fixed[name],)

    def sizes_of(self, backbone: str) -> tuple[int, ...]:
        """What the values of `image_size` are for a backbone: the nearest sizes that it takes, ascending."""
        return tuple(sorted({_fit(backbone, size) for size in self.image_sizes}))

    def fitted(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Values of a configuration, with image sizes that its backbone takes."""
        return {n: _fit(values["backbone"], v) if n in _SIZES else v for n, v in values.items()}

    def config(self, values: Mapping[str, Any]) -> TrialConfig:
        """The configuration with these values, with image sizes that its backbone takes."""
        return TrialConfig.from_dict(self.fitted(values))

    def params(self, config: TrialConfig) -> dict[str, Any]:
        """The dimensions' values in a configuration: of image sizes the options that `fitted` changed."""
        values = vars(config)
        params = {name: values[name] for name in self.active_dimensions(values)}
        for name in params.keys() & set(_SIZES):
            dimension, value = self.dimensions[name], params[name]
            if isinstance(dimension, Choice) and value not in dimension.options:
                fitting = [o for o in dimension.options if _fit(config.backbone, o) == value]
                params[name] = min(fitting, key=lambda option: abs(option - value), default=value)
        return params

    def active_dimensions(self, values: Mapping[str, Any]) -> dict[str, Dimension]:
        """The dimensions whose condition holds for a configuration with these values."""
        return {
            n: d for n, d in self.dimensions.items() if d.when is None or values.get(d.when[0]) in d.when[1]
        }

    def with_backbones(self, keep: tuple[str, ...]) -> Space:
        """The space with only these backbones. Raises ValueError if none is left."""
        options = tuple(b for b in self.backbones if b in keep)
        if not options:
            raise ValueError(f"no backbone of the space is left of {', '.join(self.backbones)}")
        return replace(self, dimensions={**self.dimensions, "backbone": Choice(options)})

    def with_override(self, text: str) -> Space:
        """The space with one dimension or field replaced: `NAME=V`, `NAME=V1,V2,...` or `NAME=LOW:HIGH`.

        Raises ValueError for an unknown name, a value of the wrong type or one that no configuration accepts.
        """
        name, new = read_override(text)
        source, others = f"--set {text}", {n: v for n, v in self.fixed.items() if n != name}
        if isinstance(new, Choice) and len(new.options) == 1:
            kept = {n: d for n, d in self.dimensions.items() if n != name}
            return replace(self, dimensions=kept, fixed={**others, name: new.options[0]})._validated(source)
        old, new = self.dimensions.get(name), replace(new, when=self._condition(name))
        if isinstance(new, Range) and isinstance(old, Range):
            new = replace(new, log=old.log)
        return replace(self, dimensions=self._with_dimension(name, new), fixed=others)._validated(source)

    def _condition(self, name: str) -> Condition | None:
        """The condition of a dimension; of one that is not in the space, the default if it can be met."""
        if name in self.dimensions:
            return self.dimensions[name].when
        when = _CONDITIONS.get(name)
        return when if when and when[0] in self.dimensions else None

    def _with_dimension(self, name: str, new: Dimension) -> dict[str, Dimension]:
        """The dimensions with one replaced, or added before those that are conditional on it."""
        dimensions: dict[str, Dimension] = {}
        for n, d in self.dimensions.items():
            if d.when and d.when[0] == name:
                dimensions.setdefault(name, new)
            dimensions[n] = new if n == name else d
        return dimensions | {name: new}

    def _validated(self, source: str) -> Space:
        """The space itself. Raises ValueError naming `source` if a value makes no valid configuration."""
        for name, dimension in self.dimensions.items():
            values = dimension.options if isinstance(dimension, Choice) else (dimension.low, dimension.high)
            for value in values if name not in _SIZES else ():
                _check_value(self, name, value, source)
        for size in self.image_sizes:
            for backbone in self.backbones:
                fixed = replace(self, fixed={**self.fixed, "backbone": backbone, "image_size": size})
                for name in filter(self._has, _SIZES):
                    for value in self._values(name) if name != "image_size" else (size,):
                        _check_value(fixed, name, value, source)
        return self


def read_override(text: str) -> tuple[str, Dimension]:
    """The field and the values of `NAME=V`, `NAME=V1,V2,...` or `NAME=LOW:HIGH`, whatever the space.

    Raises ValueError for an unknown name, a value of the wrong type, an empty range or a repeated value.
    """
    source = f"--set {text}"
    name, _, values = text.partition("=")
    if name not in FIELDS or not values:
        raise ValueError(
            f"{source}: expected NAME=V, NAME=V1,V2 or NAME=LOW:HIGH with NAME one of {', '.join(FIELDS)}"
        )
    if name == "epochs" and not values.isdecimal():
        raise ValueError(f"{source}: epochs must be one number, the same schedule for every trial")
    if ":" in values:
        low, high = (parse_value(name, value) for value in values.split(":", 1))
        if not (isinstance(low, float) and isinstance(high, float) and low < high):
            raise ValueError(f"{source}: LOW:HIGH is for a real number, with LOW below HIGH")
        return name, Range(low, high, log=low > 0 and high / low >= 10)
    options = tuple(parse_value(name, value) for value in values.split(","))
    if repeated := [v for n, v in enumerate(options) if v in options[:n]]:
        raise ValueError(f"{source}: {repeated[0]!r} is there more than once")
    return name, Choice(options)


def _dimension(values: Mapping[str, Any]) -> Dimension:
    when = (values["when"][0], tuple(values["when"][1])) if values["when"] else None
    if values["kind"] == "Choice":
        return Choice(tuple(values["options"]), when)
    return Range(values["low"], values["high"], values["log"], when)


def _fit(backbone: str, size: int) -> int:
    """The nearest size that the backbone takes; sizes that no backbone takes stay as they are."""
    return facts_of(backbone).fit(size) if SIZES[0] <= size <= SIZES[1] else size


def _check_value(space: Space, name: str, value: Any, source: str) -> None:
    start = {"backbone": space.backbones[0], "image_size": max(space.image_sizes), "epochs": 1}
    try:
        space.config({**start, **space.fixed, name: value})
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def unfrozen_configs(space: Space) -> dict[str, list[TrialConfig]]:
    """For each backbone, a fully unfrozen configuration per image size, largest first."""
    shared = {**space.fixed, "unfreeze": "full"}
    return {
        b: [
            TrialConfig.from_dict({**shared, "backbone": b, "image_size": s}) for s in space.sizes_of(b)[::-1]
        ]
        for b in space.backbones
    }
