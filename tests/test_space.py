"""Configurations are checked and named by their content; spaces draw what their conditions allow."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from typing import Any

import optuna
import pytest

from carmodels.catalog import BACKBONES
from carmodels.presets import SPACES, baseline
from carmodels.space import Choice, Range, Space
from carmodels.study import VERSION
from carmodels.training.config import TrialConfig
from carmodels.training.run import Origin, Run
from tune.cli.study_folder import describe_space
from tune.optim.optuna_records import params_of, suggest

CONFIG = TrialConfig(backbone="lcnet_035", image_size=64, epochs=4)


def draw(space: Space, count: int, seed: int = 0) -> list[dict[str, Any]]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    return [suggest(study.ask(), space) for _ in range(count)]


def test_equal_content_has_equal_id_and_any_other_field_another() -> None:
    other = {
        "backbone": "resnet50",
        "image_size": 96,
        "epochs": 5,
        "head_depth": 1,
        "head": "gelu512",
        "dropout": 0.1,
        "unfreeze": "frozen",
        "lr": 1e-4,
        "lr_ratio": 0.05,
        "optimizer": "sgd",
        "weight_decay": 0.0,
        "schedule": "plateau",
        "batch_size": 16,
        "augment": "none",
        "label_smoothing": 0.1,
        "mixup": 0.2,
        "cutmix": 0.2,
        "ema": 0.9,
        "clip_norm": 0.0,
        "class_weights": True,
        "patience": 2,
        "start_image_size": 32,
        "eval_image_size": 96,
    }
    from_elsewhere = {
        "metric": "log_loss",
        "seed": 1,
        "data": "x",
        "split": "y",
        "folds": 3,
        "fold_in": True,
        "head_seed": 3,
        "continues": "0123456789ab",
    }
    assert {*other} == {f.name for f in fields(TrialConfig)}
    assert {*from_elsewhere, "fold"} == {f.name for f in fields(Origin)}
    run = Run(CONFIG)
    ids = {run.with_config(**{name: value}).id for name, value in other.items()}
    ids |= {run.with_origin(**{name: value}).id for name, value in from_elsewhere.items()}
    ids |= {run.with_origin(folds=3, fold=fold).id for fold in range(3)}
    assert len(ids | {run.id}) == len(other) + len(from_elsewhere) + 3 + 1
    assert Run.from_dict(json.loads(json.dumps(run.to_dict()))).id == run.id


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"backbone": "resnet_5000"},
            "backbone='resnet_5000' is not known to timm; close names are resnet50, ",
        ),
        (
            {"unfreeze": "sometimes"},
            "unfreeze='sometimes' is not known; choose from frozen, full, head_first, gradual",
        ),
        ({"lr": -1.0}, "lr=-1.0 must be a number from 1e-08 to 10"),
        ({"lr": float("nan")}, "lr=nan must be a number"),
        ({"epochs": 2.5}, "epochs=2.5 must be a whole number from 1 to 10000"),
        ({"head_depth": 4}, "head_depth=4 must be a whole number from 0 to 3"),
        ({"image_size": "64"}, "image_size='64' must be a whole number"),
        (
            {"backbone": "swin_tiny_patch4_window7_224", "image_size": 100},
            "image_size=100 must be a multiple of 32 for swin_tiny_patch4_window7_224",
        ),
        ({"start_image_size": 8}, "start_image_size=8 must be 0 or a size for lcnet_035, 16 or more"),
        ({"start_image_size": 96}, "start_image_size=96 must be at most image_size=64"),
        (
            {"backbone": "swin_tiny_patch4_window7_224", "eval_image_size": 96},
            "eval_image_size=96: swin_tiny_patch4_window7_224 is built for one size; leave it out",
        ),
    ],
)
def test_a_wrong_value_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        replace(CONFIG, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "luck"}, "metric='luck' is not known; choose from accuracy, log_loss, macro_f1"),
        ({"seed": -1}, "seed=-1 must be a whole number from 0"),
        ({"fold": 0}, "fold=0 of folds=0: there must be 2 folds or more, the first is fold 0"),
        ({"folds": 1, "fold": 0}, "fold=0 of folds=1: there must be 2 folds or more"),
        ({"folds": 3, "fold": 3}, "fold=3 of folds=3: there must be 2 folds or more"),
        ({"folds": 3, "fold_in": True}, "folds=3: with fold_in nothing is held out"),
        (
            {"fold_in": True, "continues": "0123456789ab"},
            "continues='0123456789ab': that run has learnt from what is held out here",
        ),
    ],
)
def test_a_wrong_origin_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Origin(**change)


@pytest.mark.parametrize("origin", [Origin(fold_in=True), Origin(folds=3, fold=0)], ids=str)
def test_what_is_held_out_does_not_end_training(origin: Origin) -> None:
    with pytest.raises(ValueError, match="patience=2: what is held out must not end training"):
        Run(replace(CONFIG, patience=2), origin)


def test_ids_change_with_the_version_of_a_study_alone() -> None:
    """A new field, or another default, is another id: a study made before it would not find its trials."""
    run = Run(TrialConfig("lcnet_035", image_size=64, epochs=4))
    assert (VERSION, run.id) == ("0.3", "70287f0d1e9e")


def test_images_grow_in_steps_to_their_whole_size_and_augmentation_with_them() -> None:
    growing = replace(CONFIG, image_size=96, start_image_size=48, epochs=8)
    assert [growing.train_image_size(n) for n in range(1, 9)] == [48, 64, 64, 64, 80, 96, 96, 96]
    strengths = [growing.augment_strength(n) for n in range(1, 9)]
    assert strengths[0] == pytest.approx(1 / 3)
    assert strengths == sorted(strengths)
    assert strengths[6:] == [1.0, 1.0]
    still = replace(growing, start_image_size=0)
    assert {(still.train_image_size(n), still.augment_strength(n)) for n in range(1, 9)} == {(96, 1.0)}
    one = replace(growing, epochs=1)
    assert one.train_image_size(1) == 48


def test_a_misspelt_key_is_refused() -> None:
    with pytest.raises(ValueError, match="configuration key='learning_rate' is not known"):
        TrialConfig.from_dict({**asdict(CONFIG), "learning_rate": 1e-3})
    with pytest.raises(ValueError, match="origin key='sead' is not known; choose from metric, seed"):
        Run.from_dict({"config": asdict(CONFIG), "origin": {"sead": 1}})


@pytest.mark.parametrize("preset", SPACES)
def test_every_draw_of_a_preset_is_a_configuration(preset: str) -> None:
    for values in draw(SPACES[preset], 60):
        config = TrialConfig.from_dict(values)
        assert config.backbone in SPACES[preset].backbones


@pytest.mark.parametrize("preset", SPACES)
def test_a_dimension_that_is_not_used_is_not_drawn(preset: str) -> None:
    drawn = draw(SPACES[preset], 60)
    assert {"dropout" in v for v in drawn} == {True, False}
    for values in drawn:
        assert ("dropout" in values) == (values["head_depth"] > 0)
        assert ("lr_ratio" in values) == (values["unfreeze"] != "frozen")


@pytest.mark.parametrize("preset", SPACES)
def test_the_competitors_baseline_is_in_reach_of_every_preset(preset: str) -> None:
    space, reference = SPACES[preset], baseline(SPACES[preset])
    assert (reference.optimizer, reference.lr, reference.unfreeze, reference.schedule) == (
        "adam",
        1e-3,
        "head_first",
        "plateau",
    )
    assert (reference.head_depth, reference.augment, reference.patience) == (1, "shift", 0)
    assert reference.epochs == space.fixed["epochs"]
    assert abs(reference.image_size - 224) == min(abs(size - 224) for size in space.image_sizes)
    largest = max(space.backbones, key=lambda b: BACKBONES[b].millions)
    assert reference.backbone == ("xception41" if preset == "gpu" else largest)


def test_a_dimension_that_is_there_again_comes_before_those_that_hang_on_it() -> None:
    """As when a command line is corrected at its end."""
    space = SPACES["cpu"].with_override("head_depth=1").with_override("head_depth=0,1,2")
    names = [*space.dimensions]
    assert names.index("head_depth") < names.index("dropout")
    assert dict(space.dimensions) == dict(SPACES["cpu"].dimensions)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [TrialConfig(**suggest(study.ask(), space)) for _ in range(20)]
    assert len({config.dropout for config in drawn if config.head_depth}) > 5


def test_what_makes_no_difference_is_not_drawn_where_the_preset_does_not_have_it_either() -> None:
    """Two trials would differ in name alone."""
    space = SPACES["cpu"]
    for text in ("head=relu256,gelu512", "start_image_size=0,32", "dropout=0.3", "dropout=0.1:0.5"):
        space = space.with_override(text)
    drawn = draw(space, 60)
    assert {"head" in values for values in drawn} == {True, False}
    for values in drawn:
        assert ("head" in values) == ("dropout" in values) == (values["head_depth"] > 0)
        assert ("start_image_size" in values) == (values["unfreeze"] != "frozen")
    always = SPACES["cpu"].with_override("head_depth=2").with_override("head=relu256,gelu512")
    assert {values["head"] for values in draw(always, 20)} == {"relu256", "gelu512"}


def test_an_override_replaces_a_range_a_choice_or_a_fixed_value() -> None:
    space = SPACES["cpu"]
    assert space.with_override("image_size=64,128").image_sizes == (64, 128)
    assert space.with_override("lr=1e-5:1e-3").dimensions["lr"] == Range(1e-5, 1e-3, log=True)
    assert space.with_override("lr_ratio=0.1:0.9").dimensions["lr_ratio"].when is not None
    fixed = space.with_override("unfreeze=full")
    assert "unfreeze" not in fixed.dimensions
    assert fixed.fixed["unfreeze"] == "full"
    assert space.with_override("class_weights=true").fixed["class_weights"] is True
    drawn = space.with_override("batch_size=16,64")
    assert drawn.dimensions["batch_size"] == Choice((16, 64))
    assert "batch_size" not in drawn.fixed
    assert {v["unfreeze"] for v in draw(fixed, 5)} == {"full"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour=red", "--set colour=red: expected NAME=V"),
        ("lr", "--set lr: expected NAME=V"),
        ("seed=3", "--set seed=3: expected"),
        ("lr=fast", "--set lr: 'fast' is no float"),
        ("lr=nan", "--set lr: 'nan' must be finite"),
        ("epochs=2.5", "--set epochs=2.5: epochs must be one number"),
        ("epochs=4,8", "--set epochs=4,8: epochs must be one number"),
        ("head_depth=1.5", "--set head_depth: '1.5' is no int"),
        ("image_size=8,64", "--set image_size=8,64: image_size=8 must be a whole number from 16"),
        ("backbone=lcnet_035,vgg", "--set backbone=lcnet_035,vgg: backbone='vgg' is not known to timm"),
        ("lr=1e-2:1e-3", "--set lr=1e-2:1e-3: LOW:HIGH is for a real number, with LOW below HIGH"),
        ("head_depth=1:2", "--set head_depth=1:2: LOW:HIGH is for a real number"),
        ("class_weights=maybe", "--set class_weights: 'maybe' is no bool"),
        (
            "start_image_size=0,96",
            "--set start_image_size=0,96: start_image_size=96 must be at most image_size=64",
        ),
    ],
)
def test_a_wrong_override_is_refused_with_the_way_out(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        SPACES["cpu"].with_override(text)


def test_images_may_grow_from_any_size_that_the_space_has() -> None:
    space = SPACES["gpu"]
    for text in ("backbone=convnext_tiny", "image_size=352,416", "start_image_size=256"):
        space = space.with_override(text)
    assert space.fixed["start_image_size"] == 256


@pytest.mark.parametrize("preset", SPACES)
def test_a_space_comes_back_from_what_study_json_says_of_it(preset: str) -> None:
    space = SPACES[preset]
    written = json.loads(json.dumps({"space": describe_space(space)}))["space"]
    assert Space.from_dict(written) == replace(space, trials=None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dimensions": {}}, "KeyError"),
        ({"dimensions": None}, "AttributeError"),
        ({"fixed": {"epochs": 8, "colour": "red"}}, "configuration key='colour' is not known"),
        ({"fixed": {"epochs": 0}}, "epochs=0 must be a whole number"),
    ],
)
def test_what_is_no_space_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"the space of study.json: .*{message}"):
        Space.from_dict({**describe_space(SPACES["demo"]), **change})


def test_each_backbone_has_the_sizes_nearest_to_those_of_the_space() -> None:
    space = SPACES["gpu"].with_override("backbone=resnet50,test_vit,mixer_b16_224")
    space = space.with_override("image_size=100,224,420")
    assert space.sizes_of("resnet50") == (100, 224, 420)
    assert space.sizes_of("test_vit") == (96, 224, 416)  # multiples of its patches of 16 pixels
    assert space.sizes_of("mixer_b16_224") == (224,)  # its weights are for one size
    assert space.largest_size == 420
    sizes = {(v["backbone"], v["image_size"]) for v in draw(space, 60)}
    assert sizes == {(b, size) for b in space.backbones for size in space.sizes_of(b)}


def test_what_a_backbone_made_of_a_size_is_drawn_again_as_the_size_of_the_space() -> None:
    space = SPACES["gpu"].with_override("backbone=resnet50,test_vit").with_override("image_size=100,224,420")
    drawn = {"backbone": "test_vit", "image_size": 420, "unfreeze": "full", "lr": 1e-3, "head_depth": 0}
    config = space.config({**space.fixed, **drawn})
    assert config.image_size == 416
    assert space.params(config)["image_size"] == 420
    assert params_of(replace(config, image_size=320), space) is None  # no size of the space


def test_what_is_tested_larger_is_held_as_large() -> None:
    assert SPACES["cpu"].largest_size == 192
    assert SPACES["cpu"].with_override("eval_image_size=0,256").largest_size == 256
    with pytest.raises(ValueError, match="--set eval_image_size=0,288: eval_image_size=288"):
        SPACES["gpu"].with_override("eval_image_size=0,288")


def test_backbones_can_be_left_out_but_not_all() -> None:
    assert SPACES["demo"].with_backbones(("test_resnet",)).backbones == ("test_resnet",)
    with pytest.raises(ValueError, match="no backbone of the space is left"):
        SPACES["demo"].with_backbones(())
