"""Tests of image archives: written batch by batch, read block by block, damaged."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gspn_jax import folder_lock
from gspn_jax.evaluation.image_archive import Store, image_blocks, image_count, to_pixels

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 2, 3, 3), np.uint8)
LABELS = np.arange(7) % 3
SETTINGS: dict[str, Any] = {"count": 7, "batch_size": 3, "image_size": (2, 3), "seed": 0}


def fill(store: Store, starts: list[int]) -> None:
    for start in starts:
        store.write(start, IMAGES[start : start + 3], LABELS[start : start + 3])


def test_a_file_goes_on_where_it_was_interrupted(tmp_path: Path):
    path = tmp_path / "new" / "samples.NPZ"  # any case
    with pytest.raises(KeyboardInterrupt), Store(str(path), SETTINGS) as store:
        assert store.missing() == [0, 3, 6] and not store.is_complete()
        fill(store, [3])
        raise KeyboardInterrupt
    assert not path.exists()
    with pytest.raises(
        ValueError, match=r"npz: expected the settings that .*parts was made with \(seed=0\), got seed=1"
    ):
        Store(str(path), SETTINGS | {"seed": 1})
    with Store(str(path), SETTINGS) as store:
        assert store.missing() == [0, 6]
        fill(store, [0, 6])
        store.assemble()
        np.testing.assert_array_equal(store.first(5), IMAGES[:5])
    assert sorted(file.name for file in path.parent.iterdir()) == ["samples.NPZ", "samples.json"]
    with np.load(path) as file:
        np.testing.assert_array_equal(file["arr_0"], IMAGES)
        np.testing.assert_array_equal(file["arr_1"], LABELS)
    with Store(str(path), SETTINGS) as store:
        assert store.is_complete()
    assert sorted(file.name for file in path.parent.iterdir()) == ["samples.NPZ", "samples.json"]
    with pytest.raises(ValueError, match=r"npz: .*samples.NPZ was made with \(count=7\), got count=8"):
        Store(str(path), SETTINGS | {"count": 8})


def test_a_begun_file_may_get_another_count(tmp_path: Path):
    path = str(tmp_path / "samples.npz")
    with Store(path, SETTINGS | {"count": 4}) as store:
        fill(store, [0])
        store.write(3, IMAGES[3:4], LABELS[3:4])
    with Store(path, SETTINGS) as store:
        assert store.missing() == [3, 6]  # the second batch has one image of three
        fill(store, [3, 6])
        store.assemble()
        np.testing.assert_array_equal(store.first(7), IMAGES)


@pytest.mark.parametrize("junk", [b"junk", b"", "floats", "rows", "columns"])
def test_junk_among_the_batches_is_made_again(tmp_path: Path, junk: Any, caplog: pytest.LogCaptureFixture):
    path, part = str(tmp_path / "a.npz"), tmp_path / "a.parts" / "00000003.npz"
    with Store(path, SETTINGS) as store:
        fill(store, [0, 3, 6])
    if isinstance(junk, bytes):
        part.write_bytes(junk)
    else:
        images = {"floats": IMAGES[3:6] / 2, "rows": IMAGES[3:5], "columns": np.asfortranarray(IMAGES[3:6])}[junk]
        np.savez(part, images=images, labels=LABELS[3:6])
    with Store(path, SETTINGS) as store:
        assert store.missing() == [3] and f"{part}: not a batch of this run" in caplog.text
        fill(store, [3])
        store.assemble()
        np.testing.assert_array_equal(store.first(7), IMAGES)


def test_a_changed_batch_is_named_and_removed(tmp_path: Path):
    path, part = str(tmp_path / "a.npz"), tmp_path / "a.parts" / "00000003.npz"
    with Store(path, SETTINGS) as store:
        fill(store, [0, 3, 6])
        content = part.read_bytes()
        place = content.index(IMAGES[3:6].tobytes())
        part.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(ValueError, match=r"npz: .*00000003.npz was damaged \(Bad CRC.*\) and is removed; the same"):
            store.assemble()
        assert not (tmp_path / "a.npz").exists() and store.missing() == [3]
        fill(store, [3])
        store.assemble()
        np.testing.assert_array_equal(store.first(7), IMAGES)


def test_two_runs_for_one_file(tmp_path: Path):
    path = str(tmp_path / "a.npz")
    with Store(path, SETTINGS) as store:
        with pytest.raises(folder_lock.FolderInUse, match="a.parts is in use for sampling by process"):
            Store(path, SETTINGS).__enter__()
        late = Store(path, SETTINGS | {"seed": 1})  # nothing to compare with yet
        fill(store, [0, 3, 6])
        store.assemble()
    with pytest.raises(ValueError, match=r"npz: .*a.npz was made with \(seed=0\), got seed=1"):
        late.__enter__()


def test_a_failed_run_does_not_block_another(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt), Store(str(tmp_path / "a.npz"), SETTINGS):
        raise KeyboardInterrupt
    with Store(str(tmp_path / "a.npz"), SETTINGS | {"seed": 1}) as store:
        assert store.missing() == [0, 3, 6]


def test_targets_that_cannot_be_written(tmp_path: Path):
    with pytest.raises(ValueError, match="npz: expected a name that ends in .npz, got samples"):
        Store("samples", SETTINGS)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="npz: expected a folder that can be written, got .*file"):
        Store(str(tmp_path / "file" / "a.npz"), SETTINGS)
    np.savez(tmp_path / "a.npz", IMAGES)
    with pytest.raises(ValueError, match="npz: expected a new file or one that this command made, got .*a.npz"):
        Store(str(tmp_path / "a.npz"), SETTINGS)
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(ValueError, match="npz: expected settings as a JSON object in .*a.json, got a list"):
        Store(str(tmp_path / "a.npz"), SETTINGS)
    assert not (tmp_path / "a.parts").exists()  # checked before anything is made


def test_batches_of_another_kind(tmp_path: Path):
    with Store(str(tmp_path / "a.npz"), SETTINGS) as store:
        for images in (IMAGES[:2], IMAGES[:3] / 255, IMAGES[:3, :1]):
            with pytest.raises(ValueError, match=r"images: expected uint8 \(3, 2, 3, 3\), got "):
                store.write(0, images, LABELS[:3])
    assert json.loads((tmp_path / "a.parts" / "settings.json").read_text())["image_size"] == [2, 3]


def test_images_come_in_blocks(tmp_path: Path):
    path = str(tmp_path / "a.npz")
    np.savez(path, IMAGES)
    blocks = list(image_blocks(path, 3))
    assert [len(block) for block in blocks] == [3, 3, 1] and image_count(path) == 7
    np.testing.assert_array_equal(np.concatenate(blocks), IMAGES)


@pytest.mark.parametrize("images,words", [
    (IMAGES.astype(np.float32), r"arr_0 of float32 \(7, 2, 3, 3\)"),
    (IMAGES[..., 0], r"arr_0 of uint8 \(7, 2, 3\)"),
    (IMAGES[:, :0], r"arr_0 of uint8 \(7, 0, 3, 3\)"),
    (np.asfortranarray(IMAGES), "arr_0 in Fortran order"),
    (None, "No such file"),
    (b"junk", "not a zip file"),
])  # fmt: skip
def test_files_without_images(tmp_path: Path, images: Any, words: str):
    path = tmp_path / "a.npz"
    if isinstance(images, bytes):
        path.write_bytes(images)
    elif images is not None:
        np.savez(path, images)
    for read in (image_count, lambda path: list(image_blocks(path))):
        with pytest.raises(
            ValueError, match=rf"images: expected an .npz file with arr_0 uint8 \(N, H, W, 3\).*: .*{words}"
        ):
            read(str(path))


def test_pixels_are_rounded_and_finite():
    images = np.array([-2.0, -1.0, -0.5, 0.0, 0.999, 1.0, 5.0], np.float32)
    np.testing.assert_array_equal(to_pixels(images), [0, 0, 64, 128, 255, 255, 255])
    for wrong in (np.nan, np.inf):
        with pytest.raises(ValueError, match="images: expected finite numbers, got NaN or Inf"):
            to_pixels(np.append(images, np.float32(wrong)))
