"""How a machine is shared out between trials, and that what a user can mend is one line."""

from __future__ import annotations

import argparse

import pytest

from tune.cli import resources
from tune.cli.options import check_machine_options, guarded
from tune.cli.resources import Machine
from tune.runtime.job import Workers


def options(share: str = "1", workers: int | None = None) -> argparse.Namespace:
    return argparse.Namespace(gpus_per_trial=share, workers=workers, address=None, cache=None)


@pytest.mark.parametrize(
    ("share", "asked", "gpus", "cores", "expected"),
    [
        ("1", None, 0, 2, Workers(2, 1, 0.0)),
        ("1", 1, 0, 8, Workers(1, 8, 0.0)),
        ("1", 3, 0, 8, Workers(3, 2, 0.0)),
        ("1", None, 4, 32, Workers(4, 8, 1.0)),
        ("0.5", None, 2, 16, Workers(4, 4, 0.5)),
        ("0.3333333", None, 1, 16, Workers(3, 5, 0.3333333)),
        ("0.7", None, 2, 16, Workers(2, 8, 0.7)),
        ("0.25", 2, 1, 2, Workers(2, 1, 0.25)),
        ("auto", None, 2, 16, Workers(2, 8, 1.0, packed=8)),
        ("auto", 3, 1, 16, Workers(1, 16, 1.0, packed=3)),
        ("auto", 2, 8, 16, Workers(2, 8, 1.0, packed=2)),
        ("auto", None, 0, 2, Workers(2, 1, 0.0)),
    ],
)
def test_trials_get_their_share_of_gpus_or_cores(
    share: str, asked: int | None, gpus: int, cores: int, expected: Workers
) -> None:
    assert resources.share_out(options(share, asked), [Machine(cores, gpus)]) == expected


@pytest.mark.parametrize(
    ("share", "asked", "gpus", "message"),
    [
        ("0", None, 1, "--gpus-per-trial 0 must be above 0 and at most 1, or auto"),
        ("2", None, 4, "--gpus-per-trial 2 must be above 0 and at most 1"),
        ("nan", None, 4, "--gpus-per-trial nan must be above 0 and at most 1"),
        ("half", None, 4, "--gpus-per-trial half must be above 0 and at most 1"),
        ("auto", 9, 2, "--workers 9 is more than 2 GPUs at --gpus-per-trial auto hold; at most 8"),
        ("0.5", 5, 2, "--workers 5 is more than 2 GPUs at --gpus-per-trial 0.5 hold; at most 4"),
        ("1", 9, 0, "--workers 9 is more than 8 cores hold; at most 8"),
    ],
)
def test_more_than_there_is_is_refused(share: str, asked: int | None, gpus: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resources.share_out(options(share, asked), [Machine(8, gpus)])


@pytest.mark.parametrize(
    ("share", "asked", "message"),
    [
        ("half", None, "--gpus-per-trial half must be above 0 and at most 1, or auto: a trial trains on one"),
        ("0", None, "--gpus-per-trial 0 must be above 0"),
        ("auto", 0, "--workers 0 must be at least 1"),
    ],
)
def test_what_no_machine_has_is_refused_before_one_is_looked_at(
    share: str, asked: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_machine_options(options(share, asked))


@pytest.mark.parametrize(
    ("asked", "machines", "expected"),
    [
        (None, [(0, 0), (2, 0), (4, 0)], Workers(6, 1, 0.0)),
        (1, [(2, 0), (2, 0)], Workers(1, 2, 0.0)),  # four cores, but no machine that has them all
        (3, [(4, 0), (8, 0)], Workers(3, 4, 0.0)),
        (None, [(64, 0), (8, 1), (8, 1)], Workers(2, 8, 1.0)),  # the head's cores are no GPU's
        (None, [(16, 4), (4, 1)], Workers(5, 4, 1.0)),
    ],
)
def test_on_a_cluster_a_trial_asks_for_what_one_machine_has(
    asked: int | None, machines: list[tuple[int, int]], expected: Workers
) -> None:
    assert resources.share_out(options("1", asked), [Machine(*m) for m in machines]) == expected


@pytest.mark.parametrize(
    ("error", "code"),
    [(ValueError("this=1 is wrong"), 2), (PermissionError(13, "Permission denied", "/results"), 2)],
)
def test_what_a_user_can_mend_is_one_line(
    error: Exception, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: object) -> int:
        raise error

    assert guarded(run, options()) == code
    assert capsys.readouterr().err == f"error: {error}\n"


@pytest.mark.parametrize(
    ("words", "says"), [("", "stopped at once"), ("a goes on", "stopped at once; a goes on")]
)
def test_ctrl_c_is_one_line_that_says_how_to_go_on_where_that_is_known(
    words: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: object) -> int:
        raise KeyboardInterrupt(*([words] if words else []))

    assert guarded(run, options()) == 130
    assert capsys.readouterr().err == f"{says}\n"
