"""A quarter of the labelled images as a test set whose labels no arm of a benchmark sees."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from carmodels.data.dataset import open_dataset
from carmodels.data.layout import data_roots, list_images
from carmodels.data.splits import assign_folds

SHARE = 4  # one image in so many
SMALL = 32  # pixels, enough to find near-duplicates


def make_pseudo_test(data: Path, folder: Path, *, split: int, cache: Path) -> dict[str, str]:
    """Write `folder` in the competition's layout, with links to the images. Returns the test labels by id.

    Stratified by class; near-duplicates stay on one side. `split` seeds the choice.
    """
    opened = open_dataset(data, cache_dir=cache, max_size=SMALL)
    parts = (opened.train, opened.val, opened.holdout)
    ids = [name for part in parts for name in part.ids]
    labels = np.concatenate([part.labels for part in parts if part.labels is not None])
    groups = opened.images.groups[np.concatenate([part.rows for part in parts])]
    tested = assign_folds(labels, groups, SHARE, split) == 0
    paths = {item.id: item.path for item in list_images(data_roots(data, cache), data).labelled}
    train, answers = folder / "train", {}
    (folder / "test_upload").mkdir(parents=True)
    rows = []
    for name, label, held_out in zip(ids, labels, tested, strict=True):
        category, flat = opened.classes[label], name.replace("/", "_")
        place = folder / "test_upload" if held_out else train / category
        place.mkdir(parents=True, exist_ok=True)
        (place / flat).symlink_to(paths[name].absolute())
        if held_out:
            answers[flat] = category
        else:
            rows.append((flat, category))
    pd.DataFrame(rows, columns=["Id", "Category"]).to_csv(folder / "train.csv", index=False)
    sample = pd.DataFrame({"Id": list(answers), "Category": opened.classes[0]})
    sample.to_csv(folder / "sample-submission.csv", index=False)
    return answers


def right_answers(submission: Path, answers: Mapping[str, str]) -> list[int]:
    """1 for each test image that a submission has right, else 0, in the order of `answers`."""
    given = pd.read_csv(submission, dtype=str).set_index("Id")["Category"]
    return [int(given[name] == label) for name, label in answers.items()]
