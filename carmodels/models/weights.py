"""The source of pretrained weights: the hub, a folder of files, or none."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carmodels.files import user_path


@dataclass(frozen=True)
class Weights:
    """The source of pretrained weights: `hub` (timm's download), `none` (random weights) or a folder."""

    source: str  # "hub", "none", or the absolute path of a folder holding <timm name>.safetensors

    @classmethod
    def parse(cls, text: str) -> Weights:
        """Raises ValueError unless `text` is hub, none or a folder with .safetensors files."""
        if text in ("hub", "none"):
            return cls(text)
        folder = user_path(text).resolve()
        if not folder.is_dir():
            raise ValueError(
                f"--weights {text} is no folder; give a folder of <timm name>.safetensors, hub or none"
            )
        if not any(folder.glob("*.safetensors")):
            raise ValueError(
                f"--weights {text} holds no .safetensors file; name the files <timm name>.safetensors"
            )
        return cls(str(folder))

    @property
    def is_folder(self) -> bool:
        return self.source not in ("hub", "none")

    def file(self, backbone: str) -> Path | None:
        """The backbone's file in the folder; None without a folder. The file may not exist."""
        return Path(self.source) / f"{backbone}.safetensors" if self.is_folder else None

    def identity(self, backbone: str) -> str:
        """Identifies a backbone's weights: a hash of the file, or timm's name for them."""
        path = self.file(backbone)
        if path is not None:
            return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        published = _published(backbone)
        return f"{self.source}:{published.hf_hub_id or published.url}" if published else self.source

    def has(self, backbone: str) -> bool:
        """Whether the source has weights for the backbone, as far as is known without a network."""
        if self.source == "none":
            return True
        if self.source == "hub":
            published = _published(backbone)
            return bool(published and published.has_weights)
        path = self.file(backbone)
        return path is not None and path.is_file()


def _published(backbone: str) -> Any:
    """What timm knows of the weights that are published for a backbone; None for an unknown one."""
    import timm  # here: it takes seconds, and `parse` checks an option

    return timm.models.get_pretrained_cfg(backbone)
