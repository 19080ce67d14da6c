"""The yardstick of `bench_trials`: what a user would write from Ray's PyTorch, Optuna and ASHA tutorials.

A plain training function with a fresh DataLoader a trial and albumentations on images that are decoded anew
each time, the model saved as a checkpoint each epoch. Nothing here is made slower than its original; only the
images of train and val come from the caller, so that both sides of a comparison do the same work.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import albumentations as A
import cv2
import numpy as np
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from albumentations.pytorch import ToTensorV2
from ray import tune
from torch.utils.data import DataLoader, Dataset

Images = tuple[Sequence[str], Sequence[int]]  # paths and labels


class Cars(Dataset):
    def __init__(self, paths, labels, transform):
        self.paths, self.labels, self.transform = paths, labels, transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        image = cv2.cvtColor(cv2.imread(self.paths[i]), cv2.COLOR_BGR2RGB)
        return self.transform(image=image)["image"], self.labels[i]


def transforms(size: int, mean: Sequence[float], std: Sequence[float], train: bool) -> A.Compose:
    varied = [
        A.RandomResizedCrop((size, size), scale=(0.6, 1)),
        A.HorizontalFlip(),
        A.ColorJitter(0.2, 0.2, 0.2, 0.05),
    ]
    return A.Compose([*(varied if train else [A.Resize(size, size)]), A.Normalize(mean, std), ToTensorV2()])


def build(config: dict[str, Any], classes: int, weights: str) -> tuple[Any, nn.Sequential]:
    name = config["backbone"]
    overlay = {"file": f"{weights}/{name}.safetensors"}
    given = {} if weights == "none" else {"pretrained": True, "pretrained_cfg_overlay": overlay}
    body = timm.create_model(name, num_classes=0, **given)
    width = body.head_hidden_size if hasattr(body, "head_hidden_size") else body.num_features
    layers: list[nn.Module] = []
    for _ in range(config["head_depth"]):
        layers += [nn.Linear(width, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Dropout(0.25)]
        width = 256
    return body, nn.Sequential(*layers, nn.Linear(width, classes))


def evaluate(body: nn.Module, head: nn.Module, loader: DataLoader, device: str) -> np.ndarray:
    body.eval()
    head.eval()
    with torch.inference_mode():
        return torch.cat([F.softmax(head(body(x.to(device))), 1) for x, _ in loader]).cpu().numpy()


def train(config: dict[str, Any], images: dict[str, Images], weights: str, epochs: int) -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    labels = np.array(images["val"][1])
    body, head = build(config, int(labels.max()) + 1, weights)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = nn.Sequential(body, head).to(device)
    mean, std = body.pretrained_cfg["mean"], body.pretrained_cfg["std"]
    shown = Cars(*images["train"], transforms(config["size"], mean, std, True))
    train_loader = DataLoader(shown, 32, shuffle=True, drop_last=True)
    val_loader = DataLoader(Cars(*images["val"], transforms(config["size"], mean, std, False)), 64)
    optimizer = torch.optim.Adam(model.parameters(), config["lr"])
    children = list(body.children())
    for epoch in range(1, epochs + 1):
        plan = {
            "frozen": 0,
            "full": 1,
            "head_first": 0 if epoch <= 2 else 1,
            "gradual": min(1, (epoch - 1) / 4),
        }[config["unfreeze"]]
        for k, child in enumerate(children):
            for p in child.parameters():
                p.requires_grad = k >= round(len(children) * (1 - plan))
        model.train()
        for x, y in train_loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x.to(device)), y.to(device)).backward()
            optimizer.step()
        accuracy = float((evaluate(body, head, val_loader, device).argmax(1) == labels).mean())
        with tempfile.TemporaryDirectory() as d:
            torch.save(model.state_dict(), f"{d}/model.pt")
            checkpoint = tune.Checkpoint.from_directory(d)
            tune.report({"val_accuracy": accuracy, "epoch": epoch}, checkpoint=checkpoint)
