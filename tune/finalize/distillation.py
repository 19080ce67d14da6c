"""Distillation: trains one small, fast student from the ensemble, compares their scores and speed."""

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
from carmodels.files import write_json
from carmodels.holdout import add_look
from carmodels.models.backbones import known_backbones
from carmodels.models.classifier import save_weights
from carmodels.models.facts import facts_of
from carmodels.records import State, TrialRecord
from carmodels.steady_clock import steady_time
from carmodels.study import Study
from carmodels.training.config import EpochMetrics
from carmodels.training.run import Run
from carmodels.training.trainer import TrainResult, fit
from tune.budget.stages import STUDENT_EPOCHS
from tune.finalize.schedules import epochs_of_space, unfrozen
from tune.finalize.views import prediction_seconds
from tune.runtime.job import Job, Say

STUDENT = "student"
TEACHER_EPOCHS = 8  # epochs of crops that the teacher predicts
_TIMED_IMAGES = 128
_TIMED_ROUNDS = 3  # of teacher and student in turn; the fastest counts


def distil(
    job: Job,
    *,
    backbone: str | None,
    epochs: int | None,
    say: Say,
    on_epoch: Callable[[EpochMetrics], None] = lambda metrics: None,
) -> dict[str, Any]:
    """Train a student on the ensemble's predictions of train. Writes record, weights and student.json."""
    study, splits, device = job.study, job.splits, job.workers.device
    teacher = load_ensemble(study).to(device)
    run = _student_run(job, backbone, epochs, say)
    study.add_backbones(known_backbones(job.weights, [run.config.backbone]))
    views = min(TEACHER_EPOCHS, run.config.epochs)
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
    started = steady_time()
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
    record = _student_record(study, trained, steady_time() - started)
    save_weights(trained.model, study.weights_file(record.trial_id))
    study.append(record)
    study.write_table()
    temperature = _save_predictions(job, trained, record)
    student_file = study.results_file(STUDENT)
    results: dict[str, Any] = {
        "metric": study.metric,
        "members": [
            {
                "trial_id": record.trial_id,
                "title": run.title,
                "stage": STUDENT,
                "weight": 1.0,
                "gain": 0.0,
                "val": record.value,
                "temperature": 1.0,
            }
        ],
        "temperature": temperature,
        "tta": {"views": ["plain"], "sentence": "left out, the student is to be fast"},
        "taught": {"views": views, "temperature": softness, "share": TEACHER_WEIGHT},
        "val": _val_scores(study),
        "holdout": _holdout_comparison(study),
    }
    results["holdout"]["looks"] = add_look(study, STUDENT, results).number
    write_json(student_file, results)
    results["speed"] = _speeds(job, teacher, load_ensemble(study, STUDENT).to(device))
    write_json(student_file, results)
    return results


def _student_run(job: Job, backbone: str | None, epochs: int | None, say: Say) -> Run:
    """The run of the named backbone, or of the fastest one as measured here; ValueError for none."""
    candidates = _available_backbones(job)
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
    runs = {name: _student_config(job.study, name, epochs) for name in names}
    seconds = {n: prediction_seconds(job, r.config, r.config.image_size) for n, r in runs.items()}
    name = min(seconds, key=lambda n: seconds[n])
    times = ", ".join(f"{n} {1000 * s:.1f}" for n, s in sorted(seconds.items(), key=lambda item: item[1]))
    say(f"Milliseconds an image: {times}.")
    say(f"The student is {runs[name].title}, {runs[name].config.epochs} epochs.")
    return runs[name]


def _available_backbones(job: Job) -> list[str]:
    """Backbones with pretrained weights: of the catalog if they are in a folder, else of the space."""
    space = job.study.space
    own = space.backbones if space else ()
    known = own if own and not job.weights.is_folder else tuple(dict.fromkeys([*BACKBONES, *own]))
    return [name for name in known if job.weights.has(name)]


def _student_config(study: Study, backbone: str, epochs: int | None) -> Run:
    """The search's best trial (of this backbone, if any) with a long schedule and full fine-tuning."""
    board = [r for r in study.leaderboard() if r.stage == "search"]
    same_backbone = [r for r in board if r.config.backbone == backbone]
    best = (same_backbone or board)[0].run
    template = best.config
    return best.with_config(
        backbone=backbone,
        image_size=facts_of(backbone).fit(template.image_size),
        epochs=epochs or STUDENT_EPOCHS * (epochs_of_space(study) or template.epochs),
        unfreeze="full",
        lr_ratio=unfrozen(template).lr_ratio,
        start_image_size=0,  # the teacher sees the crops at full size and strength
        eval_image_size=0,
        schedule="cosine",
        augment=template.augment if AUGMENTS[template.augment].crop else "crop",
        label_smoothing=0.0,
        mixup=0.0,
        cutmix=0.0,
        patience=0,
    )


def _student_record(study: Study, trained: TrainResult, seconds: float) -> TrialRecord:
    """The student's record. Its id is a hash of its run and of the ensemble's members and weights."""
    assert trained.best is not None
    teacher = " ".join(f"{m['trial_id']} {m['weight']}" for m in study.results()["members"])
    content = f"{STUDENT} {trained.run.id} {teacher}"
    return TrialRecord(
        trial_id=hashlib.sha256(content.encode()).hexdigest()[:12],
        config=trained.run.config,
        origin=trained.run.origin,
        state=State.COMPLETE,
        epochs_run=len(trained.history),
        value=trained.best.value,
        seconds=seconds,
        reason=f"learnt from the ensemble for {len(trained.history)} epochs",
        stage=STUDENT,
        note="distilled from the ensemble",
        curve=trained.history,
    )


def _save_predictions(job: Job, trained: TrainResult, record: TrialRecord) -> float:
    """Save the predictions under the trial id and, calibrated, as the student's; the temperature."""
    study, splits = job.study, job.splits
    temperature = 1.0
    for split in (splits.val, splits.holdout, splits.test):
        if not len(split):
            continue
        predictions = job.predict(trained.model, trained.run.config, split)
        predictions.save(study.predictions_file(record.trial_id, split.name))
        if split is splits.val:
            assert split.labels is not None
            temperature = fit_temperature(predictions.probs, split.labels)
        with_temperature(predictions, temperature).save(study.predictions_file(STUDENT, split.name))
    return temperature


def _val_scores(study: Study) -> dict[str, float]:
    """The study's metric on val for student and ensemble."""
    metric = METRICS[study.metric]
    return {name: metric.score(*study.probs_and_labels(name, "val")) for name in (STUDENT, "ensemble")}


def _holdout_comparison(study: Study) -> dict[str, Any]:
    """Scores of student and ensemble on holdout and their difference, with 95 % intervals."""
    student, truth = study.probs_and_labels(STUDENT, "holdout")
    ensemble, _ = study.probs_and_labels("ensemble", "holdout")
    metric, groups = study.metric, study.groups(study.labels("holdout"))
    return {
        STUDENT: asdict(score_interval(metric, student, truth, groups=groups)),
        "ensemble": asdict(score_interval(metric, ensemble, truth, groups=groups)),
        "gain_over_ensemble": asdict(paired_gain(metric, student, ensemble, truth, groups=groups)),
        "images": len(truth),
    }


def _speeds(job: Job, teacher: Ensemble, student: Ensemble) -> dict[str, float]:
    """Images per second of both on this machine, including preprocessing and views, without decoding."""
    rows = job.splits.val.rows[:_TIMED_IMAGES]
    images = [job.splits.images[row] for row in rows]
    networks: Mapping[str, Ensemble] = {"ensemble": teacher, STUDENT: student}
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    for _ in range(1 + _TIMED_ROUNDS):
        for name, network in networks.items():
            started = time.monotonic()
            network.probabilities(images)
            seconds[name].append(time.monotonic() - started)
    speeds = {name: len(images) / min(times[1:]) for name, times in seconds.items()}
    return {**speeds, "ratio": speeds[STUDENT] / speeds["ensemble"]}
