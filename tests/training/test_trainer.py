"""Training is reproducible, learns, notices when it fails and keeps its best epoch; no option is ignored."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.utils import ModelEmaV3

from carmodels.catalog import AUGMENTS, SCHEDULES, UNFREEZE, VIEWS, Schedule
from carmodels.data.dataset import Splits
from carmodels.data.loader import Batch, Loader
from carmodels.data.splits import Split
from carmodels.evaluation.metrics import METRICS, accuracy
from carmodels.models.classifier import Classifier, save_weights
from carmodels.models.weights import Weights
from carmodels.records import State, TrialRecord
from carmodels.training import trainer as trainer_module
from carmodels.training.config import METRIC_NAMES, OPTIMIZERS, EpochMetrics, TrialConfig
from carmodels.training.features import FeatureStore
from carmodels.training.forward import predict, view_size
from carmodels.training.held_out import splits_for
from carmodels.training.run import Origin, Run
from carmodels.training.timing import training_seconds
from carmodels.training.trainer import Trainer, TrainResult, fit

pytestmark = pytest.mark.usefixtures("light_collections")


def curve(history: tuple[EpochMetrics, ...]) -> list[tuple[float, ...]]:
    return [(m.epoch, m.train_loss, m.val_loss, m.val_accuracy, m.value) for m in history]


def test_the_same_seed_gives_the_same_numbers_to_the_bit_and_another_seed_does_not(
    config: TrialConfig, splits: Splits, weights: Weights
) -> None:
    config = replace(config, head_depth=1, mixup=0.2, cutmix=0.5, ema=0.9, augment="strong")
    first = fit(Run(config), splits, weights=weights)
    fit(Run(replace(config, unfreeze="frozen"), Origin(seed=5)), splits, weights=weights)
    again = fit(Run(config), splits, weights=weights)
    assert curve(first.history) == curve(again.history)
    for one, other in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)
    another = fit(Run(config, Origin(seed=1)), splits, weights=weights)
    assert curve(another.history) != curve(first.history)


def test_the_seed_of_the_head_decides_its_initial_weights_and_nothing_else(
    config: TrialConfig, splits: Splits, weights: Weights
) -> None:
    def made(seed: int, head_seed: int | None) -> Trainer:
        run = Run(replace(config, head_depth=1), Origin(seed=seed, head_seed=head_seed))
        return Trainer(run, splits, weights=weights, device=torch.device("cpu"))

    def head(of: Trainer) -> torch.Tensor:
        return of.model.head[0].weight

    assert torch.equal(head(made(0, None)), head(made(1, 0)))
    assert torch.equal(head(made(1, None)), head(made(1, 1)))
    assert not torch.equal(head(made(1, None)), head(made(1, 0)))
    orders = [
        [b.tolist() for b in made(*seeds).train_loader.batch_positions(1)]
        for seeds in ((1, None), (1, 0), (0, 1))
    ]
    assert orders[0] == orders[1] != orders[2]
    assert Run(config, Origin(head_seed=3)).id != Run(config).id
    assert (Origin(seed=5).init_seed, Origin(seed=5, head_seed=0).init_seed) == (5, 0)
    with pytest.raises(ValueError, match="head_seed=-1 must be a whole number from 0"):
        Origin(head_seed=-1)


def test_a_run_goes_on_from_the_weights_of_another(
    config: TrialConfig, splits: Splits, weights: Weights, tmp_path: Path
) -> None:
    first = fit(Run(config), splits, weights=weights)
    save_weights(first.model, tmp_path / "first.safetensors")
    assert first.best is not None
    onward = Run(replace(config, epochs=1, lr=1e-8), Origin(seed=1, head_seed=0, continues="0123456789ab"))
    start = tmp_path / "first.safetensors"
    again = fit(onward, splits, weights=Weights("none"), start=start)
    assert again.best is not None
    assert again.best.val_loss == pytest.approx(first.best.val_loss, abs=0.02)  # BatchNorm moves a little
    random = fit(onward.with_origin(continues=""), splits, weights=weights)
    assert random.history[0].val_loss > first.best.val_loss + 0.1
    with pytest.raises(ValueError, match=r"continues='0123456789ab', start=None: give both or neither"):
        fit(onward, splits, weights=weights)
    with pytest.raises(ValueError, match=r"first\.safetensors is damaged or of another configuration"):
        fit(onward.with_config(head_depth=3), splits, weights=weights, start=start)


def test_targets_are_learnt_in_the_place_of_labels_and_shown_as_they_were_made(
    config: TrialConfig, splits: Splits, weights: Weights
) -> None:
    assert splits.train.labels is not None
    right, epochs = np.eye(10, dtype=np.float32)[splits.train.labels], 4
    longer = replace(config, epochs=epochs, image_size=48)
    other = np.roll(right, 1, axis=1)[None]
    misled = fit(Run(longer), splits, weights=weights, targets=other)
    probs = predict(misled.model, splits, splits.val, config=longer).probs
    assert accuracy(probs, (splits.val.labels + 1) % 10) > 0.25
    trainer = Trainer(
        Run(longer), splits, weights=weights, device=torch.device("cpu"), targets=np.stack([right, 1 - right])
    )
    loader = Loader(
        splits.images,
        splits.train,
        image_size=48,
        batch_size=len(splits.train),
        augment=AUGMENTS[longer.augment],
        seed=trainer.origin.seed,
    )
    for number, view in ((1, 0), (2, 1), (3, 0)):
        images, targets = next(iter(trainer.train_batches(number)))
        rows = trainer.train_loader.batch_positions(number)[0]
        assert torch.equal(images, next(loader.epoch(view)).images[rows])
        assert np.array_equal(targets.numpy(), (right if view == 0 else 1 - right)[rows])
    with pytest.raises(ValueError, match="leave out mixup, cutmix and features"):
        fit(Run(replace(config, mixup=0.2)), splits, weights=weights, targets=other)


def test_the_models_of_all_folds_are_not_trained_at_once(
    config: TrialConfig, splits: Splits, weights: Weights
) -> None:
    with pytest.raises(ValueError, match="folds=3: these are 3 models; name the fold of one"):
        fit(Run(config, Origin(folds=3)), splits, weights=weights)


@pytest.mark.parametrize(("kind", "warmup"), [("linear", 0.0), ("plateau", 0.1)])
def test_a_schedule_that_would_not_do_what_it_says_is_refused(kind: str, warmup: float) -> None:
    with pytest.raises(ValueError, match=kind):
        Schedule(kind, warmup=warmup)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_is_held_out_has_no_say_in_a_fold(
    schedule: str, config: TrialConfig, splits: Splits, weights: Weights
) -> None:
    """Whatever the fold's labels are, the model is the same, and that of the last epoch."""
    one = Run(replace(config, epochs=4, lr=2e-2, schedule=schedule), Origin(folds=3, fold=1))
    trained = fit(one, splits, weights=weights)
    assert trained.best.epoch == 4
    held_out = splits_for(one.origin, splits).val
    kept = predict(trained.model, splits, held_out, config=one.config)
    assert accuracy(kept.probs, held_out.labels) == pytest.approx(trained.best.value, abs=1e-6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "_labels", _wrong_labels)
        other = fit(one, splits, weights=weights)
    assert other.best.value != trained.best.value
    for first, second in zip(trained.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(first, second)


def _wrong_labels(split: Split) -> np.ndarray:
    return np.roll(split.labels, 7) if split.name == "oof" else split.labels


def test_a_last_run_learns_from_everything_and_has_no_score(
    config: TrialConfig, splits: Splits, weights: Weights
) -> None:
    last = Run(replace(config, schedule="plateau"), Origin(fold_in=True))
    parts = splits_for(last.origin, splits)
    assert (len(parts.train), len(parts.val), len(parts.holdout)) == (200, 0, 0)
    assert set(parts.train.ids) == {*splits.train.ids, *splits.val.ids, *splits.holdout.ids}
    trained = fit(last, splits, weights=weights)
    assert trained.ending == "schedule"
    assert trained.best.epoch == 2
    for epoch in trained.history:
        assert np.isfinite(epoch.train_loss)
        assert np.isnan([epoch.val_loss, epoch.val_accuracy, epoch.value]).all()


def test_growing_images_are_trained_on_at_each_size_and_tested_at_the_whole_one(
    config: TrialConfig, splits: Splits, weights: Weights
) -> None:
    growing = replace(config, image_size=48, start_image_size=16, epochs=4)
    trainer = Trainer(Run(growing), splits, weights=weights, device=torch.device("cpu"))
    sizes = [next(trainer.train_batches(number))[0].shape[-1] for number in range(1, 5)]
    assert sizes == [growing.train_image_size(number) for number in range(1, 5)] == [16, 32, 32, 48]
    assert next(trainer.val_loader.epoch(0)).images.shape[-1] == 48
    larger = replace(config, eval_image_size=64)
    trainer = Trainer(Run(larger), splits, weights=weights, device=torch.device("cpu"))
    assert next(trainer.val_loader.epoch(0)).images.shape[-1] == 64
    assert next(trainer.train_batches(1))[0].shape[-1] == 32
    assert view_size(larger, "plain") == 64


@pytest.fixture(scope="module")
def trained(splits: Splits, weights: Weights) -> TrainResult:
    """A model that knows its images, for tests that only ask it."""
    torch.set_num_threads(1)
    return fit(Run(TrialConfig("test_resnet", image_size=48, epochs=8, lr=3e-3)), splits, weights=weights)


def test_training_learns_far_beyond_chance(trained: TrainResult) -> None:
    assert trained.best.val_accuracy > 0.35  # ten classes
    assert trained.history[-1].train_loss < trained.history[0].train_loss
    assert trained.ending == "schedule"


@pytest.mark.parametrize("strategy", UNFREEZE)
def test_what_a_strategy_keeps_frozen_does_not_move(
    strategy: str, config: TrialConfig, splits: Splits, weights: Weights
) -> None:
    row, epochs = UNFREEZE[strategy], 8
    trainer = Trainer(
        Run(replace(config, unfreeze=strategy, epochs=epochs)),
        splits,
        weights=weights,
        device=torch.device("cpu"),
    )
    before = {name: value.clone() for name, value in trainer.model.backbone.state_dict().items()}

    def is_still() -> bool:
        return all(torch.equal(v, before[name]) for name, v in trainer.model.backbone.state_dict().items())

    if row.head_only_epochs != 0:
        trainer.epoch(row.head_only_epochs or epochs)  # the last one with the head alone
        assert is_still()
    if row.head_only_epochs is not None:
        trainer.epoch(row.head_only_epochs + 1)
        assert not is_still()


@pytest.fixture(scope="module")
def base() -> Run:
    """What the options below change."""
    return Run(TrialConfig("test_resnet", image_size=32, epochs=1, lr=3e-3, head_depth=1))


@pytest.fixture(scope="module")
def base_curve(base: Run, splits: Splits, weights: Weights) -> list[tuple[float, ...]]:
    torch.set_num_threads(1)
    return curve(fit(base, splits, weights=weights).history)


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
        {"lr_ratio": 0.05},
        {"lr": 1e-2},
        {"batch_size": 16},
        {"unfreeze": "frozen"},
        {"start_image_size": 16},
        {"eval_image_size": 48},
        Origin(folds=2, fold=0),
    ],
    ids=str,
)
def test_every_option_reaches_training(
    change: dict[str, Any] | Origin,
    base: Run,
    base_curve: list[tuple[float, ...]],
    splits: Splits,
    weights: Weights,
) -> None:
    changed = Run(base.config, change) if isinstance(change, Origin) else base.with_config(**change)
    outcome = curve(fit(changed, splits, weights=weights).history)
    assert np.isfinite(outcome).all()
    if changed != base:
        assert outcome != base_curve
    else:
        assert outcome == base_curve


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
    trainer = Trainer(
        Run(replace(config, class_weights=True)), rare, weights=weights, device=torch.device("cpu")
    )
    counts = np.bincount(rare.train.labels)
    np.testing.assert_allclose(
        trainer.loss.weight.numpy() * counts, np.full(10, counts.sum() / 10), rtol=1e-5
    )


def test_a_loss_that_is_not_finite_ends_training_as_diverged(
    config: TrialConfig, splits: Splits, weights: Weights
) -> None:
    explosive = {"optimizer": "sgd", "lr": 10.0, "weight_decay": 10.0, "clip_norm": 0.0}
    wild = replace(config, epochs=5, batch_size=8, schedule="constant", **explosive)
    trained = fit(Run(wild), splits, weights=weights)
    assert trained.ending == "diverged"
    assert len(trained.history) < 5
    assert trained.history[-1].value == 0.0


def test_patience_ends_training_when_nothing_gets_better(
    config: TrialConfig, splits: Splits, weights: Weights
) -> None:
    still = replace(config, lr=1e-8, epochs=6, patience=2, unfreeze="frozen", augment="none")
    trained = fit(Run(still), splits, weights=weights)
    assert trained.ending == "patience"
    first = next(m.epoch for m in trained.history if m.value == trained.best.value)
    assert len(trained.history) == first + 2


@pytest.mark.parametrize(
    ("on_features", "expected", "foreseen"),
    [
        (False, None, 4.0),  # what the last one took
        (False, {1: 2.0, 2: 2.0}, 4.0),  # the machine is half as fast as it was measured
        (False, {1: 2.0, 2: 6.0}, 12.0),
        (False, {1: 0.0, 2: 6.0}, 6.0),
        (True, {1: 2.0, 2: 60.0}, 60.0),  # nothing was measured of an epoch on images
        (True, {1: 40.0, 2: 60.0}, 60.0),  # others had stored the features
        (True, {1: 2.0, 2: 0.0}, 4.0),
    ],
)
def test_the_next_epoch_is_foreseen_by_its_cost_at_the_pace_of_this_run(
    on_features: bool, expected: dict[int, float] | None, foreseen: float
) -> None:
    last = EpochMetrics(1, 1.0, 1.0, 0.5, 0.5, seconds=4.0)
    cost = None if expected is None else expected.__getitem__
    assert trainer_module._next_seconds(last, on_features, cost) == foreseen


def test_the_first_epoch_with_a_trainable_backbone_is_not_begun_without_the_time_for_it(
    config: TrialConfig, splits: Splits, weights: Weights, tmp_path: Path
) -> None:
    gradual = Run(replace(config, unfreeze="head_first", epochs=4))

    def epochs(cost: Callable[[int], float] | None) -> int:
        features, until = FeatureStore(tmp_path), time.time() + 100
        trained = fit(gradual, splits, weights=weights, features=features, until=until, epoch_seconds=cost)
        return len(trained.history)

    assert epochs(lambda number: 1.0 if number <= 2 else 1000.0) == 2
    assert epochs(None) == 4


def scripted(monkeypatch: pytest.MonkeyPatch, *epochs: tuple[float, float]) -> None:
    """Epochs measure these values and log losses, whatever was trained."""

    def measured(run: Run, epoch: int, *found: object) -> EpochMetrics:
        value, loss = epochs[epoch - 1]
        return EpochMetrics(epoch, 1.0, loss, value, value, 1.0)

    monkeypatch.setattr(trainer_module, "_measure", measured)


def test_of_epochs_with_one_value_that_with_the_lowest_log_loss_is_kept(
    config: TrialConfig, splits: Splits, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, (0.5, 0.9), (0.6, 0.9), (0.6, 0.7), (0.6, 0.8))
    trained = fit(Run(replace(config, epochs=4)), splits, weights=weights)
    assert trained.best == trained.history[2]
    record = TrialRecord("a", config, State.COMPLETE, 4, 0.6, 1.0, "", curve=trained.history)
    assert record.best_epoch == trained.best


def test_a_lower_log_loss_alone_is_no_better_metric_for_patience(
    config: TrialConfig, splits: Splits, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, (0.5, 0.9), (0.6, 0.9), (0.6, 0.8), (0.6, 0.7), (0.6, 0.6), (0.6, 0.5))
    trained = fit(Run(replace(config, epochs=6, patience=2)), splits, weights=weights)
    assert (trained.ending, len(trained.history)) == ("patience", 4)
    assert trained.best.epoch == 4


def test_training_ends_with_what_it_has_before_the_time_is_up(
    config: TrialConfig, splits: Splits, weights: Weights
) -> None:
    long = replace(config, epochs=500)
    trained = fit(Run(long), splits, weights=weights, until=time.time() + 1)
    assert trained.ending == "time"
    assert 1 <= len(trained.history) < 500
    assert trained.best.value == max(m.value for m in trained.history)
    assert fit(Run(config), splits, weights=weights, until=time.time() - 1).history[-1].epoch == 1


@pytest.mark.parametrize("metric", METRIC_NAMES)
def test_the_best_epoch_by_the_metric_is_kept(
    metric: str, config: TrialConfig, splits: Splits, weights: Weights
) -> None:
    seen: list[EpochMetrics] = []
    uneasy = Run(replace(config, epochs=4, lr=2e-2, schedule="constant"), Origin(metric=metric))
    trained = fit(uneasy, splits, weights=weights, on_epoch=seen.append)
    assert tuple(seen) == trained.history
    extreme = max if METRICS[metric].mode == "max" else min
    assert trained.best.value == extreme(m.value for m in seen)
    kept = predict(trained.model, splits, splits.val, config=uneasy.config)
    assert METRICS[metric].score(kept.probs, splits.val.labels) == pytest.approx(trained.best.value, abs=1e-6)


def test_cosine_warms_up_and_ends_at_zero_and_plateau_falls_when_val_loss_stays(
    config: TrialConfig, splits: Splits, weights: Weights
) -> None:
    def rates(schedule: str, epochs: int) -> list[float]:
        trainer = Trainer(
            Run(replace(config, schedule=schedule, epochs=epochs, lr=1e-2)),
            splits,
            weights=weights,
            device=torch.device("cpu"),
        )
        seen = []
        for _ in range(epochs):
            for _ in range(len(trainer.train_loader)):
                seen.append(trainer.optimizer.param_groups[0]["lr"])
                trainer.optimizer.step()
                trainer.schedule.step_ended()
            trainer.schedule.epoch_ended(1.0)
        return [*seen, trainer.optimizer.param_groups[0]["lr"]]

    cosine = rates("cosine", 5)
    assert cosine[0] < 0.6e-2 < max(cosine)
    assert max(cosine) == pytest.approx(1e-2)
    assert cosine[-1] == pytest.approx(0.0, abs=1e-6)
    plateau = rates("plateau", 6)
    assert plateau[0] == 1e-2
    assert plateau[-1] == pytest.approx(0.25e-2)
    assert set(rates("constant", 3)) == {1e-2}


@pytest.mark.parametrize("view", VIEWS)
def test_every_view_keeps_ids_with_their_images(view: str, trained: TrainResult, splits: Splits) -> None:
    shown = predict(trained.model, splits, splits.val, config=trained.run.config, view=view)
    assert shown.ids == splits.val.ids
    assert accuracy(shown.probs, splits.val.labels) > 0.25  # ten classes: a mix-up would be at chance
    again = predict(trained.model, splits, splits.val, config=trained.run.config, view=view)
    np.testing.assert_array_equal(shown.probs, again.probs)


def test_the_cost_of_an_image_grows_with_its_size(
    config: TrialConfig, splits: Splits, weights: Weights
) -> None:
    small, large = (
        training_seconds(replace(config, image_size=size), splits, weights=weights) for size in (16, 128)
    )
    assert 0 < small < large


def gradients(trainer: Trainer, network: torch.nn.Module, batch: Batch) -> list[torch.Tensor]:
    """What a batch leaves in the parameters that learn, with BatchNorm at rest."""
    trainer.model.eval()
    trainer._backward(network, trainer.model.normalise(batch.images), batch.labels)
    return [p.grad for p in trainer.model.parameters() if p.grad is not None]


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
    trainer = Trainer(Run(replace(config, **changes)), splits, weights=weights, device=torch.device("cpu"))
    if changes:
        trainer.loss.weight = torch.linspace(0.1, 3.0, len(splits.classes))
    trainer.model.unfreeze_top(len(trainer.model.groups))
    batch = next(iter(trainer.train_loader.epoch(1)))
    whole = gradients(trainer, trainer.model, batch)
    parts = gradients(trainer, Small(trainer.model, room=9), batch)
    assert trainer.microbatches == 4
    assert len(parts) == len(whole)
    for one, other in zip(parts, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    with pytest.raises(torch.OutOfMemoryError):
        gradients(trainer, Small(trainer.model, room=1), batch)


def test_a_batch_in_parts_is_noted_from_the_epoch_on_in_which_memory_ran_out(
    config: TrialConfig, splits: Splits, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulated = Trainer._accumulate
    steps: list[int] = []

    def within(self: Trainer, network: Any, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        steps.append(self.microbatches)
        if len(steps) > len(self.train_loader) and self.microbatches == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return accumulated(self, network, inputs, targets)

    monkeypatch.setattr(Trainer, "_accumulate", within)
    trained = fit(Run(config), splits, weights=weights)
    assert [m.microbatches for m in trained.history] == [1, 2]


def test_val_is_shown_in_parts_that_fit_from_the_second_batch_on(
    config: TrialConfig, splits: Splits, weights: Weights
) -> None:
    trainer = Trainer(Run(replace(config, batch_size=8)), splits, weights=weights, device=torch.device("cpu"))
    whole = trainer._val_probs(None)
    sizes: list[int] = []

    def small(module: torch.nn.Module, images: tuple[torch.Tensor]) -> None:
        sizes.append(len(images[0]))
        if len(images[0]) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")

    trainer.model.register_forward_pre_hook(small)
    np.testing.assert_allclose(trainer._val_probs(None), whole, atol=1e-5)
    trainer._val_probs(None)
    assert sizes[:3] == [16, 8, 4]
    assert max(sizes[3:]) == 4


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def fails_at_first(
    monkeypatch: pytest.MonkeyPatch, place: Any, name: str, error: Exception, times: int
) -> None:
    """The first calls of a function raise an error."""
    function, errors = getattr(place, name), [error] * times

    def called(*arguments: Any, **more: Any) -> Any:
        if errors:
            raise errors.pop()
        return function(*arguments, **more)

    monkeypatch.setattr(place, name, called)


PLACES = {
    "the model is built": (trainer_module, "create_classifier"),
    "it is moved": (torch.nn.Module, "to"),
    "its average is built": (trainer_module, "ModelEmaV3"),
    "the images are normalised": (Classifier, "normalise"),
    "gradients are clipped": (torch.nn.utils, "clip_grad_norm_"),
    "the optimizer steps": (torch.optim.AdamW, "step"),
    "the average is updated": (ModelEmaV3, "update"),
}


@pytest.mark.parametrize("where", PLACES)
def test_memory_that_is_short_once_is_freed_and_changes_nothing(
    where: str, config: TrialConfig, splits: Splits, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(replace(config, epochs=1, ema=0.9))
    expected = fit(run, splits, weights=weights)
    fails_at_first(monkeypatch, *PLACES[where], OUT_OF_MEMORY, times=1)
    trained = fit(run, splits, weights=weights)
    assert curve(trained.history) == curve(expected.history)


@pytest.mark.parametrize("where", PLACES)
def test_memory_that_stays_short_ends_in_torchs_own_error_whoever_ran_out_of_it(
    where: str, config: TrialConfig, splits: Splits, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA")
    fails_at_first(monkeypatch, *PLACES[where], error, times=1000)
    with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA error: out of memory$"):
        fit(Run(replace(config, epochs=1, ema=0.9)), splits, weights=weights)


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
        compiled = fit(Run(replace(config, epochs=1)), splits, weights=weights, compiled=True)
    assert len(asked) == 1
    plain = fit(Run(replace(config, epochs=1)), splits, weights=weights)
    assert compiled.history[0].train_loss == pytest.approx(plain.history[0].train_loss, rel=1e-3)
    assert list(compiled.model.state_dict()) == list(plain.model.state_dict())
