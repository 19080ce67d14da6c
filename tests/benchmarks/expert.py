"""python tests/benchmarks/expert.py --data DIR --weights DIR --minutes 15 --out submission.csv

What somebody who knows the trade does without a search: one pretrained network, good defaults, all labelled
images, the whole time for one training run, and the image and its mirror image at test time. The rival that a
search has to beat. It shares no code with the project, and nothing in it was tuned on the images it meets.

The folder has the competition's layout: train.csv, train/<Category>/<Id>, test_upload/<Id>. The weights are
<timm name>.safetensors.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import pandas as pd
import timm
import torch
from PIL import Image, ImageOps
from timm.utils import ModelEmaV3
from torch import nn
from torchvision.transforms import v2

BATCH = 32
LEARNING_RATE, WARM_UP, WEIGHT_DECAY = 1e-3, 0.1, 0.05
MARGIN = 1.25  # images are kept this much larger than the crops
TIMED, SKIPPED = 6, 2  # steps by which the pace is foreseen; the first ones do not count
ANSWERS_FROM = 30.0  # seconds before the end, kept for the answers
LATEST = 15.0  # seconds before the end at which training stops in any case


def main() -> None:
    """Train until the time is up, then write the answers."""
    begun = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--size", type=int, default=160, help="side of the images, pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("submission.csv"))
    options = parser.parse_args()
    end = begun + 60 * options.minutes
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    table = pd.read_csv(options.data / "train.csv", dtype=str)
    classes = sorted(table["Category"].unique())
    labels = torch.tensor([classes.index(name) for name in table["Category"]])
    paths = [options.data / "train" / row.Category / row.Id for row in table.itertuples()]
    tests = sorted((options.data / "test_upload").iterdir())
    side = int(MARGIN * options.size)
    model = timm.create_model(
        options.backbone,
        pretrained=True,
        num_classes=len(classes),
        drop_rate=0.2,
        pretrained_cfg_overlay={"file": str(options.weights / f"{options.backbone}.safetensors")},
    ).to(memory_format=torch.channels_last)
    average, epochs = train(model, decoded(paths, side), labels, options.size, end)
    probs = answers(average, decoded(tests, side), options.size)
    named = [classes[number] for number in probs.argmax(dim=1).tolist()]
    pd.DataFrame({"Id": [path.name for path in tests], "Category": named}).to_csv(options.out, index=False)
    print(f"{epochs:.1f} epochs, {time.monotonic() - begun:.0f} s")


def decoded(paths: list[Path], side: int) -> torch.Tensor:
    """(N, 3, side, side) uint8."""
    images = []
    for path in paths:
        image = Image.open(path)
        image.draft("RGB", (2 * side, 2 * side))
        image = ImageOps.exif_transpose(image).convert("RGB")
        images.append(np.asarray(image.resize((side, side), Image.Resampling.BILINEAR)))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def normalised(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """(B, 3, S, S) uint8 -> float32 with the network's mean and std."""
    mean, std = (torch.tensor(model.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
    return ((images.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def train(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, size: int, end: float
) -> tuple[nn.Module, float]:
    """Train all layers in one schedule that ends with the time. Returns the averaged model, and epochs."""
    augment = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.5, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(0.2, 0.2, 0.2),
        ]
    )
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
    )
    loss_of = nn.CrossEntropyLoss(label_smoothing=0.1)
    average = ModelEmaV3(model, decay=0.998, use_warmup=True)
    model.train()

    def step(rows: torch.Tensor, lr: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = torch.stack([augment(images[row]) for row in rows])
        optimizer.zero_grad()
        loss_of(model(normalised(model, batch)), labels[rows]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    for number in range(TIMED):  # the rate is next to nothing: the weights stay
        if number == SKIPPED:
            started = time.monotonic()
        step(torch.randperm(len(images))[:BATCH], 1e-9)
    pace = (time.monotonic() - started) / (TIMED - SKIPPED)
    steps = max(1, int(0.97 * (end - ANSWERS_FROM - time.monotonic()) / pace))
    done = 0
    while done < steps and time.monotonic() < end - LATEST:
        for rows in torch.randperm(len(images)).split(BATCH):
            if done == steps or time.monotonic() > end - LATEST:
                break
            if len(rows) == BATCH:
                step(rows, LEARNING_RATE * warmed_cosine(done / steps))
                done += 1
                average.update(model, step=done)
    return average.module, done * BATCH / len(images)


def warmed_cosine(share: float) -> float:
    """The rate's share of its peak: up for a tenth of the run, then down to 0."""
    if share < WARM_UP:
        return share / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (share - WARM_UP) / (1 - WARM_UP)))


@torch.inference_mode()
def answers(model: nn.Module, images: torch.Tensor, size: int) -> torch.Tensor:
    """(N, C) mean of the probabilities of each image and its mirror image."""
    model.eval()
    resized = v2.Resize((size, size), antialias=True)
    found = []
    for batch in images.split(64):
        plain = normalised(model, resized(batch))
        found.append((model(plain).softmax(dim=1) + model(plain.flip(3)).softmax(dim=1)) / 2)
    return torch.cat(found)


if __name__ == "__main__":
    main()
