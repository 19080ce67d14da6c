"""Work of tune/predict.py: exports an ensemble, classifies images, or serves a drop page."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.progress import track

from carmodels.ensembling.export import TOLERANCE, check_packages, export
from carmodels.ensembling.network import EXPORTED, Ensemble, load_ensemble
from carmodels.files import user_path
from carmodels.study import Study
from tune.cli.options import out_file
from tune.monitor.terminal import Screen
from tune.runtime.findings import folder_findings
from tune.serving.drop_page import serve
from tune.serving.inference import (
    NOT_SURE,
    Answer,
    Threshold,
    Unreadable,
    answers,
    found_images,
    threshold,
    write_answers,
)
from tune.serving.model_card import write_card

MOST_LINES = 100  # answers on the screen if a CSV holds them all


def run(options: argparse.Namespace, screen: Screen, port: int) -> int:
    """Export, predict and serve, in this order, as requested."""
    if options.export:
        _check_export(options)
    study = Study(user_path(options.study))
    paths = found_images([user_path(p) if str(p).startswith("~") else p for p in options.images])
    if out := out_file(options):
        study.refuse_own(out)
        if out.exists() and any(path.samefile(out) for path in paths):
            raise ValueError(f"--out {options.out} is one of the images: give another name")
    answer = "student" if options.student else "ensemble"
    ensemble, limit = load_ensemble(study, answer), threshold(study, options.not_sure, answer)
    screen.say(limit.sentence)
    if options.export:
        _export(study, answer, ensemble, limit, user_path(options.export), screen)
    ensemble = ensemble.to("cuda" if torch.cuda.is_available() else "cpu")
    if paths:
        _answer(ensemble, limit, paths, out, screen)
    if options.serve:
        return serve(study, ensemble, limit, port, screen.say)
    return 0


def _check_export(options: argparse.Namespace) -> None:
    folder = user_path(options.export)
    for finding in folder_findings({"--export": folder}):
        raise ValueError(finding.words)
    if (folder / EXPORTED[-1]).exists() and not (folder / EXPORTED[0]).exists():
        raise ValueError(
            f"--export {options.export} holds a {EXPORTED[-1]} that is no model's; give another folder"
        )
    check_packages()


def _export(
    study: Study, answer: str, ensemble: Ensemble, limit: Threshold, folder: Path, screen: Screen
) -> None:
    onnx = export(ensemble, folder)
    write_card(study, answer, ensemble.spec, limit, onnx, folder)
    agrees = f"onnxruntime is within {onnx.difference:.1e} of torch (at most {TOLERANCE:.0e})"
    screen.say(f"Exported to {folder}: {agrees if not onnx.refusal else 'safetensors alone'}.")
    if onnx.refusal:
        screen.say(f"No ONNX file: {onnx.refusal}.", "yellow")


def _answer(
    ensemble: Ensemble, limit: Threshold, paths: list[Path], out: Path | None, screen: Screen
) -> None:
    names, shown = ensemble.spec.class_names, len(paths) <= MOST_LINES or out is None
    console = screen.console
    progress = track(
        answers(ensemble, paths, limit),
        "Looking at images",
        total=len(paths),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    found: list[Answer] = []
    for answer in progress:
        if console.quiet and out is None:  # the answers are the lines alone
            if console.trouble:
                raise ValueError(
                    f"the answers cannot be written ({console.trouble}): give --out CSV elsewhere"
                )
            return  # their reader has seen enough
        if isinstance(answer, Unreadable):
            screen.say(f"Left out: {answer.image} ({answer.reason}).", "yellow")
            continue
        found.append(answer)
        if shown:
            guess = f"{names[answer.column]} ({answer.confidence:.0%})"
            screen.say(f"{answer.image}: {guess if answer.sure else f'{NOT_SURE}, perhaps {guess}'}")
    if not found:
        raise ValueError(f"none of the {len(paths)} images can be read; the lines above say why")
    unsure = sum(not answer.sure for answer in found)
    screen.say(f"{len(found)} images, {unsure} of them {NOT_SURE!r}, {len(paths) - len(found)} left out.")
    if out:
        write_answers(found, ensemble.spec, out)
        screen.say(f"Written to {out}.")
