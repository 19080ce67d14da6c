"""The most confident wrong answers of a study's ensemble on val."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from carmodels.study import Study

MOST = 8  # mistakes shown


@dataclass(frozen=True)
class Mistake:
    """A misclassified image."""

    image: str  # its id
    column: int  # of the predicted class
    answer: str
    truth: str
    confidence: float
    chance: float  # probability of the true class


@dataclass(frozen=True)
class Mistakes:
    """The wrong answers of an ensemble on val."""

    among: int  # images in val
    wrong: int
    worst: tuple[Mistake, ...]  # most confident first


def found_mistakes(study: Study) -> Mistakes | None:
    """Mistakes of the study's ensemble. None without an ensemble."""
    if not study.predictions_file("ensemble", "val").is_file():
        return None
    ids, names = list(study.labels("val")), study.metadata["class_names"]
    probs, truth = study.probs_and_labels("ensemble", "val")
    predicted = probs.argmax(axis=1)
    wrong = np.flatnonzero(predicted != truth)
    order = wrong[np.argsort(-probs[wrong].max(axis=1), kind="stable")][:MOST].tolist()
    worst = [
        Mistake(
            image=ids[k],
            column=int(predicted[k]),
            answer=names[predicted[k]],
            truth=names[truth[k]],
            confidence=float(probs[k].max()),
            chance=float(probs[k, truth[k]]),
        )
        for k in order
    ]
    return Mistakes(len(ids), len(wrong), tuple(worst))
