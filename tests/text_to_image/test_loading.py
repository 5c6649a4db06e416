"""Folders, single files, workdirs and the hub give the same model."""

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import gspn_jax
from gspn_jax import text_to_image
from gspn_jax.text import Tokenizer
from gspn_jax.text_to_image.loading import load_parts
from gspn_jax.text_to_image.parts import Parts
from gspn_jax.text_to_image.published import is_published, read_published
from tests.text_to_image.conftest import GOLDEN, Golden
from tests.weights.test_single_file import in_one_file, tiny

SD15 = GOLDEN / "sd15_folder"


def leaves(parts: Parts) -> list[Any]:
    return jax.tree.leaves([nnx.state(each) for each in (parts.unet, parts.autoencoder, *parts.text_encoders)])


def assert_same(got: Parts, want: Parts) -> None:
    jax.tree.map(np.testing.assert_array_equal, leaves(got), leaves(want))
    assert (got.latent_scale, got.zero_negative, got.sample_size) == (
        want.latent_scale, want.zero_negative, want.sample_size,
    )  # fmt: skip
    for ours, theirs in zip(got.tokenizers, want.tokenizers, strict=True):
        np.testing.assert_array_equal(ours("a cat!"), theirs("a cat!"))


@pytest.mark.parametrize("kind,scale,zeros", [("sd15", 0.18215, False), ("sdxl", 0.13025, True)])
def test_settings_of_a_folder(goldens: dict[str, Golden], kind: str, scale: float, zeros: bool):
    parts = goldens[kind].pipeline.parts
    assert (parts.latent_scale, parts.zero_negative) == (scale, zeros)
    assert (parts.mixer, parts.default_guidance) == ("attention", {"sd15": 7.5, "sdxl": 5.0}[kind])


@pytest.mark.parametrize("kind", ["sd15", pytest.param("sdxl", marks=pytest.mark.full)])
def test_a_single_file(goldens: dict[str, Golden], tmp_path: Path, kind: str):
    path = tmp_path / "model.safetensors"
    save_file({name: np.ascontiguousarray(array) for name, array in in_one_file(tiny(kind), kind).items()}, path)
    assert is_published(str(path))
    assert_same(load_parts(path, config=GOLDEN / f"{kind}_folder"), goldens[kind].pipeline.parts)
    other = {"sd15": "sdxl", "sdxl": "sd15"}[kind]
    with pytest.raises(ValueError, match="config: expected a folder with the networks of .* text_encoder_2"):
        load_parts(path, config=GOLDEN / f"{other}_folder")


@pytest.mark.full
def test_a_workdir(goldens: dict[str, Golden], tmp_path: Path):
    golden, workdir = goldens["sd15"], str(tmp_path / "run")
    description, count = text_to_image.convert(golden.folder, workdir)
    assert count == sum(leaf.size for leaf in leaves(golden.pipeline.parts))
    run = gspn_jax.load_run(workdir)
    assert (run.task_name, run.description["model"]) == ("text_to_image", description["model"])
    assert_same(run.pipeline.parts, golden.pipeline.parts)
    assert_same(load_parts(workdir), golden.pipeline.parts)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    np.testing.assert_allclose(run.preprocess(image)[0], image / 255, rtol=1e-6)
    with pytest.raises(ValueError, match="task: expected classification or generation, got text_to_image"):
        _ = run.task
    with pytest.raises(ValueError, match="workdir: expected a run of generation, got one of text_to_image"):
        gspn_jax.load_run(workdir, task="generation")


@pytest.mark.full
def test_a_workdir_in_bfloat16_with_replacements(tmp_path: Path):
    """What a workdir holds is its default; the attention stays there for those who ask for it."""
    with np.load(GOLDEN / "unet_gspn_sd15.npz") as file:
        count = len(file["modules"])
    parts = load_parts(SD15, mixer="gspn", options={"query_key_value": True})
    released = gspn_jax.weights.unet_replacements(parts.unet)
    assert len({name.partition(".")[0] for name in released}) == 16 > count
    save_file(released, tmp_path / "replacements.safetensors")
    workdir = tmp_path / "run"
    options: dict[str, Any] = dict(mixer="gspn", replacements=tmp_path / "replacements.safetensors")
    text_to_image.convert(SD15, workdir, alignment="aligned", dtype="bfloat16", **options)
    loaded, direct = load_parts(workdir), load_parts(SD15, alignment="aligned", **options)
    middle: Any = loaded.unet.middle.transformer
    assert loaded.mixer == "gspn" and middle.blocks.mixer.alignment == "aligned"
    for got, want in zip(leaves(loaded), leaves(direct), strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_array_equal(got, want.astype(jnp.bfloat16).astype(jnp.float32))
    assert load_parts(workdir, mixer="attention").mixer == "attention"


def test_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Only the files that are read are fetched, of whatever lies in the repository."""
    repository = tmp_path / "repository"
    shutil.copytree(SD15, repository)
    for name in ("unet/diffusion_pytorch_model.non_ema.safetensors", "v1-5-pruned.safetensors", "vae/model.bin"):
        (repository / name).write_bytes(b"x")

    def fetch(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert (name, revision) == ("owner/name", "main")
        files = [str(file.relative_to(repository)) for file in repository.rglob("*") if file.is_file()]
        for file in huggingface_hub.utils.filter_repo_objects(files, allow_patterns=allow_patterns):
            (tmp_path / "cache" / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(repository / file, tmp_path / "cache" / file)
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert is_published("hf://owner/name")
    read, want = read_published("hf://owner/name@main"), read_published(str(SD15))
    for part, arrays in want.arrays.items():
        assert dict(read.arrays[part]).keys() == arrays.keys()
    assert read.configs == want.configs
    assert Tokenizer.from_pretrained(read.tokenizers[0])("a cat").shape == (1, 77)
    fetched = {file.name for file in (tmp_path / "cache").rglob("*") if file.is_file()}
    assert "model.bin" not in fetched and not any("non_ema" in name or "pruned" in name for name in fetched)


@pytest.mark.full
def test_files_in_shards_and_in_float16(goldens: dict[str, Golden], tmp_path: Path):
    folder = copied(tmp_path / "folder", {})
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    arrays = list(load_file(unet).items())
    unet.unlink()
    shards = {f"diffusion_pytorch_model-0000{n + 1}-of-00002.safetensors": dict(arrays[n::2]) for n in range(2)}
    for name, part in shards.items():
        save_file(part, unet.parent / name)
    places = {name: shard for shard, part in shards.items() for name in part}
    Path(f"{unet}.index.json").write_text(json.dumps({"weight_map": places}))
    tower = folder / "text_encoder" / "model.safetensors"
    halves = {name: array.astype(np.float16) for name, array in load_file(tower).items() if array.dtype == np.float32}
    save_file(halves, tower.with_suffix(".fp16.safetensors"))
    tower.unlink()
    loaded, want = load_parts(folder), goldens["sd15"].pipeline.parts
    jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded.unet), nnx.state(want.unet))
    for got, full in zip(
        *(jax.tree.leaves(nnx.state(parts.text_encoders[0])) for parts in (loaded, want)), strict=True
    ):
        np.testing.assert_array_equal(got, full.astype(np.float16).astype(np.float32))


def copied(folder: Path, changes: dict[str, Any]) -> Path:
    """Returns a copy of the tiny folder with some keys of its JSON files changed, by FILE:KEY."""
    shutil.copytree(SD15, folder, dirs_exist_ok=True)
    for place, value in changes.items():
        name, _, key = place.partition(":")
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**values, key: value}))
    return folder


@pytest.mark.parametrize("changes,words", [
    ({"unet/config.json:act_fn": "gelu"}, "act_fn 'silu' or 'swish', got 'gelu'"),
    ({"vae/config.json:shift_factor": 0.1}, "vae/config.json: expected shift_factor to be None, got 0.1"),
    ({"text_encoder/config.json:hidden_act": "relu"}, "expected hidden_act to be .* got 'relu'"),
    ({"model_index.json:unet": ["diffusers", "Transformer"]}, "expected unet to be a UNet2DConditionModel"),
])  # fmt: skip
def test_what_is_not_supported_is_named(tmp_path: Path, changes: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        load_parts(copied(tmp_path / "folder", changes))


def test_damaged_folders(tmp_path: Path):
    folder = copied(tmp_path / "folder", {})
    arrays = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    arrays.pop("conv_in.bias")
    save_file({**arrays, "extra": np.zeros(2, np.float32)}, folder / "unet/diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="conv_in.bias.*extra|extra.*conv_in.bias"):
        load_parts(folder)
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="source: expected parameters in .*unet, such as diffusion_pytorch_model.safe"):
        load_parts(folder)
    (folder / "vae/config.json").write_text("[1")
    with pytest.raises(ValueError, match="source: expected a JSON object in .*vae/config.json"):
        load_parts(folder)
    for source, words in (
        (tmp_path / "none", "source: expected a file, got .*none|source: .*none"),
        (tmp_path, "source: expected a folder with a model_index.json, or a file, got"),
    ):
        with pytest.raises(ValueError, match=words):
            load_parts(source)
    with pytest.raises(ValueError, match="config: expected none for a folder, which holds its own"):
        load_parts(SD15, config=SD15)
    with pytest.raises(ValueError, match="dtype: expected one of float32, .* got 'int8'"):
        load_parts(SD15, dtype="int8")
