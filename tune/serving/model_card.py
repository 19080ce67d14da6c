"""Model card of an exported ensemble (after Mitchell et al., 2019)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from carmodels.ensembling.export import Onnx
from carmodels.ensembling.network import EXPORTED, EnsembleSpec
from carmodels.files import write_atomic
from carmodels.formatting import interval_text, score_text
from carmodels.holdout import later_looks, looks, quoted_look, quoted_suffix
from carmodels.models.facts import short_name
from carmodels.study import Study
from tune.serving.inference import Threshold


def write_card(
    study: Study, answer: str, spec: EnsembleSpec, limit: Threshold, onnx: Onnx, folder: Path
) -> None:
    """Write README.md of an exported ensemble or student: contents, scores and usage."""
    facts, results = study.metadata, study.results(answer)
    metric = facts["metric"]
    text = _template().render(
        name=study.folder.name,
        answer=answer,
        facts=facts,
        results=results,
        first=quoted_look(study, answer),
        which=quoted_suffix(study, answer),
        later=later_looks(study, answer),
        looks=looks(study),
        spec=spec,
        limit=limit,
        onnx=onnx,
        recalls=recalls(study, answer, spec),
        backbones=backbones(study, spec),
        score=lambda value: score_text(metric, value),
        interval=lambda found: interval_text(metric, found),
    )
    write_atomic(folder / EXPORTED[-1], text)


def backbones(study: Study, spec: EnsembleSpec) -> list[tuple[str, dict[str, Any]]]:
    """(name, facts in study.json) of the members' backbones, in order."""
    known = study.metadata.get("backbones", {})
    names = dict.fromkeys(member.config.backbone for member in spec.members)
    return [(short_name(name), known[name]) for name in names if name in known]


def _template() -> jinja2.Template:
    here = jinja2.FileSystemLoader(Path(__file__).with_name("templates"))
    environment = jinja2.Environment(
        loader=here, undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    environment.filters["cell"] = _cell
    return environment.get_template("card.md")


def _cell(value: Any) -> str:
    """Text on one line, escaped for a cell of a Markdown table."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")


def recalls(study: Study, answer: str, spec: EnsembleSpec) -> list[tuple[str, str, int, float]]:
    """(class, name, images, recall) on holdout, lowest recall first."""
    probs, truth = study.probs_and_labels(answer, "holdout")
    guessed = probs.argmax(axis=1)
    rows = [
        (name, spec.class_names[k], int((truth == k).sum()), float((guessed == k)[truth == k].mean()))
        for k, name in enumerate(spec.classes)
        if (truth == k).any()
    ]
    return sorted(rows, key=lambda row: row[-1])
