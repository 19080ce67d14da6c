"""Learning curves of configurations that nobody trained: a regression over recorded ones, and its error."""

from __future__ import annotations

import csv
import math
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
from sklearn.ensemble import ExtraTreesRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

from carmodels.catalog import UNFREEZE
from carmodels.models.parameter_groups import trainable_groups
from carmodels.training.config import TrialConfig
from tune.budget.costs import FORWARD_COST, Costs

TRAIN, VAL = 1383, 297  # images that the curves were trained and validated on
GROUPS = 16  # about as many layer groups as a backbone has


@dataclass(frozen=True)
class Curves:
    """What `collect_curves.py` wrote: configurations by number, and whole curves by (number, seed)."""

    configs: dict[int, TrialConfig]
    accuracy: dict[tuple[int, int], np.ndarray]  # (epochs,) on val
    seconds: dict[tuple[int, int], np.ndarray]  # (epochs,)
    fills: dict[tuple[str, int], float]  # (backbone, image size) -> seconds to store one view's outputs

    @classmethod
    def read(cls, path: Path) -> Curves:
        """`path` is the CSV of the curves; the other two lie beside it."""
        types = {f.name: str(f.type) for f in fields(TrialConfig)}
        cast = {"int": int, "float": float, "bool": lambda text: text == "True", "str": str}
        configs = {}
        for row in _rows(path.with_name(f"{path.stem}-configs.csv")):
            number = int(row.pop("config_id"))
            row.pop("metric", None)  # what the curves were recorded by, the same for all
            configs[number] = TrialConfig.from_dict({k: cast[types[k]](v) for k, v in row.items()})
        found: dict[tuple[int, int], dict[int, tuple[float, float]]] = defaultdict(dict)
        for row in _rows(path):
            key = int(row["config_id"]), int(row["seed"])
            found[key][int(row["epoch"])] = float(row["val_accuracy"]), float(row["seconds"])
        whole = {k: v for k, v in found.items() if len(v) == configs[k[0]].epochs}
        fills = defaultdict(list)
        for row in _rows(path.with_name(f"{path.stem}-fills.csv")):
            fills[row["backbone"], int(row["image_size"])].append(float(row["seconds"]))
        return cls(
            {n: c for n, c in configs.items() if (n, 0) in whole},
            {k: np.array([v[e][0] for e in sorted(v)]) for k, v in whole.items()},
            {k: np.array([v[e][1] for e in sorted(v)]) for k, v in whole.items()},
            {key: float(np.median(values)) for key, values in fills.items()},
        )

    def only(self, numbers: Sequence[int]) -> Curves:
        """The same of these configurations alone."""
        kept = set(numbers)
        return replace(
            self,
            configs={n: c for n, c in self.configs.items() if n in kept},
            accuracy={k: v for k, v in self.accuracy.items() if k[0] in kept},
            seconds={k: v for k, v in self.seconds.items() if k[0] in kept},
        )

    def costs(self) -> Costs:
        """What a search would have measured of its hardware: the median of full epochs, for each image."""
        images = TRAIN + FORWARD_COST * VAL
        full: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        for (number, _), seconds in self.seconds.items():
            config = self.configs[number]
            if config.unfreeze == "full":
                full[config.backbone][config.image_size].append(float(np.median(seconds)) / images)
        found = {b: {size: float(np.median(s)) for size, s in sizes.items()} for b, sizes in full.items()}
        return Costs(found, TRAIN, VAL)

    def halves(self) -> tuple[Curves, Curves]:
        """Two disjoint halves, drawn at random: alternate points of a Sobol sequence differ in kind.

        Where more configurations are collected than the first ones that were, each stays in its half.
        """
        drawn = np.random.default_rng(0)
        numbers = [*drawn.permutation(HALVED), *(HALVED + drawn.permutation(HALVED))]
        here = [[n for n in numbers[one::2] if n in self.configs] for one in (0, 1)]
        return self.only(here[0]), self.only(here[1])


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


class Surrogate:
    """Noise-free curves and seconds of any configuration of the space, and the noise around them.

    The logits of each configuration's accuracies, a mean over its seeds, are a mean curve plus `SHAPES`
    principal components; the weight of each is a Gaussian process over the configuration (Matern kernel, a
    length for each feature; Rasmussen and Williams, 2006). Noise is normal with the covariance of the
    repeated seeds over epochs: new in each at first, a run's own at the end, where the rate is low. Seconds
    are extremely randomised trees (Geurts et al., 2006), one row an epoch. With `trees` the weights are such
    trees, too: a truth of another kind, which no searcher that models with Gaussian processes has an
    advantage on.
    """

    def __init__(
        self,
        curves: Curves,
        seed: int = 0,
        *,
        trees: bool = False,
        noise: np.ndarray | None = None,
    ) -> None:
        """`noise` (epochs, epochs) is its covariance, by default what the curves' own repeats show."""
        self.curves = curves
        numbers = sorted(curves.configs)
        means = np.array(
            [np.mean([_logit(v) for k, v in curves.accuracy.items() if k[0] == n], axis=0) for n in numbers]
        )
        self._centre = means.mean(0)
        _, _, shapes = np.linalg.svd(means - self._centre, full_matrices=False)
        self._shapes = shapes[:SHAPES]
        weights = (means - self._centre) @ self._shapes.T
        described = np.array([encoded(curves.configs[n]) for n in numbers])
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", ConvergenceWarning
            )  # lengths of what does not matter go to the bound
            self._regressions = [
                _regression(trees, described.shape[1], seed).fit(described, w) for w in weights.T
            ]
        keys = sorted(curves.seconds)
        rows = np.concatenate([epochs(curves.configs[n]) for n, _ in keys])
        seconds = np.concatenate([curves.seconds[k] for k in keys])
        self._seconds = ExtraTreesRegressor(300, max_features=0.6, random_state=seed)
        self._seconds.fit(rows, np.log(np.maximum(seconds, 0.05)))
        covariance = repeat_noise(curves) if noise is None else noise
        values, vectors = np.linalg.eigh(covariance)
        self._noise = vectors * np.sqrt(np.maximum(values, 0))  # (epochs, epochs), a root of the covariance
        self._known: dict[TrialConfig, tuple[np.ndarray, np.ndarray]] = {}

    def of(self, config: TrialConfig) -> tuple[np.ndarray, np.ndarray]:
        """(epochs,) mean accuracy on val, and (epochs,) seconds, of a configuration."""
        if config not in self._known:
            self._known[config] = (
                self.means([config])[0],
                np.exp(self._seconds.predict(epochs(config))),
            )
        return self._known[config]

    def means(self, configs: Sequence[TrialConfig]) -> np.ndarray:
        """(N, epochs) mean accuracies on val."""
        described = np.array([encoded(config) for config in configs])
        weights = np.stack([regression.predict(described) for regression in self._regressions], axis=1)
        return _expit(self._centre + weights @ self._shapes)

    def sample(self, mean: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(epochs,) a run's accuracies around the mean."""
        return np.clip(mean + self._noise @ rng.normal(size=len(mean)), 0, 1)


BACKBONES = ("mobilenetv2_035", "mobilenetv2_100", "mobilenetv1_100")
HALVED = 124  # configurations that the halves were first drawn from
SHAPES = 3  # principal components of a learning curve


def encoded(config: TrialConfig) -> list[float]:
    """(F,) a configuration in numbers of about the same scale; what it does not use is at the middle."""
    learns = UNFREEZE[config.unfreeze].head_only_epochs is None
    return [
        *(float(config.backbone == name) for name in BACKBONES),
        *(float(config.augment == name) for name in ("shift", "crop", "color")),
        *(float(config.unfreeze == name) for name in UNFREEZE),
        math.log2(config.image_size / 96),
        math.log10(config.lr / 2.5e-3),
        0.0 if learns else math.log10(config.lr_ratio / 0.03) / 2,
        float(config.head_depth) / 2,
        2 * config.dropout - 0.5 if config.head_depth else 0.0,
        10 * config.label_smoothing,
    ]


def epochs(config: TrialConfig) -> np.ndarray:
    """(epochs, F): what decides the seconds of each of its epochs."""
    row = UNFREEZE[config.unfreeze]
    numbers = range(1, config.epochs + 1)
    opened = [trainable_groups(row, epoch=n, epochs=config.epochs, groups=GROUPS) / GROUPS for n in numbers]
    return np.array([[*encoded(config), share, float(share > 0)] for share in opened])


def _regression(trees: bool, dimensions: int, seed: int) -> GaussianProcessRegressor | ExtraTreesRegressor:
    if trees:
        return ExtraTreesRegressor(300, max_features=0.6, random_state=seed)
    kernel = ConstantKernel(1.0, (1e-2, 1e2)) * Matern([1.0] * dimensions, (0.2, 1e2), nu=2.5)
    return GaussianProcessRegressor(
        kernel + WhiteKernel(0.1, (1e-3, 1.0)), normalize_y=True, n_restarts_optimizer=1, random_state=seed
    )


def errors(known: Curves, unseen: Curves, *, trees: bool = False) -> dict[str, float]:
    """How far the surrogate of some curves is off on others: in the best epoch's accuracy, and in seconds."""
    truth, guess, took, guessed = [], [], [], []
    model = Surrogate(known, trees=trees)
    for number, config in sorted(unseen.configs.items()):
        mean, seconds = model.of(config)
        runs = [k for k in unseen.accuracy if k[0] == number]
        truth.append(float(np.mean([unseen.accuracy[k].max() for k in runs])))
        guess.append(float(mean.max()))
        took.append(float(np.mean([unseen.seconds[k].sum() for k in runs])))
        guessed.append(float(seconds.sum()))
    error = np.array(guess) - np.array(truth)
    return {
        "configurations": len(truth),
        "rmse": float(np.sqrt((error**2).mean())),
        "rank correlation": float(np.corrcoef(_ranks(truth), _ranks(guess))[0, 1]),
        "seconds, median factor off": float(
            np.exp(np.median(np.abs(np.log(np.array(guessed) / np.array(took)))))
        ),
    }


def repeat_noise(curves: Curves) -> np.ndarray:
    """(epochs, epochs) covariance of accuracies around their configuration's mean, over its seeds, pooled."""
    by_config = defaultdict(list)
    for number, seed in sorted(curves.accuracy):
        by_config[number].append(curves.accuracy[number, seed])
    groups = [np.array(runs) for runs in by_config.values() if len(runs) > 1]
    if not groups:
        return 1e-4 * np.eye(len(next(iter(curves.accuracy.values()))))
    apart = np.concatenate([runs - runs.mean(0) for runs in groups])  # (runs, epochs)
    covariance: np.ndarray = apart.T @ apart / (len(apart) - len(groups))
    return covariance


def _ranks(values: Sequence[float]) -> np.ndarray:
    return np.argsort(np.argsort(values))


def _logit(share: np.ndarray) -> np.ndarray:
    clipped = np.clip(share, 0.02, 0.98)
    return np.log(clipped / (1 - clipped))


def _expit(value: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-value))
