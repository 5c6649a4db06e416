import shutil

import numpy as np
import pytest
from PIL import Image

from gspn_jax import data
from tests.data import pictures


def test_folder_lists_every_image_once_with_its_class(tmp_path):
    pictures.write_folder(tmp_path)
    (tmp_path / "train/class_1/90.PNG").write_bytes(b"")  # upper case counts
    (tmp_path / "train/class_1/.hidden.jpg").write_bytes(b"")
    (tmp_path / "train/class_1/notes.txt").write_text("no image")
    dataset = data.load("image_folder", str(tmp_path))
    assert dataset.class_names == ("class_0", "class_1", "class_2") and dataset.num_classes == 3
    assert (len(dataset.train), len(dataset.test)) == (19, 9)
    names = [dataset.train.describe(i) for i in range(19)]
    assert names == sorted(names)
    assert names[6:13] == [str(tmp_path / f"train/class_1/{n}") for n in [*(f"{i:02}.jpg" for i in range(6)), "90.PNG"]]
    image, label = dataset.train[13]
    assert label == 2 and image.shape == (40, 40, 3)  # number 0 of class 2
    np.testing.assert_allclose(image.astype(int), pictures.gradient(40, 40, shade=120), atol=6)


def test_folder_takes_any_mode_and_format_as_rgb(tmp_path):
    pictures.write_folder(tmp_path, train=1, val=1, classes=1)
    pixels = pictures.gradient(20, 30)
    folder = tmp_path / "train/class_0"
    (folder / "00.jpg").unlink()
    Image.fromarray(pixels).save(folder / "1.png")
    Image.fromarray(pixels[..., 0]).save(folder / "2.bmp")
    Image.fromarray(np.dstack([pixels, np.full((20, 30), 9, np.uint8)])).save(
        folder / "3.webp", lossless=True, exact=True
    )
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 256 + 99).save(folder / "4.png")
    Image.fromarray(pixels).convert("CMYK").save(folder / "5.tif")
    Image.fromarray(pixels[..., 0] // 16).save(folder / "6.gif")
    source = data.load("image_folder", str(tmp_path)).train
    assert len(source) == 6
    grey = np.stack([pixels[..., 0]] * 3, axis=2)
    for index, expected in enumerate([pixels, grey, pixels, grey, pixels, grey // 16]):
        image, _ = source[index]
        assert image.dtype == np.uint8
        np.testing.assert_allclose(image.astype(int), expected, atol=1, err_msg=source.describe(index))


def test_names_that_are_not_ascii(tmp_path):
    pictures.write_folder(tmp_path, train=1, val=1, classes=1)
    (tmp_path / "train/class_0/00.jpg").rename(tmp_path / "train/class_0/été 1.jpg")
    source = data.load("image_folder", str(tmp_path)).train
    assert source.describe(0).endswith("été 1.jpg") and source[0][0].shape == (48, 64, 3)


def test_faults_of_folders_are_one_clear_line(tmp_path):
    with pytest.raises(
        ValueError, match=r"path: expected a folder with train/ and val/, got .*where train/ is missing"
    ):
        data.load("image_folder", str(tmp_path))
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match=r"train: expected one folder per class, got none"):
        data.load("image_folder", str(tmp_path))
    (tmp_path / "train/cat").mkdir()
    with pytest.raises(ValueError, match="where val/ is missing"):
        data.load("image_folder", str(tmp_path))
    (tmp_path / "val/dog").mkdir(parents=True)
    with pytest.raises(ValueError, match="expected the classes of val among those of train, got 1 others: dog"):
        data.load("image_folder", str(tmp_path))
    (tmp_path / "val/dog").rename(tmp_path / "val/cat")
    with pytest.raises(ValueError, match="train: expected images in every class folder, got none in cat"):
        data.load("image_folder", str(tmp_path))
    (tmp_path / "train/cat/1.jpg").write_bytes(pictures.jpeg(pictures.gradient(8, 8)))
    with pytest.raises(ValueError, match="val: expected at least one image, got none in 1 class folders"):
        data.load("image_folder", str(tmp_path))


def test_val_may_lack_a_class(tmp_path):
    pictures.write_folder(tmp_path)
    for file in (tmp_path / "val/class_1").iterdir():
        file.unlink()
    (tmp_path / "val/class_1").rmdir()
    test = data.load("image_folder", str(tmp_path)).test
    assert [test[i][1] for i in range(len(test))] == [0, 0, 0, 2, 2, 2]


@pytest.mark.parametrize("content", [b"", b"not an image", pictures.jpeg(pictures.gradient(64, 64))[:700]])
def test_corrupt_image_names_its_path(tmp_path, content):
    pictures.write_folder(tmp_path, train=2, val=1, classes=1)
    (tmp_path / "train/class_0/01.jpg").write_bytes(content)
    source = data.load("image_folder", str(tmp_path)).train
    assert source[0][0].shape == (48, 64, 3)
    with pytest.raises(data.CorruptImage, match=r"train/class_0/01.jpg: .*(not a readable image|cannot be decoded)"):
        source[1]


def test_a_file_that_went_away_is_not_called_corrupt(tmp_path):
    pictures.write_folder(tmp_path, train=2, val=1, classes=1)
    source = data.load("image_folder", str(tmp_path)).train
    (tmp_path / "train/class_0/01.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="class_0/01.jpg"):
        source[1]


def test_a_loop_of_links_is_a_corrupt_image(tmp_path):
    pictures.write_folder(tmp_path, train=2, val=1, classes=1)
    (tmp_path / "train/class_0/02.jpg").symlink_to("02.jpg")
    (tmp_path / "train/loop").symlink_to("loop")  # not a class
    dataset = data.load("image_folder", str(tmp_path))
    assert dataset.class_names == ("class_0",)
    batches = {
        mode: data.evaluation_batches(dataset.train, batch_size=3, image_size=8, num_threads=0, on_corrupt=mode)
        for mode in ("stop", "drop")
    }
    assert next(batches["drop"])["mask"].tolist() == [True, True, False]
    with pytest.raises(data.CorruptImage, match=r"02.jpg: expected a regular file, got a loop of symbolic links"):
        next(batches["stop"])


def test_val_alone_is_enough_to_evaluate(tmp_path):
    pictures.write_folder(tmp_path)
    whole = data.load("image_folder", str(tmp_path))
    shutil.rmtree(tmp_path / "train")
    alone = data.load("image_folder", str(tmp_path))
    assert alone.class_names == whole.class_names and len(alone.train) == 0
    assert [alone.test[i][1] for i in range(len(alone.test))] == [whole.test[i][1] for i in range(len(whole.test))]
    with pytest.raises(ValueError, match="at least one sample"):
        data.training_batches(alone.train, batch_size=2, image_size=8)
    shutil.rmtree(tmp_path / "val")
    with pytest.raises(ValueError, match="train/ is missing"):
        data.load("image_folder", str(tmp_path))


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pictures_without_a_fixed_range_are_not_guessed_at(tmp_path, mode):
    pictures.write_folder(tmp_path, train=2, val=1, classes=1)
    Image.new(mode, (9, 7), 1).save(tmp_path / "train/class_0/02.tiff")
    source = data.load("image_folder", str(tmp_path)).train
    with pytest.raises(data.CorruptImage, match=rf"02.tiff: .*8 or 16 bits a channel, got Pillow's mode {mode}"):
        source[2]


def test_a_file_that_is_no_image_is_reported_once(tmp_path, caplog):
    pictures.write_folder(tmp_path, train=2, val=1, classes=1)
    (tmp_path / "train/class_0/01.jpg").write_bytes(b"not an image")
    source = data.load("image_folder", str(tmp_path)).train
    stream = data.training_batches(source, batch_size=2, image_size=8, on_corrupt="drop", num_threads=2)
    replaced = sum(next(stream)["replaced"] for _ in range(6))
    stream.close()
    assert replaced == 6
    assert len([record for record in caplog.records if "01.jpg" in record.getMessage()]) == 1
