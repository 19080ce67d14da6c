"""A data set in any of its layouts becomes the same four splits, or one clear line says why not."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from carmodels.catalog import AUGMENTS, VIEWS, Augment, Step, View
from carmodels.data import archives
from carmodels.data.dataset import Splits, open_dataset
from carmodels.data.layout import image_names
from carmodels.data.loader import Batch, Loader
from carmodels.data.splits import assign_splits
from carmodels.data.transforms import apply_view, resize

CLASSES, EACH, TESTS = ("2", "10", "1"), 8, 5


def draw(seed: int, width: int = 64, height: int = 48) -> Image.Image:
    """Smooth patches and a little noise, as in a photograph."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 8, 3)).astype(np.float32)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return Image.fromarray((smooth + rng.normal(0, 4, smooth.shape)).clip(0, 255).astype(np.uint8))


def make_competition(root: Path, each: int = EACH, order: random.Random | None = None) -> Path:
    """The competition's layout: `each` images in three classes, five for test; files made in `order`."""
    labelled = [(f"{n}_{c}.jpg", c, 1000 * k + n) for k, c in enumerate(CLASSES) for n in range(each)]
    tests = [(f"t{n}.jpg", 9000 + n) for n in reversed(range(TESTS))]
    rows = [f"{name},{category}" for name, category, _ in labelled]
    files = [(root / "train" / c / name, seed) for name, c, seed in labelled]
    files += [(root / "test_upload" / name, seed) for name, seed in tests]
    if order is not None:
        order.shuffle(rows)
        order.shuffle(files)
    for path, seed in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(seed).save(path, quality=95)
    (root / "train.csv").write_text("\n".join(["Id,Category", *rows]) + "\n")
    (root / "sample-submission.csv").write_text(
        "\n".join(["Id,Category", *(f"{n},0" for n, _ in tests)]) + "\n"
    )
    return root


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_competition(tmp_path_factory.mktemp("pristine"))


@pytest.fixture
def competition(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "cars"))


@pytest.fixture(scope="session")
def splits(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Splits:
    return open_dataset(pristine, cache_dir=tmp_path_factory.mktemp("cache"), max_size=20)


def opened(path: Path, **options: object) -> Splits:
    settings = {"cache_dir": path.parent / "cache", "max_size": 20, **options}
    return open_dataset(path, **settings)  # type: ignore[arg-type]


def pack(folder: Path, archive: Path, under: str = "") -> Path:
    """`archive` with all files of `folder`, their names beginning with `under`; the folder goes."""
    with zipfile.ZipFile(archive, "w") as packed:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            packed.write(path, Path(under, path.relative_to(folder)))
    shutil.rmtree(folder)
    return archive


# ---- layouts


def test_the_competition_layout_gives_every_image_once(splits: Splits, pristine: Path) -> None:
    assert splits.classes == splits.class_names == ("1", "2", "10")
    assert splits.test.ids == tuple(f"t{n}.jpg" for n in reversed(range(TESTS)))
    assert splits.test.labels is None
    parts = [splits.train, splits.val, splits.holdout]
    assert [len(part) for part in parts] == [18, 3, 3]
    ids = [name for part in parts for name in part.ids]
    assert sorted(ids) == sorted(path.name for path in pristine.glob("train/*/*"))
    for part in parts:
        assert part.labels is not None
        for name, label, row in zip(part.ids, part.labels, part.rows, strict=True):
            category = splits.classes[label]
            assert name.endswith(f"_{category}.jpg")
            fresh = np.asarray(Image.open(pristine / "train" / category / name).resize((53, 40), 1))
            np.testing.assert_array_equal(splits.images[row], fresh)
    assert splits.sample_file == pristine / "sample-submission.csv"
    assert splits.excluded == splits.test_duplicates == ()


def test_classes_txt_names_the_classes(competition: Path) -> None:
    (competition / "classes.txt").write_text("1 sedan\n2 pickup truck\n10 van\n\n")
    assert opened(competition).class_names == ("sedan", "pickup truck", "van")
    (competition / "classes.txt").write_text("1 sedan\n2 van\n10 sedan\n")
    assert opened(competition).class_names == ("sedan (1)", "van", "sedan (10)")


def test_the_files_of_windows_and_the_other_sample_name_are_read(competition: Path, splits: Splits) -> None:
    table = competition / "train.csv"
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes().replace(b"\n", b"\r\n"))
    (competition / "sample-submission.csv").rename(competition / "sample_submission.csv")
    found = opened(competition)
    assert (found.fingerprint, found.split_hash) == (splits.fingerprint, splits.split_hash)
    assert found.sample_file == competition / "sample_submission.csv"


def test_without_a_sample_file_all_test_images_are_taken_in_order(competition: Path) -> None:
    (competition / "sample-submission.csv").unlink()
    found = opened(competition)
    assert found.test.ids == tuple(f"t{n}.jpg" for n in range(TESTS))
    assert found.sample_file is None


def zip_of_zips(competition: Path) -> Path:
    pack(competition / "train", competition / "train.zip", "train")
    pack(competition / "test_upload", competition / "test.zip", "test_upload")
    return pack(competition, competition.parent / "sf-dl.zip")


def folder_of_zips(competition: Path) -> Path:
    pack(competition / "train", competition / "train.zip", "train")
    pack(competition / "test_upload", competition / "test.zip", "test_upload")
    return competition


def half_unpacked(competition: Path) -> Path:
    pack(competition / "test_upload", competition / "test.zip", "test_upload")
    return competition


def zip_of_folder(competition: Path) -> Path:
    (competition / "__MACOSX").mkdir()
    (competition / "__MACOSX" / "._a.jpg").write_bytes(b"Mac")
    return pack(competition, competition.parent / "cars.zip", "cars")


@pytest.mark.parametrize("ship", [zip_of_zips, folder_of_zips, half_unpacked, zip_of_folder])
def test_a_zipped_data_set_is_the_same_data_set(
    competition: Path, splits: Splits, ship: Callable[[Path], Path]
) -> None:
    path = ship(competition)
    for _ in range(2):
        found = opened(path)
        assert (found.fingerprint, found.split_hash) == (splits.fingerprint, splits.split_hash)
        assert found.sample_file is not None
        assert found.sample_file.is_file()


@pytest.mark.parametrize("under", ["", "cars", "my.cars/"])
def test_the_zip_of_class_folders_is_enough(competition: Path, under: str) -> None:
    expected = opened(shutil.copytree(competition / "train", competition.parent / "tree"))
    found = opened(pack(competition / "train", competition.parent / "cars.zip", under))
    assert (found.fingerprint, found.split_hash) == (expected.fingerprint, expected.split_hash)


def test_hidden_folders_hold_no_images_and_linked_ones_do(competition: Path, tmp_path: Path) -> None:
    audi, elsewhere = competition / "train" / "1", tmp_path / "elsewhere"
    before = image_names(audi)
    (audi / ".thumbnails").mkdir()
    shutil.copy(audi / before[0], audi / ".thumbnails" / "a.jpg")
    elsewhere.mkdir()
    shutil.copy(audi / before[0], elsewhere / "b.jpg")
    (audi / "2020").symlink_to(elsewhere)
    (elsewhere / "again").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(competition)
    assert image_names(audi) == sorted([*before, "2020/b.jpg"])


def test_a_label_need_not_be_a_path(competition: Path) -> None:
    paths = sorted(competition.glob("train/*/*.jpg"))
    rows = [f"{path.relative_to(competition)},/m/{path.parent.name}" for path in paths]
    (competition / "train.csv").write_text("\n".join(["path,label", *rows]) + "\n")
    assert set(opened(competition).classes) == {"/m/1", "/m/2", "/m/10"}


def test_zips_that_would_overwrite_each_other_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "cars.zip", "w") as outer:
        for name in ("test.zip", "train.zip"):
            with zipfile.ZipFile(tmp_path / name, "w") as inner:
                inner.writestr("0.jpg", name)
            outer.write(tmp_path / name, name)
    with pytest.raises(ValueError, match=r"'train\.zip' would overwrite '0\.jpg'"):
        opened(tmp_path / "cars.zip")


def test_a_zip_that_may_not_be_read_is_named(
    competition: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = pack(competition / "test_upload", competition / "test.zip", "test_upload")
    monkeypatch.setattr(archives, "file_digests", lambda paths, manifest: [""])
    with pytest.raises(ValueError, match=r"test\.zip' cannot be read: look at its rights"):
        archives.unpack_once(archive, tmp_path / "cache")


@pytest.mark.parametrize("below", ["train", "."])
def test_a_tree_of_class_folders_is_enough(competition: Path, below: str) -> None:
    for name in ("train.csv", "sample-submission.csv"):
        (competition / name).unlink()
    (competition / "test_upload").rename(competition / "test")
    for category, name in zip(CLASSES, ("van", "sedan", "coupe"), strict=True):
        target = competition / below / name
        (competition / "train" / category).rename(target)
        (target / ".DS_Store").write_bytes(b"x")
    if below == ".":
        (competition / "train").rmdir()
    found = opened(competition)
    assert found.classes == found.class_names == ("coupe", "sedan", "van")
    assert "van/0_2.jpg" in {*found.train.ids, *found.val.ids, *found.holdout.ids}
    assert found.test.ids == tuple(f"t{n}.jpg" for n in range(TESTS))


def test_a_tree_without_tests_has_an_empty_test_split(competition: Path) -> None:
    for path in (competition / "train").iterdir():
        path.rename(competition.parent / path.name)
    shutil.rmtree(competition)
    found = opened(competition.parent)
    assert len(found.test) == 0
    assert list(Loader(found.images, found.test, image_size=16, batch_size=4).epoch(0)) == []


def test_a_csv_of_paths_and_labels_is_enough(competition: Path) -> None:
    rows = [
        f"train/{path.parent.name}/{path.name},car {path.parent.name}"
        for path in competition.glob("train/*/*")
    ]
    (competition / "train.csv").write_text("\n".join(["path,label", *rows]))
    (competition / "test.csv").write_text("path\ntest_upload/t3.jpg\ntest_upload/t1.jpg\n")
    (competition / "sample-submission.csv").unlink()
    found = opened(competition)
    assert found.classes == ("car 1", "car 10", "car 2")
    assert "train/10/0_10.jpg" in {*found.train.ids, *found.val.ids, *found.holdout.ids}
    assert found.test.ids == ("test_upload/t3.jpg", "test_upload/t1.jpg")


def test_all_formats_can_be_mixed(competition: Path) -> None:
    for n, kind in enumerate(["png", "webp", "bmp"]):
        path = competition / "test_upload" / f"t{n}.jpg"
        draw(n).save(path, format=kind)
    assert len(opened(competition).test) == TESTS


# ---- the split


def test_the_split_depends_neither_on_the_order_of_files_nor_on_their_place(
    tmp_path: Path, splits: Splits
) -> None:
    for seed in (1, 2):
        found = opened(make_competition(tmp_path / str(seed) / "cars", order=random.Random(seed)))
        assert (found.fingerprint, found.split_hash) == (splits.fingerprint, splits.split_hash)
        assert found.train.ids == splits.train.ids


def test_the_split_is_this_one_on_any_machine() -> None:
    sides = assign_splits(np.repeat([0, 1], 10), np.arange(20), seed=0)
    assert sides.tolist() == [0, 2, 0, 0, 0, 1, 0, 0, 1, 2, 0, 2, 0, 0, 1, 1, 0, 0, 2, 0]


def test_another_seed_splits_otherwise_and_another_size_does_not(competition: Path) -> None:
    first, other, larger = opened(competition), opened(competition, seed=1), opened(competition, max_size=48)
    assert other.split_hash != first.split_hash
    assert (other.fingerprint, larger.fingerprint) == (first.fingerprint, first.fingerprint)
    assert larger.split_hash == first.split_hash


def test_the_fingerprint_follows_labels_and_pixels(competition: Path) -> None:
    first = opened(competition).fingerprint
    draw(77).save(competition / "test_upload" / "t0.jpg")
    second = opened(competition).fingerprint
    (competition / "train" / "1" / "0_1.jpg").rename(competition / "train" / "2" / "0_1.jpg")
    table = competition / "train.csv"
    table.write_text(table.read_text().replace("0_1.jpg,1", "0_1.jpg,2"))
    assert len({first, second, opened(competition).fingerprint}) == 3


@pytest.mark.parametrize("count", [4, 7, 20, 101])
def test_each_class_is_shared_out_by_70_15_15(count: int) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(3), count))
    sides = assign_splits(labels, np.arange(len(labels)), seed=5)
    held_out = max(1, round(0.15 * count))
    for label in range(3):
        assert np.bincount(sides[labels == label]).tolist() == [count - 2 * held_out, held_out, held_out]


def test_a_group_stays_on_one_side_and_splits_keep_their_size() -> None:
    rng = np.random.default_rng(0)
    labels, groups = rng.integers(0, 4, 400), rng.integers(0, 150, 400)
    sides = assign_splits(labels, groups, seed=0)
    assert all(len(set(sides[groups == group])) == 1 for group in set(groups.tolist()))
    np.testing.assert_allclose(np.bincount(sides) / 400, [0.70, 0.15, 0.15], atol=0.02)


def test_near_duplicates_are_kept_together_and_those_of_the_test_are_listed(competition: Path) -> None:
    for n in range(EACH):
        copy = Image.open(competition / "train" / "1" / f"{n}_1.jpg").resize((60, 45))
        copy.save(competition / "train" / "10" / f"{n}_10.jpg", quality=90)
    Image.open(competition / "train" / "2" / "3_2.jpg").save(
        competition / "test_upload" / "t4.jpg", quality=80
    )
    found = opened(competition)
    side = {name: part.name for part in (found.train, found.val, found.holdout) for name in part.ids}
    assert all(side[f"{n}_1.jpg"] == side[f"{n}_10.jpg"] for n in range(EACH))
    assert found.test_duplicates == (("t4.jpg", "3_2.jpg"),)


def test_images_that_are_all_alike_cannot_be_split(competition: Path) -> None:
    for path in competition.glob("train/*/*"):
        draw(0).save(path)
    with pytest.raises(
        ValueError, match=r"no image is left for val: the 24 labelled images are near-dup.* of 1,"
    ):
        opened(competition)


# ---- what cannot be used


def test_broken_training_images_are_left_out_and_listed(tmp_path: Path) -> None:
    root = make_competition(tmp_path / "cars", each=110)
    (root / "train" / "1" / "5_1.jpg").write_bytes(b"")
    (root / "train" / "1" / "7_1.jpg").unlink()
    draw(0).save(root / "train" / "2" / "9_2.jpg", format="GIF")
    found = opened(root)
    assert [(item.id, item.reason.split(":")[0]) for item in found.excluded] == [
        ("5_1.jpg", "the file is empty"),
        ("7_1.jpg", "the file is missing"),
        ("9_2.jpg", "not a JPEG, PNG, WebP or BMP image"),
    ]
    assert found.excluded[0].path == str(root / "train" / "1" / "5_1.jpg")
    ids = [*found.train.ids, *found.val.ids, *found.holdout.ids]
    assert len(ids) == 327
    assert not {item.id for item in found.excluded} & set(ids)
    for part in (found.train, found.val, found.holdout, found.test):
        for name, row in zip(part.ids, part.rows, strict=True):
            [path] = [*root.glob(f"train/*/{name}"), *root.glob(f"test_upload/{name}")]
            np.testing.assert_array_equal(found.images[row], np.asarray(Image.open(path).resize((53, 40), 1)))


def change_table(old: str, new: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        table = root / "train.csv"
        assert old in table.read_text()
        table.write_text(table.read_text().replace(old, new))

    return change


def break_test_image(root: Path) -> None:
    path = root / "test_upload" / "t2.jpg"
    path.write_bytes(path.read_bytes()[:-300])


def list_test_image_twice(root: Path) -> None:
    sample = root / "sample-submission.csv"
    sample.write_text(sample.read_text() + "t1.jpg,0\n")


def keep_three_of_a_class(root: Path) -> None:
    table = root / "train.csv"
    names = [f"{n}_10.jpg" for n in range(3, EACH)]
    table.write_text(
        "".join(row for row in table.read_text().splitlines(True) if row.split(",")[0] not in names)
    )


def keep_one_class(root: Path) -> None:
    table = root / "train.csv"
    table.write_text(
        "".join(row for row in table.read_text().splitlines(True) if row.endswith((",1\n", "Category\n")))
    )


def empty_the_folder(root: Path) -> None:
    shutil.rmtree(root)
    root.mkdir()


def empty_a_class_folder(root: Path) -> None:
    (root / "train.csv").unlink()
    shutil.rmtree(root / "train" / "10")
    (root / "train" / "10").mkdir()


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "too many broken": (
        lambda root: (root / "train" / "2" / "1_2.jpg").write_bytes(b""),
        r"1 of 24 labelled images cannot be read, more than 1%: '.*1_2.jpg': the file is empty; fetch",
    ),
    "broken test": (
        break_test_image,
        r"1 test images cannot be read: '.*t2.jpg': it cannot be decoded: image file is truncated",
    ),
    "missing test": (
        lambda root: (root / "test_upload" / "t2.jpg").unlink(),
        r"1 test images cannot be read: '.*t2.jpg': the file is missing; fetch them again",
    ),
    "test not in sample": (
        lambda root: draw(0).save(root / "test_upload" / "more.jpg"),
        r"1 images of '.*test_upload' are not in '.*sample-submission.csv', the first is 'more.jpg'",
    ),
    "no test folder": (
        lambda root: shutil.rmtree(root / "test_upload"),
        r"sample-submission.csv' lists test images, but there is no test_upload or test folder",
    ),
    "small class": (keep_three_of_a_class, "class '10' has 3 readable images, but 4 are needed"),
    "one class": (keep_one_class, "all images are of the class '1': two classes are needed"),
    "label without folder": (
        change_table("3_1.jpg,1\n", "3_1.jpg,1.0\n"),
        r"the class '1.0' of '.*train.csv' has no folder in '.*train'",
    ),
    "id twice": (change_table("3_1.jpg", "4_1.jpg"), "the id '4_1.jpg' is there 2 times"),
    "test id twice": (
        list_test_image_twice,
        r"more than once in the sample file .*sample-submission.csv: 't1.jpg'",
    ),
    "empty folder": (
        empty_the_folder,
        "no images in '.*cars': it needs train.csv, or a folder for each class",
    ),
    "empty class folder": (empty_a_class_folder, r"the class folder '.*train/10' holds no images"),
    "no rows": (
        lambda root: (root / "train.csv").write_text("Id,Category\n"),
        "no images in '.*cars'",
    ),
    "missing column": (
        change_table("Category", "Kind"),
        r"train.csv' has the columns \['id', 'kind'\]; needed are Id,Category or path,label",
    ),
    "other separator": (change_table(",", ";"), r"has the columns \['id;category'\]; needed are Id,Category"),
    "no text": (
        lambda root: (root / "train.csv").write_bytes(b"\x89PNG\xff\xfe"),
        "train.csv' cannot be read as CSV",
    ),
    "empty csv": (
        lambda root: (root / "train.csv").write_text(""),
        "cannot be read as CSV: No columns to parse",
    ),
    "no train folder": (
        lambda root: shutil.rmtree(root / "train"),
        r"there is no train folder \(or train.zip\) beside '.*train.csv'",
    ),
    "id outside": (
        change_table("3_1.jpg", "../3_1.jpg"),
        r"names '../3_1.jpg', which is not a path inside its",
    ),
    "absolute id": (
        change_table("3_1.jpg", "/etc/passwd"),
        "names '/etc/passwd', which is not a path inside",
    ),
    "empty id": (change_table("3_1.jpg,", ","), "names '', which is not a path inside its folder"),
    "class without name": (
        lambda root: (root / "classes.txt").write_text("1 sedan\n2 van\n"),
        "classes.txt has no line for the class '10'",
    ),
    "odd classes.txt": (
        lambda root: (root / "classes.txt").write_text("sedan\n"),
        r"classes.txt' has the line 'sedan'; needed is '<category> <name>'",
    ),
    "test.csv without path": (
        lambda root: (root / "test.csv").write_text("name\na.jpg\n"),
        r"test.csv' has the columns \['name'\]; needed is path",
    ),
    "damaged inner zip": (
        lambda root: (
            shutil.rmtree(root / "train"),
            (root / "train.zip").write_bytes(b"PK\x03\x04 cut short"),
        ),
        "'train.zip' is damaged: File is not a zip file; fetch it again",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_data_set_that_cannot_be_used_is_named_in_one_line(competition: Path, case: str) -> None:
    spoil, message = BAD[case]
    spoil(competition)
    with pytest.raises(ValueError, match=message) as found:
        opened(competition)
    assert "\n" not in str(found.value)


def test_a_path_that_is_no_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the data '.*nowhere' does not exist: give a folder or a zip"):
        opened(tmp_path / "nowhere")
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"the data '.*a.txt' is neither a folder nor an intact zip"):
        opened(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="max_size=0 must be at least 1 pixel"):
        opened(tmp_path, max_size=0)


def link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = 0o120777 << 16
    return info


@pytest.mark.parametrize(
    ("member", "message"),
    [
        ("../evil.jpg", "names '../evil.jpg', outside its folder: it is not safe to unpack"),
        ("/etc/evil", "names '/etc/evil', outside its folder"),
        ("..\\evil.jpg", "outside its folder"),
        ("C:/evil.jpg", "outside its folder"),
        (link("train/1/a.jpg"), "holds the link 'train/1/a.jpg': pack the file itself"),
        ("zeros", r"would unpack to 110,000,000 bytes, over 100 times its own size"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_zip_that_could_do_harm_is_not_unpacked(
    tmp_path: Path, member: str | zipfile.ZipInfo, message: str, nested: bool
) -> None:
    content = bytes(110_000_000) if member == "zeros" else b"/etc/passwd"
    with zipfile.ZipFile(tmp_path / "cars.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed:
        packed.writestr(member, content)
    if nested:
        with zipfile.ZipFile(tmp_path / "outer.zip", "w") as packed:
            packed.write(tmp_path / "cars.zip", "train.zip")
    with pytest.raises(ValueError, match=message):
        opened(tmp_path / ("outer.zip" if nested else "cars.zip"))
    assert not any(path.is_dir() for path in (tmp_path / "cache" / "unpacked").iterdir())
    assert not list(tmp_path.rglob("evil*"))


def test_a_loop_of_links_is_a_missing_image(tmp_path: Path) -> None:
    root = make_competition(tmp_path / "cars", each=40)
    loop = root / "train" / "1" / "3_1.jpg"
    loop.unlink()
    os.symlink(loop, loop)
    [excluded] = opened(root).excluded
    assert excluded.id == "3_1.jpg"


# ---- travelling


def test_splits_are_sent_without_their_images(splits: Splits) -> None:
    sent = pickle.dumps(splits)
    assert len(sent) < 5_000
    again = pickle.loads(sent)
    row = splits.val.rows[0]
    np.testing.assert_array_equal(again.images[row], splits.images[row])


# ---- batches


def by_position(batches: Iterator[Batch]) -> np.ndarray:
    """(N, 3, S, S) images of an epoch in the order of the split."""
    found = {
        int(row): image for batch in batches for row, image in zip(batch.positions, batch.images, strict=True)
    }
    return np.stack([found[row].numpy() for row in range(len(found))])


def test_a_batch_holds_what_the_split_says(splits: Splits) -> None:
    loader = Loader(splits.images, splits.train, image_size=24, batch_size=5)
    batches = list(loader.epoch(0))
    assert [len(batch.labels) for batch in batches] == [5, 5, 5, 3]
    assert len(loader) == 4
    assert batches[0].images.shape == (5, 3, 24, 24)
    assert batches[0].images.dtype == torch.uint8
    assert batches[0].images.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_array_equal(np.concatenate([batch.positions for batch in batches]), np.arange(18))
    np.testing.assert_array_equal(torch.cat([batch.labels for batch in batches]), splits.train.labels)
    for row, image in zip(splits.train.rows, by_position(iter(batches)), strict=True):
        expected = cv2.resize(splits.images[row], (24, 24), interpolation=cv2.INTER_AREA)
        np.testing.assert_array_equal(image.transpose(1, 2, 0), expected)


def test_the_test_split_has_no_labels(splits: Splits) -> None:
    [batch] = Loader(splits.images, splits.test, image_size=16, batch_size=8).epoch(0)
    assert batch.labels.tolist() == [-1] * TESTS


@pytest.mark.parametrize(("height", "width"), [(30, 60), (10, 60), (10, 12), (24, 24)])
def test_resize_keeps_the_mean_whether_it_shrinks_or_grows(height: int, width: int) -> None:
    image = np.asarray(draw(0, width, height))
    found = resize(image, 24)
    assert found.shape == (24, 24, 3)
    np.testing.assert_allclose(found.mean((0, 1)), image.mean((0, 1)), atol=4)


@pytest.mark.parametrize("name", AUGMENTS)
def test_each_augmentation_depends_on_seed_epoch_and_position_alone(splits: Splits, name: str) -> None:
    loader = Loader(splits.images, splits.train, image_size=24, batch_size=5, augment=AUGMENTS[name], seed=3)
    first = by_position(loader.epoch(0))
    np.testing.assert_array_equal(by_position(loader.epoch(0)), first)
    settings = {"image_size": 24, "augment": AUGMENTS[name], "seed": 3}
    mixed = Loader(splits.images, splits.train, batch_size=4, shuffle=True, **settings)
    np.testing.assert_array_equal(by_position(mixed.epoch(0)), first)
    other_seed = Loader(splits.images, splits.train, batch_size=4, **{**settings, "seed": 4})
    varies = AUGMENTS[name].crop is not None or len(AUGMENTS[name].steps) > 0
    assert (by_position(loader.epoch(1)) != first).any() == varies
    assert (by_position(other_seed.epoch(0)) != first).any() == varies


def test_the_same_image_at_two_positions_is_cropped_in_two_ways(splits: Splits) -> None:
    twice = replace(
        splits.train, ids=("a", "b"), labels=np.zeros(2, np.int64), rows=splits.train.rows[[0, 0]]
    )
    loader = Loader(splits.images, twice, image_size=24, batch_size=2, augment=AUGMENTS["crop"])
    first, second = by_position(loader.epoch(0))
    assert (first != second).any()


@pytest.mark.parametrize("name", VIEWS)
def test_each_view_is_the_same_every_time(splits: Splits, name: str) -> None:
    loader = Loader(splits.images, splits.val, image_size=24, batch_size=5, view=VIEWS[name])
    first = by_position(loader.epoch(0))
    np.testing.assert_array_equal(by_position(loader.epoch(1)), first)


def test_each_view_shows_what_its_row_says(splits: Splits) -> None:
    image = splits.images[splits.val.rows[0]]
    height, width = image.shape[:2]
    plain = apply_view(image, VIEWS["plain"], 24)
    np.testing.assert_array_equal(plain, resize(image, 24))
    np.testing.assert_array_equal(apply_view(image, VIEWS["flip"], 24), plain[:, ::-1])
    corner = image[: round(0.88 * height), round(0.12 * width) :]
    np.testing.assert_array_equal(apply_view(image, VIEWS["top_right"], 24), resize(corner, 24))
    for name, wanted in (
        ("brighter", plain * 1.15),
        ("darker", plain * 0.87),
        ("more_contrast", (plain - 127.5) * 1.2 + 127.5),
        ("less_contrast", (plain - 127.5) * 0.8 + 127.5),
    ):
        assert np.abs(apply_view(image, VIEWS[name], 24) - wanted.clip(0, 255)).max() <= 0.5 + 1e-9
    speck = np.full((1, 1, 3), 9, np.uint8)
    assert all(apply_view(speck, row, 2).shape == (2, 2, 3) for row in VIEWS.values())


def test_the_plain_view_is_the_plain_image_to_the_bit(splits: Splits) -> None:
    views = [None, VIEWS["plain"]]
    first, second = (
        by_position(Loader(splits.images, splits.val, image_size=24, batch_size=5, view=view).epoch(0))
        for view in views
    )
    np.testing.assert_array_equal(first, second)


def test_loader_processes_change_nothing_and_live_on(splits: Splits) -> None:
    settings = {"image_size": 24, "batch_size": 5, "augment": AUGMENTS["strong"], "shuffle": True, "seed": 7}
    ours = Loader(splits.images, splits.train, **settings)
    theirs = Loader(splits.images, splits.train, processes=2, **settings)
    state = torch.get_rng_state()
    next(iter(theirs.epoch(5)))  # an epoch that is left early does not disturb the next
    for epoch in (0, 1, 0):
        for expected, found in zip(ours.epoch(epoch), theirs.epoch(epoch), strict=True):
            assert torch.equal(found.images, expected.images)
            assert torch.equal(found.labels, expected.labels)
            assert found.images.is_contiguous(memory_format=torch.channels_last)
            np.testing.assert_array_equal(found.positions, expected.positions)
    assert torch.equal(torch.get_rng_state(), state)


def test_shuffling_depends_on_seed_and_epoch(splits: Splits) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        loader = Loader(splits.images, splits.train, image_size=8, batch_size=5, seed=seed, shuffle=True)
        return np.concatenate([batch.positions for batch in loader.epoch(epoch)]).tolist()

    assert order(0, 0) == order(0, 0)
    assert sorted(order(0, 0)) == list(range(18))
    assert len({tuple(order(seed, epoch)) for seed in range(2) for epoch in range(2)}) == 4


def test_drop_last_leaves_whole_batches_and_refuses_to_leave_none(splits: Splits) -> None:
    loader = Loader(splits.images, splits.train, image_size=8, batch_size=5, drop_last=True)
    assert [len(batch.positions) for batch in loader.epoch(0)] == [5, 5, 5]
    assert len(loader) == 3
    with pytest.raises(ValueError, match="batch_size=19 is more than the 18 images of train"):
        Loader(splits.images, splits.train, image_size=8, batch_size=19, drop_last=True)


def test_steps_are_drawn_independently_of_each_other(splits: Splits) -> None:
    """A flip and a grey image, each with probability 1/2, come in all four combinations equally often."""
    augment = Augment(crop=None, steps=(Step("HorizontalFlip", {"p": 0.5}), Step("ToGray", {"p": 0.5})))
    split = replace(splits.train, ids=splits.train.ids[:1], rows=splits.train.rows[:1])
    plain = by_position(
        Loader(splits.images, split, image_size=24, batch_size=1, augment=Augment(None)).epoch(0)
    )[0]
    loader = Loader(splits.images, split, image_size=24, batch_size=1, augment=augment)
    counts = {(flipped, grey): 0 for flipped in (False, True) for grey in (False, True)}
    for epoch in range(400):
        [image] = by_position(loader.epoch(epoch))
        grey = bool((image[0] == image[1]).all())
        shade = cv2.cvtColor(image.transpose(1, 2, 0), cv2.COLOR_RGB2GRAY).astype(int)
        expected = cv2.cvtColor(plain.transpose(1, 2, 0), cv2.COLOR_RGB2GRAY).astype(int)
        counts[bool(np.abs(shade - expected).mean() > np.abs(shade[:, ::-1] - expected).mean()), grey] += 1
    assert all(70 <= count <= 130 for count in counts.values()), counts


def test_a_random_crop_keeps_its_share_of_the_image(splits: Splits) -> None:
    """On ramps from left to right and from top to bottom, the spread of values tells the crop's sides."""
    ramp = np.zeros((200, 400, 3), np.uint8)
    ramp[..., 0] = np.linspace(0, 255, 400)[None]
    ramp[..., 1] = np.linspace(0, 255, 200)[:, None]
    split = replace(splits.train, ids=("ramp",), labels=np.zeros(1, np.int64), rows=np.zeros(1, np.int64))
    loader = Loader([ramp], split, image_size=64, batch_size=1, augment=Augment(crop=(0.3, 0.6)))  # type: ignore[arg-type]
    shares, ratios = [], []
    for epoch in range(300):
        [image] = by_position(loader.epoch(epoch))
        width, height = np.ptp(image[0].astype(float)) / 255, np.ptp(image[1].astype(float)) / 255
        shares.append(width * height)
        ratios.append(width / height)
    assert 0.26 < min(shares) < 0.33
    assert 0.55 < max(shares) < 0.62
    assert 0.72 < min(ratios) < 0.80
    assert 1.25 < max(ratios) < 1.38


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (Step("HorizontalFlop"), r"albumentations 2\S+ has no transform 'HorizontalFlop'"),
        (Step("Compose"), "has no transform 'Compose'"),
        (Step("HorizontalFlip", {"chance": 0.5}), "albumentations refuses .*chance"),
        (Step("HorizontalFlip", {"p": 2}), "albumentations refuses .*less than or equal to 1"),
    ],
)
def test_a_step_that_albumentations_does_not_know_is_refused(
    splits: Splits, step: Step, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Loader(
            splits.images, splits.train, image_size=8, batch_size=5, augment=Augment(crop=None, steps=(step,))
        )


def test_augment_and_view_exclude_each_other(splits: Splits) -> None:
    with pytest.raises(ValueError, match="augment or view, not both"):
        Loader(splits.images, splits.val, image_size=8, batch_size=5, augment=AUGMENTS["crop"], view=View())


@pytest.mark.timeout(20)
def test_a_pipe_and_a_device_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(ValueError, match="is neither a folder nor an intact zip"):
            open_dataset(path, cache_dir=tmp_path / "cache", max_size=48)
