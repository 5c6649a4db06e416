import functools
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from gspn_jax.weights import read_arrays
from gspn_jax.weights.clip import clip_text
from gspn_jax.weights.single_file import split_single_file
from tests.weights import ldm_names
from tests.weights.ldm_names import table
from tests.weights.tensor_names import published_shapes, stand_in

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "text_to_image"
COMPONENTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
NEW_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
EXTRAS = """
betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod
log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod posterior_variance
posterior_log_variance_clipped posterior_mean_coef1 posterior_mean_coef2 lvlb_weights scale_factor denoiser.sigmas
model_ema.decay model_ema.num_updates model_ema.diffusion_modelinput_blocks00weight
cond_stage_model.transformer.text_model.embeddings.position_ids conditioner.embedders.1.model.logit_scale
"""


@functools.cache
def tiny(model: str) -> dict[str, dict[str, np.ndarray]]:
    """Returns parts of a tiny folder: names to arrays, the autoencoder's new ones."""
    parts = ("unet", "vae", "text_encoder", *["text_encoder_2"] * (model == "sdxl"))
    found = {part: read_arrays(GOLDEN / f"{model}_folder" / part / f"{COMPONENTS.get(part, 'model')}.safetensors")
             for part in parts}  # fmt: skip
    for old, new in NEW_NAMES.items():
        found["vae"] = {name.replace(old, new): array for name, array in found["vae"].items()}
    found["text_encoder"].pop("text_model.embeddings.position_ids", None)
    return found


def published(model: str) -> dict[str, dict[str, np.ndarray]]:
    """Returns parts of a real folder with stand-ins for the arrays."""
    files = {"unet": model, "vae": "vae", "text_encoder": "clipL", "text_encoder_2": "bigG"}
    if model == "sd15":
        del files["text_encoder_2"]
    return {part: {name: stand_in(shape) for name, shape in published_shapes(file).items()}
            for part, file in files.items()}  # fmt: skip


def in_one_file(parts: Mapping[str, Mapping[str, np.ndarray]], model: str) -> dict[str, np.ndarray]:
    """Returns the arrays as the programs of Stability name and shape them."""
    renamed = renamed_blocks(parts["unet"], table(getattr(ldm_names, f"{model.upper()}_BLOCKS")), unet_layer)
    file = {f"model.diffusion_model.{name}": array for name, array in renamed.items()}
    for name, array in renamed_blocks(parts["vae"], table(ldm_names.VAE_BLOCKS), vae_layer).items():
        is_pointwise = ".attn_1." in name and array.ndim == 2
        file[f"first_stage_model.{name}"] = array[:, :, None, None] if is_pointwise else array
    first = {"sd15": "cond_stage_model", "sdxl": "conditioner.embedders.0"}[model]
    for name, array in parts["text_encoder"].items():
        file[f"{first}.transformer.text_model.{name.removeprefix('text_model.')}"] = array
    second = open_clip(parts["text_encoder_2"]) if model == "sdxl" else {}
    return file | {f"conditioner.embedders.1.model.{name}": array for name, array in second.items()}


def renamed_blocks(
    arrays: Mapping[str, np.ndarray], blocks: dict[str, str], rename: Callable[[str, str], str]
) -> dict[str, np.ndarray]:
    found = {}
    for name, array in arrays.items():
        (block,) = (block for block in blocks if name.startswith(f"{block}."))
        layer, _, leaf = name.removeprefix(f"{block}.").rpartition(".")
        found[".".join(filter(None, [blocks[block], layer and rename(block, layer), leaf]))] = array
    assert len(found) == len(arrays)
    return found


def unet_layer(block: str, layer: str) -> str:
    if ".attentions." in block:
        return layer
    if "samplers." in block:
        return table(ldm_names.DOWNSAMPLER if "down" in block else ldm_names.UPSAMPLER)[layer]
    return table(ldm_names.UNET_LAYERS)[layer]


def vae_layer(block: str, layer: str) -> str:
    return table(ldm_names.VAE_LAYERS)[layer]


def open_clip(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    arrays = {name.removeprefix("text_model."): array for name, array in arrays.items()}
    found = {
        "token_embedding.weight": arrays["embeddings.token_embedding.weight"],
        "positional_embedding": arrays["embeddings.position_embedding.weight"],
        "ln_final.weight": arrays["final_layer_norm.weight"],
        "ln_final.bias": arrays["final_layer_norm.bias"],
        "text_projection": arrays["text_projection.weight"].T,
    }
    for layer in range(sum(name.endswith(".layer_norm1.bias") for name in arrays)):
        theirs, ours = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for leaf in ("weight", "bias"):
            thirds = [arrays[f"{theirs}.self_attn.{letter}_proj.{leaf}"] for letter in "qkv"]
            rows, *columns = thirds[0].shape
            is_stand_in = not any(thirds[0].strides)
            joined = stand_in((3 * rows, *columns)) if is_stand_in else np.concatenate(thirds)
            found[f"{ours}.attn.in_proj_{leaf}"] = joined
            for name, other in table(ldm_names.OPEN_CLIP_LAYERS).items():
                found[f"{ours}.{other}.{leaf}"] = arrays[f"{theirs}.{name}.{leaf}"]
    return found


@pytest.mark.parametrize("model", ["sd15", "sdxl"])
def test_tiny_checkpoints_split_into_their_folders(model):
    parts = tiny(model)
    file = in_one_file(parts, model) | {name: np.zeros(1) for name in EXTRAS.split()}
    found = split_single_file(file)
    assert found.keys() == parts.keys()
    for part, want in parts.items():
        assert sorted(found[part]) == sorted(want) and len(found[part]) == len(want), part
        assert all(np.array_equal(found[part][name], array) for name, array in want.items()), part


@pytest.mark.parametrize("model,count", [("sd15", 686 + 248 + 196), ("sdxl", 1680 + 248 + 196 + 517)])
def test_names_and_shapes_of_the_published_files(model, count):
    parts = published(model)
    found = split_single_file(in_one_file(parts, model))
    assert sum(map(len, found.values())) == count and found.keys() == parts.keys()
    prefix = "text_model."  # the single files have it everywhere
    for part, want in parts.items():
        bare = part == "text_encoder"
        assert {name.removeprefix(prefix) if bare else name: array.shape for name, array in found[part].items()} == {
            name: array.shape for name, array in want.items()
        }


def test_names_from_memory():
    """Of SD-1.5's and SDXL's own files, so that a slip in both lists shows."""
    sd15, sdxl = (in_one_file(published(model), model) for model in ("sd15", "sdxl"))
    unet, vae = "model.diffusion_model", "first_stage_model"
    for file, name, shape in (
        (sd15, f"{unet}.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", (320, 768)),
        (sd15, f"{unet}.output_blocks.2.1.conv.weight", (1280, 1280, 3, 3)),
        (sd15, f"{unet}.output_blocks.8.2.conv.weight", (640, 640, 3, 3)),
        (sd15, f"{unet}.output_blocks.11.0.skip_connection.weight", (320, 640, 1, 1)),
        (sd15, f"{unet}.middle_block.1.proj_in.weight", (1280, 1280, 1, 1)),
        (sd15, f"{vae}.decoder.up.0.block.0.nin_shortcut.weight", (128, 256, 1, 1)),
        (sd15, f"{vae}.encoder.mid.attn_1.q.weight", (512, 512, 1, 1)),
        (sd15, "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc2.weight", (768, 3072)),
        (sdxl, f"{unet}.label_emb.0.0.weight", (1280, 2816)),
        (sdxl, f"{unet}.input_blocks.4.1.proj_in.weight", (640, 640)),
        (sdxl, f"{unet}.output_blocks.2.2.conv.weight", (1280, 1280, 3, 3)),
        (sdxl, f"{unet}.middle_block.1.transformer_blocks.9.attn2.to_v.weight", (1280, 2048)),
        (sdxl, "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight", (3840, 1280)),
        (sdxl, "conditioner.embedders.1.model.text_projection", (1280, 1280)),
    ):
        assert file[name].shape == shape


def test_a_part_loads():
    config = json.loads((GOLDEN / "sdxl_folder" / "text_encoder_2" / "config.json").read_text())
    arrays = tiny("sdxl")["text_encoder_2"]
    tower = clip_text(split_single_file(in_one_file(tiny("sdxl"), "sdxl"))["text_encoder_2"], config)
    assert tower.project is not None
    np.testing.assert_array_equal(tower.project.kernel[...], arrays["text_projection.weight"].T)
    value = arrays["text_model.encoder.layers.1.self_attn.v_proj.weight"]
    np.testing.assert_array_equal(tower.layers.attention.value.kernel[...][1], value.T)


def test_arrays_are_read_one_after_another():
    class Counted(dict):
        read: list[str] = []

        def __getitem__(self, name):
            self.read.append(name)
            return super().__getitem__(name)

    file = Counted(in_one_file(tiny("sdxl"), "sdxl"))
    found = split_single_file(file)
    assert "conv_in.weight" in found["unet"] and list(found["vae"]) and file.read == []
    found["unet"]["conv_in.weight"]
    assert file.read == ["model.diffusion_model.input_blocks.0.0.weight"]


def test_other_checkpoints_are_refused():
    def refuses(words: str, changes: dict[str, Any]) -> None:
        arrays = {name: array for name, array in (file | changes).items() if array is not None}
        with pytest.raises(ValueError, match=words):
            split_single_file(arrays)

    file: dict[str, Any] = in_one_file(tiny("sd15"), "sd15")
    start = "arrays: expected the names of SD-1.5 or SDXL in one file, got"
    strange = [
        "model.diffusion_model.input_blocks.1.0.lora_down.weight",
        "model.diffusion_model.input_blocks.3.0.extra.weight",
        "first_stage_model.encoder.down.0.attn.0.q.weight",
        "first_stage_model.loss.logvar",
        "cond_stage_model.model.ln_final.weight",
    ]
    listed = ", ".join(sorted(strange)).replace(".", r"\.")
    refuses(rf"{start} 5 of other networks: {listed}$", dict.fromkeys(strange, np.zeros(1)))
    refuses(rf"{start} 6 of other networks: ", dict.fromkeys([*strange, "control_model.x"], np.zeros(1)))
    unet = {name: None for name in file if name.startswith("model.")}
    refuses(
        rf"{start} none that start with model\.diffusion_model\.; 1 of other networks: down",
        unet | {"down": np.zeros(1)},
    )
    with pytest.raises(ValueError, match=r"none that start with cond_stage_model\.transformer\. or conditioner\.embed"):
        split_single_file({})
    name = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_bias"
    found = split_single_file(file | {name: np.zeros(7)})["text_encoder_2"]
    with pytest.raises(ValueError, match=r"rows of query, key and value in transformer\.resblocks\.0.* shape \(7,\)"):
        found["text_model.encoder.layers.0.self_attn.q_proj.bias"]
