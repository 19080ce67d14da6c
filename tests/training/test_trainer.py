"""Training is reproducible, learns, notices when it fails and keeps its best epoch; no option is ignored."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from carmodels.catalog import AUGMENTS, SCHEDULES, UNFREEZE, VIEWS, Schedule
from carmodels.data.dataset import Splits
from carmodels.data.loader import Batch, Loader
from carmodels.data.splits import Split
from carmodels.evaluation.metrics import METRICS, accuracy
from carmodels.models.classifier import save_weights
from carmodels.models.weights import Weights
from carmodels.training import trainer
from carmodels.training.config import METRIC_NAMES, OPTIMIZERS, EpochMetrics, TrialConfig
from carmodels.training.forward import in_parts, predict, view_size
from carmodels.training.held_out import splits_for
from carmodels.training.timing import training_seconds
from carmodels.training.trainer import Trainer, TrainResult, fit


def curve(history: tuple[EpochMetrics, ...]) -> list[tuple[float, ...]]:
    return [(m.epoch, m.train_loss, m.val_loss, m.val_accuracy, m.value) for m in history]


def test_the_same_seed_gives_the_same_numbers_to_the_bit_and_another_seed_does_not(
    config: TrialConfig, splits: Splits, weights: Weights
) -> None:
    config = replace(config, head_depth=1, mixup=0.2, cutmix=0.5, ema=0.9, augment="strong")
    first = fit(config, splits, weights=weights)
    fit(replace(config, unfreeze="frozen", seed=5), splits, weights=weights)
    again = fit(config, splits, weights=weights)
    assert curve(first.history) == curve(again.history)
    for one, other in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert curve(fit(replace(config, seed=1), splits, weights=weights).history) != curve(first.history)


def test_the_seed_of_the_head_decides_its_initial_weights_and_nothing_else(
    config: TrialConfig, splits: Splits, weights: Weights
) -> None:
    def run(seed: int, head_seed: int | None) -> Trainer:
        changed = replace(config, head_depth=1, seed=seed, head_seed=head_seed)
        return Trainer(changed, splits, weights=weights, device=torch.device("cpu"))

    def head(of: Trainer) -> torch.Tensor:
        return of.model.head[0].weight

    assert torch.equal(head(run(0, None)), head(run(1, 0)))
    assert torch.equal(head(run(1, None)), head(run(1, 1)))
    assert not torch.equal(head(run(1, None)), head(run(1, 0)))
    orders = [
        [b.tolist() for b in run(*seeds).train_loader.orders(1)] for seeds in ((1, None), (1, 0), (0, 1))
    ]
    assert orders[0] == orders[1] != orders[2]
    assert replace(config, head_seed=3).id != config.id
    assert (replace(config, seed=5).init_seed, replace(config, seed=5, head_seed=0).init_seed) == (5, 0)
    with pytest.raises(ValueError, match="head_seed=-1 must be None or a whole number from 0"):
        replace(config, head_seed=-1)


def test_a_run_goes_on_from_the_weights_of_another(
    config: TrialConfig, splits: Splits, weights: Weights, tmp_path: Path
) -> None:
    first = fit(config, splits, weights=weights)
    save_weights(first.model, tmp_path / "first.safetensors")
    assert first.best is not None
    onward = replace(config, seed=1, head_seed=0, continues="0123456789ab", epochs=1, lr=1e-8)
    start = tmp_path / "first.safetensors"
    again = fit(onward, splits, weights=Weights("none"), start=start)
    assert again.best is not None
    assert again.best.val_loss == pytest.approx(first.best.val_loss, abs=0.02)  # BatchNorm moves a little
    random = fit(replace(onward, continues=""), splits, weights=weights)
    assert random.history[0].val_loss > first.best.val_loss + 0.1
    with pytest.raises(ValueError, match=r"continues='0123456789ab', start=None: one takes the other"):
        fit(onward, splits, weights=weights)
    with pytest.raises(ValueError, match=r"first\.safetensors is damaged or of another configuration"):
        fit(replace(onward, head_depth=3), splits, weights=weights, start=start)


def test_targets_are_learnt_in_the_place_of_labels_and_shown_as_they_were_made(
    config: TrialConfig, splits: Splits, weights: Weights
) -> None:
    assert splits.train.labels is not None
    right, epochs = np.eye(10, dtype=np.float32)[splits.train.labels], 4
    longer = replace(config, epochs=epochs, image_size=48)
    other = np.roll(right, 1, axis=1)[None]
    misled = fit(longer, splits, weights=weights, targets=other)
    probs = predict(misled.model, splits, splits.val, config=longer).probs
    assert accuracy(probs, (splits.val.labels + 1) % 10) > 0.25
    run = Trainer(
        longer, splits, weights=weights, device=torch.device("cpu"), targets=np.stack([right, 1 - right])
    )
    loader = Loader(
        splits.images,
        splits.train,
        image_size=48,
        batch_size=len(splits.train),
        augment=AUGMENTS[longer.augment],
        seed=longer.seed,
    )
    for number, view in ((1, 0), (2, 1), (3, 0)):
        images, targets = next(iter(run.shown(number)))
        rows = run.train_loader.orders(number)[0]
        assert torch.equal(images, next(loader.epoch(view)).images[rows])
        assert np.array_equal(targets.numpy(), (right if view == 0 else 1 - right)[rows])
    with pytest.raises(ValueError, match="no mixup, no features"):
        fit(replace(config, mixup=0.2), splits, weights=weights, targets=other)


def test_the_models_of_all_folds_are_not_trained_at_once(
    config: TrialConfig, splits: Splits, weights: Weights
) -> None:
    with pytest.raises(ValueError, match="folds=3: these are 3 models; name the fold of one"):
        fit(replace(config, folds=3), splits, weights=weights)


@pytest.mark.parametrize(("kind", "warmup"), [("linear", 0.0), ("plateau", 0.1)])
def test_a_schedule_that_would_not_do_what_it_says_is_refused(kind: str, warmup: float) -> None:
    with pytest.raises(ValueError, match=kind):
        Schedule(kind, warmup=warmup)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_is_held_out_has_no_say_in_a_fold(
    schedule: str, config: TrialConfig, splits: Splits, weights: Weights
) -> None:
    """Whatever the fold's labels are, the model is the same, and that of the last epoch."""
    one = replace(config, folds=3, fold=1, epochs=4, lr=2e-2, schedule=schedule)
    fitted = fit(one, splits, weights=weights)
    assert fitted.best.epoch == 4
    held_out = splits_for(one, splits).val
    kept = predict(fitted.model, splits, held_out, config=one)
    assert accuracy(kept.probs, held_out.labels) == pytest.approx(fitted.best.value, abs=1e-6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "_labels", _wrong_labels)
        other = fit(one, splits, weights=weights)
    assert other.best.value != fitted.best.value
    for first, second in zip(fitted.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(first, second)


def _wrong_labels(split: Split) -> np.ndarray:
    return np.roll(split.labels, 7) if split.name == "oof" else split.labels


def test_a_last_run_learns_from_everything_and_has_no_score(
    config: TrialConfig, splits: Splits, weights: Weights
) -> None:
    last = replace(config, fold_in=True, schedule="plateau")
    parts = splits_for(last, splits)
    assert (len(parts.train), len(parts.val), len(parts.holdout)) == (200, 0, 0)
    assert set(parts.train.ids) == {*splits.train.ids, *splits.val.ids, *splits.holdout.ids}
    fitted = fit(last, splits, weights=weights)
    assert fitted.ending == "schedule"
    assert fitted.best.epoch == 2
    for epoch in fitted.history:
        assert np.isfinite(epoch.train_loss)
        assert np.isnan([epoch.val_loss, epoch.val_accuracy, epoch.value]).all()


def test_growing_images_are_trained_on_at_each_size_and_tested_at_the_whole_one(
    config: TrialConfig, splits: Splits, weights: Weights
) -> None:
    growing = replace(config, image_size=48, start_image_size=16, epochs=4)
    run = Trainer(growing, splits, weights=weights, device=torch.device("cpu"))
    sizes = [next(run.shown(number))[0].shape[-1] for number in range(1, 5)]
    assert sizes == [growing.shown_size(number) for number in range(1, 5)] == [16, 32, 32, 48]
    assert next(run.val_loader.epoch(0)).images.shape[-1] == 48
    larger = replace(config, eval_image_size=64)
    run = Trainer(larger, splits, weights=weights, device=torch.device("cpu"))
    assert next(run.val_loader.epoch(0)).images.shape[-1] == 64
    assert next(run.shown(1))[0].shape[-1] == 32
    assert view_size(larger, "plain") == 64


def test_training_learns_far_beyond_chance(config: TrialConfig, splits: Splits, weights: Weights) -> None:
    fitted = fit(replace(config, image_size=48, epochs=6), splits, weights=weights)
    assert fitted.best.val_accuracy > 0.35  # ten classes
    assert fitted.history[-1].train_loss < fitted.history[0].train_loss
    assert fitted.ending == "schedule"


@pytest.mark.parametrize("strategy", UNFREEZE)
def test_what_a_strategy_keeps_frozen_does_not_move(
    strategy: str, config: TrialConfig, splits: Splits, weights: Weights
) -> None:
    row, epochs = UNFREEZE[strategy], 8
    run = Trainer(
        replace(config, unfreeze=strategy, epochs=epochs), splits, weights=weights, device=torch.device("cpu")
    )
    before = {name: value.clone() for name, value in run.model.backbone.state_dict().items()}

    def is_still() -> bool:
        return all(torch.equal(v, before[name]) for name, v in run.model.backbone.state_dict().items())

    if row.head_only_epochs != 0:
        run.epoch(row.head_only_epochs or epochs)  # the last one with the head alone
        assert is_still()
    if row.head_only_epochs is not None:
        run.epoch(row.head_only_epochs + 1)
        assert not is_still()


@pytest.mark.parametrize(
    "change",
    [
        *({"optimizer": name} for name in OPTIMIZERS),
        *({"schedule": name} for name in SCHEDULES),
        *({"augment": name} for name in AUGMENTS),
        {"head": "gelu512"},
        {"head_depth": 2, "dropout": 0.5},
        {"label_smoothing": 0.2},
        {"mixup": 0.4},
        {"cutmix": 0.4},
        {"mixup": 0.4, "cutmix": 0.4},
        {"ema": 0.5},
        {"clip_norm": 0.01, "optimizer": "sgd"},
        {"weight_decay": 0.5},
        {"layer_decay": 0.5},
        {"lr": 1e-2},
        {"batch_size": 16},
        {"unfreeze": "frozen"},
        {"start_image_size": 16},
        {"eval_image_size": 48},
        {"folds": 2, "fold": 0},
    ],
    ids=str,
)
def test_every_option_reaches_training(
    change: dict[str, object], config: TrialConfig, splits: Splits, weights: Weights
) -> None:
    base = replace(config, epochs=1, head_depth=1, image_size=32)
    changed = replace(base, **change)
    outcome = curve(fit(changed, splits, weights=weights).history)
    assert np.isfinite(outcome).all()
    if changed != base:
        assert outcome != curve(fit(base, splits, weights=weights).history)


def test_class_weights_weigh_the_rare_class_up(splits: Splits, weights: Weights, config: TrialConfig) -> None:
    keep = np.flatnonzero((splits.train.labels != 0) | (np.arange(len(splits.train)) % 4 == 0))
    rare = replace(
        splits,
        train=replace(
            splits.train,
            ids=tuple(splits.train.ids[i] for i in keep),
            labels=splits.train.labels[keep],
            rows=splits.train.rows[keep],
        ),
    )
    run = Trainer(replace(config, class_weights=True), rare, weights=weights, device=torch.device("cpu"))
    counts = np.bincount(rare.train.labels)
    np.testing.assert_allclose(run.loss.weight.numpy() * counts, np.full(10, counts.sum() / 10), rtol=1e-5)


def test_a_loss_that_is_not_finite_ends_training_as_diverged(
    config: TrialConfig, splits: Splits, weights: Weights
) -> None:
    explosive = {"optimizer": "sgd", "lr": 10.0, "weight_decay": 10.0, "clip_norm": 0.0}
    wild = replace(config, epochs=5, batch_size=8, schedule="constant", **explosive)
    fitted = fit(wild, splits, weights=weights)
    assert fitted.ending == "diverged"
    assert len(fitted.history) < 5
    assert fitted.history[-1].value == 0.0


def test_patience_ends_training_when_nothing_gets_better(
    config: TrialConfig, splits: Splits, weights: Weights
) -> None:
    still = replace(config, lr=1e-8, epochs=6, patience=2, unfreeze="frozen", augment="none")
    fitted = fit(still, splits, weights=weights)
    assert fitted.ending == "patience"
    assert len(fitted.history) == fitted.best.epoch + 2


def test_training_ends_with_what_it_has_before_the_time_is_up(
    config: TrialConfig, splits: Splits, weights: Weights
) -> None:
    long = replace(config, epochs=500)
    fitted = fit(long, splits, weights=weights, until=time.time() + 3)
    assert fitted.ending == "time"
    assert 1 <= len(fitted.history) < 500
    assert fitted.best.value == max(m.value for m in fitted.history)
    assert fit(config, splits, weights=weights, until=time.time() - 1).history[-1].epoch == 1


@pytest.mark.parametrize("metric", METRIC_NAMES)
def test_the_best_epoch_by_the_metric_is_kept(
    metric: str, config: TrialConfig, splits: Splits, weights: Weights
) -> None:
    seen: list[EpochMetrics] = []
    uneasy = replace(config, metric=metric, epochs=4, lr=2e-2, schedule="constant")
    fitted = fit(uneasy, splits, weights=weights, on_epoch=seen.append)
    assert tuple(seen) == fitted.history
    extreme = max if METRICS[metric].mode == "max" else min
    assert fitted.best.value == extreme(m.value for m in seen)
    kept = predict(fitted.model, splits, splits.val, config=uneasy)
    assert METRICS[metric].score(kept.probs, splits.val.labels) == pytest.approx(fitted.best.value, abs=1e-6)


def test_cosine_warms_up_and_ends_at_zero_and_plateau_falls_when_val_loss_stays(
    config: TrialConfig, splits: Splits, weights: Weights
) -> None:
    def rates(schedule: str, epochs: int) -> list[float]:
        run = Trainer(
            replace(config, schedule=schedule, epochs=epochs, lr=1e-2),
            splits,
            weights=weights,
            device=torch.device("cpu"),
        )
        seen = []
        for _ in range(epochs):
            for _ in range(len(run.train_loader)):
                seen.append(run.optimizer.param_groups[0]["lr"])
                run.optimizer.step()
                run.schedule.step_ended()
            run.schedule.epoch_ended(1.0)
        return [*seen, run.optimizer.param_groups[0]["lr"]]

    cosine = rates("cosine", 5)
    assert cosine[0] < 0.6e-2 < max(cosine)
    assert max(cosine) == pytest.approx(1e-2)
    assert cosine[-1] == pytest.approx(0.0, abs=1e-6)
    plateau = rates("plateau", 6)
    assert plateau[0] == 1e-2
    assert plateau[-1] == pytest.approx(0.25e-2)
    assert set(rates("constant", 3)) == {1e-2}


@pytest.fixture(scope="module")
def fitted(splits: Splits, weights: Weights) -> TrainResult:
    """A model that knows its images, for tests that only ask it."""
    return fit(TrialConfig("test_resnet", image_size=48, epochs=4, lr=3e-3), splits, weights=weights)


@pytest.mark.parametrize("view", VIEWS)
def test_every_view_keeps_ids_with_their_images(view: str, fitted: TrainResult, splits: Splits) -> None:
    shown = predict(fitted.model, splits, splits.val, config=fitted.config, view=view)
    assert shown.ids == splits.val.ids
    assert accuracy(shown.probs, splits.val.labels) > 0.25  # ten classes: a mix-up would be at chance
    again = predict(fitted.model, splits, splits.val, config=fitted.config, view=view)
    np.testing.assert_array_equal(shown.probs, again.probs)


def test_the_cost_of_a_image_grows_with_its_size(
    config: TrialConfig, splits: Splits, weights: Weights
) -> None:
    small, large = (
        training_seconds(replace(config, image_size=size), splits, weights=weights) for size in (16, 128)
    )
    assert 0 < small < large


def gradients(run: Trainer, network: torch.nn.Module, batch: Batch) -> list[torch.Tensor]:
    """What a batch leaves in the parameters that learn, with BatchNorm at rest."""
    run.model.eval()
    run._gradients(network, run.model.normalise(batch.images), batch.labels)
    return [p.grad for p in run.model.parameters() if p.grad is not None]


class Small(torch.nn.Module):
    """A network on a device that holds the activations of `room` images."""

    def __init__(self, network: torch.nn.Module, room: int) -> None:
        super().__init__()
        self.network, self.room = network, room

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if len(images) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.network(images)


@pytest.mark.parametrize("changes", [{}, {"class_weights": True, "label_smoothing": 0.1}])
def test_where_memory_runs_out_a_batch_in_parts_has_the_gradients_of_the_whole(
    changes: dict[str, Any], config: TrialConfig, splits: Splits, weights: Weights
) -> None:
    run = Trainer(replace(config, **changes), splits, weights=weights, device=torch.device("cpu"))
    if changes:
        run.loss.weight = torch.linspace(0.1, 3.0, len(splits.classes))
    run.model.freeze_to(len(run.model.groups))
    batch = next(iter(run.train_loader.epoch(1)))
    whole = gradients(run, run.model, batch)
    parts = gradients(run, Small(run.model, room=9), batch)
    assert run.parts == 4
    assert len(parts) == len(whole)
    for one, other in zip(parts, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    with pytest.raises(torch.OutOfMemoryError):
        gradients(run, Small(run.model, room=1), batch)


def test_where_memory_runs_out_images_are_shown_in_halves() -> None:
    images = torch.arange(12.0).reshape(6, 2)
    torch.testing.assert_close(in_parts(Small(torch.nn.Identity(), room=2), images), images)
    with pytest.raises(torch.OutOfMemoryError):
        in_parts(Small(torch.nn.Identity(), room=0), images)


def test_compiled_training_gives_the_same_curve(
    config: TrialConfig, splits: Splits, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.nn.Module] = []
    compile_it = torch.compile

    def traced(model: torch.nn.Module) -> object:
        asked.append(model)
        return compile_it(model, backend="eager")  # all of it but the C compiler's work

    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", traced)
        compiled = fit(replace(config, epochs=1), splits, weights=weights, compiled=True)
    assert len(asked) == 1
    plain = fit(replace(config, epochs=1), splits, weights=weights)
    assert compiled.history[0].train_loss == pytest.approx(plain.history[0].train_loss, rel=1e-3)
    assert list(compiled.model.state_dict()) == list(plain.model.state_dict())
