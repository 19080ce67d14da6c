"""The smallest network of every module of timm trains here: groups, freezing, rates, a step, its weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from timm.models import list_modules
from torch import nn

from carmodels.models.classifier import create_classifier, load_weights, save_weights
from carmodels.models.facts import facts_of
from carmodels.models.parameter_groups import optimizer_groups
from carmodels.models.weights import Weights
from carmodels.training.config import TrialConfig

NONE = Weights("none")

SMALLEST = {  # by module, of under 30 million parameters
    "byoanet": "halonet_h1",
    "byobnet": "test_byobnet",
    "cait": "cait_xxs24_224",
    "coat": "coat_tiny",
    "convit": "convit_tiny",
    "convmixer": "convmixer_768_32",
    "convnext": "test_convnext",
    "cpubone": "cpubone_nano",
    "crossvit": "crossvit_tiny_240",
    "csatv2": "csatv2",
    "cspnet": "cs3darknet_focus_s",
    "cspnext": "cspnext_tiny",
    "davit": "davit_tiny",
    "deit": "deit_tiny_patch16_224",
    "densenet": "densenet121",
    "dla": "dla46x_c",
    "dpn": "dpn48b",
    "edgenext": "edgenext_xx_small",
    "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientnet": "test_efficientnet",
    "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0",
    "efficientvit_msra": "efficientvit_m0",
    "eva": "vit_tiny_patch16_dinov3_qkvb",
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8",
    "focalnet": "focalnet_tiny_srf",
    "gcvit": "gcvit_xxtiny",
    "ghostnet": "ghostnet_050",
    "hardcorenas": "hardcorenas_b",
    "hgnet": "hgnetv2_b0",
    "hiera": "hiera_tiny_224",
    "hieradet_sam2": "sam2_hiera_tiny",
    "hrnet": "hrnet_w18_small",
    "iformer": "iformer_t",
    "inception_next": "inception_next_atto",
    "inception_v3": "inception_v3",
    "lcnetv2": "lcnetv2_small",
    "levit": "levit_128s",
    "lowformer": "lowformer_b0",
    "mambaout": "test_mambaout",
    "maxxvit": "test_coatnet",
    "metaformer": "poolformerv2_s12",
    "mlp_mixer": "gmlp_ti16_224",
    "mobilenetv3": "lcnet_035",
    "mobilevit": "mobilevit_xxs",
    "mvitv2": "mvitv2_tiny",
    "nest": "nest_tiny",
    "nfnet": "test_nfnet",
    "pit": "pit_ti_224",
    "pvt_v2": "pvt_v2_b0",
    "rdnet": "rdnet_tiny",
    "regnet": "regnetx_002",
    "repghost": "repghostnet_050",
    "repvit": "repvit_m1",
    "res2net": "res2next50",
    "resnest": "resnest14d",
    "resnet": "test_resnet",
    "resnetv2": "resnetv2_18",
    "rexnet": "rexnet_100",
    "selecsls": "selecsls42",
    "senet": "legacy_seresnet18",
    "shvit": "shvit_s1",
    "sknet": "skresnet18",
    "starnet": "starnet_s050",
    "swiftformer": "swiftformer_xs",
    "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window8_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224",
    "tiny_vit": "tiny_vit_5m_224",
    "tnt": "tnt_s_legacy_patch16_224",
    "tresnet": "tresnet_m",
    "twins": "twins_svt_small",
    "visformer": "visformer_tiny",
    "vision_transformer": "test_vit",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
    "vision_transformer_relpos": "test_vit_relpos",
    "vitamin": "vitamin_small_224",
    "volo": "volo_d1_224",
    "vovnet": "ese_vovnet19b_slim_dw",
    "xception": "legacy_xception",
    "xception_aligned": "xception41p",
    "xcit": "xcit_nano_12_p8_224",
}
LARGER = {
    "beit",
    "deepseek_vit",
    "gemma4_vit",
    "inception_resnet_v2",
    "inception_v4",
    "mobilenetv5",
    "naflexvit",
    "nasnet",
    "nextvit",
    "pnasnet",
    "qwen3_vit",
    "vgg",
    "vision_transformer_sam",
}  # whose smallest network has more
LEFT_OUT = {"sequencer": "its LSTM takes a minute on the meta device"}


def test_every_module_of_timm_is_in_a_table() -> None:
    """All of `SMALLEST` train; `LEFT_OUT` was tried once and does, too."""
    assert {*SMALLEST, *LARGER, *LEFT_OUT} == {
        module for module in list_modules() if timm.list_models(module=module)
    }


@pytest.mark.slow
@pytest.mark.parametrize("module", SMALLEST)
def test_the_smallest_network_of_a_module_trains(module: str, tmp_path: Path) -> None:
    name = SMALLEST[module]
    config = TrialConfig(name, image_size=facts_of(name).fit(48), epochs=1, lr=1e-3, lr_ratio=0.1)
    torch.manual_seed(0)
    model = create_classifier(config, classes=3, weights=NONE)
    named = dict(model.backbone.named_parameters())
    assert sorted(n for names in model.groups for n in names) == sorted(named)
    assert len(model.groups) > 1
    optimizer = torch.optim.AdamW(optimizer_groups(model, config))
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert rates[id(named[model.groups[0][0]])] == pytest.approx(1e-4)

    count = len(model.groups) // 2
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.unfreeze_top(count)
    images = torch.randint(0, 256, (4, 3, config.image_size, config.image_size), dtype=torch.uint8)
    logits = model.train()(images)
    assert logits.shape == (4, 3)
    nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()
    optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    for number, names in enumerate(model.groups):
        opened = number >= len(model.groups) - count
        assert bool({f"backbone.{n}" for n in names} & moved) == opened

    file = tmp_path / "w.safetensors"
    save_weights(model, file)
    loaded = load_weights(config, file, classes=3)
    file.unlink()  # together they would be gigabytes
    with torch.inference_mode():
        torch.testing.assert_close(loaded.eval()(images), model.eval()(images), rtol=1e-4, atol=1e-4)
