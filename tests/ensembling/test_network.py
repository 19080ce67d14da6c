"""An ensemble as one network."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from carmodels.catalog import BACKBONES, VIEWS, Backbone
from carmodels.ensembling.network import Ensemble, EnsembleSpec, InputSpec, Member, preprocess
from carmodels.models.classifier import create_classifier
from carmodels.models.weights import Weights
from carmodels.training.config import TrialConfig
from carmodels.training.forward import shown_view, view_size

IMAGES = list(np.random.default_rng(0).integers(0, 256, (3, 50, 60, 3), np.uint8))
FREE = TrialConfig("test_resnet", image_size=64, epochs=1)
FIXED = TrialConfig("vit_small_patch16_224", image_size=224, epochs=1)


@pytest.mark.parametrize("config", [FREE, FIXED], ids=["any size", "one size"])
def test_views_that_look_alike_are_one(config: TrialConfig) -> None:
    shown = {view: preprocess(IMAGES, InputSpec(view, view_size(config, view))) for view in VIEWS}
    for view, images in shown.items():
        alike = next(name for name, other in shown.items() if torch.equal(images, other))
        assert shown_view(config, view) == alike
    assert len({shown_view(config, view) for view in VIEWS}) == (11 if config is FIXED else len(VIEWS))


def test_a_member_answers_once_what_it_is_shown_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A size of a multiple of 32 px is neither larger nor smaller by a fifth."""
    monkeypatch.setitem(BACKBONES, "test_resnet", Backbone(0.4, multiple=32))
    config = TrialConfig("test_resnet", image_size=32, epochs=1)
    model = create_classifier(config, classes=4, weights=Weights("none"))
    names = ("a", "b", "c", "d")
    views = ("plain", "larger", "flip")
    spec = EnsembleSpec(names, names, (Member("id", 1.0, config),), views, 1.0, 48)
    assert [i.name for i in spec.inputs] == ["plain_32", "flip_32"]
    shown: list[torch.Tensor] = []
    ensemble = Ensemble(spec, [model])
    model.register_forward_pre_hook(lambda module, inputs: shown.append(inputs[0]))
    found = ensemble.probabilities(IMAGES)
    assert len(shown) == 2
    with torch.inference_mode():
        plain, flip = (model(images).softmax(dim=1) for images in shown[:2])
    torch.testing.assert_close(torch.from_numpy(found), (2 * plain + flip) / 3)
