"""What is known of backbones: the catalog's rows, what timm says, and what a study or an export holds."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models import save_for_hf

from carmodels.catalog import BACKBONES, Backbone
from carmodels.ensembling.network import EnsembleSpec, Member
from carmodels.models import facts
from carmodels.models.backbones import known_backbones
from carmodels.models.classifier import create_classifier
from carmodels.models.facts import absolute_name, facts_of
from carmodels.models.weights import NOT_STATED, Provenance, Weights
from carmodels.records import State, TrialRecord
from carmodels.space import Choice, read_override
from carmodels.study import Study
from carmodels.training.config import TrialConfig

from hub import fetch_from, serving


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("test_mambaout", Backbone(0.2)),  # any size
        ("test_vit.r160_in1k", Backbone(0.3, multiple=16, dynamic=True)),  # patches of 16 pixels
        ("vit_tiny_patch16_224", Backbone(5.5, multiple=16, dynamic=True)),
        ("test_coatnet", Backbone(0.4, multiple=32, fixed_size=True, smallest=32)),  # windows
        ("mixer_s32_224", Backbone(18.6, only_size=224)),  # its weights mix the patches of one size
    ],
)
def test_timm_is_asked_for_what_has_no_row(name: str, known: Backbone) -> None:
    assert facts_of(name) == known


def test_the_rows_of_the_catalog_are_what_timm_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tf_efficientnet_lite0", "lcnet_035", "test_resnet"):
        row = BACKBONES[name]
        monkeypatch.delitem(BACKBONES, name)
        assert replace(facts_of(name), top1=row.top1) == row  # timm has no accuracies


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet5", "backbone='resnet5' is not known to timm; close names are .*resnet50"),
        ("zzzz", r"backbone='zzzz' is not known to timm; timm\.list_models\(\) lists its names"),
        ("test_resnet.in22k", r"timm has no weights 'in22k' of test_resnet; choose from r160_in1k"),
    ],
)
def test_an_unknown_name_or_tag_is_refused_with_those_there_are(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrialConfig(name, image_size=64, epochs=1)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("timm/resnet50", "timm/resnet50 is no folder; .* or hf-hub:ORGANISATION/NAME"),
        ("local-dir:./pickled", r"holds no model\.safetensors, and a pickle is not opened"),
    ],
)
def test_a_folder_without_safetensors_is_refused(
    asked: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pickled").mkdir()
    torch.save({}, tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=message):
        absolute_name(asked)


def test_an_override_names_backbones_of_every_source(tmp_path: Path) -> None:
    folder = saved_network(tmp_path / "own")
    name, choice = read_override(f"backbone=test_resnet,hf-hub:maker/net@v1,local-dir:{folder}")
    assert name == "backbone"
    assert choice == Choice(("test_resnet", "hf-hub:maker/net@v1", f"local-dir:{folder}"))
    assert read_override(f"backbone={folder}")[1] == Choice((f"local-dir:{folder}",))


def saved_network(folder: Path, licence: str = "cc-by-nc-4.0") -> Path:
    """A small network as timm saves one, trained on other pixels than the architecture's."""
    network = timm.create_model("test_resnet", num_classes=7)
    own = {"pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "license": licence, "tag": "mine"}}
    save_for_hf(network, folder, model_config=own, safe_serialization=True)
    return folder


def test_a_folder_in_timms_format_is_a_backbone_and_is_remembered_when_it_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(facts, "_known", {})
    name = absolute_name(str(saved_network(tmp_path / "own")))
    known = json.loads(json.dumps(known_backbones(Weights("hub"), [name])))[name]
    assert (known["architecture"], known["tag"], known["source"]) == ("test_resnet", "mine", "own")
    assert known["revision"].startswith("sha256:")
    assert (known["licence"], known["non_commercial"]) == ("cc-by-nc-4.0", True)
    config = TrialConfig(name, image_size=64, epochs=1)
    assert config.title.startswith("own 64px")
    model = create_classifier(config, classes=3, weights=Weights("hub"))
    stored = load_file(tmp_path / "own" / "model.safetensors")
    weight = model.backbone.conv1[0].weight if "conv1.0.weight" in stored else model.backbone.conv1.weight
    assert any(torch.equal(weight, value) for value in stored.values())
    black = model.normalise(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
    std = torch.tensor(model.backbone.pretrained_cfg["std"])
    torch.testing.assert_close(black[0, :, 0, 0], -torch.tensor([0.1, 0.2, 0.3]) / std)

    study = Study(tmp_path / "study")
    study.begin({"backbones": {name: known}}, [])
    study.append(TrialRecord("x", config, State.COMPLETE, 1, 0.5, 1.0, ""))
    shutil.rmtree(tmp_path / "own")
    monkeypatch.setattr(facts, "_known", {})  # as in another process
    again = study.records()[0].config
    assert again == config
    spec = EnsembleSpec(("a", "b"), ("a", "b"), (Member("x", 1.0, again),), ("plain",), 1.0, 64)
    written = json.loads(json.dumps(spec.to_dict()))
    monkeypatch.setattr(facts, "_known", {})
    exported = EnsembleSpec.from_dict(written).members[0].config
    assert create_classifier(exported, classes=2, weights=Weights("none")).head[-1].out_features == 2


@pytest.mark.server
def test_a_repository_of_the_hub_is_a_backbone_with_its_revision_and_licence(tmp_path: Path) -> None:
    files = saved_network(tmp_path / "www" / "maker" / "net" / "resolve" / "main", licence="")
    (files / "README.md").write_text("---\nlicense: other\nlicense_name: maker-nc\n---\n# Net\n")
    (files.parent / ("a" * 40)).symlink_to(files)
    with serving(tmp_path / "www") as server:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        result = fetch_from(endpoint, tmp_path / "home", "hf-hub:maker/net")
        (files / "model.safetensors").rename(files / "pytorch_model.bin")
        pickled = fetch_from(endpoint, tmp_path / "other", "hf-hub:maker/net")
    assert result.returncode == 0, result.stderr
    known = json.loads(result.stdout)["hf-hub:maker/net"]
    assert (known["source"], known["revision"]) == ("hf-hub:maker/net", "a" * 40)
    assert (known["licence"], known["non_commercial"]) == ("maker-nc", True)
    assert known["saved"]["architecture"] == "test_resnet"
    assert "maker/net holds no model.safetensors, and a pickle is not opened" in pickled.stderr
    assert not any("pytorch_model" in path for path in server.seen)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("licence", "forbids"),
    [("cc-by-nc-4.0", True), ("fair-noncommercial-research-license", True), ("apple-amlr", True)]
    + [(name, False) for name in ("apache-2.0", "mit", "cc-by-4.0", "dinov3-license", NOT_STATED, "")],
)
def test_a_licence_that_forbids_commercial_use_is_known_by_its_name(licence: str, forbids: bool) -> None:
    assert Provenance("x", "", "x", "", licence).non_commercial is forbids


def test_a_file_of_weights_has_a_hash_and_no_licence_of_its_own(weights: Weights) -> None:
    known = known_backbones(weights, ["test_resnet"])["test_resnet"]
    assert known["source"] == "test_resnet.safetensors"
    assert known["revision"] == f"sha256:{weights.identity('test_resnet')}"
    assert (known["licence"], known["non_commercial"], known["tag"]) == (NOT_STATED, False, "")
