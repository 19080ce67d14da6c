"""optuna.db: a copy of the search for Optuna's dashboard."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import optuna
from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError

_LOCKED = 0.5  # seconds that SQLite waits for a lock; Optuna asks several times
_PAUSE = 60.0  # seconds from a failure to the next try, since a try may take seconds of the driver's time


class OptunaFile:
    """A copy of the search for Optuna's dashboard. Nothing reads it, so no error of it stops a search.

    Trials that could not be written are written with a later one. `say` is told of the first failure.
    """

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self._path, self._say = path, say
        self._study: optuna.Study | None = None
        self._waiting: list[FrozenTrial] = []
        self._told = False
        self._next_try = 0.0  # time.monotonic()

    def __reduce__(self) -> tuple[type[object], tuple[()]]:
        """As an empty object: Ray pickles the searcher for `Tuner.restore`, which is not used."""
        return object, ()

    def begin(self, study: optuna.Study) -> None:
        """Replace the file by one that has the study's trials."""
        self._name, self._direction = study.study_name, study.direction
        self._study, self._next_try = None, 0.0
        self.add(study.trials)

    def add(self, trials: Sequence[FrozenTrial]) -> None:
        """Write trials that ended, and those that are still to be written."""
        self._waiting += trials
        if time.monotonic() < self._next_try:
            return
        try:
            self._write()
        except (SQLAlchemyError, StorageInternalError, OSError) as error:
            self._next_try = time.monotonic() + _PAUSE
            if not self._told:
                self._told = True
                self._say(f"{self._path}: {_reason(error)}. It is a copy: the search goes on without it.")

    def end(self) -> None:
        """Write what is still to be written, at the search's end."""
        self._next_try = 0.0
        self.add([])

    def _write(self) -> None:
        if self._study is None:
            self._path.unlink(missing_ok=True)
            url = URL.create("sqlite", database=str(self._path)).render_as_string(hide_password=False)
            storage = optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": _LOCKED}})
            self._study = optuna.create_study(
                storage=storage, study_name=self._name, direction=self._direction
            )
        while self._waiting:
            self._study.add_trial(self._waiting[0])
            self._waiting.pop(0)


def _reason(error: Exception) -> str:
    """The database's own words."""
    cause = error.__cause__ or error
    return str(getattr(cause, "orig", None) or cause).splitlines()[0]
