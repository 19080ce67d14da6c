"""The built-in data set: its layout, its repeatability, and the small weights that come with it."""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from carmodels.catalog import BACKBONES
from carmodels.demo import folder as folder_module
from carmodels.demo import shapes
from carmodels.demo.drawing import draw_vehicle
from carmodels.demo.folder import DEMO_WEIGHTS, draw_demo
from carmodels.demo.shapes import CLASSES

from benchmarks import pretrain_demo

WEIGHTS = sorted(DEMO_WEIGHTS.glob("*.safetensors"))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "cars"
    draw_demo(folder, train=40, test=20)
    return folder


def rows(path: Path) -> list[tuple[str, int]]:
    with path.open(newline="") as lines:
        return [(row["Id"], int(row["Category"])) for row in csv.DictReader(lines)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_layout_is_the_competitions(drawn: Path) -> None:
    train, sample = rows(drawn / "train.csv"), rows(drawn / "sample-submission.csv")
    images = {str(path.relative_to(drawn)) for path in drawn.rglob("*.jpg")}
    labelled = {f"train/{label}/{name}" for name, label in train}
    assert images == labelled | {f"test_upload/{name}" for name, _ in sample}
    assert (len(train), len(sample)) == (40, 20)
    assert {category for _, category in sample} == {0}
    expected = [f"{number} {name}" for number, name in enumerate(CLASSES)]
    assert (drawn / "classes.txt").read_text().splitlines() == expected


def test_classes_are_balanced_in_both_parts(drawn: Path) -> None:
    assert Counter(label for _, label in rows(drawn / "train.csv")) == dict.fromkeys(range(10), 4)
    assert Counter(label for _, label in rows(drawn / "test-labels.csv")) == dict.fromkeys(range(10), 2)


def test_test_labels_name_the_images_of_the_sample_file_in_its_order(drawn: Path) -> None:
    labelled, sample = rows(drawn / "test-labels.csv"), rows(drawn / "sample-submission.csv")
    assert [name for name, _ in labelled] == [name for name, _ in sample]


def test_images_are_small_jpegs_that_opencv_reads(drawn: Path) -> None:
    paths = list(drawn.rglob("*.jpg"))
    assert len(paths) == 60
    for path in paths:
        assert cv2.imread(str(path)).shape == (120, 160, 3)


def test_same_seed_draws_the_same_bytes(drawn: Path, tmp_path: Path) -> None:
    draw_demo(tmp_path / "again", train=40, test=20)
    assert contents(tmp_path / "again") == contents(drawn)


def test_another_seed_draws_other_images(drawn: Path, tmp_path: Path) -> None:
    draw_demo(tmp_path / "other", seed=1, train=40, test=20)
    images, others = (
        {data for name, data in contents(folder).items() if name.endswith(".jpg")}
        for folder in (drawn, tmp_path / "other")
    )
    assert not images & others


def test_finished_draw_is_left_as_it_is(drawn: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in drawn.rglob("*")}
    draw_demo(drawn, train=40, test=20)
    assert {path: path.stat().st_mtime_ns for path in drawn.rglob("*")} == before


def test_interrupted_draw_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(rng: np.random.Generator, shape: shapes.BodyShape) -> np.ndarray:
        if rng.random() < 0.2:
            raise KeyboardInterrupt
        return draw_vehicle(rng, shape)

    monkeypatch.setattr(folder_module, "draw_vehicle", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw_demo(tmp_path / "cars", train=40, test=20)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_made_beforehand_is_filled(tmp_path: Path) -> None:
    draw_demo(tmp_path, train=10, test=10)
    assert (tmp_path / "train.csv").is_file()


def test_a_folder_that_holds_something_else_is_not_touched(drawn: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for folder in (tmp_path, drawn):
        before = contents(folder)
        with pytest.raises(ValueError, match="delete it or name another folder"):
            draw_demo(folder, seed=7, train=10, test=10)
        assert contents(folder) == before


def test_too_few_images_for_the_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train=9"):
        draw_demo(tmp_path / "cars", train=9)


def test_every_class_differs_from_every_other_in_the_same_scene() -> None:
    scenes = [draw_vehicle(np.random.default_rng(0), shape) for shape in CLASSES.values()]
    assert len({scene.tobytes() for scene in scenes}) == len(CLASSES)


def test_shapes_for_pretraining_are_none_of_the_classes() -> None:
    shapes = pretrain_demo.other_shapes(np.random.default_rng(0), 60)
    assert len(set(shapes)) == 60
    assert not any(pretrain_demo.may_coincide(shape, row) for shape in shapes for row in CLASSES.values())


def test_a_class_drawn_by_chance_is_not_used_for_pretraining(monkeypatch: pytest.MonkeyPatch) -> None:
    (other,) = pretrain_demo.other_shapes(np.random.default_rng(0), 1)
    chances = iter([replace(CLASSES["sedan"], doors=3), other])
    monkeypatch.setattr(pretrain_demo, "random_shape", lambda rng: next(chances))
    assert pretrain_demo.other_shapes(np.random.default_rng(0), 1) == [other]


def test_shapes_within_twice_the_variation_may_coincide() -> None:
    sedan = CLASSES["sedan"]
    within, beyond = (replace(sedan, length=sedan.length + metres) for metres in (0.49, 0.51))
    assert pretrain_demo.may_coincide(sedan, within)  # the length of each varies by 0.25 metres
    assert not pretrain_demo.may_coincide(sedan, beyond)


def test_weights_are_two_backbones_of_the_catalog_in_three_megabytes() -> None:
    assert len(WEIGHTS) == 2
    assert all(path.stem in BACKBONES for path in WEIGHTS)
    assert sum(path.stat().st_size for path in WEIGHTS) < 3e6


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda path: path.stem)
def test_weights_load_through_timms_own_path(path: Path) -> None:
    overlay = {"file": str(path)}
    model = timm.create_model(path.stem, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay)
    loaded, saved = model.state_dict(), load_file(path)
    assert loaded.keys() == saved.keys()
    for name, value in saved.items():
        is_float = value.is_floating_point()
        assert value.dtype == (torch.float16 if is_float else torch.int64)
        assert loaded[name].dtype == (torch.float32 if is_float else torch.int64)
        assert torch.equal(loaded[name], value.to(loaded[name].dtype))
