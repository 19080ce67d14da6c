"""The two locks: what a search needs, and what developers add."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
RUN, DEV = "requirements.lock", "requirements-dev.lock"
PIN = re.compile(r"([A-Za-z0-9._-]+)==([0-9][0-9A-Za-z.]*)")
OF_TORCH = re.compile(r"cuda-|nvidia-|triton$")  # torch pins these itself


def pinned(lock: str) -> dict[str, str]:
    """Versions by package; every line that is no comment must be an exact pin, so none can name a host."""
    lines = (ROOT / lock).read_text(encoding="utf-8").splitlines()
    pins = [PIN.fullmatch(line) for line in lines if not line.startswith("#")]
    assert all(pins)
    return {canonicalize_name(pin[1]): pin[2] for pin in pins if pin}


def needed(declared: list[str]) -> set[str]:
    """The packages that requirements ask for here, with what those ask for in turn."""
    found: set[tuple[str, str]] = set()
    left = [Requirement(line) for line in declared]
    while left:
        requirement = left.pop()
        name = canonicalize_name(requirement.name)
        if name == PROJECT["name"]:
            extras = PROJECT["optional-dependencies"]
            left += [Requirement(line) for extra in requirement.extras for line in extras[extra]]
            continue
        for extra in {"", *requirement.extras} - {extra for known, extra in found if known == name}:
            found.add((name, extra))
            asked = [Requirement(line) for line in requires(name) or []]
            left += [one for one in asked if one.marker is None or one.marker.evaluate({"extra": extra})]
    return {name for name, _ in found if not OF_TORCH.match(name)}


def test_the_locks_do_not_overlap() -> None:
    assert not pinned(RUN).keys() & pinned(DEV).keys()


@pytest.mark.parametrize("lock", [RUN, DEV])
def test_comments_in_a_lock_name_no_host(lock: str) -> None:
    comments = [line for line in (ROOT / lock).read_text(encoding="utf-8").splitlines() if line[:1] == "#"]
    assert not [line for line in comments if "://" in line]


def test_every_declared_dependency_is_pinned_in_its_lock_at_an_allowed_version() -> None:
    extras = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    for lock, declared in ((RUN, PROJECT["dependencies"]), (DEV, extras)):
        for requirement in map(Requirement, declared):
            if requirement.name != PROJECT["name"]:
                version = pinned(lock)[canonicalize_name(requirement.name)]
                assert requirement.specifier.contains(version), (lock, requirement)


def test_each_lock_holds_what_its_packages_need_and_nothing_else() -> None:
    run = needed(PROJECT["dependencies"])
    dev = needed(PROJECT["optional-dependencies"]["dev"])
    assert pinned(RUN).keys() == run
    assert pinned(DEV).keys() == dev - run
