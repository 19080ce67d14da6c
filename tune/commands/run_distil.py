"""Work of tune/distil.py: trains a student and prints its accuracy and speed."""

from __future__ import annotations

import argparse
from typing import Any

import joblib
import torch

from carmodels.files import user_path
from carmodels.formatting import gain_text, gain_unit, interval_text, score_text
from carmodels.holdout import later_sentence, quoted_look, quoted_suffix
from carmodels.models.weights import Weights
from carmodels.study import Study
from carmodels.training.config import EpochMetrics
from tune.cli import session
from tune.finalize import distillation
from tune.monitor.terminal import Screen


def run(options: argparse.Namespace, screen: Screen) -> int:
    """Distil and print the results."""
    study = Study(user_path(options.study))

    def on_epoch(epoch: EpochMetrics) -> None:
        screen.say(f"  epoch {epoch.epoch}: {study.metric} on val {epoch.value:.4f}, {epoch.seconds:.0f} s")

    with session.open_job_without_ray(study, options, screen) as job:
        Weights.parse(job.weights.source)  # its folder may be gone
        torch.set_num_threads(joblib.cpu_count())
        results = distillation.distil(
            job, backbone=options.backbone, epochs=options.epochs, say=screen.say, on_epoch=on_epoch
        )
    _tell(results, study, screen)
    return 0


def _tell(results: dict[str, Any], study: Study, screen: Screen) -> None:
    """Print the student's scores and its speed."""
    first = quoted_look(study, "student")
    metric, holdout, speed = results["metric"], first.scores, results["speed"]
    val = ", ".join(f"{name} {score_text(metric, score)}" for name, score in results["val"].items())
    screen.say(f"{metric} on val: {val}.")
    images = f"{holdout['images']} images kept aside, 95 % intervals"
    screen.say(f"{metric} on holdout ({images}){quoted_suffix(study, 'student')}:")
    for name in ("student", "ensemble"):
        screen.say(f"  {name:<24}{interval_text(metric, holdout[name])}", "bold" if name == "student" else "")
    value, ends = gain_text(metric, holdout["gain_over_ensemble"])
    screen.say(f"  {'gain over the ensemble':<24}{value} {gain_unit(metric)} ({ends})")
    if later := later_sentence(study, "student"):
        screen.say(f"  {later}", "yellow")
    screen.say(
        f"Images a second: {speed['student']:.0f}, the ensemble {speed['ensemble']:.0f}; "
        f"{speed['ratio']:.1f} times as fast."
    )
    screen.say(f"To answer with it: python tune/predict.py {study.folder} IMAGES --student")
