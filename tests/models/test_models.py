"""Backbones of every row build; heads, freezing, optimizer groups and weights do what their rows say."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HTTPError
from safetensors.torch import load_file, save_file
from timm.optim import param_groups_weight_decay
from torch import nn

from carmodels.catalog import BACKBONES, HEADS, UNFREEZE, VIEWS
from carmodels.data.dataset import Splits
from carmodels.models.backbones import create_backbone, fetch_weights
from carmodels.models.classifier import Classifier, create_classifier, create_head, load_weights, save_weights
from carmodels.models.parameter_groups import optimizer_groups, trainable_groups
from carmodels.models.weights import Weights
from carmodels.training.config import TrialConfig
from carmodels.training.forward import predict, view_size
from carmodels.training.run import Run
from carmodels.training.trainer import fit

from hub import fetch_from, serving

NONE = Weights("none")


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_row_builds_with_its_size_groups_and_parameters(backbone: str) -> None:
    row = BACKBONES[backbone]
    config = TrialConfig(
        backbone=backbone, image_size=64 if not row.fixed_size else 224, epochs=1, head_depth=1
    )
    with torch.device("meta"):
        model = create_classifier(config, classes=7, weights=NONE)
        logits = model.eval()(torch.empty(2, 3, config.image_size, config.image_size, dtype=torch.uint8))
    assert logits.shape == (2, 7)
    parameters = dict(model.backbone.named_parameters())
    assert sorted(n for names in model.groups for n in names) == sorted(parameters)
    assert len(model.groups) >= 4
    assert sum(p.numel() for p in parameters.values()) / 1e6 == pytest.approx(row.millions, abs=0.06)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_a_head_has_its_blocks_and_a_linear_classifier(head: str, depth: int) -> None:
    row = HEADS[head]
    layers = list(create_head(row, depth=depth, dropout=0.3, features=10, classes=4))
    block = [nn.Linear, nn.BatchNorm1d, getattr(nn, row.activation), nn.Dropout]
    assert [type(layer) for layer in layers] == block * depth + [nn.Linear]
    assert nn.Sequential(*layers).eval()(torch.zeros(2, 10)).shape == (2, 4)


def test_images_are_normalised_as_the_backbone_was_trained(config: TrialConfig) -> None:
    model = create_classifier(config, classes=3, weights=NONE)
    white = torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
    mean, std = (torch.tensor(model.backbone.pretrained_cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    torch.testing.assert_close(model.normalise(white), ((1 - mean) / std).expand(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("strategy", "opened"),
    [
        ("frozen", [0, 0, 0, 0, 0, 0, 0, 0]),
        ("full", [6, 6, 6, 6, 6, 6, 6, 6]),
        ("head_first", [0, 0, 6, 6, 6, 6, 6, 6]),
        ("gradual", [0, 2, 4, 6, 6, 6, 6, 6]),
    ],
)
def test_groups_open_as_the_strategy_says(strategy: str, opened: list[int]) -> None:
    row = UNFREEZE[strategy]
    assert [trainable_groups(row, epoch=e, epochs=8, groups=6) for e in range(1, 9)] == opened


@pytest.mark.parametrize("strategy", UNFREEZE)
def test_a_schedule_of_one_epoch_is_possible_for_every_strategy(strategy: str) -> None:
    assert 0 <= trainable_groups(UNFREEZE[strategy], epoch=1, epochs=1, groups=6) <= 6


def moved(before: dict[str, torch.Tensor], model: Classifier) -> set[str]:
    """Names of parameters and buffers that are no longer what they were."""
    return {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}


@pytest.mark.parametrize("count", [0, 1, 3, 5])
def test_only_open_groups_and_the_head_move_and_frozen_batchnorm_stays(
    config: TrialConfig, count: int
) -> None:
    torch.manual_seed(0)
    config = replace(config, head_depth=1, weight_decay=0.1)
    model = create_classifier(config, classes=3, weights=NONE)
    optimizer = torch.optim.AdamW(optimizer_groups(model, config))
    before = {n: v.clone() for n, v in model.state_dict().items()}
    model.unfreeze_top(count)
    model.train()
    for _ in range(2):
        images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
        loss = nn.functional.cross_entropy(model(images), torch.randint(0, 3, (8,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    changed = moved(before, model)
    open_names = {f"backbone.{n}" for names in model.groups[len(model.groups) - count :] for n in names}
    named = dict(model.named_parameters())
    assert {n for n in changed if n in named and n.startswith("backbone.")} <= open_names
    assert {n for n in open_names if named[n].ndim > 1} <= changed
    assert {n for n in named if n.startswith("head.") and named[n].ndim > 1} <= changed
    statistics = {n for n in changed if "running" in n and n.startswith("backbone.")}
    holders = {n.rsplit(".", 1)[0] for n in open_names}
    assert {n.rsplit(".", 1)[0] for n in statistics} <= holders
    assert bool(statistics) == (count > 0)


def test_rates_fall_to_lr_ratio_at_the_bottom_and_vectors_are_not_decayed(
    config: TrialConfig,
) -> None:
    config = replace(config, lr=1e-2, lr_ratio=0.1, weight_decay=0.1, unfreeze="full")
    model = create_classifier(config, classes=3, weights=NONE)
    by_parameter = {id(p): g for g in optimizer_groups(model, config) for p in g["params"]}
    named = dict(model.backbone.named_parameters())
    assert len(by_parameter) == len(list(model.parameters()))
    for below, names in enumerate(reversed(model.groups), start=1):
        for name in names:
            group = by_parameter[id(named[name])]
            assert group["lr"] == pytest.approx(1e-2 * 0.1 ** (below / len(model.groups)))
            assert group["weight_decay"] == (0.1 if named[name].ndim > 1 else 0.0)
    assert {by_parameter[id(p)]["lr"] for p in model.head.parameters()} == {1e-2}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_what_a_backbone_exempts_from_weight_decay_is_exempt(backbone: str) -> None:
    """As timm itself sorts the parameters."""
    size = 224 if BACKBONES[backbone].fixed_size else 64
    config = TrialConfig(backbone, image_size=size, epochs=1, weight_decay=0.1)
    with torch.device("meta"):
        model = create_classifier(config, classes=7, weights=NONE)
    names = {id(p): name for name, p in model.backbone.named_parameters()}
    decayed = {
        names[id(p)]: group["weight_decay"] > 0
        for group in optimizer_groups(model, config)
        for p in group["params"]
        if id(p) in names
    }
    exempt = getattr(model.backbone, "no_weight_decay", set)()
    kept, decaying = param_groups_weight_decay(model.backbone, 0.1, no_weight_decay_list=exempt)
    assert decayed == {
        **{names[id(p)]: False for p in kept["params"]},
        **{names[id(p)]: True for p in decaying["params"]},
    }


def test_a_pattern_of_exempt_parameters_reaches_all_that_it_names(config: TrialConfig) -> None:
    model = create_classifier(config, classes=3, weights=NONE)
    model.backbone.no_weight_decay = lambda: {"conv1.*"}
    decay = {id(p): g["weight_decay"] for g in optimizer_groups(model, config) for p in g["params"]}
    found = {name: decay[id(p)] for name, p in model.backbone.named_parameters() if p.ndim > 1}
    assert {n for n, value in found.items() if not value} == {n for n in found if n.startswith("conv1.")}
    assert set(found.values()) == {0.0, config.weight_decay}


@pytest.mark.parametrize("backbone", ["resnet50", "xception41"])  # of 5 and 14 groups
def test_the_stem_has_the_same_rate_whatever_the_number_of_groups(backbone: str) -> None:
    config = TrialConfig(backbone, image_size=64, epochs=1, lr=1e-2, lr_ratio=0.03)
    with torch.device("meta"):
        model = create_classifier(config, classes=3, weights=NONE)
    rates = {id(p): g["lr"] for g in optimizer_groups(model, config) for p in g["params"]}
    named = dict(model.backbone.named_parameters())
    assert [rates[id(named[name])] for name in model.groups[0]] == pytest.approx(
        [3e-4] * len(model.groups[0])
    )
    assert max(rates.values()) == 1e-2


def test_a_frozen_backbone_is_not_given_to_the_optimizer(config: TrialConfig) -> None:
    config = replace(config, unfreeze="frozen")
    model = create_classifier(config, classes=3, weights=NONE)
    given = {id(p) for g in optimizer_groups(model, config) for p in g["params"]}
    assert given == {id(p) for p in model.head.parameters()}


def test_weights_of_a_folder_are_the_files_own(config: TrialConfig, weights: Weights) -> None:
    model = create_classifier(config, classes=3, weights=weights)
    stored = load_file(weights.file(config.backbone))
    for name, value in model.backbone.state_dict().items():
        if "num_batches" not in name:
            torch.testing.assert_close(value, stored[name].float())


@pytest.mark.parametrize(
    ("text", "message"),
    [("no/such/folder", "--weights no/such/folder is no folder"), (".", r"holds no \.safetensors file")],
)
def test_a_wrong_place_for_weights_is_named(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        Weights.parse(text)


def test_a_damaged_weights_file_is_one_line_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "lcnet_035.safetensors").write_bytes(b"not weights")
    with pytest.raises(ValueError, match=r"weights of lcnet_035 could not be loaded .* give --weights DIR"):
        fetch_weights(Weights.parse(str(tmp_path)), ["lcnet_035"])


def test_weights_of_other_names_are_refused_and_not_left_out(tmp_path: Path, weights: Weights) -> None:
    fetch_weights(weights, ["test_resnet"])
    stored = load_file(weights.file("test_resnet"))
    save_file({f"model.{key}": value for key, value in stored.items()}, tmp_path / "test_resnet.safetensors")
    with pytest.raises(ValueError, match=r"could not be loaded from .* \(it holds nothing for "):
        fetch_weights(Weights(str(tmp_path)), ["test_resnet"])


def test_what_a_source_holds_is_known_without_a_network(weights: Weights) -> None:
    assert weights.has("test_resnet")
    assert not weights.has("resnet50")
    assert Weights("hub").has("resnet50")
    assert not Weights("hub").has("lcnet_035")  # timm publishes none
    assert NONE.has("resnet50")


@pytest.mark.server
def test_an_unreachable_hub_is_one_clear_error_that_names_the_option(tmp_path: Path) -> None:
    result = fetch_from("http://127.0.0.1:9", tmp_path)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: the weights of lcnet_050 could not be loaded from the hub")
    assert "--weights DIR" in last


def test_a_download_that_fails_in_a_worker_is_an_error_that_reaches_the_driver(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray pickles it. What the hub's client raises cannot be read again, or is no OSError."""

    def refuse(*arguments: object, **named: object) -> None:
        raise HTTPError("the hub does not answer")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(OSError, match="the hub does not answer") as caught:
        create_backbone("lcnet_050", image_size=32, weights=Weights("hub"))
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), OSError)


@pytest.mark.server
def test_hub_weights_are_fetched_once(tmp_path: Path) -> None:
    repository = tmp_path / "www" / "timm" / "lcnet_050.ra2_in1k" / "resolve" / "main"
    repository.mkdir(parents=True)
    import timm

    save_file(timm.create_model("lcnet_050").state_dict(), repository / "model.safetensors")
    with serving(tmp_path / "www") as server:
        first = fetch_from(f"http://127.0.0.1:{server.server_port}", tmp_path / "home")
    assert first.returncode == 0, first.stderr
    assert any("model.safetensors" in path for path in server.seen)  # type: ignore[attr-defined]
    env_offline = fetch_from("http://127.0.0.1:9", tmp_path / "home")
    assert env_offline.returncode == 0, env_offline.stderr  # from the local copy


def test_saved_weights_give_the_same_probabilities(
    config: TrialConfig, splits: Splits, weights: Weights, tmp_path: Path
) -> None:
    trained = fit(Run(replace(config, epochs=1, head_depth=1)), splits, weights=weights)
    save_weights(trained.model, tmp_path / "w.safetensors")
    loaded = load_weights(trained.run.config, tmp_path / "w.safetensors", classes=len(splits.classes))
    one, other = (predict(m, splits, splits.val, config=config) for m in (trained.model, loaded))
    assert torch.equal(torch.tensor(one.probs), torch.tensor(other.probs))


def test_weights_of_another_configuration_are_refused_by_name(config: TrialConfig, tmp_path: Path) -> None:
    save_weights(create_classifier(config, classes=3, weights=NONE), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"w\.safetensors is damaged or of another configuration"):
        load_weights(replace(config, head_depth=2), tmp_path / "w.safetensors", classes=3)


@pytest.mark.parametrize("view", VIEWS)
def test_backbones_built_for_one_size_keep_it_in_every_view(view: str) -> None:
    sized = TrialConfig(backbone="swin_tiny_patch4_window7_224", image_size=224, epochs=1)
    assert view_size(sized, view) == 224
    free = TrialConfig(backbone="lcnet_035", image_size=64, epochs=1)
    assert view_size(free, view) == round(64 * VIEWS[view].scale)
