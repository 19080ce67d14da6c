"""Bad input, case by case: what is wrong, how it is made, and the one line that the user reads.

Every case goes through a script's own entry point with a study folder and a data set there. It must end with
exit status 2 and exactly that line, before Ray starts, and every file that was there must be there as it was.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from carmodels.data.dataset import open_dataset
from carmodels.evaluation.predictions import Predictions
from carmodels.models.weights import Weights
from carmodels.records import State, TrialRecord
from carmodels.study import Study
from carmodels.submission import write_submission
from carmodels.training.config import TrialConfig
from carmodels.training.run import Run
from tune import ensemble, report, retrain, search
from tune.cli import session
from tune.cli.options import guarded
from tune.commands import run_search
from tune.runtime.job import Workers

CLASSES, EACH, TESTS = ("2", "10", "1"), 8, 5
SETTABLE = (
    "backbone, image_size, epochs, head_depth, head, dropout, unfreeze, lr, lr_ratio, optimizer, "
    "weight_decay, schedule, batch_size, augment, label_smoothing, mixup, cutmix, ema, clip_norm, "
    "class_weights, patience, start_image_size, eval_image_size"
)


@dataclass(frozen=True)
class Place:
    """A data set in the competition's layout, a study of it, and where a run keeps its files."""

    folder: Path
    weights: str

    @property
    def data(self) -> Path:
        return self.folder / "cars"

    @property
    def zip(self) -> Path:
        return self.folder / "cars.zip"

    @property
    def table(self) -> Path:
        return self.data / "train.csv"

    @property
    def sample(self) -> Path:
        return self.data / "sample-submission.csv"

    @property
    def study(self) -> Study:
        """One that was begun, of this data."""
        return Study(self.folder / "results" / "begun")

    def search(self, *options: str) -> int:
        """A search of the zip where there is one, else of the folder, with further options."""
        given = {
            "--data": str(self.zip if self.zip.exists() else self.data),
            "--preset": "demo",
            "--weights": self.weights,
            "--results": str(self.folder / "results"),
            "--cache": str(self.folder / "cache"),
        }
        kept = [text for option, value in given.items() if option not in options for text in (option, value)]
        return search.main([*kept, *options])

    def filled(self, text: str) -> str:
        """`text` with the paths of this place for the names in braces."""
        for name in ("data", "zip", "folder"):
            text = text.replace("{" + name + "}", str(getattr(self, name)))
        return text.replace("{study}", str(self.study.folder))


def draw(seed: int) -> Image.Image:
    """Smooth patches and a little noise, as in a photograph."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3)).astype(np.uint8))
    smooth = np.asarray(coarse.resize((64, 48), Image.Resampling.BICUBIC))
    return Image.fromarray((smooth + rng.normal(0, 4, smooth.shape)).clip(0, 255).astype(np.uint8))


def write_competition(root: Path) -> None:
    labelled = [(f"{n}_{c}.jpg", c, 1000 * k + n) for k, c in enumerate(CLASSES) for n in range(EACH)]
    tests = [(f"t{n}.jpg", 9000 + n) for n in reversed(range(TESTS))]
    files = [(root / "train" / c / name, seed) for name, c, seed in labelled]
    for path, seed in files + [(root / "test_upload" / name, seed) for name, seed in tests]:
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(seed).save(path, quality=95)
    rows = [f"{name},{category}" for name, category, _ in labelled]
    (root / "train.csv").write_text("\n".join(["Id,Category", *rows, ""]))
    (root / "sample-submission.csv").write_text("\n".join(["Id,Category", *(f"{n},0" for n, _ in tests), ""]))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, weights: Weights) -> Place:
    """The place that every case gets a copy of; its study was begun by search.py itself."""
    place = Place(tmp_path_factory.mktemp("made") / "place", weights.source)
    write_competition(place.data)
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch)
        assert place.search("--study", "begun") == 0
    return place


@pytest.fixture
def place(made: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A copy to spoil; to start Ray is an error."""

    def refuse(*arguments: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(session, "ray_running", refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return Place(Path(shutil.copytree(made.folder, tmp_path / "place")), made.weights)


def without_ray(patch: pytest.MonkeyPatch) -> None:
    """A search does everything up to its first stage, and ends there."""

    @contextmanager
    def running(*arguments: object) -> Iterator[Workers]:
        yield Workers(1, 1, 0.0)

    patch.setattr(session, "ray_running", running)
    patch.setattr(run_search, "go", lambda *arguments: 0)


def files_of(folder: Path) -> dict[str, object]:
    """Every file below `folder` and what is in it, but for locks and the cache."""
    found: dict[str, object] = {}
    for path in folder.rglob("*"):
        name = os.fsdecode(path.relative_to(folder))
        if path.is_symlink():
            found[name] = path.readlink()
        elif path.is_file() and not name.startswith("cache/") and not path.name.startswith("."):
            found[name] = path.read_bytes()
    return found


# ---- how bad input is made

Spoil = Callable[[Place], object]


def nothing(place: Place) -> None:
    """The options are what is wrong."""


def swap(old: str, new: str, name: str = "train.csv") -> Spoil:
    """Another text in a table."""

    def spoil(place: Place) -> None:
        text = (place.data / name).read_text()
        assert old in text
        (place.data / name).write_text(text.replace(old, new))

    return spoil


def put(name: str, content: bytes | str) -> Spoil:
    """Another file in the data set."""

    def spoil(place: Place) -> None:
        path = place.data / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return spoil


def remove(*names: str) -> Spoil:
    def spoil(place: Place) -> None:
        for path in (place.data / name for name in names):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return spoil


def both(*spoils: Spoil) -> Spoil:
    return lambda place: [spoil(place) for spoil in spoils]


def recoded(encoding: str) -> Spoil:
    """The table in another encoding, with a name that is not ASCII."""
    return lambda place: place.table.write_bytes(place.table.read_text().replace("3_1", "ö").encode(encoding))


def keep_rows(wanted: Callable[[str], bool]) -> Spoil:
    """Only some rows of the table."""

    def spoil(place: Place) -> None:
        header, *rows = place.table.read_text().splitlines()
        place.table.write_text("\n".join([header, *filter(wanted, rows), ""]))

    return spoil


def widen_rows(place: Place) -> None:
    header, *rows = place.table.read_text().splitlines()
    place.table.write_text("\n".join([header, *(f"{row},x" for row in rows), ""]))


def truncate_test(place: Place) -> None:
    path = place.data / "test_upload" / "t2.jpg"
    path.write_bytes(path.read_bytes()[:-300])


def bomb(width: int, height: int) -> bytes:
    """A PNG of 78 bytes that claims to be of this size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def instead_of_test_image(make: Callable[[Path], object]) -> Spoil:
    def spoil(place: Place) -> None:
        path = place.data / "test_upload" / "t0.jpg"
        path.unlink()
        make(path)

    return spoil


def draw_the_same(place: Place) -> None:
    for path in place.data.glob("train/*/*"):
        draw(0).save(path)


def name_without_encoding(place: Place) -> None:
    source = place.data / "train" / "1" / "0_1.jpg"
    place.table.unlink()
    shutil.copy(source, os.fsencode(source.parent) + b"/\xff.jpg")


def circle(place: Place) -> None:
    place.table.unlink()
    (place.data / "train" / "again").symlink_to(place.data / "train")


def packed(
    method: int = zipfile.ZIP_STORED, damage: Callable[[bytes], bytes] | None = None, **members: bytes
) -> Spoil:
    """The data set as a zip with further members, its bytes then damaged; the folder goes."""

    def spoil(place: Place) -> None:
        pack(place.data, place.zip, method)
        with zipfile.ZipFile(place.zip, "a", method, compresslevel=1) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        if damage is not None:
            place.zip.write_bytes(damage(place.zip.read_bytes()))

    return spoil


def pack(folder: Path, archive: Path, method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(archive, "w", method, compresslevel=1) as written:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            written.write(path, path.relative_to(folder))
    shutil.rmtree(folder)


def packed_link(place: Place) -> None:
    info = zipfile.ZipInfo("train/1/a.jpg")
    info.external_attr = 0o120777 << 16
    pack(place.data, place.zip)
    with zipfile.ZipFile(place.zip, "a") as archive:
        archive.writestr(info, "/etc/passwd")


def nested(name: str, content: bytes) -> Spoil:
    """A data set whose train.zip holds a member of this name."""

    def spoil(place: Place) -> None:
        pack(place.data / "train", place.data / "train.zip")
        with zipfile.ZipFile(place.data / "train.zip", "a", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            archive.writestr(name, content)

    return spoil


def garbled(data: bytes) -> bytes:
    """Eight zeros in the middle of the packed train.csv."""
    start = data.index(b"train.csv") + 60
    return data[:start] + bytes(8) + data[start + 8 :]


def encrypted(data: bytes) -> bytes:
    """Every member is marked as encrypted in the central directory."""
    return re.sub(rb"(PK\x01\x02.{4}).", lambda found: found[1] + b"\x01", data, flags=re.DOTALL)


def facts(change: Callable[[dict[str, object]], object]) -> Spoil:
    """Another study.json."""

    def spoil(place: Place) -> None:
        path = place.study.folder / "study.json"
        found = json.loads(path.read_text())
        change(found)
        path.write_text(json.dumps(found))

    return spoil


def in_study(name: str, content: bytes) -> Spoil:
    """Another file in the study's folder, which has a complete trial."""

    def spoil(place: Place) -> None:
        run = Run(TrialConfig("test_resnet", image_size=32, epochs=2))
        record = TrialRecord(run.id, run.config, State.COMPLETE, 2, 0.5, 4.0, "ran its 2 epochs")
        place.study.append(record)
        (place.study.folder / name).write_bytes(content)

    return spoil


def other_images(place: Place) -> None:
    draw(77).save(place.data / "test_upload" / "t0.jpg")


def lose_study_json(place: Place) -> None:
    in_study("study.json", b"")(place)
    (place.study.folder / "study.json").unlink()


# ---- the table


@dataclass(frozen=True)
class Case:
    """`spoil` is done to a place; `says` is the line: {names} of paths, … what the machine decides."""

    spoil: Spoil
    says: str
    options: tuple[str, ...] = ()  # of the script
    script: ModuleType = search


def wrong(options: str, says: str) -> Case:
    """Options that are wrong by themselves."""
    return Case(nothing, says, tuple(options.split(" ")))


def script(module: ModuleType, options: str, says: str, spoil: Spoil = nothing) -> Case:
    """A script on the study."""
    return Case(spoil, says, ("{study}", *options.split()), module)


RESUME = ("--study", "begun", "--resume")
UNREADABLE = "1 test images cannot be read: '{data}/test_upload/t0.jpg': "

DATA_SETS = {
    "no such path": wrong(
        "--data {folder}/nowhere", "the data '{folder}/nowhere' does not exist: give a folder or a zip"
    ),
    "no such path, and weights to fetch": wrong(
        "--data {folder}/nowhere --weights hub",
        "the data '{folder}/nowhere' does not exist: give a folder or a zip",
    ),
    "a text file": wrong(
        "--data {data}/train.csv", "the data '{data}/train.csv' is neither a folder nor an intact zip"
    ),
    "empty folder": Case(
        remove("train", "test_upload", "train.csv", "sample-submission.csv"),
        "no images in '{data}': it needs train.csv, or a folder for each class in it or train/",
    ),
    "empty class folder": Case(
        both(remove("train.csv", "train/10"), lambda place: (place.data / "train" / "10").mkdir()),
        "the class folder '{data}/train/10' holds no images: fill or remove it",
    ),
    "one class": Case(
        keep_rows(lambda row: row.endswith(",1")),
        "all images are of the class '1': two classes are needed at least",
    ),
    "three images of a class": Case(
        keep_rows(lambda row: not re.match(r"[3-7]_10", row)),
        "the class '10' has 3 readable images, but 4 are needed: add some or take the class out",
    ),
    "all alike": Case(
        draw_the_same,
        "no image is left for val: the 24 labelled images are near-duplicates of 1, which stay together; "
        "add different ones",
    ),
    "zero-byte image": Case(
        put("train/2/1_2.jpg", ""),
        "1 of 24 labelled images cannot be read, more than 1%: '{data}/train/2/1_2.jpg': the file is empty"
        "; fetch them again or take them out",
    ),
    "truncated image": Case(
        truncate_test,
        "1 test images cannot be read: '{data}/test_upload/t2.jpg': it cannot be decoded: "
        "image file is truncated (… bytes not processed); fetch them again",
    ),
    "missing image": Case(remove("test_upload/t0.jpg"), UNREADABLE + "the file is missing; fetch them again"),
    "GIF named .jpg": Case(
        instead_of_test_image(lambda path: draw(0).save(path, format="GIF")),
        UNREADABLE + r"not a JPEG, PNG, WebP or BMP image: it begins with b'GIF87a@\x00'; fetch them again",
    ),
    "folder named .jpg": Case(
        instead_of_test_image(Path.mkdir),
        UNREADABLE + "it is a folder or a device, no file; fetch them again",
    ),
    "pipe named .jpg": Case(
        instead_of_test_image(os.mkfifo),
        UNREADABLE + "it is a folder or a device, no file; fetch them again",
    ),
    "link to itself": Case(
        instead_of_test_image(lambda path: path.symlink_to(path)),
        UNREADABLE + "the link leads to no file; fetch them again",
    ),
    "link to what holds it": Case(
        circle, "the class folder '{data}/train/again' is a link to what holds it: remove the link"
    ),
    "decompression bomb": Case(
        put("train/1/0_1.jpg", bomb(30_000, 30_000)),
        "'{data}/train/1/0_1.jpg' is too large: Image size (900000000 pixels) exceeds limit of 178956970 "
        "pixels, could be decompression bomb DOS attack.; remove or shrink it",
    ),
    "name that is no UTF-8": Case(
        name_without_encoding, r"the name of '{data}/train/1/\udcff.jpg' is not UTF-8: rename it"
    ),
    "no test folder": Case(
        remove("test_upload"),
        "'{data}/sample-submission.csv' lists test images, but there is no test_upload or test folder",
    ),
    "test image not in the sample": Case(
        put("test_upload/more.jpg", "x"),
        "1 images of '{data}/test_upload' are not in '{data}/sample-submission.csv', "
        "the first is 'more.jpg': add or remove them",
    ),
}

ZIPS = {
    "empty zip": Case(
        both(
            remove("train", "test_upload", "train.csv", "sample-submission.csv"),
            lambda place: pack(place.data, place.zip),
        ),
        "no images in '{zip}': it needs train.csv, or a folder for each class in it or train/",
    ),
    "zero-byte zip": Case(
        packed(damage=lambda data: b""), "the data '{zip}' is neither a folder nor an intact zip"
    ),
    "zip cut off": Case(
        packed(damage=lambda data: data[:-100]), "the data '{zip}' is neither a folder nor an intact zip"
    ),
    "zip with a hole": Case(
        packed(damage=lambda data: data[:200] + data[3000:]),
        "'cars.zip' cannot be unpacked: Invalid argument; fetch it again",
    ),
    "stored member damaged": Case(
        packed(damage=garbled), "'cars.zip' is damaged: Bad CRC-32 for file 'train.csv'; fetch it again"
    ),
    "bz2 member damaged": Case(
        packed(zipfile.ZIP_BZIP2, garbled),
        "'cars.zip' cannot be unpacked: Invalid data stream; fetch it again",
    ),
    "lzma member damaged": Case(
        packed(zipfile.ZIP_LZMA, garbled), "'cars.zip' is damaged: Corrupt input data; fetch it again"
    ),
    "encrypted": Case(packed(damage=encrypted), "'cars.zip' is encrypted: unpack it and give the folder"),
    "absolute path": Case(
        packed(**{"/etc/evil": b"x"}),
        "'cars.zip' names '/etc/evil', outside its folder: it is not safe to unpack",
    ),
    "path with ..": Case(
        packed(**{"../evil.jpg": b"x"}),
        "'cars.zip' names '../evil.jpg', outside its folder: it is not safe to unpack",
    ),
    "path with .. of Windows": Case(
        packed(**{"train\\..\\..\\evil.jpg": b"x"}),
        r"'cars.zip' names 'train\\..\\..\\evil.jpg', outside its folder: it is not safe to unpack",
    ),
    "path with a drive": Case(
        packed(**{"C:/evil.jpg": b"x"}),
        "'cars.zip' names 'C:/evil.jpg', outside its folder: it is not safe to unpack",
    ),
    "link in a zip": Case(packed_link, "'cars.zip' holds the link 'train/1/a.jpg': pack the file itself"),
    "zip bomb": Case(
        packed(zipfile.ZIP_DEFLATED, zeros=bytes(110_000_000)),
        "'cars.zip' would unpack to 110,…,… bytes, over 100 times its own size",
    ),
    "file and folder of one name": Case(
        packed(**{"train.csv/x": b"x"}), "'cars.zip' cannot be unpacked: Not a directory; fetch it again"
    ),
    "no name in a zip": Case(
        packed(damage=lambda data: data.replace(b"evil.jpg", b"\0vil.jpg"), **{"evil.jpg": b"x"}),
        "'cars.zip' holds a file without a name: fetch it again",
    ),
    "name too long for a file": Case(
        packed(**{"train/1/" + "x" * 300: b"x"}),
        "'cars.zip' cannot be unpacked: File name too long; fetch it again",
    ),
    "name that is no UTF-8 in a zip": Case(
        packed(damage=lambda data: data.replace("ö".encode(), b"\xff\xff"), **{"ö.jpg": b"x"}),
        "'cars.zip' is damaged: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte; "
        "fetch it again",
    ),
    "nested zip missing": Case(
        both(remove("train"), lambda place: pack(place.data, place.zip)),
        "there is no train folder (or train.zip) beside '{folder}/cache/unpacked/…/train.csv'",
    ),
    "nested zip damaged": Case(
        both(remove("train"), put("train.zip", b"PK\x03\x04 cut short")),
        "'train.zip' is damaged: File is not a zip file; fetch it again",
    ),
    "nested zip with ..": Case(
        nested("../../evil.jpg", b"x"),
        "'train.zip' names '../../evil.jpg', outside its folder: it is not safe to unpack",
    ),
    "nested zip bomb": Case(
        nested("zeros", bytes(110_000_000)),
        "'train.zip' would unpack to 110,…,… bytes, over 100 times its own size",
    ),
}

AS_CSV = "'{data}/train.csv' cannot be read as CSV: "
NEEDED = "; needed is UTF-8 text with commas"
SAMPLE = "{data}/sample-submission.csv"

TABLES = {
    "empty table": Case(put("train.csv", ""), AS_CSV + "No columns to parse from file" + NEEDED),
    "header alone": Case(
        put("train.csv", "Id,Category\n"),
        "no images in '{data}': it needs train.csv, or a folder for each class in it or train/",
    ),
    "semicolons": Case(
        swap(",", ";"),
        "'{data}/train.csv' has the columns ['id;category']; needed are Id,Category or path,label",
    ),
    "tabs": Case(
        swap(",", "\t"),
        r"'{data}/train.csv' has the columns ['id\tcategory']; needed are Id,Category or path,label",
    ),
    "missing column": Case(
        swap("Category", "Kind"),
        "'{data}/train.csv' has the columns ['id', 'kind']; needed are Id,Category or path,label",
    ),
    "a column twice": Case(
        swap("Id,Category", "Category,category"),
        "'{data}/train.csv' has more than one column 'category': keep one",
    ),
    "a row too long": Case(
        swap("3_1.jpg,", "3,_1.jpg,"),
        AS_CSV + "Error tokenizing data. C error: Expected 2 fields in line 21, saw 3" + NEEDED,
    ),
    "all rows too long": Case(
        widen_rows, AS_CSV + "Error tokenizing data. C error: Expected 2 fields in line 2, saw 3" + NEEDED
    ),
    "a quote left open": Case(
        swap("3_1.jpg,", '"3_1.jpg,'),
        AS_CSV + "Error tokenizing data. C error: EOF inside string starting at row 20" + NEEDED,
    ),
    "UTF-16": Case(
        recoded("utf-16"),
        AS_CSV + "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte" + NEEDED,
    ),
    "Latin-1": Case(
        recoded("latin-1"),
        AS_CSV + "'utf-8' codec can't decode byte 0xf6 in position …: invalid start byte" + NEEDED,
    ),
    "a folder in the table's place": Case(
        both(remove("train.csv"), lambda place: place.table.mkdir()),
        AS_CSV + "[Errno 21] Is a directory: '{data}/train.csv'" + NEEDED,
    ),
    "float labels": Case(
        swap(",1\n", ",1.0\n"),
        "the class '1.0' of '{data}/train.csv' has no folder in '{data}/train'",
    ),
    "label without a folder": Case(
        swap("3_1.jpg,1", "3_1.jpg,7"), "the class '7' of '{data}/train.csv' has no folder in '{data}/train'"
    ),
    "no label": Case(
        swap("3_1.jpg,1", "3_1.jpg"),
        "'{data}/train.csv' names '', which is not a path inside its folder: correct the row",
    ),
    "no label beside a path": Case(
        put("train.csv", "path,label\ntrain/1/3_1.jpg,\n"),
        "'{data}/train.csv' has the label '', which names no class: correct the row",
    ),
    "id twice": Case(swap("3_1.jpg", "4_1.jpg"), "the id '4_1.jpg' is there 2 times: ids must be unique"),
    "id with ..": Case(
        swap("3_1.jpg", "../3_1.jpg"),
        "'{data}/train.csv' names '../3_1.jpg', which is not a path inside its folder: correct the row",
    ),
    "absolute id": Case(
        swap("3_1.jpg", "/etc/passwd"),
        "'{data}/train.csv' names '/etc/passwd', which is not a path inside its folder: correct the row",
    ),
    "id with a NUL": Case(
        swap("3_1.jpg", "3\0.jpg"),
        r"'{data}/train.csv' names '3\x00.jpg', which is not a path inside its folder: correct the row",
    ),
    "test.csv without paths": Case(
        put("test.csv", "name\na.jpg\n"), "'{data}/test.csv' has the columns ['name']; needed is path"
    ),
    "test.csv against the sample": Case(
        put("test.csv", "path\ntest_upload/t1.jpg\n"),
        "'{data}/test.csv' and '{data}/sample-submission.csv' do not list the same images, only one of "
        "them names 't0.jpg': correct one, or take one away",
    ),
    "empty sample": Case(
        put("sample-submission.csv", ""),
        SAMPLE + " is not a table of ids and categories: No columns to parse from file",
    ),
    "sample of three columns": Case(
        put("sample-submission.csv", "Id,a,b\nt0.jpg,0.5,0.5\n"),
        SAMPLE + " must have two columns, ids and categories, but its header is ['Id', 'a', 'b']",
    ),
    "sample with semicolons": Case(
        swap(",", ";", "sample-submission.csv"),
        SAMPLE + " must have two columns, ids and categories, but its header is ['Id;Category']",
    ),
    "sample with a row too long": Case(
        swap("t1.jpg,0", "t1.jpg,0,0", "sample-submission.csv"),
        SAMPLE + " is not a table of ids and categories: "
        "Error tokenizing data. C error: Expected 2 fields in line 5, saw 3",
    ),
    "sample with an id twice": Case(
        swap("t1.jpg", "t2.jpg", "sample-submission.csv"),
        "more than once in the sample file " + SAMPLE + ": 't2.jpg'",
    ),
    "sample of other images": Case(
        swap("t1.jpg", "u1.jpg", "sample-submission.csv"),
        "1 images of '{data}/test_upload' are not in '{data}/sample-submission.csv', "
        "the first is 't1.jpg': add or remove them",
    ),
    "class without a name": Case(
        put("classes.txt", "1 sedan\n2 van\n"),
        "classes.txt has no line for the class '10': add one or remove the file",
    ),
    "name without a class": Case(
        put("classes.txt", "sedan\n"),
        "'{data}/classes.txt' has the line 'sedan'; needed is '<category> <name>'",
    ),
    "class named twice": Case(
        put("classes.txt", "1 sedan\n1 van\n"),
        "'{data}/classes.txt' names the class '1' more than once: keep one line",
    ),
    "classes.txt in Latin-1": Case(
        put("classes.txt", "1 sedän\n".encode("latin-1")),
        "'{data}/classes.txt' is not UTF-8: 'utf-8' codec can't decode byte 0xe4 in position 5: "
        "invalid continuation byte; save it as such",
    ),
}

SET = f"expected NAME=V, NAME=V1,V2 or NAME=LOW:HIGH with NAME one of {SETTABLE}"
HELP = "; --help lists the options"
PLAIN = "must be a plain name of letters, digits, '.', '_' and '-', 100 characters at most"
SHARE = "must be above 0 and at most 1, or auto: a trial trains on one GPU"
HOME = "'~no-such-user/x': there is no such home folder; write the path in full"

OPTIONS = {
    case.options: case
    for case in (
        wrong("--trials 0", "--trials 0 must be at least 1"),
        wrong("--trials -5", "--trials -5 must be at least 1"),
        wrong("--trials nan", "argument --trials: invalid int value: 'nan'" + HELP),
        wrong("--trials 1.5", "argument --trials: invalid int value: '1.5'" + HELP),
        wrong("--set lr=0.1 --set lr=0.2", "--set lr is given 2 times: leave out all but one"),
        wrong("--hours 0", "--hours 0.0 must be above 0 and below a year"),
        wrong("--hours -1", "--hours -1.0 must be above 0 and below a year"),
        wrong("--hours nan", "--hours nan must be above 0 and below a year"),
        wrong("--hours inf", "--hours inf must be above 0 and below a year"),
        wrong("--hours 1e400", "--hours inf must be above 0 and below a year"),
        wrong("--hours two", "argument --hours: invalid float value: 'two'" + HELP),
        wrong("--seed -1", "--seed -1 must be from 0 to 2000000000"),
        wrong("--seed 99999999999999999999", "--seed 99999999999999999999 must be from 0 to 2000000000"),
        wrong("--workers 0", "--workers 0 must be at least 1"),
        wrong("--workers -3", "--workers -3 must be at least 1"),
        wrong("--workers 99999", "--workers 99999 is more than … hold; at most …"),
        wrong("--gpus-per-trial 0", f"--gpus-per-trial 0 {SHARE}"),
        wrong("--gpus-per-trial 2", f"--gpus-per-trial 2 {SHARE}"),
        wrong("--gpus-per-trial nan", f"--gpus-per-trial nan {SHARE}"),
        wrong("--gpus-per-trial half", f"--gpus-per-trial half {SHARE}"),
        wrong("--confirm -1", "--confirm -1 must be at least 0, which leaves it out"),
        wrong("--folds 99", "--folds 99 must be 0, which leaves it out, or from 2 to 20"),
        wrong("--check-stops -1", "--check-stops -1 must be at least 0, which leaves it out"),
        wrong("--cache-limit 0", "--cache-limit 0 must be above 0 and below 1,000,000 GB"),
        wrong("--cache-limit nan", "--cache-limit nan must be above 0 and below 1,000,000 GB"),
        wrong("--cache-limit inf", "--cache-limit inf must be above 0 and below 1,000,000 GB"),
        wrong("--cache-limit 1e300", "--cache-limit 1e+300 must be above 0 and below 1,000,000 GB"),
        Case(
            lambda place: shutil.rmtree(place.folder / "cache"),
            "the images at up to 96 px would take 0.0 GB in '{folder}/cache/images', where there is room "
            "for 0.0 GB: give --cache DIR on a larger disk, a larger --cache-limit, or smaller sizes with "
            "--set image_size=...",
            ("--cache-limit", "1e-9"),
        ),
        wrong("--study ..", f"--study '..' {PLAIN}"),
        wrong("--study a/b", f"--study 'a/b' {PLAIN}"),
        wrong("--study " + "x" * 101, f"--study '{'x' * 101}' {PLAIN}"),
        wrong("--preset tpu", "argument --preset: invalid choice: 'tpu' (choose from …)" + HELP),
        wrong("--metric f1", "argument --metric: invalid choice: 'f1' (choose from …)" + HELP),
        wrong(
            "--thumbnails --until search", "--thumbnails is for the report, which --until search leaves out"
        ),
        wrong("--until never", "argument --until: invalid choice: 'never' (choose from …)" + HELP),
        wrong("--frobnicate", "unrecognized arguments: --frobnicate" + HELP),
        wrong("images", "unrecognized arguments: images" + HELP),
        wrong("--resume --overwrite", "argument --overwrite: not allowed with argument --resume" + HELP),
        wrong("--data ", "--data is empty: give a value, or leave it out"),
        wrong("--weights ", "--weights is empty: give a value, or leave it out"),
        wrong("--results ", "--results is empty: give a value, or leave it out"),
        wrong("--study ", "--study is empty: give a value, or leave it out"),
        wrong("--data ~no-such-user/x", HOME),
        wrong("--results ~no-such-user/x", HOME),
        wrong("--cache ~no-such-user/x", HOME),
        wrong("--weights ~no-such-user/x", HOME),
        wrong(
            "--weights {folder}/none",
            "--weights {folder}/none is no folder; give a folder of <timm name>.safetensors, hub or none",
        ),
        wrong(
            "--weights {data}",
            "--weights {data} holds no .safetensors file; name the files <timm name>.safetensors",
        ),
        wrong(
            "--cache {data}/train.csv",
            "--cache {data}/train.csv: no writing there (Not a directory); give a folder of your own",
        ),
        wrong(
            "--results {data}/train.csv",
            "--results {data}/train.csv: no writing there (Not a directory); give a folder of your own",
        ),
        wrong("--set lr", f"--set lr: {SET}"),
        wrong("--set lr=", f"--set lr=: {SET}"),
        wrong("--set colour=red", f"--set colour=red: {SET}"),
        wrong("--set seed=3", f"--set seed=3: {SET}"),
        wrong("--set continues=0123456789ab", f"--set continues=0123456789ab: {SET}"),
        wrong(
            "--until search --folds 3", "--folds is for what --until search leaves out; leave out one of them"
        ),
        wrong("--set lr=nan", "--set lr: 'nan' must be finite"),
        wrong("--set lr=1e-3:inf", "--set lr: 'inf' must be finite"),
        wrong("--set lr=fast", "--set lr: 'fast' is no float"),
        wrong("--set lr=0", "--set lr=0: lr=0.0 must be a number from 1e-08 to 10"),
        wrong("--set lr=-1", "--set lr=-1: lr=-1.0 must be a number from 1e-08 to 10"),
        wrong("--set lr=99", "--set lr=99: lr=99.0 must be a number from 1e-08 to 10"),
        wrong("--set lr=1:0.1", "--set lr=1:0.1: LOW:HIGH is for a real number, with LOW below HIGH"),
        wrong(
            "--set head_depth=1:2", "--set head_depth=1:2: LOW:HIGH is for a real number, with LOW below HIGH"
        ),
        wrong("--set lr=0.1,0.1", "--set lr=0.1,0.1: 0.1 is there more than once"),
        wrong("--set epochs=0", "--set epochs=0: epochs=0 must be a whole number from 1 to 10000"),
        wrong(
            "--set epochs=3,4",
            "--set epochs=3,4: epochs must be one number, the same schedule for every trial",
        ),
        wrong(
            "--set image_size=99999",
            "--set image_size=99999: image_size=99999 must be a whole number from 16 to 2048",
        ),
        wrong("--set class_weights=maybe", "--set class_weights: 'maybe' is no bool"),
        wrong(
            "--set backbone=resnet5",
            "--set backbone=resnet5: backbone='resnet5' is not known to timm; close names are resnet50, …",
        ),
        wrong(
            "--set backbone=resnet50",
            "--weights …/carmodels/demo/weights: no weights for any of resnet50; name the files "
            "<timm name>.safetensors, or give --set backbone=NAME, --weights hub or --weights none",
        ),
    )
}

OLD = (
    "{study}/study.json has no 'metric': it is damaged, or of another version of this program; "
    "use the version it was made with, or begin another study"
)
VERSION_1 = (
    "{study} was made by version 0.1 of this project, this is 0.3: use that version, or begin another study"
)
CHANGED = "in {study} and is … now; give the options of the first run, or another --study NAME"
NO_STUDY = (
    "{study} is there already, but is no study: it holds no study.json; bring that back, move the folder "
    "away, or give another --study NAME"
)
BEGUN = ("--study", "begun")

STUDIES = {
    "exists": Case(
        nothing,
        "{study} holds a study already; give --resume to go on with it, --overwrite to delete it, "
        "or another --study NAME",
        BEGUN,
    ),
    "nothing to resume": Case(
        nothing,
        "--resume: there is no study at {folder}/results/never; leave --resume out to begin one",
        ("--study", "never", "--resume"),
    ),
    "of another data set": Case(other_images, f"--resume: fingerprint was … {CHANGED}", RESUME),
    "of another seed": Case(nothing, f"--resume: seed was 0 {CHANGED}", (*RESUME, "--seed", "1")),
    "of another space": Case(nothing, f"--resume: space was … {CHANGED}", (*RESUME, "--set", "epochs=2")),
    "of another metric": Case(
        nothing, f"--resume: metric was accuracy {CHANGED}", (*RESUME, "--metric", "log_loss")
    ),
    "of other weights": Case(nothing, f"--resume: weights was … {CHANGED}", (*RESUME, "--weights", "none")),
    "without its metric": Case(facts(lambda found: found.pop("metric")), OLD, RESUME),
    "of an older version": Case(facts(lambda found: found.pop("version")), VERSION_1, RESUME),
    "of another version": Case(
        facts(lambda found: found.update(version="9.9")), VERSION_1.replace("0.1", "9.9"), RESUME
    ),
    "study.json torn": Case(
        in_study("study.json", b'{"seed": 0,'),
        "{study}/study.json is damaged (Expecting property name enclosed in double quotes: …); "
        "bring a copy back, or delete it",
        RESUME,
    ),
    "study.json of another kind": Case(
        in_study("study.json", b"[1]"),
        "{study}/study.json is damaged (it holds no object); bring a copy back, or delete it",
        RESUME,
    ),
    "study.json that is no text": Case(
        in_study("study.json", b"\xff\xfe"),
        "{study}/study.json is damaged ('utf-8' codec can't decode byte 0xff in position 0: "
        "invalid start byte); bring a copy back, or delete it",
        RESUME,
    ),
    "study.json lost": Case(lose_study_json, NO_STUDY, RESUME),
    "study.json lost, begun anew": Case(lose_study_json, NO_STUDY, BEGUN),
    "study.json lost, overwritten": Case(lose_study_json, NO_STUDY, (*BEGUN, "--overwrite")),
    "a file in its place": Case(
        lambda place: (shutil.rmtree(place.study.folder), place.study.folder.write_text("mine")),
        NO_STUDY,
        BEGUN,
    ),
    "somebody's images in its place": Case(
        lambda place: shutil.copytree(place.data, place.folder / "copy"),
        "{folder}/cars is there already, but is no study: it holds no study.json; bring that back, "
        "move the folder away, or give another --study NAME",
        ("--data", "{folder}/copy", "--results", "{folder}", "--study", "cars", "--overwrite"),
    ),
    "around its own data": Case(
        lambda place: shutil.copytree(place.data, place.study.folder / "images"),
        "--data {study}/images lies in the folder of the study, {study}; "
        "give another --study NAME or --results DIR",
        ("--data", "{study}/images", *BEGUN, "--overwrite"),
    ),
    "around its own cache": Case(
        nothing,
        "--cache {study}/cache lies in the folder of the study, {study}; "
        "give another --study NAME or --results DIR",
        ("--cache", "{study}/cache", *BEGUN, "--overwrite"),
    ),
    "retrain: no study": Case(
        nothing,
        "{data} is no study: it holds no study.json; give a folder under results/",
        ("{data}",),
        retrain,
    ),
    "retrain: no folder named": Case(
        nothing, "the following arguments are required: STUDY_DIR" + HELP, (), retrain
    ),
    "retrain: an older version": script(retrain, "", VERSION_1, facts(lambda found: found.pop("version"))),
    "retrain: without its largest size": script(
        retrain, "", OLD.replace("metric", "max_size"), facts(lambda found: found.pop("max_size"))
    ),
    "retrain: other images": script(
        retrain,
        "--cache {folder}/cache",
        "{data} is no longer the data set that {study} was made with; bring that one back",
        other_images,
    ),
    "retrain: images gone": script(
        retrain,
        "--cache {folder}/cache",
        "the data '{data}' does not exist: give a folder or a zip",
        lambda place: shutil.rmtree(place.data),
    ),
    "retrain --seeds 0": script(retrain, "--seeds 0", "--seeds 0 must be at least 1"),
    "retrain --seeds huge": script(retrain, "--seeds 9999999", "--seeds 9999999 must be at most 1000"),
    "retrain --set nothing": script(
        retrain, "--set tempo=2", "--set tempo=2: expected NAME=V with NAME one of …"
    ),
    "retrain --set size": script(
        retrain,
        "--set image_size=96",
        "--set image_size: that is another configuration; give --trial ID or --epochs N",
    ),
    "retrain --set head": script(
        retrain,
        "--onward --set head_depth=2",
        "--set head_depth: the weights of the trial have another; leave out --onward",
    ),
    "retrain --onward --folds": script(
        retrain,
        "--onward --folds 3",
        "--onward: what folds hold out the trial has learnt from; leave one of them out",
    ),
    "retrain --folds --set patience": script(
        retrain,
        "--folds 3 --set patience=2",
        "--set patience: what is held out must not end training; leave it out",
    ),
    "retrain --folds 1": script(
        retrain, "--folds 1", "--folds 1 must be 0, which leaves it out, or from 2 to 20"
    ),
    "retrain --folds with --seeds": script(
        retrain,
        "--folds 3 --seeds 2",
        "--seeds 2 does not go with --folds: each fold is a run of its own",
    ),
    "retrain --epochs huge": script(retrain, "--epochs 99999", "--epochs 99999 must be at most 10000"),
    "retrain --set twice": script(
        retrain,
        "--set lr=0.1 --set ema=0.9 --set lr=0.2",
        "--set lr is given 2 times: leave out all but one",
    ),
    "retrain --cache on a file": script(
        retrain,
        "--cache {data}/train.csv",
        "--cache {data}/train.csv: no writing there (Not a directory); give a folder of your own",
    ),
    **{
        f"retrain: study.json with {name} {value!r}": script(
            retrain,
            "--cache {folder}/cache",
            "{study}/study.json is damaged (…); bring a copy back",
            facts(lambda found, name=name, value=value: found.update({name: value})),
        )
        for name, value in [
            ("data", 5),
            ("classes", None),
            ("class_names", [1]),
            ("backbones", ["test_resnet"]),
            ("max_size", "96"),
            ("seed", "x"),
            ("images", [1]),
        ]
    },
    "retrain: study.json with another metric": script(
        retrain,
        "--cache {folder}/cache",
        "{study}/study.json: metric is 'profit', must be one of …; bring a copy back",
        facts(lambda found: found.update(metric="profit")),
    ),
    "retrain --epochs -1": script(retrain, "--epochs -1", "--epochs -1 must be at least 1"),
    "ensemble --top 0": script(
        ensemble, "--top 0", "--top 0 must be from 1 to 12, whose weights a search keeps"
    ),
    "ensemble --tta 99": script(
        ensemble, "--tta 99", "--tta 99 must be from 1 to 15, the number of views there are"
    ),
    "ensemble --max-seconds-per-1000 0": script(
        ensemble, "--max-seconds-per-1000 0", "--max-seconds-per-1000 0 must be above 0"
    ),
    "ensemble --tta many": script(ensemble, "--tta many", "argument --tta: invalid int value: 'many'" + HELP),
    "ensemble --out nowhere": script(
        ensemble,
        "--out {folder}/nowhere/a.csv",
        "--out {folder}/nowhere/a.csv must name a file in a folder that exists",
    ),
    "ensemble --out folder": script(
        ensemble, "--out {data}", "--out {data} must name a file in a folder that exists"
    ),
    "report: no trial": script(report, "", "{study} has no trials yet: there is nothing to report"),
    "report: nothing but damaged lines": script(
        report,
        "",
        "{study}/trials.jsonl: lines [1, 2] are damaged, their trials left out; bring a copy back",
        in_study("trials.jsonl", b"{}\n[1]\n"),
    ),
    **{
        f"report: ensemble.json with members {members}": script(
            report,
            "",
            "{study}/ensemble.json is damaged (…); bring a copy back",
            in_study("ensemble.json", b'{"members": ' + members.encode() + b"}"),
        )
        for members in ("null", '["a"]', '[{"trial_id": 5}]', '[{"weight": "1"}]')
    },
    **{
        f"report --out onto {name}": script(
            report,
            f"--out {{study}}/{name}",
            f"--out {{study}}/{name} is a file of the study {{study}}: give another name",
            in_study("best.json", b"{}"),
        )
        for name in ("trials.jsonl", "study.json", "submission.csv", "predictions/page.html")
    },
    "report --out to a stream": script(
        report, "--out /dev/stdout", "--out /dev/stdout must name a file in a folder that exists"
    ),
    "report: ensemble.json damaged": script(
        report,
        "",
        "{study}/ensemble.json is damaged (Expecting value: line 1 column 1 (char 0)); "
        "bring a copy back, or delete it",
        in_study("ensemble.json", b"?"),
    ),
    "report: ensemble.json of an older version": script(
        report,
        "",
        "{study}/ensemble.json has no 'holdout': it is damaged, or of another version of this program; "
        "use the version it was made with, or begin another study",
        in_study("ensemble.json", b"{}"),
    ),
    "report --port alone": script(report, "--port 80", "--port 80 is for --serve; add that or leave it out"),
    "report twice": script(report, "{study}", "{study} is given twice: name each study once"),
    "report: another that is none": script(
        report, "{data}", "{data} is no study: it holds no study.json; give a folder under results/"
    ),
    "report --out nowhere": script(
        report,
        "--out {folder}/nowhere/a.html",
        "--out {folder}/nowhere/a.html must name a file in a folder that exists",
    ),
    "report --out --serve": script(
        report,
        "--serve --out a.html",
        "--out a.html is for a page that is written; leave it or --serve out",
    ),
    "report --thumbnails of two": script(
        report,
        "{data} --thumbnails",
        "--thumbnails is for the report of one study; leave it or the other studies out",
    ),
    "report --thumbnails too early": script(
        report,
        "--thumbnails --cache {folder}/cache",
        "{study} has no ensemble.json; python tune/ensemble.py {study} makes it",
    ),
    "report --cache alone": script(
        report, "--cache x", "--cache and --cache-limit are for --thumbnails; add that or leave them out"
    ),
    "report --port huge": script(report, "--serve --port 99999", "--port 99999 must be from 0 to 65535"),
}

TABLE = {
    f"{part}: {' '.join(name) if isinstance(name, tuple) else name}"[:60]: case
    for part, cases in (
        ("data", DATA_SETS),
        ("zip", ZIPS),
        ("table", TABLES),
        ("option", OPTIONS),
        ("study", STUDIES),
    )
    for name, case in cases.items()
}


def run(place: Place, case: Case) -> int:
    """The exit status of a case."""
    options = [place.filled(option) for option in case.options]
    try:
        if case.script is search:
            return place.search(*options)
        return guarded(case.script.run, case.script.parser().parse_args(options))
    except SystemExit as ended:
        return int(str(ended.code))


@pytest.mark.parametrize("name", TABLE)
def test_bad_input_is_one_line_and_loses_nothing(
    name: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    case = TABLE[name]
    case.spoil(place)
    before = files_of(place.folder)
    assert run(place, case) == 2
    errors = capsys.readouterr().err
    wanted = re.escape(f"error: {place.filled(case.says)}\n").replace("…", r"[^\n]+")
    assert re.fullmatch(wanted, errors), errors
    assert files_of(place.folder) == before


def test_every_case_has_a_name_of_its_own() -> None:
    assert len(TABLE) == sum(map(len, (DATA_SETS, ZIPS, TABLES, OPTIONS, STUDIES)))


@pytest.mark.server
def test_a_study_that_another_process_works_on_is_refused_and_left_alone(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    script = (
        "import sys; from pathlib import Path; from carmodels.study import Study\n"
        "from tune.cli import session\n"
        "with session.held(Study(Path(sys.argv[1]))): print('held', flush=True); sys.stdin.read()"
    )
    before = files_of(place.folder)
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(place.study.folder)],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert other.stdin is not None
    assert other.stdout is not None
    with other:
        assert other.stdout.readline() == b"held\n"
        for options in (RESUME, (*BEGUN, "--overwrite")):
            assert place.search(*options) == 2
            assert capsys.readouterr().err == (
                f"error: {place.study.folder} is in use by process {other.pid} on {platform.node()}; "
                "wait for its end, stop it, or give another --study NAME\n"
            )
        other.stdin.close()
    assert files_of(place.folder) == before


def test_a_line_end_in_a_path_does_not_make_it_two_lines(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    assert place.search("--results", str(place.folder / "re\nsults"), "--resume", "--study", "a") == 2
    assert capsys.readouterr().err == (
        f"error: --resume: there is no study at {place.folder}/re sults/a; leave --resume out to begin one\n"
    )


# ---- what is unusual and right


def with_bom_and_crlf(place: Place) -> None:
    for table in (place.table, place.sample):
        table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes().replace(b"\n", b"\r\n"))


def renamed(other: Callable[[str], str]) -> Spoil:
    """Images and classes of other names, on disk and in the tables."""

    def spoil(place: Place) -> None:
        rows = [["Id", "Category"]]
        for folder in sorted((place.data / "train").iterdir()):
            for path in sorted(folder.iterdir()):
                path.rename(folder / other(path.name))
                rows.append([other(path.name), other(folder.name)])
            folder.rename(folder.with_name(other(folder.name)))
        tests = [other(f"t{n}.jpg") for n in reversed(range(TESTS))]
        for n, name in zip(reversed(range(TESTS)), tests, strict=True):
            (place.data / "test_upload" / f"t{n}.jpg").rename(place.data / "test_upload" / name)
        write_rows(place.table, rows)
        write_rows(place.sample, [["Id", "Category"], *([name, "0"] for name in tests)])

    return spoil


def reorder_columns(place: Place) -> None:
    rows = [row.split(",") for row in place.table.read_text().splitlines()]
    write_rows(place.table, [[category, name, "x"] for name, category in rows])


def write_rows(path: Path, rows: list[list[str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL).writerows(rows)


def widen_an_image(place: Place) -> None:
    draw(5).resize((20_000, 48)).save(place.data / "train" / "1" / "0_1.jpg")


def link_images(place: Place) -> None:
    """Images kept elsewhere, and a folder that leads back to the top among those of a class."""
    for path in sorted(place.data.glob("train/*/*.jpg")):
        target = place.folder / "elsewhere" / path.name
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
        path.symlink_to(target)
    (place.data / "train" / "1" / "back").symlink_to(place.data)


def same(name: str) -> str:
    return name


def cyrillic(name: str) -> str:
    return f"«Жигули» {name}"


def spaced(name: str) -> str:
    return f' a  b, "c" {name}'


def folded(name: str) -> str:
    return f"a\nb\r\nc\r{name}"


def returned(name: str) -> str:
    return f"a\r{name}"


UNUSUAL: dict[str, tuple[Spoil, Callable[[str], str]]] = {  # and what each name becomes
    "BOM and CRLF": (with_bom_and_crlf, same),
    "blank lines": (swap("\n", "\n\n"), same),
    "columns in another order, one more": (reorder_columns, same),
    "Cyrillic names": (renamed(cyrillic), cyrillic),
    "names with spaces, commas and quotes": (renamed(spaced), spaced),
    "names with line ends": (renamed(folded), folded),
    "names with a carriage return": (renamed(returned), returned),
    "20,000 px wide": (widen_an_image, same),
    "linked images, a circle of folders": (link_images, same),
    "a zip of Cyrillic names": (both(renamed(cyrillic), packed(zipfile.ZIP_LZMA)), cyrillic),
    "a zip with a folder named .zip": (packed(**{"notes.zip/read.me": b"x"}), same),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_unusual_and_right_is_read_and_written_as_it_is(
    name: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil, renaming = UNUSUAL[name]
    spoil(place)
    before = files_of(place.folder)
    without_ray(monkeypatch)
    assert place.search("--study", "unusual") == 0
    assert {n: content for n, content in files_of(place.folder).items() if n in before} == before

    study = Study(place.folder / "results" / "unusual")
    classes = study.metadata["classes"]
    found = {i: classes[k] for part in ("train", "val", "holdout") for i, k in study.labels(part).items()}
    assert found == {renaming(f"{n}_{c}.jpg"): renaming(c) for c in CLASSES for n in range(EACH)}
    ids = [renaming(f"t{n}.jpg") for n in reversed(range(TESTS))]
    assert list(study.labels("test")) == ids

    source = place.zip if place.zip.exists() else place.data
    sample = open_dataset(source, cache_dir=place.folder / "cache", max_size=96).sample_file
    answers = Predictions(tuple(sorted(ids)), tuple(classes), np.full((TESTS, 3), [0.2, 0.3, 0.5]))
    write_submission(answers, study.submission_file, sample=sample)
    with study.submission_file.open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [["Id", "Category"], *([i, classes[2]] for i in ids)]


def test_damaged_lines_of_a_resumed_study_are_named_and_the_rest_is_kept(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    in_study("notes.txt", b"")(place)
    with place.study.trials_file.open("ab") as file:
        file.write(b'\xff\x00\n[]\n{"config": {"colour": "red"}, "origin": {}, "curve": []}\n{"trial_id": ')
    before = files_of(place.folder)
    without_ray(monkeypatch)
    assert place.search(*RESUME) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "lines [2, 3, 4, 5] are damaged, their trials run again." in said
    assert files_of(place.folder) == before
    assert [record.epochs_run for record in place.study.records()] == [2]
