import json

import numpy as np
import pytest

from gspn_jax import data
from tests.data import pictures

RECIPE = data.Augmentation(crop="resized", flip=True, randaugment_magnitude=9, erasing=0.25)


class Numbered:
    """A source whose image i is filled with i (low byte red, high byte green), to identify samples in batches."""

    def __init__(self, size: int, bad: tuple[int, ...] = ()):
        self.size, self.bad = size, bad

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int, /) -> tuple[np.ndarray, int]:
        if index in self.bad:
            raise data.CorruptImage(f"{self.describe(index)}: damaged")
        image = np.zeros((8, 8, 3), np.uint8)
        image[..., 0], image[..., 1] = index % 256, index // 256
        return image, index % 7

    def describe(self, index: int, /) -> str:
        return f"numbered {index}"


def batches(source, batch_size: int = 8, *, image_size: int | tuple[int, int] = 8, **options) -> data.Batches:
    options.setdefault("num_threads", 0)
    return data.training_batches(source, batch_size=batch_size, image_size=image_size, **options)


def indices(batch) -> list[int]:
    return (batch["image"][:, 0, 0, 0].astype(int) + 256 * batch["image"][:, 0, 0, 1].astype(int)).tolist()


def same(first, second) -> None:
    assert set(first) == set(second)
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def test_a_batch_is_what_it_says():
    batch = next(batches(data.load("fake").train, 6, image_size=(20, 24), augmentation=RECIPE))
    assert batch["image"].shape == (6, 20, 24, 3) and batch["image"].dtype == np.uint8
    assert batch["label"].shape == (6,) and batch["label"].dtype == np.int32
    assert batch["replaced"] == 0 and set(batch) == {"image", "label", "replaced"}


def test_every_epoch_has_every_sample_once_in_another_order():
    stream = batches(Numbered(300), 25)
    epochs = []
    for _ in range(3):
        seen = [next(stream) for _ in range(12)]
        assert all(batch["label"].tolist() == [index % 7 for index in indices(batch)] for batch in seen)
        epochs.append([index for batch in seen for index in indices(batch)])
        assert sorted(epochs[-1]) == list(range(300))
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(300))


def test_epochs_join_without_a_gap_and_small_sources_repeat():
    stream = batches(Numbered(5), 8)
    seen = [index for _ in range(5) for index in indices(next(stream))]
    for epoch in range(8):
        assert sorted(seen[5 * epoch : 5 * epoch + 5]) == list(range(5))


def test_seeds_give_other_orders_not_shifted_ones():
    streams = [batches(Numbered(32), seed=seed) for seed in (0, 1)]
    first, second = ([index for _ in range(8) for index in indices(next(stream))] for stream in streams)
    assert first[:32] != second[:32] and first[32:] != second[:32]


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_hold_the_rows_of_the_same_global_batches(process_count):
    source = data.load("fake", train_size=50).train
    whole = batches(source, 12, augmentation=RECIPE, image_size=16)
    parts = [
        batches(
            source,
            12,
            augmentation=RECIPE,
            image_size=16,
            process_index=index,
            process_count=process_count,
            num_threads=2,
        )
        for index in range(process_count)
    ]
    for _ in range(6):  # past the end of the first epoch
        expected, got = next(whole), [next(part) for part in parts]
        for name in ("image", "label"):
            np.testing.assert_array_equal(np.concatenate([part[name] for part in got]), expected[name])


@pytest.mark.parametrize("num_threads", [0, 1, 3])
def test_threads_change_nothing(num_threads):
    source = data.load("fake", train_size=40).train
    plain, threaded = (batches(source, 8, augmentation=RECIPE, num_threads=threads) for threads in (0, num_threads))
    for _ in range(12):
        same(next(plain), next(threaded))
    threaded.close()


def test_augmentation_depends_on_the_position_not_on_the_batch_size():
    source = data.load("fake", train_size=40).train
    large, small = batches(source, 24, augmentation=RECIPE), batches(source, 4, augmentation=RECIPE)
    expected = next(large)["image"]
    np.testing.assert_array_equal(np.concatenate([next(small)["image"] for _ in range(6)]), expected)
    again = [next(large)["image"] for _ in range(5)]  # the same samples in later epochs are augmented otherwise
    assert not any(np.array_equal(expected[0], image) for batch in again for image in batch)


@pytest.mark.parametrize("num_threads", [0, 3])
@pytest.mark.parametrize("at", [0, 1, 5])
def test_restored_batches_continue_exactly(num_threads, at):
    source = data.load("fake", train_size=40).train
    whole = batches(source, 8, augmentation=RECIPE, num_threads=num_threads)
    for _ in range(at):
        next(whole)
    state = json.loads(json.dumps(whole.state()))
    expected = [next(whole) for _ in range(4)]
    fresh = batches(source, 8, augmentation=RECIPE, num_threads=num_threads)
    fresh.restore(state)
    assert fresh.state() == state
    for batch in expected:
        same(batch, next(fresh))
    assert fresh.state() == whole.state()
    whole.restore(state)  # and an object that is under way goes back
    same(expected[0], next(whole))
    fresh.close()
    whole.close()


def test_restored_batches_continue_in_another_number_of_processes_and_batch_size():
    source = data.load("fake", train_size=40).train
    whole = batches(source, 8, augmentation=RECIPE)
    for _ in range(3):
        next(whole)
    state = whole.state()
    expected = [next(whole)["image"] for _ in range(4)]
    parts = [batches(source, 8, augmentation=RECIPE, process_index=p, process_count=2) for p in range(2)]
    for part in parts:
        part.restore(state)
    for image in expected:
        np.testing.assert_array_equal(np.concatenate([next(part)["image"] for part in parts]), image)
    assert parts[0].state() == parts[1].state() == whole.state()
    larger = batches(source, 16, augmentation=RECIPE)
    larger.restore(state)
    np.testing.assert_array_equal(next(larger)["image"], np.concatenate(expected[:2]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, "state: expected seed=0, as in this run, got 4"),
        ({"samples": 31}, "state: expected samples=40, as in this run, got 31"),
        ({"position": -8}, "state: expected a value of Batches.state.."),
        ({"extra": 1}, "state: expected a value of Batches.state.."),
    ],
)
def test_restore_refuses_the_state_of_another_stream(change, message):
    stream = batches(Numbered(40))
    with pytest.raises(ValueError, match=message):
        stream.restore({**stream.state(), **change})


def test_corrupt_image_stops_with_its_path(tmp_path):
    pictures.write_folder(tmp_path)
    pictures.truncate(tmp_path / "train/class_1/02.jpg")
    source = data.load("image_folder", str(tmp_path)).train
    with pytest.raises(data.CorruptImage, match=r"train/class_1/02.jpg: cannot be decoded \(.*truncated"):
        next(batches(source, 18, augmentation=RECIPE, num_threads=2))  # an epoch


def test_corrupt_image_is_replaced_counted_and_reported_once(tmp_path, caplog):
    pictures.write_folder(tmp_path)
    source = data.load("image_folder", str(tmp_path)).train
    undamaged = batches(source, 6)
    plain = [next(undamaged) for _ in range(9)]
    pictures.truncate(tmp_path / "train/class_1/02.jpg")
    runs = []
    for _ in range(2):
        caplog.clear()
        stream = batches(source, 6, on_corrupt="drop", num_threads=2)
        runs.append([next(stream) for _ in range(9)])  # three epochs of 18
        stream.close()
        assert sum(batch["replaced"] for batch in runs[-1]) == 3
        assert [sum(batch["replaced"] for batch in runs[-1][3 * epoch : 3 * epoch + 3]) for epoch in range(3)] == [
            1
        ] * 3
        messages = [record.getMessage() for record in caplog.records if "02.jpg" in record.getMessage()]
        assert len(messages) == 1
        assert str(tmp_path / "train/class_1/02.jpg") in messages[0] and "replaced by its neighbour" in messages[0]
    for first, second in zip(*runs, strict=True):
        same(first, second)
    # The next file replaces one row; all other rows are unchanged.
    changed = [
        batch["image"][row]
        for batch, before in zip(runs[0], plain, strict=True)
        for row in range(6)
        if not np.array_equal(batch["image"][row], before["image"][row])
    ]
    assert len(changed) == 3
    neighbour = data.evaluation_batches(source, batch_size=18, image_size=8, on_corrupt="drop", num_threads=0)
    np.testing.assert_array_equal(changed[0], next(neighbour)["image"][9])


def test_replacement_goes_on_to_the_next_good_sample_and_gives_up_when_there_is_none():
    stream = batches(Numbered(12, bad=(3, 4, 5, 11)), 12, on_corrupt="drop")
    batch = next(stream)
    assert batch["replaced"] == 4
    assert sorted(indices(batch)) == [0, 0, 1, 2, 6, 6, 6, 6, 7, 8, 9, 10]
    with pytest.raises(data.CorruptImage, match="neither can the samples after it"):
        next(batches(Numbered(3, bad=(0, 1, 2)), 4, on_corrupt="drop"))


@pytest.mark.parametrize(("samples", "batch_size", "process_count"), [(10, 4, 1), (10, 4, 2), (3, 8, 4), (8, 4, 2)])
def test_evaluation_covers_each_sample_once(samples, batch_size, process_count):
    parts = [
        data.evaluation_batches(
            Numbered(samples),
            batch_size=batch_size,
            image_size=8,
            process_index=index,
            process_count=process_count,
            num_threads=2,
        )
        for index in range(process_count)
    ]
    assert {len(part) for part in parts} == {-(-samples // batch_size)}
    collected = [list(part) for part in parts]
    assert [len(part) for part in collected] == [len(part) for part in parts]
    share = batch_size // process_count
    seen = []
    for step in zip(*collected, strict=True):
        for batch in step:
            assert batch["image"].shape == (share, 8, 8, 3) and batch["mask"].dtype == bool
            assert not batch["image"][~batch["mask"]].any() and not batch["label"][~batch["mask"]].any()
            assert batch["label"].tolist() == [i % 7 for i in indices(batch)]
            seen += [index for index, kept in zip(indices(batch), batch["mask"], strict=True) if kept]
    assert seen == list(range(samples))  # in order, over the processes as well


def test_evaluation_resizes_and_crops_the_centre(tmp_path):
    pictures.write_folder(tmp_path)
    source = data.load("image_folder", str(tmp_path)).test
    batch = next(data.evaluation_batches(source, batch_size=9, image_size=28, resize=32))
    image = batch["image"][0].astype(int)  # 48 x 64 becomes 32 x 43, of which 28 x 28 in the middle are kept
    assert image[:, :, 0].mean() == pytest.approx(127.5, abs=2) and image[:, :, 1].mean() == pytest.approx(127.5, abs=2)
    assert image[14, -1, 0] - image[14, 0, 0] == pytest.approx(255 / 63 * 64 / 43 * 27, abs=4)
    assert image[-1, 14, 1] - image[0, 14, 1] == pytest.approx(255 / 47 * 48 / 32 * 27, abs=4)
    assert batch["label"].tolist() == [0] * 3 + [1] * 3 + [2] * 3
    np.testing.assert_allclose(batch["image"][:, 14, 14, 2], np.repeat([0, 60, 120], 3), atol=5)


def test_evaluation_masks_corrupt_images_out_and_counts_them(tmp_path, caplog):
    pictures.write_folder(tmp_path)
    pictures.truncate(tmp_path / "val/class_1/00.jpg")
    source = data.load("image_folder", str(tmp_path)).test
    run = data.evaluation_batches(source, batch_size=4, image_size=16, on_corrupt="drop")
    masks = np.concatenate([batch["mask"] for batch in run])
    assert masks.tolist() == [True] * 3 + [False] + [True] * 5 + [False] * 3
    assert run.dropped == 1 and not list(run)  # it has ended, and stays so
    assert [
        r.getMessage()
        for r in caplog.records
        if "val/class_1/00.jpg" in r.getMessage() and "left out" in r.getMessage()
    ]
    with pytest.raises(data.CorruptImage, match="val/class_1/00.jpg"):
        list(data.evaluation_batches(source, batch_size=4, image_size=16))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 10, "process_count": 4}, "batch_size: expected a multiple of process_count=4, got 10"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"process_index": 2, "process_count": 2}, "process_index: expected 0 to 1, got 2"),
        ({"num_threads": -1}, "num_threads: expected at least 0, got -1"),
        ({"num_workers": -1}, "num_workers: expected at least 0, got -1"),
        ({"image_size": 0}, "image_size: expected a positive side"),
        ({"image_size": (8, 8, 3)}, "image_size: expected a positive side"),
        ({"on_corrupt": "ignore"}, r"on_corrupt: expected one of \('stop', 'drop'\), got 'ignore'"),
        ({"source": Numbered(0)}, "source: expected at least one sample"),
        ({"batch_size": 4.0}, "batch_size: expected an integer, got 4.0"),
        ({"num_threads": None}, "num_threads: expected an integer, got None"),
        ({"image_size": 8.5}, "image_size: expected a positive side or .* got 8.5"),
        ({"image_size": "8"}, "image_size: expected a positive side or .* got '8'"),
        ({"exif_rotation": "yes"}, "exif_rotation: expected True or False, got 'yes'"),
    ],
)
def test_bad_arguments_are_named(options, message):
    arguments = {"source": Numbered(20), "batch_size": 4, "image_size": 8, **options}
    source = arguments.pop("source")
    for make in (data.training_batches, data.evaluation_batches):
        with pytest.raises(ValueError, match=message):
            make(source, **arguments)


def test_bad_arguments_of_one_of_them():
    with pytest.raises(ValueError, match="seed: expected 0 to"):
        batches(Numbered(20), seed=-1)
    with pytest.raises(ValueError, match="resize: expected at least the image size 8, got 7"):
        data.evaluation_batches(Numbered(20), batch_size=4, image_size=8, resize=7)
    with pytest.raises(ValueError, match="resize: expected at least 1, got 0"):
        data.evaluation_batches(Numbered(20), batch_size=4, image_size=8, resize=0)
    with pytest.raises(ValueError, match="resize: expected an integer, got 9.5"):
        data.evaluation_batches(Numbered(20), batch_size=4, image_size=8, resize=9.5)  # pyright: ignore[reportArgumentType]
