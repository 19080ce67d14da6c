"""TensorBoard logs, one folder per trial: tensorboard --logdir results/STUDY"""

from __future__ import annotations

import math
import shutil

from tensorboardX import SummaryWriter

from carmodels.records import TrialRecord
from carmodels.study import Study
from carmodels.training.config import EpochMetrics
from carmodels.training.run import Run
from tune.runtime.callbacks import ProgressCallback
from tune.runtime.worker import trial_name


def written(study: Study) -> ProgressCallback:
    """Callbacks that log each epoch. A restarted trial overwrites its earlier curves."""
    writers: dict[str, SummaryWriter] = {}

    def on_epoch(stage: str, run: Run, epoch: EpochMetrics, gpu_bytes: int) -> None:
        name = f"{stage}-{trial_name(run)}"
        if epoch.epoch == 1:
            folder = study.tensorboard_folder / name
            shutil.rmtree(folder, ignore_errors=True)
            writers[name] = SummaryWriter(str(folder))
        for tag, value in (
            (f"val/{run.origin.metric}", epoch.value),
            ("val/loss", epoch.val_loss),
            ("train/loss", epoch.train_loss),
            ("seconds", epoch.seconds),
        ):
            if math.isfinite(value):  # val metrics are not finite when val is part of training
                writers[name].add_scalar(tag, value, epoch.epoch)
        writers[name].flush()

    def on_record(record: TrialRecord) -> None:
        writer = writers.pop(f"{record.stage}-{trial_name(record.run)}", None)
        if writer is not None:
            writer.close()

    return ProgressCallback(on_record, on_epoch=on_epoch)
