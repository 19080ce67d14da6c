"""python tests/benchmarks/pretrain_demo.py

Pretrains the demo's two small backbones on drawn vehicles that are in none of the demo's classes, and writes
carmodels/demo/weights/<timm name>.safetensors (float16, without a classifier); prints one line an epoch. What
the files that come with the project reached is in carmodels/demo/weights/README.md.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import cv2
import numpy as np
import timm
import torch
from safetensors.torch import save_file
from timm.data import resolve_model_data_config
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR

from carmodels.demo.drawing import draw_vehicle
from carmodels.demo.shapes import CLASSES, VARIATION, BodyShape

SIZES = (48, 64, 96)  # pixels; each batch takes one, for the search draws the image size too


def other_shapes(rng: np.random.Generator, count: int) -> list[BodyShape]:
    """`count` vehicles of random proportions that no image of a demo class can show."""
    shapes: list[BodyShape] = []
    while len(shapes) < count:
        shape = random_shape(rng)
        if not any(may_coincide(shape, known) for known in CLASSES.values()):
            shapes.append(shape)
    return shapes


def may_coincide(first: BodyShape, second: BodyShape) -> bool:
    """Whether images of the two can have equal proportions. Ignores pillars, doors and axles."""
    return all(abs(getattr(first, name) - getattr(second, name)) <= 2 * by for name, by in VARIATION.items())


def random_shape(rng: np.random.Generator) -> BodyShape:
    height = rng.uniform(1.2, 3.2)
    belt = rng.uniform(0.45, 0.7)
    cowl = rng.uniform(0.03, 0.4)
    roof_front = cowl + rng.uniform(0.03, 0.15)
    deck = rng.uniform(roof_front + 0.15, 0.98)
    windows = int(rng.integers(1, 6))
    return BodyShape(
        length=height * rng.uniform(1.6, 3.6),
        width=1.3 + 0.3 * height,
        height=height,
        clearance=rng.uniform(0.13, 0.4),
        wheel=rng.uniform(0.26, 0.26 + 0.1 * height),
        nose=belt - rng.uniform(0.0, 0.15),
        belt=belt,
        cowl=cowl,
        roof_front=roof_front,
        roof_rear=rng.uniform(roof_front + 0.08, deck),
        deck=deck,
        tail=belt + rng.choice([0.0, 0.03, rng.uniform(-0.15, 0.5)]),
        pillars=tuple(np.linspace(0, rng.uniform(0.3, 0.97), windows + 1)),
        doors=int(rng.integers(0, min(windows, 3) + 1)),
        axles=(rng.uniform(0.1, 0.22), *np.sort(rng.uniform(0.5, 0.88, rng.choice([1, 2], p=[0.7, 0.3])))),
        open_top=bool(rng.random() < 0.15),
        bed=bool(rng.random() < 0.3),
        rails=bool(rng.random() < 0.3),
        cladding=bool(rng.random() < 0.3),
    )


def draw(seed: int, shapes: int, images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 images (N, 3, H, W) in RGB, the shapes taking turns, and the index of each one's shape (N,)."""
    rows = other_shapes(np.random.default_rng(seed), shapes)
    labels = np.arange(shapes * images) % shapes
    drawn = [draw_vehicle(np.random.default_rng([seed, i]), rows[label]) for i, label in enumerate(labels)]
    return torch.from_numpy(np.stack(drawn)[..., ::-1].transpose(0, 3, 1, 2).copy()), torch.from_numpy(labels)


def look(images: torch.Tensor, size: int, model: nn.Module, *, vary: bool) -> torch.Tensor:
    """uint8 (N, 3, H, W) -> model input (N, 3, size, size), mirrored and cropped at random if `vary`."""
    count = len(images)
    zoom, shift, mirror = torch.ones(2, count), torch.zeros(2, count), torch.ones(count)
    if vary:
        zoom = torch.empty(2, count).uniform_(0.7, 1.0)
        shift = (1 - zoom) * torch.empty(2, count).uniform_(-1, 1)
        mirror = torch.randint(0, 2, (count,)) * 2.0 - 1
    zero = torch.zeros(count)
    rows = [torch.stack(row, 1) for row in ((zoom[0] * mirror, zero, shift[0]), (zero, zoom[1], shift[1]))]
    grid = F.affine_grid(torch.stack(rows, 1), [count, 3, size, size], align_corners=False)
    expected = resolve_model_data_config(model)
    mean, std = (torch.tensor(expected[key]).view(3, 1, 1) for key in ("mean", "std"))
    return (F.grid_sample(images / 255, grid, align_corners=False, padding_mode="border") - mean) / std


@torch.no_grad()
def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    model.eval()
    batches = zip(images.split(64), labels.split(64), strict=True)
    hits = [(model(look(x, SIZES[-1], model, vary=False)).argmax(1) == y).sum().item() for x, y in batches]
    return sum(hits) / len(labels)


def pretrain(name: str, images: torch.Tensor, labels: torch.Tensor, args: argparse.Namespace) -> nn.Module:
    """Trains from random weights; the last tenth of the images is held out and scored after every epoch."""
    torch.manual_seed(args.seed)
    model = timm.create_model(name, num_classes=args.shapes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05)
    learnt = len(labels) * 9 // 10
    schedule = OneCycleLR(optimizer, args.lr, total_steps=args.epochs * (learnt // args.batch_size))
    started = time.perf_counter()
    for epoch in range(args.epochs):
        model.train()
        for batch in torch.randperm(learnt).split(args.batch_size)[: learnt // args.batch_size]:
            size = SIZES[int(torch.randint(len(SIZES), ()))]
            logits = model(look(images[batch], size, model, vary=True))
            loss = F.cross_entropy(logits, labels[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        score = accuracy(model, images[learnt:], labels[learnt:])
        seconds = time.perf_counter() - started
        done = f"{name} epoch {epoch + 1}/{args.epochs}"
        print(f"{done}: loss {loss:.3f}, held out {score:.3f}, {seconds:.0f} s", flush=True)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--backbones", nargs="+", default=["test_resnet", "test_efficientnet"], help="timm names"
    )
    parser.add_argument("--out", type=Path, default=Path("carmodels/demo/weights"))
    parser.add_argument("--shapes", type=int, default=60, help="vehicles to tell apart")
    parser.add_argument("--images", type=int, default=120, help="of each shape")
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=4e-3, help="highest of the one-cycle schedule")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    images, labels = draw(args.seed, args.shapes, args.images)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.backbones:
        model = pretrain(name, images, labels, args)
        state = model.half().state_dict()
        without_classifier = timm.create_model(name, num_classes=0).state_dict()
        weights = {key: state[key] for key in without_classifier}
        save_file(weights, args.out / f"{name}.safetensors")


if __name__ == "__main__":
    main()
