"""The answers on val that a study's ensemble was surest of and that are wrong."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from carmodels.study import Study

MOST = 8  # mistakes that are shown


@dataclass(frozen=True)
class Mistake:
    """An image that is answered wrongly."""

    image: str  # its id
    column: int  # of the answer
    answer: str
    truth: str
    confidence: float
    chance: float  # the probability of the truth


@dataclass(frozen=True)
class Mistakes:
    """The wrong answers of an ensemble among those on val."""

    among: int
    wrong: int
    worst: tuple[Mistake, ...]  # the most confident ones first


def found_mistakes(study: Study) -> Mistakes | None:
    """Those of the study's ensemble; None before there is one."""
    if not study.predictions_file("ensemble", "val").is_file():
        return None
    ids, names = list(study.labels("val")), study.metadata["class_names"]
    probs, truth = study.probs_and_labels("ensemble", "val")
    told = probs.argmax(axis=1)
    wrong = np.flatnonzero(told != truth)
    order = wrong[np.argsort(-probs[wrong].max(axis=1), kind="stable")][:MOST].tolist()
    worst = [
        Mistake(
            image=ids[k],
            column=int(told[k]),
            answer=names[told[k]],
            truth=names[truth[k]],
            confidence=float(probs[k].max()),
            chance=float(probs[k, truth[k]]),
        )
        for k in order
    ]
    return Mistakes(len(ids), len(wrong), tuple(worst))
