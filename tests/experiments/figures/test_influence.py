import numpy as np

from experiments.figures import influence


def test_each_direction_reaches_its_own_cone():
    right, down, left, up = influence.influence()
    row, column = influence.PIXEL
    rows, columns = np.mgrid[: influence.HEIGHT, : influence.WIDTH]
    for panel, ahead, aside in (
        (right, columns - column, rows - row), (left, column - columns, rows - row),
        (down, rows - row, columns - column), (up, row - rows, columns - column),
    ):  # fmt: skip
        assert panel[row, column] == 1
        assert np.all(panel[(ahead < 0) | (np.abs(aside) > ahead)] == 0)
        assert np.all(panel[(ahead > 0) & (aside == 0)] > 0)


def test_picture_is_written(tmp_path):
    influence.draw(str(tmp_path / "influence.png"))
    assert (tmp_path / "influence.png").read_bytes()[:4] == b"\x89PNG"
