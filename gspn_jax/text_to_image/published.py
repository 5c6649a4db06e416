"""Where text-to-image models come from: folders in the layout of diffusers, single files, the Hugging Face Hub."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gspn_jax.weights.files import open_arrays, read_names
from gspn_jax.weights.single_file import UNET_START, split_single_file

NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")
TOKENIZERS = ("tokenizer", "tokenizer_2")

_HUB_FOLDER = re.compile(r"hf://(?P<repository>[^/@]+/[^/@]+)(@(?P<revision>[^/@]+))?/?")
# Files of a network, the first that exists counts. Text towers have the second names.
_STEMS = ("diffusion_pytorch_model", "model")
_ENDS = (".safetensors", ".safetensors.index.json", ".fp16.safetensors", ".fp16.safetensors.index.json", ".bin")
_SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
    "steps_offset": 1, "set_alpha_to_one": False, "skip_prk_steps": True, "clip_sample": False,
}  # fmt: skip
_TOWER = {"hidden_act": "quick_gelu", "num_attention_heads": 12, "eos_token_id": 2}

# The configurations of the published models, for single files, which hold none: what the tensors do not tell.
CONFIGS: dict[str, dict[str, Any]] = {
    "Stable Diffusion 1.5": {
        "unet": {"attention_head_dim": 8, "sample_size": 64},
        "vae": {"scaling_factor": 0.18215},
        "text_encoder": _TOWER,
        "scheduler": {"_class_name": "PNDMScheduler", **_SCHEDULE},
        "model_index": {"force_zeros_for_empty_prompt": False},
    },
    "SDXL": {
        "unet": {
            "attention_head_dim": [5, 10, 20], "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
            "sample_size": 128,
        },
        "vae": {"scaling_factor": 0.13025},
        "text_encoder": _TOWER,
        "text_encoder_2": {"hidden_act": "gelu", "num_attention_heads": 20, "eos_token_id": 2},
        "scheduler": {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading", **_SCHEDULE},
        "model_index": {"force_zeros_for_empty_prompt": True},
    },
}  # fmt: skip
# Folders that hold the tokenizers of each.
_TOKENIZERS_OF = {
    "Stable Diffusion 1.5": "hf://stable-diffusion-v1-5/stable-diffusion-v1-5",
    "SDXL": "hf://stabilityai/stable-diffusion-xl-base-1.0",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Published:
    """A model as its files hold it.

    Attributes:
        arrays: of `NETWORKS`, the tensors of each network by their names in a folder's files.
        configs: mappings of the configuration files of networks, "scheduler" and "model_index".
        tokenizers: folders, one for each text tower.
    """

    arrays: dict[str, Mapping[str, Any]]
    configs: dict[str, Mapping[str, Any]]
    tokenizers: tuple[Path, ...]


def is_published(source: str) -> bool:
    """Returns whether a source is a text-to-image model: a folder in the layout of diffusers or a single file.

    Raises:
        ValueError: a file that cannot be read.
    """
    if is_folder(source):
        return True
    return not Path(source).is_dir() and any(name.startswith(UNET_START) for name in read_names(source))


def is_folder(source: str) -> bool:
    """Returns whether a source is a folder in the layout of diffusers, here or on the hub, by its name."""
    return bool(_HUB_FOLDER.fullmatch(source)) or (Path(source) / "model_index.json").is_file()


def read_published(source: str, config: str | None = None) -> Published:
    """Reads a folder or a single file.

    Args:
        source: a folder in the layout of diffusers, hf://owner/name of one on the hub, or a single file.
        config: single files only: a folder with configurations and tokenizers; None: those of the published models.

    Raises:
        ValueError: names the file or argument at fault.
    """
    if is_folder(source):
        if config is not None:
            raise ValueError(f"config: expected none for a folder, which holds its own, got {config}")
        folder = _local_folder(source)
        configs = _configs(folder)
        return Published(
            {name: _network(folder / name) for name in NETWORKS if name in configs},
            configs,
            _tokenizers(folder, configs),
        )
    if not source.startswith("hf://") and not Path(source).exists():
        raise ValueError(f"source: expected a folder, a file, or hf://owner/name, got {source}, which does not exist")
    if Path(source).is_dir():
        raise ValueError(f"source: expected a folder with a model_index.json, or a file, got {source}")
    arrays: dict[str, Mapping[str, Any]] = {**split_single_file(open_arrays(source))}
    if config is None:
        name = "SDXL" if "text_encoder_2" in arrays else "Stable Diffusion 1.5"
        configs, folder = dict(CONFIGS[name]), _tokenizers_from_hub(name)
    else:
        folder = _local_folder(config, argument="config")
        configs = _configs(folder)
    missing = sorted({name for name in NETWORKS if name in configs} ^ set(arrays))
    if missing:
        raise ValueError(f"config: expected a folder with the networks of {source}, got another: {', '.join(missing)}")
    return Published(arrays, configs, _tokenizers(folder, configs))


def _configs(folder: Path) -> dict[str, Mapping[str, Any]]:
    index = _read_json(folder / "model_index.json")
    known = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
    for name, kind in known.items():
        given = index.get(name)
        if not isinstance(given, list) or len(given) != 2 or given[1] != kind:
            raise ValueError(f"source: expected {name} to be a {kind} in {folder / 'model_index.json'}, got {given}")
    networks = [name for name in NETWORKS if isinstance(index.get(name), list) and index[name][1]]
    configs: dict[str, Mapping[str, Any]] = {name: _read_json(folder / name / "config.json") for name in networks}
    configs["scheduler"] = _read_json(folder / "scheduler" / "scheduler_config.json")
    configs["model_index"] = index
    return configs


def _network(folder: Path) -> Mapping[str, Any]:
    names = [f"{stem}{end}" for end in _ENDS for stem in _STEMS] + ["pytorch_model.bin"]
    for name in names:
        if (folder / name).is_file():
            return open_arrays(folder / name)
    raise ValueError(f"source: expected parameters in {folder}, such as {names[0]} or {names[1]}; got none")


def _tokenizers(folder: Path, configs: Mapping[str, Any]) -> tuple[Path, ...]:
    return tuple(folder / name for name in TOKENIZERS[: 1 + ("text_encoder_2" in configs)])


def _local_folder(source: str, *, argument: str = "source") -> Path:
    if not source.startswith("hf://"):
        if not (Path(source) / "model_index.json").is_file():
            raise ValueError(f"{argument}: expected a folder with a model_index.json, got {source}")
        return Path(source)
    # The files that `_network` would choose, and none of the copies beside them.
    patterns = ["model_index.json", "scheduler/*.json", "tokenizer*/*"]
    patterns += [f"{name}/config.json" for name in NETWORKS]
    patterns += [
        f"{name}/{stem}{part}.safetensors*" for name in NETWORKS for stem in _STEMS for part in ("", "-?????-of-?????")
    ]
    return _snapshot(source, patterns, argument)


def _tokenizers_from_hub(name: str) -> Path:
    try:
        return _snapshot(_TOKENIZERS_OF[name], ["tokenizer*/*"], "config")
    except ValueError as error:
        raise ValueError(
            f"config: expected a folder with the tokenizers of {name}, since a single file holds none; "
            f"those of the hub {str(error).partition(': ')[2]}"
        ) from error


def _snapshot(source: str, patterns: list[str], argument: str) -> Path:
    match = _HUB_FOLDER.fullmatch(source)
    if match is None:
        raise ValueError(f"{argument}: expected hf://owner/name or hf://owner/name@revision, got {source}")
    import huggingface_hub  # takes a while, and only these sources need it

    try:
        found = huggingface_hub.snapshot_download(
            match["repository"], revision=match["revision"], allow_patterns=patterns
        )
    except Exception as error:  # of several packages
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{argument}: {source}: cannot be fetched: {reason}") from error
    return Path(found)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"source: expected a file {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"source: expected a JSON object in {path}: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"source: expected a JSON object in {path}, got a {type(value).__name__}")
    return value
