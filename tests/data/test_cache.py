"""Images of every kind come out as upright RGB, and the cache of them is whole or made anew."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from carmodels.data import decode
from carmodels.data.cache import ImageCache, open_images
from carmodels.data.decode import BrokenImage, read_image, shrink
from carmodels.data.digests import file_digests
from carmodels.data.duplicates import DUPLICATE_BITS, near_duplicate_groups, perceptual_hash
from carmodels.data.transforms import resize

from synthetic import draw, save_many


def error_db(first: np.ndarray, second: np.ndarray) -> float:
    """Peak signal-to-noise ratio, decibels."""
    return float(10 * np.log10(255**2 / max(1e-9, np.mean((first.astype(float) - second) ** 2))))


@pytest.mark.parametrize(
    ("suffix", "options"), [("jpg", {"quality": 97}), ("png", {}), ("webp", {"lossless": True})]
)
def test_each_format_keeps_its_colours(tmp_path: Path, suffix: str, options: dict[str, object]) -> None:
    image = draw(0)
    image.save(tmp_path / f"a.{suffix}", **options)
    assert error_db(np.asarray(read_image(tmp_path / f"a.{suffix}")), np.asarray(image)) > 30


@pytest.mark.parametrize(
    ("mode", "suffix"), [("L", "jpg"), ("1", "png"), ("P", "png"), ("LA", "png"), ("CMYK", "jpg")]
)
def test_each_mode_becomes_rgb_of_the_same_look(tmp_path: Path, mode: str, suffix: str) -> None:
    image = draw(0).convert(mode)
    image.save(tmp_path / f"a.{suffix}")
    found = read_image(tmp_path / f"a.{suffix}")
    assert found.mode == "RGB"
    assert error_db(np.asarray(found), np.asarray(image.convert("RGB"))) > 25


def test_grey_of_16_bits_keeps_its_shades(tmp_path: Path) -> None:
    grey = np.asarray(draw(0).convert("L"))
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "a.png"))[..., 0], grey)


@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_what_is_transparent_becomes_white(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (8, 8), (200, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 4, 8))
    image.convert(mode).save(tmp_path / "a.png")
    found = np.asarray(read_image(tmp_path / "a.png"))
    assert (found[:, :4] == 255).all()
    assert (found[:, 4:] == (200, 0, 0)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_rotated_photograph_comes_out_upright(tmp_path: Path, orientation: int) -> None:
    upright = draw(0)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # EXIF orientation -> Image.Transpose as it was stored
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "a.png")), np.asarray(upright))


def test_a_broken_image_is_told_from_an_empty_a_missing_and_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    draw(0).save(path)
    whole = path.read_bytes()
    with pytest.raises(BrokenImage, match="missing"):
        read_image(tmp_path / "no.jpg")
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BrokenImage, match="cannot be decoded: image file is truncated"):
        read_image(path)
    path.write_bytes(b"")
    with pytest.raises(BrokenImage, match="the file is empty"):
        read_image(path)
    draw(0).save(path, format="GIF")
    with pytest.raises(BrokenImage, match="not a JPEG, PNG, WebP or BMP image: it begins with b'GIF8"):
        read_image(path)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_an_image_with_damaged_exif_is_read_as_it_is_stored(tmp_path: Path, kind: str) -> None:
    draw(0).save(tmp_path / "plain", format=kind, dpi=(300, 300))
    draw(0).save(tmp_path / "odd", format=kind, dpi=(300, 300), exif=b"Exif\0\0" + bytes(40))
    plain, odd = (np.asarray(read_image(tmp_path / name)) for name in ("plain", "odd"))
    np.testing.assert_array_equal(plain, odd)


@pytest.mark.filterwarnings("ignore")  # Pillow's, of odd metadata
def test_damaged_bytes_raise_nothing_but_value_errors(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("JPEG", "MPO", "PNG", "WEBP", "BMP"):
        draw(0).save(tmp_path / "whole", format=kind, **({} if kind == "BMP" else {"exif": exif}))
        whole = np.frombuffer((tmp_path / "whole").read_bytes(), np.uint8)
        for _ in range(60):
            damaged = whole.copy()
            damaged[rng.integers(0, min(300, len(damaged)), 3)] = rng.integers(0, 256, 3)
            (tmp_path / "damaged").write_bytes(damaged.tobytes())
            with contextlib.suppress(ValueError):
                assert read_image(tmp_path / "damaged").mode == "RGB"


def test_an_image_of_more_than_178_megapixels_is_refused_by_name(tmp_path: Path) -> None:
    Image.new("1", (20_000, 9_000)).save(tmp_path / "bomb.png")
    with pytest.raises(ValueError, match=r"bomb.png' is too large: .*180000000 pixels"):
        read_image(tmp_path / "bomb.png")


@pytest.mark.parametrize(
    ("size", "expected"), [((640, 480), (128, 171)), ((480, 640), (171, 128)), ((90, 70), (70, 90))]
)
def test_images_shrink_to_twice_max_size_and_never_grow(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert shrink(draw(0, *size), max_size=64).shape == (*expected, 3)


@pytest.mark.parametrize("max_size", [96, 160])
@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
def test_sizes_from_the_cache_are_within_40_db_of_decoding_afresh(
    tmp_path: Path, name: str, max_size: int
) -> None:
    photograph = load_sample_image(name)
    path = tmp_path / "a.png"
    Image.fromarray(photograph).save(path)
    cached = open_images([path], tmp_path / "cache", max_size, on_progress=None)[0]
    for image_size in range(32, max_size + 1, 32):
        assert error_db(resize(cached, image_size), resize(photograph, image_size)) >= 40


def test_an_estimate_comes_first_and_is_near_what_the_cache_takes(tmp_path: Path) -> None:
    paths = save_many(tmp_path / "images", 5)
    told: list[int] = []
    open_images(paths, tmp_path / "cache", 16, None, on_estimate=told.append)
    assert told == [pytest.approx((tmp_path / "cache" / "pixels.bin").stat().st_size, rel=0.1)]
    open_images(paths, tmp_path / "cache", 16, None, on_estimate=told.append)
    assert len(told) == 1


def test_a_cache_beyond_the_limit_is_refused_before_it_is_built(tmp_path: Path) -> None:
    paths = save_many(tmp_path / "images", 3)
    message = r"at up to 32 px would take 0.0 GB in .*room for 0.0 GB: give --cache DIR"
    with pytest.raises(ValueError, match=message):
        open_images(paths, tmp_path / "images" / "a", 32, None, limit=1000)
    assert not (tmp_path / "images" / "a").exists()


def test_a_cache_that_another_process_is_building_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = save_many(tmp_path / "images", 3)
    other = tmp_path / "images" / "other"
    open_images(paths, other, 32, None)
    glob = Path.glob

    def moved(self: Path, pattern: str) -> Iterator[Path]:
        found = list(glob(self, pattern))
        if pattern == "*/index.json":
            other.rename(other.with_name("moved"))
        return iter(found)

    monkeypatch.setattr(Path, "glob", moved)
    assert len(open_images(paths, tmp_path / "images" / "new", 32, None)) == 3


def test_caches_that_were_not_opened_for_a_week_make_room(tmp_path: Path) -> None:
    paths = save_many(tmp_path / "images", 3)
    for name in ("old", "recent"):
        open_images(paths, tmp_path / name, 32, None)
        folder = tmp_path / "images" / name
        folder.parent.mkdir(exist_ok=True)
        (tmp_path / name).rename(folder)
    size = sum(file.stat().st_size for file in folder.iterdir())
    week_ago = time.time() - 8 * 86400
    os.utime(tmp_path / "images" / "old" / "index.json", (week_ago, week_ago))
    open_images(paths, tmp_path / "images" / "new", 32, None, limit=round(2.5 * size))
    left = {path.parent.name for path in (tmp_path / "images").glob("*/index.json")}
    assert left == {"recent", "new"}
    with pytest.raises(ValueError, match="where there is room for"):
        open_images(paths, tmp_path / "images" / "newer", 32, None, limit=round(2.5 * size))


def test_the_cache_holds_the_images_and_the_reasons_for_what_it_lacks(tmp_path: Path) -> None:
    paths = save_many(tmp_path / "images", 5)
    paths[2].write_bytes(b"")
    calls: list[tuple[int, int]] = []
    images = open_images(paths, tmp_path / "cache", 32, lambda done, total: calls.append((done, total)))
    assert calls == [(n + 1, 5) for n in range(5)]
    assert images.rows.tolist() == [0, 1, -1, 2, 3]
    assert images.broken == {2: "the file is empty"}
    assert len(images) == 4
    for position in (0, 1, 3, 4):
        expected = shrink(read_image(paths[position]), 32)
        np.testing.assert_array_equal(images[int(images.rows[position])], expected)
    assert not images[0].flags.writeable


def test_a_second_opening_decodes_nothing(tmp_path: Path) -> None:
    paths = save_many(tmp_path / "images", 3)
    open_images(paths, tmp_path / "cache", 32, None)
    calls: list[int] = []
    open_images(paths, tmp_path / "cache", 32, lambda done, total: calls.append(done))
    assert not calls


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("pixels.bin", "cut"),
        ("pixels.bin", "removed"),
        ("pixels.bin", "flipped"),
        ("index.json", "cut"),
        ("index.json", "removed"),
        ("index.json", "flipped"),
    ],
)
def test_a_damaged_cache_is_made_anew(tmp_path: Path, name: str, damage: str) -> None:
    paths = save_many(tmp_path / "images", 3)
    before = open_images(paths, tmp_path / "cache", 32, None)[1].copy()
    file = tmp_path / "cache" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink()
    if damage != "removed":
        file.write_bytes(content[:-1] if damage == "cut" else content)
    np.testing.assert_array_equal(open_images(paths, tmp_path / "cache", 32, None)[1], before)


def counting(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Collects the folder of each cache whose checksums are verified."""
    verified: list[Path] = []
    verify = ImageCache._verify

    def counted(cache: ImageCache, checksums: list[int]) -> None:
        verified.append(cache.path)
        verify(cache, checksums)

    monkeypatch.setattr(ImageCache, "_verify", counted)
    return verified


def test_a_copy_with_another_modification_time_is_verified_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, verified = save_many(tmp_path / "images", 3), counting(monkeypatch)
    before = open_images(paths, tmp_path / "cache", 32, None)
    shutil.copytree(tmp_path / "cache", tmp_path / "copy")
    os.utime(tmp_path / "copy" / "pixels.bin", (1, 1))
    for _ in range(3):
        opened = ImageCache(tmp_path / "copy")
        np.testing.assert_array_equal(opened.groups, before.groups)
    assert verified == [tmp_path / "copy"]


def test_a_cache_in_a_folder_that_cannot_be_written_to_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = save_many(tmp_path / "images", 3)
    first = open_images(paths, tmp_path / "cache", 32, None)[0].copy()
    os.utime(tmp_path / "cache" / "pixels.bin", (1, 1))

    def refused(path: Path, value: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("carmodels.data.cache.write_checksummed", refused)
    monkeypatch.setattr("carmodels.data.digests.write_checksummed", refused)
    np.testing.assert_array_equal(ImageCache(tmp_path / "cache")[0], first)
    assert len(set(file_digests(paths, tmp_path / "digests" / "a.json"))) == 3


def test_a_build_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    paths = save_many(tmp_path / "images", 3)
    with pytest.raises(KeyboardInterrupt):
        open_images(paths, tmp_path / "caches" / "a", 32, stop)
    assert [path.name for path in (tmp_path / "caches").iterdir() if path.is_dir()] == []


@pytest.mark.server
def test_two_processes_that_open_at_once_build_once(tmp_path: Path) -> None:
    save_many(tmp_path / "images", 40)
    program = f"""
from pathlib import Path
from carmodels.data.cache import open_images
calls = []
paths = sorted(Path({str(tmp_path / "images")!r}).iterdir())
images = open_images(paths, Path({str(tmp_path / "cache")!r}), 32, lambda done, total: calls.append(done))
print(len(calls), sum(int(images[row].sum()) for row in range(len(images))))
"""
    running = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) for _ in range(2)]
    found = [tuple(map(int, process.communicate()[0].split())) for process in running]
    assert sorted(built for built, _ in found) == [0, 40]
    assert found[0][1] == found[1][1] > 0


def test_a_cache_is_sent_as_its_path(tmp_path: Path) -> None:
    images = open_images(save_many(tmp_path / "images", 4), tmp_path / "cache", 48, None)
    sent = pickle.dumps(images)
    assert len(sent) < 500
    again = pickle.loads(sent)
    assert isinstance(again, ImageCache)
    np.testing.assert_array_equal(again[3], images[3])


def test_groups_are_what_brute_force_finds() -> None:
    rng = np.random.default_rng(0)
    codes = [int(code) for code in rng.integers(0, 2**63, 300)]
    codes += [codes[0], codes[1] ^ 0b111111, codes[1] ^ 0b111111_111111, codes[2] ^ (2**7 - 1)]
    group = list(range(len(codes)))
    for a in range(len(codes)):
        for b in range(a):
            if (codes[a] ^ codes[b]).bit_count() <= DUPLICATE_BITS:
                low, high = sorted((group[a], group[b]))
                group = [low if g == high else g for g in group]
    found = near_duplicate_groups(np.array(codes, dtype=np.uint64))
    assert found.tolist() == group
    assert group[300:] == [0, 1, 1, 303]


def test_what_hangs_together_without_being_copies_is_cut() -> None:
    rng = np.random.default_rng(0)
    codes, steps = [int(rng.integers(0, 2**63))], 100
    for _ in range(steps):  # each differs from the one before by four bits, and from others by more
        bits = rng.choice(63, 4, replace=False)
        codes.append(codes[-1] ^ sum(1 << int(bit) for bit in bits))
    codes += codes[:5]
    alone = [int(code) for code in rng.integers(0, 2**63, 200)]
    found = near_duplicate_groups(np.array(codes + alone, dtype=np.uint64))
    assert np.bincount(found).max() <= 20
    assert found[-205:-200].tolist() == found[:5].tolist()  # copies stay together
    few = near_duplicate_groups(np.array(codes[:15], dtype=np.uint64))
    assert few.tolist() == [0] * 15


def test_large_images_are_decoded_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(0, 200, 100).save(tmp_path / "a.png")
    for least, alone in ((19_999, True), (20_000, False)):
        monkeypatch.setattr(decode, "LARGE_PIXELS", least)
        with decode.decode_slot(tmp_path / "a.png"):
            assert decode._large_image_lock.locked() == alone
        assert not decode._large_image_lock.locked()


def test_a_copy_in_another_size_and_quality_is_a_near_duplicate_and_another_image_is_not(
    tmp_path: Path,
) -> None:
    image = draw(0, 320, 240)
    image.resize((200, 150)).save(tmp_path / "copy.jpg", quality=60)
    copy, other = perceptual_hash(read_image(tmp_path / "copy.jpg")), perceptual_hash(draw(1, 320, 240))
    codes = np.array([perceptual_hash(image), other, copy], dtype=np.uint64)
    assert near_duplicate_groups(codes).tolist() == [0, 1, 0]


def test_digests_follow_the_content_and_unchanged_files_are_not_read(tmp_path: Path) -> None:
    paths = save_many(tmp_path / "images", 3)
    manifest = tmp_path / "digests" / "a.json"
    first = file_digests([*paths, tmp_path / "missing"], manifest)
    assert len(set(first)) == 4
    assert first[3] == ""
    written = manifest.stat().st_mtime_ns
    assert file_digests([*paths, tmp_path / "missing"], manifest) == first
    assert manifest.stat().st_mtime_ns == written
    paths[1].write_bytes(b"changed")
    assert [a == b for a, b in zip(file_digests(paths, manifest), first, strict=False)] == [True, False, True]
    manifest.write_bytes(manifest.read_bytes()[:-1])
    assert file_digests(paths[:1], manifest) == first[:1]


def test_opencv_keeps_to_one_thread() -> None:
    assert cv2.getNumThreads() == 1
