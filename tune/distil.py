"""python tune/distil.py results/demo

Distil a study's ensemble into one small model: the fastest backbone there are weights for, as measured, or
the one named, learns what the ensemble says of train. Says what is kept of its accuracy and gained in speed;
tune/predict.py --student answers with it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import joblib
import torch

from carmodels.files import user_path
from carmodels.formatting import interval_text, score_text
from carmodels.models.weights import Weights
from carmodels.study import Study
from carmodels.training.config import BOUNDS, EpochMetrics
from tune.cli import session
from tune.cli.options import Parser, add_cache_options, guarded
from tune.finalize import distillation
from tune.monitor.terminal import Screen


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("study", metavar="STUDY_DIR", type=Path, help="a folder under results/")
    p.add_argument("--backbone", metavar="NAME", help="timm name of the student's backbone (the fastest)")
    p.add_argument(
        "--epochs",
        type=int,
        metavar="N",
        help=f"length of the schedule ({distillation.STUDENT_EPOCHS} times that of the study's trials)",
    )
    add_cache_options(p)
    return p


def run(options: argparse.Namespace, screen: Screen) -> int:
    """Distil and say what came of it."""
    most = int(BOUNDS["epochs"][1])
    if options.epochs is not None and not 1 <= options.epochs <= most:
        raise ValueError(f"--epochs {options.epochs} must be from 1 to {most}")
    study = Study(user_path(options.study))

    def on_epoch(epoch: EpochMetrics) -> None:
        screen.say(f"  epoch {epoch.epoch}: {study.metric} on val {epoch.value:.4f}, {epoch.seconds:.0f} s")

    with session.open_job_without_ray(study, options, screen) as job:
        Weights.parse(job.weights.source)  # a folder may have gone since
        torch.set_num_threads(joblib.cpu_count())
        results = distillation.distil(
            job, backbone=options.backbone, epochs=options.epochs, say=screen.say, on_epoch=on_epoch
        )
    _tell(results, study, screen)
    return 0


def _tell(results: dict[str, Any], study: Study, screen: Screen) -> None:
    """What is kept and what is gained."""
    metric, holdout, speed = results["metric"], results["holdout"], results["speed"]
    val = ", ".join(f"{name} {score_text(metric, score)}" for name, score in results["val"].items())
    screen.say(f"{metric} on val: {val}.")
    screen.say(f"{metric} on holdout ({holdout['images']} images kept aside, 95 % intervals):")
    for name, words in (
        ("student", "student"),
        ("ensemble", "ensemble"),
        ("gain_over_ensemble", "student less ensemble"),
    ):
        screen.say(
            f"  {words:<24}{interval_text(metric, holdout[name])}", "bold" if name == "student" else ""
        )
    if holdout["looks"] > 1:
        screen.say(
            f"  (holdout was looked at {holdout['looks']} times for students: quote the first)", "yellow"
        )
    screen.say(
        f"Images a second: {speed['student']:.0f}, the ensemble {speed['ensemble']:.0f}; "
        f"{speed['ratio']:.1f} times as fast."
    )
    screen.say(f"To answer with it: python tune/predict.py {study.folder} IMAGES --student")


if __name__ == "__main__":
    sys.exit(guarded(run, parser().parse_args()))
