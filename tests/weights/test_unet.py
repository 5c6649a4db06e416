import ast
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from gspn_jax.models import parameter_count
from gspn_jax.weights import diffusers_unet, diffusers_unet_sizes, unet_replacements
from tests.tolerances import assert_close, rms_ratio

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "text_to_image"
# What no tensor tells. The networks have 4 heads everywhere (SD-1.5), and 4, 4 and 8 by level (SDXL).
CONFIG: dict[str, dict[str, Any]] = {
    "sd15": dict(attention_head_dim=4, norm_num_groups=8),
    "sdxl": dict(
        attention_head_dim=[4, 4, 8], norm_num_groups=8, addition_embed_type="text_time", addition_time_embed_dim=8
    ),
}
REAL_CONFIG: dict[str, dict[str, Any]] = {
    "sd15": dict(attention_head_dim=8),
    "sdxl": dict(attention_head_dim=[5, 10, 20], addition_embed_type="text_time", addition_time_embed_dim=256,
                 use_linear_projection=True),
}  # fmt: skip


def golden(file):
    with np.load(GOLDEN / f"{file}.npz") as saved:
        return dict(saved)


def published(kind):
    """Parameters of a tiny network."""
    arrays = golden(f"unet_{kind}_tiny").items()
    return {name.removeprefix("param/"): array for name, array in arrays if name.startswith("param/")}


def below(arrays, prefix):
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


@jax.jit(static_argnums=0)
def apply(graph, state, inputs):
    return nnx.merge(graph, state)(**inputs, keep_mixed=True)


def call(unet, arrays, latent="latent", prefix=""):
    """Prediction (N, C, H, W), and the mixers' outputs in the order of replacements, (N, H * W, C) each."""
    names = ("timestep", "context", "text_embeds", "time_ids")
    inputs = {name: jnp.asarray(arrays[prefix + name]) for name in names if prefix + name in arrays}
    inputs["latents"] = jnp.asarray(arrays[prefix + latent].transpose(0, 2, 3, 1))
    # Flax's norms promote the dtypes of what is not float32.
    with jax.numpy_dtype_promotion("strict" if unet.dtype == jnp.float32 else "standard"):
        out, mixed = apply(*nnx.split(unet), inputs)
    flat = [np.asarray(each).reshape(len(each), -1, each.shape[-1]) for stack in mixed for each in stack]
    return np.asarray(out).transpose(0, 3, 1, 2), flat


@pytest.mark.parametrize("kind,dtype", [
    ("sdxl", "float32"),
    pytest.param("sd15", "float32", marks=pytest.mark.full),
    pytest.param("sd15", "float64", marks=pytest.mark.full),
    pytest.param("sdxl", "float64", marks=pytest.mark.full),
])  # fmt: skip
def test_published_networks(kind, dtype):
    arrays = golden(f"unet_{kind}_tiny")
    with jax.enable_x64(dtype == "float64"):
        out, _ = call(diffusers_unet(published(kind), CONFIG[kind], dtype=jnp.dtype(dtype)), arrays)
    assert out.dtype == dtype
    np.testing.assert_allclose(out, arrays["out"], rtol=0, atol=4e-6)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_bfloat16_is_close(kind):
    arrays = golden(f"unet_{kind}_tiny")
    unet = diffusers_unet(published(kind), CONFIG[kind], dtype=jnp.dtype("bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(unet))} == {jnp.dtype("bfloat16")}
    out, _ = call(unet, arrays)
    assert_close(out, arrays["out"], dtype=np.float32, tolerance=0.02)


def gspn_cases():
    shapes = [("released", "square"), ("released", "wide")]
    shapes += [("aligned", shape) for shape in ("square", "wide", "oblong")]
    for kind in ("sd15", "sdxl"):
        for variant in ("pure", "qkv"):
            for mode, shape in shapes:
                is_fast = (kind, variant, mode, shape) == ("sd15", "qkv", "released", "square")
                yield pytest.param(kind, variant, mode, shape, marks=() if is_fast else pytest.mark.full)


@pytest.mark.parametrize("kind,variant,mode,shape", list(gspn_cases()))
def test_released_gspn(kind, variant, mode, shape):
    arrays = golden(f"unet_gspn_{kind}")
    replacements = below(arrays, f"{variant}/")
    alignment = "aligned" if mode == "aligned" else None
    with jax.enable_x64(True):
        unet = diffusers_unet(
            published(kind), CONFIG[kind], mixer="gspn", replacements=replacements, alignment=alignment,
            dtype=jnp.dtype("float64"),
        )  # fmt: skip
        out, mixed = call(unet, arrays, f"latent_{shape}")
        exported = unet_replacements(unet)
    np.testing.assert_allclose(out, arrays[f"out_{variant}_{mode}_{shape}"], rtol=0, atol=1e-9)
    assert len(mixed) == len(arrays["modules"])
    for index, want in below(arrays, f"attn1_{variant}_{mode}_{shape}/").items():
        np.testing.assert_allclose(mixed[int(index)], want, rtol=0, atol=1e-9)
    assert exported.keys() == replacements.keys()
    for name, array in exported.items():
        np.testing.assert_array_equal(array, replacements[name], strict=False)
        assert array.shape == replacements[name].shape


@pytest.mark.full
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_released_linfusion(kind):
    arrays = golden("linfusion_attention")
    replacements = below(arrays, f"{kind}/")
    with jax.enable_x64(True):
        unet = diffusers_unet(
            published(kind), CONFIG[kind], mixer="linfusion", replacements=replacements, dtype=jnp.dtype("float64")
        )
        out, _ = call(unet, arrays, prefix=f"{kind}_")
    np.testing.assert_allclose(out, arrays[f"{kind}_out"], rtol=0, atol=1e-9)
    assert unet_replacements(unet).keys() == replacements.keys()


@pytest.mark.parametrize("kind,parameters", [
    pytest.param("sd15", 859_520_964, marks=pytest.mark.full), ("sdxl", 2_567_463_684),
])  # fmt: skip
def test_all_tensors_of_the_real_files_are_used(kind, parameters):
    lines = (GOLDEN / "tensor_names" / f"{kind}.keys").read_text().splitlines()
    named = (line.split("\t") for line in lines)
    arrays = {name: jax.ShapeDtypeStruct(ast.literal_eval(shape), jnp.float16) for name, shape in named}
    unet = diffusers_unet(arrays, REAL_CONFIG[kind])
    assert parameter_count(unet) == parameters
    assert sum(transformer.depth for transformer in unet.transformers) == {"sd15": 16, "sdxl": 70}[kind]


def test_sizes_of_a_folder():
    # The config of this folder has old fields only; that of the other has all.
    for folder, want in (
        ("sd15_folder", dict(depths=(1, 1, 1, 0), middle_depth=1, num_heads=(4,) * 4, context_width=32, blocks=2)),
        ("sdxl_folder", dict(depths=(0, 2, 3), middle_depth=3, num_heads=(2, 3, 4), text_width=20, id_features=8)),
    ):
        config = json.loads((GOLDEN / folder / "unet/config.json").read_text())
        arrays = load_file(GOLDEN / folder / "unet/diffusion_pytorch_model.safetensors")
        sizes = diffusers_unet_sizes(config, arrays)
        assert sizes.items() >= want.items()
        told = ("attention_head_dim", "norm_num_groups", "addition_embed_type", "addition_time_embed_dim")
        assert diffusers_unet_sizes({key: config[key] for key in told if key in config}, arrays) == sizes


class OnRequest(dict):
    """Arrays that count how many times each is read."""

    def __init__(self, arrays):
        super().__init__(arrays)
        self.reads = dict.fromkeys(arrays, 0)

    def __getitem__(self, name):
        self.reads[name] += 1
        return super().__getitem__(name)


def teacher_kernels(arrays):
    """Kernels of the middle's self-attention."""
    names = dict(query="to_q", key="to_k", value="to_v", out="to_out.0")
    stem = "mid_block.attentions.0.transformer_blocks.0.attn1"
    return {ours: arrays[f"{stem}.{theirs}.weight"].T for ours, theirs in names.items()}


def middle_mixer(unet) -> Any:
    return unet.transformers[-1].blocks.mixer


@pytest.mark.full
def test_teachers_layers_are_taken_over():
    arrays = published("sdxl")
    new: Any = dict(mixer="gspn", mixer_options={"query_key_value": True})
    lazy = OnRequest(arrays)
    unet = diffusers_unet(lazy, CONFIG["sdxl"], **new)
    assert max(lazy.reads.values()) <= 2 and min(lazy.reads.values()) == 1  # sizes are read off a few
    mixer = middle_mixer(unet)
    assert mixer.alignment == "aligned" and mixer.proxy.kernel.shape == (2, 32, 1)
    for ours, kernel in teacher_kernels(arrays).items():
        np.testing.assert_array_equal(getattr(mixer, ours).kernel[0], kernel)
    for leaf in jax.tree.leaves(nnx.state(unet)):
        assert np.all(np.isfinite(leaf))


@pytest.mark.full
def test_random_mixers_and_exported_ones():
    arrays = published("sdxl")
    new: Any = dict(mixer="gspn", mixer_options={"query_key_value": True})
    unet, random = (diffusers_unet(arrays, CONFIG["sdxl"], **new, initial=each) for each in ("teacher", "random"))
    mixer, drawn = (middle_mixer(each) for each in (unet, random))
    for ours, kernel in teacher_kernels(arrays).items():
        assert rms_ratio(getattr(drawn, ours).kernel[0], kernel) > 0.5
    np.testing.assert_array_equal(mixer.logits.kernel[...], drawn.logits.kernel[...])  # by the seed
    bare = diffusers_unet(
        {name: array for name, array in arrays.items() if "attn1" not in name}, CONFIG["sdxl"], mixer="gspn",
        replacements=unet_replacements(unet), alignment="aligned",
    )  # fmt: skip
    for ours, theirs in zip(*(jax.tree.leaves(nnx.state(each)) for each in (unet, bare)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.full
@pytest.mark.parametrize("mixer", ["gspn", "linfusion", "mamba", "mamba2"])
def test_new_mixers_run_at_any_size(mixer):
    arrays = golden("unet_gspn_sd15")
    unet = diffusers_unet(published("sd15"), CONFIG["sd15"], mixer=mixer)
    out, mixed = call(unet, arrays, "latent_oblong")
    assert out.shape == arrays["latent_oblong"].shape and np.all(np.isfinite(out)) and len(mixed) == 10
    again = diffusers_unet(
        published("sd15"), CONFIG["sd15"], mixer=mixer, replacements=unet_replacements(unet),
        alignment="aligned" if mixer == "gspn" else None,
    )  # fmt: skip
    np.testing.assert_array_equal(call(again, arrays, "latent_oblong")[0], out)


@pytest.mark.parametrize("config,words", [
    (dict(act_fn="mish"), "config: expected act_fn 'silu' or 'swish', got 'mish'"),
    (dict(time_cond_proj_dim=256, class_embed_type="timestep"),
     "class_embed_type None, got 'timestep'; time_cond_proj_dim None, got 256"),
    (dict(down_block_types=["DownBlock2D", "AttnDownBlock2D"]), "down_block_types .*, got AttnDownBlock2D"),
    (dict(attention_head_dim=[4, 4]), "attention_head_dim to be one integer of at least 1 or 4, got"),
    (dict(attention_head_dim=5), r"attention_head_dim to be numbers of heads, got 5 for \(16, 24, 24, 32\)"),
    (dict(layers_per_block=[1, 1, 2, 1]), "layers_per_block to be an integer of at least 1"),
    (dict(norm_eps="small"), "norm_eps to be a number between 0 and 1"),
    (dict(addition_embed_type="text_time"), "addition_time_embed_dim to be an integer"),
])  # fmt: skip
def test_settings_that_the_network_lacks_are_refused(config, words):
    with pytest.raises(ValueError, match=words):
        diffusers_unet(published("sd15"), CONFIG["sd15"] | config)


def test_all_faults_of_the_arrays_are_in_one_error():
    arrays = published("sd15")
    del arrays["down_blocks.2.resnets.0.conv1.bias"]
    arrays["up_blocks.1.resnets.0.conv2.weight"] = np.zeros((24, 24, 1, 3), np.float32)
    arrays["mid_block.attentions.0.transformer_blocks.0.attn1.to_k.weight"] = np.zeros((32, 31), np.float32)
    arrays["conv_out.bias"] = np.full(4, np.nan, np.float32)
    arrays["controlnet.weight"] = np.zeros(3, np.float32)
    with pytest.raises(ValueError) as caught:
        diffusers_unet(arrays, CONFIG["sd15"])
    message = str(caught.value)
    assert message.startswith("arrays: 5 faults: ")
    for words in (
        "a parameter down_blocks.2.resnets.0.conv1.bias, which is missing",
        "up_blocks.1.resnets.0.conv2.weight to give a parameter of shape (3, 3, 24, 24), got (1, 3, 24, 24)",
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_k.weight",
        "finite numbers in conv_out.bias, got NaN or Inf",
        "a UNet2DConditionModel, got 1 more: controlnet.weight",
    ):
        assert words in message


def test_bad_arguments_are_refused():
    arrays, config = published("sd15"), CONFIG["sd15"]
    cases: list[tuple[str, dict[str, Any]]] = [
        ("initial: expected one of teacher, random; got 'zero'", dict(initial="zero")),
        ("replacements: expected none for the mixer attention, got 1", dict(replacements={"0.x": np.zeros(1)})),
        ("alignment: expected None for the mixer linfusion", dict(mixer="linfusion", alignment="aligned")),
        ("mixer: expected a callable or one of", dict(mixer="pooling")),
        ("rank: expected an option of the mixer gspn", dict(mixer="gspn", mixer_options={"rank": 2})),
        ("0.x_conv_down.weight, which is missing", dict(mixer="gspn", replacements={"0.x": np.zeros(1)})),
    ]
    for words, options in cases:
        with pytest.raises(ValueError, match=words):
            diffusers_unet(arrays, config, **options)
    with pytest.raises(ValueError, match="mixer: expected the parameters of one of gspn"):
        unet_replacements(diffusers_unet(arrays, config))
