"""The competition's sample file in, a checked submission of the same ids, order and header out."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from carmodels.evaluation.predictions import Predictions, refuse_doubles
from carmodels.files import csv_text, write_whole

_COLUMNS = ["Id", "Category"]  # where there is no sample file


def read_sample(path: Path) -> pd.DataFrame:
    """The sample file as text: ids in the first column, categories in the second, named as in its header.

    ValueError naming the file for one that is no UTF-8 table of two columns, or that holds an id twice.
    """
    try:
        # header=None: pandas renames columns without a name or with another's, and guesses an index column
        rows = pd.read_csv(path, header=None, dtype=str, na_filter=False)
    except (ValueError, IsADirectoryError) as error:  # pandas' own are ValueErrors without the file's name
        raise ValueError(f"{path} is not a table of ids and categories: {str(error).strip()}") from error
    if rows.shape[1] != len(_COLUMNS):
        raise ValueError(
            f"{path} must have two columns, ids and categories, but its header is {list(rows.iloc[0])}"
        )
    refuse_doubles(rows[0].iloc[1:], f"the sample file {path}")
    return pd.DataFrame(rows.iloc[1:].to_numpy(), columns=list(rows.iloc[0]))


def write_submission(predictions: Predictions, out: Path, *, sample: Path | None) -> None:
    """Writes each id with its likeliest class to `out`, whole, in the order and under the header of `sample`.

    Without a sample file: in the order of the predictions, under `Id,Category`. ValueError naming the ids
    that only one side has, or that the sample file holds twice; nothing is written then.
    """
    columns = _COLUMNS
    if sample is not None:
        template = read_sample(sample)
        columns = list(template.columns)
        predictions = predictions.aligned(tuple(template.iloc[:, 0]), theirs=f"the sample file {sample}")
    guesses = [predictions.classes[index] for index in predictions.probs.argmax(axis=1)]
    write_whole(out, csv_text([columns, *zip(predictions.ids, guesses, strict=True)]))
