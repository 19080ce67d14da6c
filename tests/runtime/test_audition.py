"""The audition probes each backbone on a growing sample, within the time it has."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from carmodels.data.dataset import Splits
from carmodels.models.weights import Weights
from carmodels.presets import SPACES
from carmodels.steady_clock import steady_time
from carmodels.study import Study
from carmodels.training.config import TrialConfig
from carmodels.training.probing import Probed
from tune.budget.clock import Clock
from tune.monitor.terminal import Screen
from tune.runtime import audition as auditions
from tune.runtime.audition import Candidate, _affordable, _survivors, _take, audition, shortlisted
from tune.runtime.job import Job, Workers

SPACE = SPACES["demo"].with_override("image_size=32,48")


@pytest.fixture
def job(splits: Splits, weights: Weights, tmp_path: Path) -> Job:
    return Job(Study(tmp_path / "study"), splits, weights, Workers(2, 1, 0.0), tmp_path / "cache")


@pytest.mark.usefixtures("own_ray")
def test_each_backbone_is_probed_at_each_size_on_all_images_there_are(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auditions, "_LEAST_IMAGES", 50)
    found = audition(job, SPACE, until=math.inf)
    assert {(s.backbone, s.image_size) for s in found} == {
        (backbone, size) for backbone in SPACE.backbones for size in (32, 48)
    }
    assert {len(s.right) for s in found} == {len(job.splits.train)}
    assert all(s.accuracy > 2 / len(job.splits.classes) for s in found)
    assert all(0 < s.seconds < 1 for s in found)


@pytest.mark.usefixtures("own_ray")
def test_when_the_time_is_up_no_further_backbone_is_probed(job: Job) -> None:
    found = audition(
        Job(job.study, job.splits, job.weights, Workers(1, 1, 0.0), job.cache), SPACE, until=steady_time() - 1
    )
    assert {s.backbone for s in found} == {SPACE.backbones[0]}


def test_a_backbone_is_probed_at_the_largest_sizes_that_can_be_trained_in_time(job: Job) -> None:
    configs = [TrialConfig(backbone="test_resnet", image_size=size, epochs=1) for size in (96, 64, 48, 32)]
    sample = _take(job.splits.train, np.arange(50))
    assert [c.image_size for c in _affordable(job, configs, sample, math.inf)] == [96, 64]
    assert [c.image_size for c in _affordable(job, configs, sample, 1e3)] == [96, 64]
    assert [c.image_size for c in _affordable(job, configs, sample, 1e-9)] == [32]


def test_the_best_third_goes_on_with_what_is_known_of_it() -> None:
    def candidate(number: int) -> tuple[Candidate, dict[int, Probed]]:
        config = TrialConfig(backbone=BACKBONES[number], image_size=32, epochs=1)
        return Candidate([config], {}), {32: Probed(np.zeros((20, 2)), np.arange(20) < number, 0.01)}

    from carmodels.catalog import BACKBONES as ROWS

    BACKBONES = [name for name, row in ROWS.items() if row.multiple == 1][:15]
    kept = _survivors([candidate(number) for number in range(15)])
    assert [c.configs[0].backbone for c in kept] == BACKBONES[:-6:-1]
    assert all(c.known[32].features.shape == (20, 2) for c in kept)
    assert len(_survivors([candidate(number) for number in range(3)])) == 3


@pytest.mark.usefixtures("own_ray")
def test_a_search_tries_the_short_list_alone_and_a_resumed_one_the_same(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(auditions, "SHORTLIST", 1)
    job.study.begin({"metric": "accuracy"}, [])
    said: list[str] = []
    clock = Clock(steady_time(), 3600)
    space, rows = shortlisted(job, SPACE, clock, seed=0, say=said.append)
    assert next(row["backbone"] for row in rows if row["listed"]) in space.backbones
    assert len(rows) == 2
    assert said[0].startswith("Audition: linear probes of 2 backbones")
    Screen(plain=True).audition(rows)
    printed = capsys.readouterr().out
    assert all(f"{row['accuracy']:.3f}" in printed for row in rows)
    monkeypatch.setattr(auditions, "audition", None)
    assert shortlisted(job, SPACE, clock, seed=0, say=said.append) == (space, rows)


def test_a_space_of_few_backbones_has_no_audition(job: Job) -> None:
    assert shortlisted(job, SPACE, Clock(0.0, 3600), seed=0, say=print) == (SPACE, [])
