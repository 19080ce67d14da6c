"""A short list of backbones from their linear probes."""

from __future__ import annotations

import numpy as np
import pytest

from tune.optim.shortlist import ProbeScore, gap, is_unresolved, shortlist


def score(backbone: str, accuracy: float, *, size: int = 96, images: int = 1000, seed: int = 0) -> ProbeScore:
    """A score whose right answers are those of the easiest images: paired gaps have little noise."""
    return ProbeScore(backbone, size, np.arange(images) < round(accuracy * images), 0.01)


def scattered(backbone: str, accuracy: float, seed: int, images: int = 200) -> ProbeScore:
    """A score whose right answers are anywhere: gaps have much noise."""
    return ProbeScore(backbone, 96, np.random.default_rng(seed).random(images) < accuracy, 0.01)


def names(scores: list[ProbeScore]) -> list[str]:
    return [s.backbone for s in scores]


def test_a_clearly_worse_backbone_is_not_listed_whatever_imagenet_says() -> None:
    found = shortlist([score("a", 0.8), score("b", 0.6)], {"a": 70.0, "b": 85.0})
    assert names(found) == ["a"]


def test_within_the_noise_imagenet_decides_the_order() -> None:
    found = shortlist([score("a", 0.80), score("b", 0.79)], {"a": 70.0, "b": 75.0})
    assert names(found) == ["b", "a"]


def test_the_best_by_probe_stays_on_a_full_list() -> None:
    scores = [score("best", 0.80), *(score(f"other{n}", 0.79) for n in range(5))]
    found = shortlist(scores, {f"other{n}": 75.0 + n for n in range(5)})
    assert len(found) == 3
    assert names(found) == ["other4", "other3", "best"]


def test_without_imagenets_accuracy_the_probe_decides() -> None:
    assert names(shortlist([score("a", 0.79), score("b", 0.80)], {})) == ["b", "a"]


def test_few_images_resolve_little() -> None:
    assert is_unresolved(scattered("a", 0.6, 0), scattered("b", 0.55, 1))
    assert not is_unresolved(scattered("a", 0.6, 0, 20_000), scattered("b", 0.55, 1, 20_000))


def test_each_backbone_is_listed_once_at_its_best_size() -> None:
    scores = [score("a", 0.75, size=64), score("a", 0.80, size=96), score("b", 0.80, size=64)]
    assert {(s.backbone, s.image_size) for s in shortlist(scores, {})} == {("a", 96), ("b", 64)}


def test_a_gap_is_paired_on_the_images_that_both_have_seen() -> None:
    first, second = score("a", 0.8, images=1000), score("b", 0.8, images=100)
    second = ProbeScore("b", 96, first.right[:100].copy(), 0.01)
    assert gap(first, second) == (0.0, 0.0)


@pytest.mark.parametrize("few", [50, 200])
def test_who_was_dropped_early_ranks_behind_who_was_not(few: int) -> None:
    lucky = ProbeScore("lucky", 96, np.ones(few, bool), 0.01)
    assert names(shortlist([lucky, score("a", 0.7), score("b", 0.5)], {}))[0] != "lucky"
