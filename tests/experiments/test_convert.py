import json
import pathlib

import pytest

from experiments import convert
from gspn_jax.training import load_parameters
from gspn_jax.weights import read_arrays

TORCH_FILES = pathlib.Path(__file__).parents[1] / "weights" / "torch_files"


@pytest.mark.full
def test_a_checkpoint_becomes_a_workdir(command, tmp_path, capsys):
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    command(
        convert,
        f"--source={TORCH_FILES / 'gspn_classifier.pth'}", f"--workdir={tmp_path / 'run'}", "--global_stages=0,1",
        "--chunk=3", "--alignment=aligned", "--image_size=32", f"--class_names={tmp_path / 'names.txt'}",
    )  # fmt: skip
    _, description = load_parameters(tmp_path / "run")
    options = description["model"]["options"]
    assert (options["chunk"], options["global_stages"], options["alignment"]) == (3, [0, 1], "aligned")
    assert description["class_names"] == ["a", "b", "c"] and description["data"]["image_size"] == 32
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"] == description["model"]
    count = sum(array.size for array in read_arrays(TORCH_FILES / "gspn_classifier.pth").values())
    assert capsys.readouterr().out == f"custom: {count:,} parameters written to {tmp_path / 'run'}\n"


def test_flags_of_denoisers(command, tmp_path):
    source = f"--source={TORCH_FILES / 'dit_checkpoint.pt'}"
    command(convert, source, f"--workdir={tmp_path}", "--num_heads=2", "--objective=linear")
    _, description = load_parameters(tmp_path)
    assert description["objective"] == "linear" and description["model"]["options"]["num_heads"] == 2
    with pytest.raises(ValueError, match="global_blocks: expected integers, got a"):
        command(convert, source, f"--workdir={tmp_path}", "--global_blocks=a")
