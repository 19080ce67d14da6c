"""Writes submissions with the ids, order and header of the competition's sample file."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from carmodels.evaluation.predictions import Predictions, refuse_duplicates
from carmodels.files import csv_text, write_atomic

_DEFAULT_HEADER = ["Id", "Category"]  # without a sample file


def read_sample(path: Path) -> pd.DataFrame:
    """The sample file as text: ids, then categories, in columns named by its header.

    ValueError names a file that is not a UTF-8 table of two columns, or that has an id twice.
    """
    try:
        # header=None: otherwise pandas renames empty and duplicate column names and may take ids as an index
        rows = pd.read_csv(path, header=None, dtype=str, na_filter=False)
    except (ValueError, IsADirectoryError) as error:  # pandas raises ValueErrors without the file's name
        raise ValueError(f"{path} is not a table of ids and categories: {str(error).strip()}") from error
    if rows.shape[1] != len(_DEFAULT_HEADER):
        raise ValueError(
            f"{path} must have two columns, ids and categories, but its header is {list(rows.iloc[0])}"
        )
    refuse_duplicates(rows[0].iloc[1:], f"the sample file {path}")
    return pd.DataFrame(rows.iloc[1:].to_numpy(), columns=list(rows.iloc[0]))


def write_submission(predictions: Predictions, out: Path, *, sample: Path | None) -> None:
    """Write each id with its most probable class to `out`, atomically.

    Order and header are those of `sample`; without one, those of the predictions and `Id,Category`.
    ValueError, with nothing written, names ids that only one side has or that the sample file has twice.
    """
    header = _DEFAULT_HEADER
    if sample is not None:
        template = read_sample(sample)
        header = list(template.columns)
        predictions = predictions.aligned(tuple(template.iloc[:, 0]), theirs=f"the sample file {sample}")
    categories = [predictions.classes[index] for index in predictions.probs.argmax(axis=1)]
    write_atomic(out, csv_text([header, *zip(predictions.ids, categories, strict=True)]))
