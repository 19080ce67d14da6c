"""python tests/benchmarks/bench_leaderboard.py --data ../shared/data/cars9 --weights ../shared/weights

Whether predicted leaderboards hold: one configuration, fixed beforehand, is trained anew on each of a number
of random splits of the labelled pictures; from its score on audit the score on a pseudo-test is predicted,
which is as large beside audit as cars9's hidden set is (660 beside 297). A row a metric: how many of the
scores lie in their 95 % interval, and how many lie in that of audit alone, which forgets that the hidden
pictures are a sample, too.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from platformdirs import user_cache_path

from carmodels import demo
from carmodels.data import Split, Splits, open_dataset
from carmodels.features import FeatureStore
from carmodels.models import Weights
from carmodels.predictions import METRICS, Interval, accuracy_interval, hidden_score, score_interval
from carmodels.space import TrialConfig
from carmodels.training import fit, predict

from table import Row, as_in_a_worker, asked, finish

HIDDEN = 1 / 3  # of the labelled pictures, taken from train
CONFIG = TrialConfig(
    "mobilenetv2_035", image_size=96, epochs=6, unfreeze="frozen", head_depth=1, lr=3e-3, augment="crop"
)
DEMO_CONFIG = replace(CONFIG, backbone="test_resnet", image_size=64)


def main() -> None:
    """Train on every split, predict, look, write the table."""

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--splits", type=int, default=20, metavar="N", help="random splits (20)")

    options = asked(__doc__, add)
    torch.set_num_threads(2)
    cache = user_cache_path("carmodels")
    config = CONFIG if options.data else DEMO_CONFIG
    data = options.data or demo.draw_demo(cache / "demo") or cache / "demo"
    weights = Weights.parse(options.weights or str(Path(demo.__file__).with_name("weights")))
    found: dict[str, list[tuple[float, Interval, Interval]]] = {name: [] for name in METRICS}
    for seed in range(options.splits):
        splits = with_hidden(open_dataset(data, cache_dir=cache, max_size=96, seed=seed), seed)
        for name, score, predicted, alone in looks(replace(config, seed=seed), splits, weights):
            found[name].append((score, predicted, alone))
            print(f"{seed:2}  {name:9} audit {predicted.value:.4f}  predicted {predicted.low:.4f} to "
                  f"{predicted.high:.4f}  came to {score:.4f}  {inside(score, predicted)}")  # fmt: skip
    case = "cars9" if options.data else "demo"
    rows = [
        Row(
            f"{case}, {name}: pseudo-tests in their prediction interval; theirs: in that of audit alone",
            sum(inside(score, predicted) for score, predicted, _ in looked),
            sum(inside(score, alone) for score, _, alone in looked),
            "",
            round(0.9 * len(looked)),
            len(looked),
            f"of {len(looked)} splits",
        )
        for name, looked in found.items()
    ]
    finish("bench_leaderboard", rows)


def with_hidden(splits: Splits, seed: int) -> Splits:
    """A third of the labelled pictures go from train to `test`, where they keep their labels; groups whole."""
    train, groups = splits.train, splits.images.groups[splits.train.rows]
    wanted = HIDDEN * sum(len(s) for s in (splits.train, splits.val, splits.audit))
    order = np.random.default_rng(seed).permutation(np.unique(groups))
    place = {group: at for at, group in enumerate(order)}
    by_group = np.argsort([place[group] for group in groups], kind="stable")
    hidden = np.zeros(len(train), bool)
    hidden[by_group[: round(wanted)]] = True
    hidden = np.isin(groups, groups[hidden])
    learns, test = part(train, ~hidden, "train"), part(train, hidden, "test")
    return replace(splits, train=learns, test=test, split_hash=f"{splits.split_hash}-hidden")


def part(split: Split, chosen: np.ndarray, name: str) -> Split:
    """The chosen pictures of a split."""
    assert split.labels is not None
    ids = tuple(np.array(split.ids)[chosen].tolist())
    return Split(name, ids, split.labels[chosen], split.rows[chosen])


def looks(
    config: TrialConfig, splits: Splits, weights: Weights
) -> Iterator[tuple[str, float, Interval, Interval]]:
    """For each metric: the score on the pseudo-test, its prediction interval, and the interval of audit."""
    with tempfile.TemporaryDirectory() as folder:
        model = fit(config, splits, weights=weights, features=FeatureStore(Path(folder))).model
    audit, test = (
        predict(model, splits, split, config=config).probs for split in (splits.audit, splits.test)
    )
    known, true = splits.audit.labels, splits.test.labels
    assert known is not None
    assert true is not None
    for name, metric in METRICS.items():
        alone = accuracy_interval(audit, known) if name == "accuracy" else score_interval(name, audit, known)
        yield name, metric.score(test, true), hidden_score(name, audit, known, len(true)), alone


def inside(score: float, interval: Interval) -> bool:
    """Whether the interval holds the score."""
    return interval.low <= score <= interval.high


if __name__ == "__main__":
    as_in_a_worker()
    main()
