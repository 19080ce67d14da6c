"""The source of pretrained weights: the hub, a folder of files, or none."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carmodels.files import user_path
from carmodels.models.facts import HUB, LOCAL, WEIGHTS_FILE, facts_of

NOT_STATED = "not stated"
# The names of licences that allow research alone, beside those that say so in their own.
_RESEARCH_ONLY = ("apple-amlr", "seer-license")
_says_non_commercial = re.compile(r"\bnc\b|non-?commercial", re.IGNORECASE)


@dataclass(frozen=True)
class Provenance:
    """Where a backbone's weights come from."""

    architecture: str  # timm's name without a tag
    tag: str  # timm's name for these weights of the architecture; "": the source does not say
    source: str  # hf-hub:ORGANISATION/NAME, a file's name, or none
    revision: str  # commit of the hub's repository, or sha256 and the first 16 digits of the file's hash
    licence: str

    @property
    def non_commercial(self) -> bool:
        """Whether the licence forbids commercial use, by its name."""
        return _forbids(self.licence)


@dataclass(frozen=True)
class Weights:
    """The source of pretrained weights: `hub` (a download), `none` (random weights) or a folder.

    A backbone `hf-hub:...` or `local-dir:...` has weights of its own, which are used unless it is `none`.
    Only safetensors files are opened: a pickle can run code.
    """

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
        """The backbone's safetensors file, downloaded if need be; None for random weights.

        A file in a folder may not exist. Raises OSError if a download fails, ValueError for a backbone
        without safetensors.
        """
        if self.source == "none":
            return None
        if local := self._local_file(backbone):
            return local
        repository, revision, name = _repository(backbone)
        return _download(repository, name, revision)

    def _local_file(self, backbone: str) -> Path | None:
        """The path that a backbone's file has without a download."""
        if backbone.startswith(LOCAL):
            return Path(backbone.removeprefix(LOCAL)) / WEIGHTS_FILE
        if self.is_folder and not backbone.startswith(HUB):
            return Path(self.source) / f"{backbone}.safetensors"
        return None

    def place(self, backbone: str) -> str:
        """Where the file is, in words."""
        return str(self._local_file(backbone) or "the hub")

    def identity(self, backbone: str) -> str:
        """Identifies a backbone's weights: a hash of the file, or timm's name for them."""
        if self.source == "none":
            return self.source
        if path := self._local_file(backbone):
            return _digest(path)
        repository, revision, _ = _repository(backbone)
        return f"hub:{repository}{f'@{revision}' if revision else ''}"

    def has(self, backbone: str) -> bool:
        """Whether the source has weights for the backbone, as far as is known without a network."""
        if self.source == "none":
            return True
        if path := self._local_file(backbone):
            return path.is_file()
        if backbone.startswith(HUB):
            return True
        published = _published(backbone)
        return bool(published and published.hf_hub_id)

    def provenance(self, backbone: str) -> Provenance:
        """Where the weights come from. They are there already: `file` was called."""
        saved, named = facts_of(backbone).saved, backbone.partition(".")
        settings = saved["pretrained_cfg"] if saved else vars(_published(backbone))
        architecture = saved["architecture"] if saved else named[0]
        tag, licence = settings.get("tag") or "", settings.get("license") or ""
        path = self.file(backbone)
        if path is None:
            return Provenance(architecture, "", "none", "", "")
        if not self._local_file(backbone):
            repository, revision = _repository(backbone)[0], path.parent.name
            licence = licence or _card_licence(repository, revision) or NOT_STATED
            return Provenance(architecture, tag, f"{HUB}{repository}", revision, licence)
        if saved is None:  # a file that is called by the architecture alone may be any
            tag = named[2]
            licence = licence if tag or _forbids(licence) else ""
        name = path.parent.name if backbone.startswith(LOCAL) else path.name
        return Provenance(architecture, tag, name, f"sha256:{_digest(path)}", licence or NOT_STATED)


def _forbids(licence: str) -> bool:
    return licence in _RESEARCH_ONLY or bool(_says_non_commercial.search(licence))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _repository(backbone: str) -> tuple[str, str | None, str]:
    """(repository, revision if one is asked for, file) of a backbone on the hub.

    Raises ValueError if timm knows only a pickle.
    """
    if backbone.startswith(HUB):
        repository, _, revision = backbone.removeprefix(HUB).partition("@")
        return repository, revision or None, WEIGHTS_FILE
    published = _published(backbone)
    if not (published and published.hf_hub_id):
        raise ValueError("timm publishes no safetensors of it, and a pickle is not opened")
    name = published.hf_hub_filename or WEIGHTS_FILE
    if not name.endswith(".safetensors"):  # as the hub calls the safe copy of a pickle
        name = name.replace("pytorch_model", "model").rpartition(".")[0] + ".safetensors"
    return published.hf_hub_id, None, name


def _download(repository: str, name: str, revision: str | None) -> Path:
    """A file of the hub, in its cache. Raises ValueError if the repository does not hold it."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, name, revision=revision))
    except EntryNotFoundError as error:
        if isinstance(error, LocalEntryNotFoundError):  # the hub is out of reach
            raise ConnectionError(str(error)) from error
        raise ValueError(f"{repository} holds no {name}, and a pickle is not opened") from None
    except HTTPError as error:  # not always an OSError, and one that Ray cannot bring to the driver
        raise ConnectionError(str(error) or type(error).__name__) from error


def _card_licence(repository: str, revision: str) -> str:
    """The licence that a repository's card states; "" if it states none or cannot be read."""
    from huggingface_hub.repocard import metadata_load

    try:
        card = metadata_load(_download(repository, "README.md", revision)) or {}
    except (OSError, ValueError):
        return ""
    licence = card.get("license_name") if card.get("license") == "other" else card.get("license")
    return str(licence or "")


def _published(backbone: str) -> Any:
    """What timm knows of the weights that are published for a backbone; None for an unknown one."""
    import timm  # here: it takes seconds, and `parse` checks an option

    return timm.models.get_pretrained_cfg(backbone)
