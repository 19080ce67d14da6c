"""One small, fast model that has learnt from a study's ensemble, and what that keeps and gains."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from carmodels.catalog import AUGMENTS, BACKBONES
from carmodels.ensembling.network import Ensemble, load_ensemble
from carmodels.ensembling.student import TEACHER_WEIGHT, predict_train, soft_targets
from carmodels.evaluation.calibration import fit_temperature, with_temperature
from carmodels.evaluation.intervals import paired_gain, score_interval
from carmodels.evaluation.metrics import METRICS
from carmodels.files import read_json, write_json
from carmodels.models.classifier import save_weights
from carmodels.records import State, TrialRecord
from carmodels.study import Study
from carmodels.training.config import EpochMetrics
from carmodels.training.run import Run
from carmodels.training.trainer import TrainResult, fit
from tune.finalize.retraining import epochs_of_space, opened
from tune.finalize.views import prediction_seconds
from tune.runtime.job import Job, Say

STAGE = "student"
LONGER = 4  # times the epochs of the study's trials: distillation goes on gaining (Beyer et al., 2022)
VIEWS = 8  # epochs' worth of crops that the teacher is asked about
_TIMED = 128  # images
_ROUNDS = 3  # of the two in turn, the fastest of which counts


def distil(
    job: Job,
    *,
    backbone: str | None,
    epochs: int | None,
    say: Say,
    on_epoch: Callable[[EpochMetrics], None] = lambda metrics: None,
) -> dict[str, Any]:
    """Train a student on what the ensemble says of train; leaves its record, weights and student.json."""
    study, splits, device = job.study, job.splits, job.workers.device
    teacher = load_ensemble(study).to(device)
    run = _student(job, backbone, epochs, say)
    views = min(VIEWS, run.config.epochs)
    say(f"The ensemble is shown train, {len(splits.train)} images in {views} crops each.")
    processes = job.workers.processes
    answers = predict_train(teacher, splits, run, views=views, device=device, processes=processes)
    val = study.predictions("ensemble", "val")
    assert splits.train.labels is not None
    confidence = float(val.probs.max(axis=1).mean())
    targets, softness = soft_targets(answers, splits.train.labels, confidence)
    say(
        f"It is {answers.max(axis=2).mean():.0%} sure there and {confidence:.0%} on val: "
        f"its answers get a temperature of {softness:.2f}."
    )
    started = time.time()
    trained = fit(
        run,
        splits,
        weights=job.weights,
        device=device,
        processes=processes,
        targets=targets,
        on_epoch=on_epoch,
    )
    if trained.best is None:
        raise ValueError(
            f"the student's loss was not finite in epoch {len(trained.history)}; a lower lr helps"
        )
    record = _record(study, trained, time.time() - started)
    save_weights(trained.model, study.weights_file(record.trial_id))
    study.append(record)
    study.write_table()
    temperature = _answers(job, trained, record)
    student_file = study.results_file(STAGE)
    looks = 1 + (read_json(student_file)["holdout"]["looks"] if student_file.is_file() else 0)
    results = {
        "metric": study.metric,
        "members": [
            {
                "trial_id": record.trial_id,
                "title": run.title,
                "stage": STAGE,
                "weight": 1.0,
                "gain": 0.0,
                "val": record.value,
                "temperature": 1.0,
            }
        ],
        "temperature": temperature,
        "tta": {"views": ["plain"], "sentence": "left out, the student is to be fast"},
        "taught": {"views": views, "temperature": softness, "share": TEACHER_WEIGHT},
        "val": _scores(study, "val"),
        "holdout": {**_holdout(study), "looks": looks},
    }
    write_json(student_file, results)
    results["speed"] = _speeds(job, teacher, load_ensemble(study, STAGE).to(device))
    write_json(student_file, results)
    return results


def _student(job: Job, backbone: str | None, epochs: int | None, say: Say) -> Run:
    """The run of the named backbone, else of the one that is measured to be fastest."""
    candidates = _backbones(job)
    if not candidates:
        raise ValueError(
            f"{job.weights.source} holds the weights of no backbone that is known here; bring the files "
            "<timm name>.safetensors back that the search began with"
        )
    if backbone is not None and backbone not in candidates:
        raise ValueError(
            f"--backbone {backbone}: there are weights for {', '.join(candidates)}; name one of these"
        )
    names = candidates if backbone is None else [backbone]
    runs = {name: _configured(job.study, name, epochs) for name in names}
    seconds = {n: prediction_seconds(job, r.config, r.config.image_size) for n, r in runs.items()}
    name = min(seconds, key=lambda n: seconds[n])
    paces = ", ".join(f"{n} {1000 * s:.1f}" for n, s in sorted(seconds.items(), key=lambda item: item[1]))
    say(f"Milliseconds an image: {paces}.")
    say(f"The student is {runs[name].title}, {runs[name].config.epochs} epochs.")
    return runs[name]


def _backbones(job: Job) -> list[str]:
    """Those of the catalog that the study's folder of weights holds, else those of its space."""
    space = job.study.space
    known = tuple(BACKBONES) if job.weights.is_folder or space is None else space.backbones
    return [name for name in known if job.weights.has(name)]


def _configured(study: Study, backbone: str, epochs: int | None) -> Run:
    """As the search's best finished trial with this backbone, or of all, but long and with all open."""
    board = [r for r in study.leaderboard() if r.stage == "search"]
    own = [r for r in board if r.config.backbone == backbone]
    best = (own or board)[0].run
    like = best.config
    multiple = BACKBONES[backbone].multiple
    return best.with_config(
        backbone=backbone,
        image_size=max(multiple, like.image_size // multiple * multiple),
        epochs=epochs or LONGER * (epochs_of_space(study) or like.epochs),
        unfreeze="full",
        layer_decay=opened(like).layer_decay,
        start_image_size=0,  # the teacher is asked about crops at their full size and strength
        eval_image_size=0,
        schedule="cosine",
        augment=like.augment if AUGMENTS[like.augment].crop else "crop",
        label_smoothing=0.0,
        mixup=0.0,
        cutmix=0.0,
        patience=0,
    )


def _record(study: Study, trained: TrainResult, seconds: float) -> TrialRecord:
    """The student's line in the study; its id says of which ensemble it is, too."""
    assert trained.best is not None
    teacher = " ".join(f"{m['trial_id']} {m['weight']}" for m in read_json(study.ensemble_file)["members"])
    content = f"{STAGE} {trained.run.id} {teacher}"
    return TrialRecord(
        trial_id=hashlib.sha256(content.encode()).hexdigest()[:12],
        config=trained.run.config,
        origin=trained.run.origin,
        state=State.COMPLETE,
        epochs_run=len(trained.history),
        value=trained.best.value,
        seconds=seconds,
        reason=f"learnt from the ensemble for {len(trained.history)} epochs",
        stage=STAGE,
        note="distilled from the ensemble",
        curve=trained.history,
    )


def _answers(job: Job, trained: TrainResult, record: TrialRecord) -> float:
    """Leave the student's probabilities, as they are and as it answers; the temperature between the two."""
    study, splits = job.study, job.splits
    temperature = 1.0
    for split in (splits.val, splits.holdout, splits.test):
        if not len(split):
            continue
        shown = job.predict(trained.model, trained.run.config, split)
        shown.save(study.predictions_file(record.trial_id, split.name))
        if split is splits.val:
            assert split.labels is not None
            temperature = fit_temperature(shown.probs, split.labels)
        with_temperature(shown, temperature).save(study.predictions_file(STAGE, split.name))
    return temperature


def _scores(study: Study, split: str) -> dict[str, float]:
    """The metric of student and ensemble."""
    metric = METRICS[study.metric]
    return {name: metric.score(*study.probs_and_labels(name, split)) for name in (STAGE, "ensemble")}


def _holdout(study: Study) -> dict[str, Any]:
    """What is kept, with 95 % intervals."""
    student, truth = study.probs_and_labels(STAGE, "holdout")
    ensemble, _ = study.probs_and_labels("ensemble", "holdout")
    return {
        STAGE: asdict(score_interval(study.metric, student, truth)),
        "ensemble": asdict(score_interval(study.metric, ensemble, truth)),
        "gain_over_ensemble": asdict(paired_gain(study.metric, student, ensemble, truth)),
        "images": len(truth),
    }


def _speeds(job: Job, teacher: Ensemble, student: Ensemble) -> dict[str, float]:
    """Images a second that both answer here, from decoded images on, views included."""
    rows = job.splits.val.rows[:_TIMED]
    images = [job.splits.images[row] for row in rows]
    both: Mapping[str, Ensemble] = {"ensemble": teacher, STAGE: student}
    taken: dict[str, list[float]] = {name: [] for name in both}
    for _ in range(1 + _ROUNDS):
        for name, network in both.items():
            started = time.monotonic()
            network.probabilities(images)
            taken[name].append(time.monotonic() - started)
    speeds = {name: len(images) / min(times[1:]) for name, times in taken.items()}
    return {**speeds, "ratio": speeds[STAGE] / speeds["ensemble"]}
