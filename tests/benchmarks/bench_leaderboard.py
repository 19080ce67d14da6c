"""python tests/benchmarks/bench_leaderboard.py --data ../shared/data/cars9 --weights ../shared/weights

Whether predicted leaderboards hold: one configuration, fixed beforehand (a linear head, by logistic
regression, on a frozen backbone's outputs), is trained anew on each of a number of random splits of the
labelled images. From its score on holdout the score on a pseudo-test is predicted, a third of the labelled
images that neither training nor holdout has seen, as large beside holdout as cars9's hidden set is. A row a
metric: how many of the scores lie in their 95 % interval, and how many lie in the interval of holdout alone,
which forgets that the hidden images are a sample, too.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from platformdirs import user_cache_path
from sklearn.linear_model import LogisticRegression

from carmodels.data.dataset import Splits, open_dataset
from carmodels.data.loader import Loader
from carmodels.data.splits import Split
from carmodels.demo.folder import DEMO_WEIGHTS, draw_demo
from carmodels.evaluation.intervals import Interval, score_interval, score_prediction_interval
from carmodels.evaluation.metrics import METRICS
from carmodels.models.classifier import create_classifier
from carmodels.models.weights import Weights
from carmodels.training.config import TrialConfig

from table import Row, as_in_a_worker, asked, finish

HIDDEN = 1 / 3  # of the labelled images, taken from train
PENALTY = 0.01  # inverse strength, of scikit-learn's logistic regression
CONFIG = TrialConfig("mobilenetv2_100", image_size=128, epochs=1)
DEMO_CONFIG = replace(CONFIG, backbone="test_resnet", image_size=64)


def main() -> None:
    """Train on every split, predict, look, write the table."""

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--splits", type=int, default=20, metavar="N", help="random splits (20)")

    options = asked(__doc__, add)
    cache = user_cache_path("carmodels")
    config = CONFIG if options.data else DEMO_CONFIG
    data = options.data or cache / "demo"
    if not options.data:
        draw_demo(data)
    weights = Weights.parse(options.weights or str(DEMO_WEIGHTS))
    seen = [open_dataset(data, cache_dir=cache, max_size=128, seed=s) for s in range(options.splits)]
    features = outputs(config, seen[0], weights)
    found: dict[str, list[tuple[float, Interval, Interval]]] = {name: [] for name in METRICS}
    for seed, splits in enumerate(seen):
        for name, score, predicted, alone in looks(with_hidden(splits, seed), features):
            found[name].append((score, predicted, alone))
            ends = f"{predicted.low:.4f} to {predicted.high:.4f}"
            print(f"{seed:2}  {name:9} holdout {predicted.value:.4f}  predicted {ends}  came to {score:.4f}")
    case = options.data.name if options.data else "demo"
    rows = [
        Row(
            f"{case}, {name}: pseudo-tests in their prediction interval; theirs: in that of holdout alone",
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


@torch.inference_mode()
def outputs(config: TrialConfig, splits: Splits, weights: Weights) -> np.ndarray:
    """(N, F) outputs of the frozen backbone for every image of the cache, by row."""
    model = create_classifier(config, classes=len(splits.classes), weights=weights).eval()
    rows = np.arange(len(splits.images))
    everything = Split("all", tuple(map(str, rows)), None, rows)
    loader = Loader(splits.images, everything, image_size=config.image_size, batch_size=64)
    batches = (model.backbone(model.normalise(batch.images)) for batch in loader.epoch(0))
    return torch.cat(list(batches)).numpy()


def with_hidden(splits: Splits, seed: int) -> Splits:
    """A third of the labelled images go from train to `test`, with labels; near-duplicates together."""
    train = splits.train
    wanted = HIDDEN * sum(len(split) for split in (train, splits.val, splits.holdout))
    groups, sizes = np.unique(splits.images.groups[train.rows], return_counts=True)
    order = np.random.default_rng(seed).permutation(len(groups))
    taken = groups[order[np.cumsum(sizes[order]) <= wanted]]
    hidden = np.isin(splits.images.groups[train.rows], taken)
    learns, test = part(train, ~hidden, "train"), part(train, hidden, "test")
    return replace(splits, train=learns, test=test)


def part(split: Split, chosen: np.ndarray, name: str) -> Split:
    """The chosen images of a split."""
    assert split.labels is not None
    ids = tuple(np.array(split.ids)[chosen].tolist())
    return Split(name, ids, split.labels[chosen], split.rows[chosen])


def looks(splits: Splits, features: np.ndarray) -> Iterator[tuple[str, float, Interval, Interval]]:
    """For each metric: the score on the pseudo-test, its prediction interval, and the interval of holdout."""
    known, true = splits.holdout.labels, splits.test.labels
    assert known is not None
    assert true is not None
    head = LogisticRegression(C=PENALTY, max_iter=1000)
    head.fit(features[splits.train.rows], splits.train.labels)
    holdout, test = (head.predict_proba(features[split.rows]) for split in (splits.holdout, splits.test))
    for name, metric in METRICS.items():
        alone = score_interval(name, holdout, known)
        yield (
            name,
            metric.score(test, true),
            score_prediction_interval(name, holdout, known, len(true)),
            alone,
        )


def inside(score: float, interval: Interval) -> bool:
    """Whether the interval holds the score."""
    return interval.low <= score <= interval.high


if __name__ == "__main__":
    as_in_a_worker()
    main()
