"""Whatever is in a table, an image, a zip or a study's file, it is read right or refused in one line.

Tables are drawn by hypothesis; images and zips are intact ones with bytes changed, moved or lost.
"""

from __future__ import annotations

import csv
import io
import json
import random
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from carmodels.data import layout
from carmodels.data.archives import unpack_once
from carmodels.data.cache import estimate_cache_bytes
from carmodels.data.decode import read_image, shrink
from carmodels.data.duplicates import perceptual_hash
from carmodels.evaluation.predictions import Predictions
from carmodels.files import read_json
from carmodels.presets import SPACES
from carmodels.records import TrialRecord
from carmodels.space import Space
from carmodels.study import Study
from carmodels.submission import read_sample, write_submission

MUTANTS = 150  # of each image and zip
quick = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
# all that UTF-8 can write, line ends and quotes more often than by chance; a NUL ends a file's name
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12) | st.text(
    "ab \t\r\n\"',;\ufeffЖ", max_size=12
)
NAMES = TEXT.filter(bool)
# a first column whose header begins with a BOM cannot be told from a file that begins with one
HEADERS = NAMES.filter(lambda name: not name.startswith("\ufeff"))


def table(rows: list[list[str]], end: str = "\n", quoting: int = csv.QUOTE_ALL) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator=end, quoting=quoting).writerows(rows)
    return text.getvalue().encode()


def refused(call: Callable[[], object], named: str) -> bool:
    """Whether the call raises a ValueError, which must be one line that names something."""
    try:
        call()
    except ValueError as error:
        said = str(error)
    else:
        return False
    assert named in said
    assert len(said.splitlines()) == 1, said
    return True


# ---- tables


@quick
@given(
    rows=st.lists(st.tuples(TEXT, TEXT), max_size=6),
    bom=st.sampled_from([b"", b"\xef\xbb\xbf"]),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_any_table_is_read_as_it_was_written(
    tmp_path: Path, rows: list[tuple[str, str]], bom: bytes, end: str
) -> None:
    path = tmp_path / "train.csv"
    path.write_bytes(bom + table([[" Path", "LABEL "], *map(list, rows)], end))
    frame = layout._read_table(path)
    assert list(frame.columns) == ["path", "label"]
    assert list(frame.itertuples(index=False, name=None)) == rows


@quick
@given(content=st.binary(max_size=60) | TEXT.map(str.encode))
@example(content=b"a,b\n1,2,3\n")
@example(content=b"\xff\xfea\0,\0b\0")
@example(content=b"a,a\n1,2\n")
@example(content=b'"a\nb",c\n"')
def test_any_bytes_are_a_table_or_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "train.csv"
    path.write_bytes(content)
    for read in (layout._read_table, read_sample, layout._read_names):
        refused(lambda read=read: read(path), "train.csv")


@quick
@given(name=TEXT | st.text("./\\a\0", max_size=8))
def test_a_name_that_is_accepted_stays_in_its_folder(tmp_path: Path, name: str) -> None:
    if not refused(lambda: layout._checked_path(name, tmp_path / "train.csv"), repr(name)):
        inside = (tmp_path / name).resolve()
        assert inside != tmp_path.resolve()
        assert inside.is_relative_to(tmp_path.resolve())


# ---- submissions


@quick
@given(
    answers=st.dictionaries(NAMES, st.sampled_from(["0", "7", "10"]), min_size=1, max_size=8),
    header=st.lists(HEADERS, min_size=2, max_size=2),
    shuffle=st.randoms(use_true_random=False),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_any_sample_comes_back_with_the_answers_in_place(
    tmp_path: Path, answers: dict[str, str], header: list[str], shuffle: random.Random, end: str
) -> None:
    classes = ("0", "7", "10")
    probs = 0.8 * np.eye(3)[[classes.index(answer) for answer in answers.values()]] + 0.2 / 3
    order = list(answers)
    shuffle.shuffle(order)
    sample, out = tmp_path / "sample.csv", tmp_path / "out.csv"
    sample.write_bytes(table([header, *([name, "x"] for name in order)], end))
    write_submission(Predictions(tuple(answers), classes, probs), out, sample=sample)
    with out.open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [header, *([name, answers[name]] for name in order)]


@quick
@given(
    asked=st.lists(NAMES, min_size=1, max_size=5),
    given_ids=st.lists(NAMES, min_size=1, max_size=5, unique=True),
)
def test_a_submission_of_other_ids_is_refused_and_the_old_one_kept(
    tmp_path: Path, asked: list[str], given_ids: list[str]
) -> None:
    sample, out = tmp_path / "sample.csv", tmp_path / "out.csv"
    sample.write_bytes(table([["Id", "Category"], *([name, "x"] for name in asked)]))
    out.write_text("before")
    answers = Predictions(tuple(given_ids), ("a",), np.ones((len(given_ids), 1)))
    at_fault = [name for name in asked if asked.count(name) > 1] or sorted(set(asked) ^ set(given_ids))
    named = repr(at_fault[0]) if at_fault else ""
    assert refused(lambda: write_submission(answers, out, sample=sample), named) is bool(at_fault)
    assert (out.read_text() == "before") is bool(at_fault)


# ---- studies


@quick
@given(rows=st.dictionaries(TEXT, st.integers(0, 9), max_size=6))
def test_any_ids_come_back_from_a_study(tmp_path: Path, rows: dict[str, int]) -> None:
    study = Study(tmp_path / "study")
    study.begin({"metric": "accuracy"}, [("val", name, label) for name, label in rows.items()])
    assert study.labels("val") == rows


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(
        ("trial_id", "config", "origin", "state", "cause", "epochs_run", "curve", "value"), JSON
    ),
)


@quick
@given(line=st.text(max_size=30) | JSON.map(json.dumps) | FIELDS.map(json.dumps))
def test_any_line_is_a_record_or_a_damaged_one(tmp_path: Path, line: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - what json says
        TrialRecord.from_json(line)


@quick
@given(content=st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_an_object_or_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "study.json"
    path.write_bytes(content)
    if not refused(lambda: read_json(path), "study.json"):
        assert read_json(path) == json.loads(content)
        assert refused(lambda: read_json(path)["absent key"], "study.json has no 'absent key'")


@quick
@given(
    name=st.sampled_from(["lr", "epochs", "image_size", "backbone", "class_weights", "dropout", "seed", "x"]),
    # the scripts put a message on one line; the text of an option is in it as it was typed
    written=st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=8)
    | st.text("0123456789.e-+:,naif_", max_size=10),
)
@example(name="lr", written="1e-3:1e-2")
@example(name="epochs", written="3")
@example(name="seed", written="3")
def test_any_override_makes_a_space_or_is_refused_by_name(name: str, written: str) -> None:
    space = SPACES["demo"]
    text = f"{name}={written}"
    made: list[Space] = []
    if refused(lambda: made.append(space.with_override(text)), "--set"):
        assert (name, written) not in [("lr", "1e-3:1e-2"), ("epochs", "3")]
    else:
        others = {n: d for n, d in {**space.dimensions, **space.fixed}.items() if n != name}
        [found] = made
        values = {**found.dimensions, **found.fixed}
        assert values.pop(name) is not None
        assert values == others


# ---- images and zips


def mutant(content: bytes, seed: int) -> bytes:
    """The content with some bytes changed, a part lost, doubled or zeroed, or its end cut off."""
    rng = random.Random(seed)
    changed = bytearray(content)
    # headers are small and matter most
    place = rng.randrange(len(changed) if rng.random() < 0.5 else min(100, len(changed)))
    length = rng.choice((1, 2, 4, 16, 200))
    kind = rng.randrange(6)
    if kind == 0:
        for _ in range(rng.choice((1, 3, 20))):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
    elif kind == 1:
        changed[place : place + length] = rng.randbytes(length)
    elif kind == 2:
        del changed[place : place + length]
    elif kind == 3:
        changed[place:place] = changed[place : place + length]
    elif kind == 4:
        changed[place : place + length] = bytes([rng.choice((0, 255))] * length)
    else:
        del changed[place:]
    return bytes(changed)


def encoded_image(kind: str) -> bytes:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (6, 8, 3)).astype(np.uint8)).resize((40, 30))
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    image.save(file, format=kind, **({} if kind == "BMP" else {"exif": exif}))
    return file.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_a_damaged_image_is_read_or_refused_and_never_anything_else(tmp_path: Path, kind: str) -> None:
    content, path = encoded_image(kind), tmp_path / "a.jpg"
    outcomes = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as where the cache is built
        for seed in range(MUTANTS):
            path.write_bytes(mutant(content, seed))
            assert estimate_cache_bytes([path], 16) >= 0
            try:
                image = read_image(path)
            except ValueError:
                outcomes.append("refused")
                continue
            pixels = shrink(image, 16)
            assert pixels.ndim == 3
            assert min(pixels.shape) >= 1
            assert 0 <= perceptual_hash(image) < 2**64
            outcomes.append("read")
    assert outcomes.count("refused") > MUTANTS // 10


def archive(method: int) -> bytes:
    """A zip of a few files and a zip."""
    inner, outer = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(inner, "w", method) as packed:
        packed.writestr("1/a.jpg", b"a" * 400)
    with zipfile.ZipFile(outer, "w", method) as packed:
        packed.writestr("train.csv", "Id,Category\n" * 30)
        packed.writestr("папка/картинка.jpg", bytes(range(256)))
        packed.writestr("train.zip", inner.getvalue())
    return outer.getvalue()


@pytest.mark.parametrize(
    "method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
)
def test_a_damaged_zip_is_unpacked_or_refused_and_nothing_is_written_elsewhere(
    tmp_path: Path, method: int
) -> None:
    content, path, cache = archive(method), tmp_path / "cars.zip", tmp_path / "cache"
    refusals = 0
    for seed in range(MUTANTS):
        path.write_bytes(mutant(content, seed))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a name twice
            refusals += refused(lambda: unpack_once(path, cache), ".zip'")
        assert {found.name for found in tmp_path.iterdir()} == {"cars.zip", "cache"}
        assert {found.name for found in cache.iterdir()} <= {"digests", "unpacked"}
        assert not list((cache / "unpacked").glob("*.tmp"))
    assert MUTANTS // 10 < refusals < MUTANTS
