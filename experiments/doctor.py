"""Diagnoses this machine: which backend and kernels run, and the usual reasons for a wrong or slow one.

    python -m experiments.doctor --model=gspn_t --image_size=224

Prints the versions, the backend, the devices and the implementation of each propagation in the model, then the faults.
--assume_h200 prints the implementations for an NVIDIA H200. The exit code is 1 if there is a fault; notes do not
change it.
"""

import contextlib
import dataclasses
import os
import platform
import sys

try:
    import jax
    from absl import flags

    from experiments import command_line
except ImportError as missing:
    found = ".".join(map(str, sys.version_info[:2]))
    sys.exit(
        f"{missing}: the libraries are not installed for {sys.executable} (Python {found}). Run this with "
        ".venv/bin/python, which `make venv` makes with Python 3.12 or 3.13."
    )

import pallas_kernels
from experiments.machine import Machine, observe

CUDA_PLUGINS = ("jax-cuda13-plugin", "jax-cuda12-plugin")
OLDEST_CUDA13_DRIVER = 580  # major version of the first driver that runs CUDA 13
LEAST_FREE_DISK = 5.0  # GiB: room for a few checkpoints of the largest classifier with their optimizer state
MOST_HELD_MEMORY = 0.2  # share of a card's memory; JAX reserves 0.75 at its start and needs some room beside it
SLOW_SETTINGS = {
    "JAX_DISABLE_JIT": "nothing is compiled",
    "JAX_ENABLE_X64": "arrays are float64 by default, at a small fraction of the speed",
    "JAX_DEBUG_NANS": "JAX checks every operation for NaN, and runs it again without compilation if it finds one",
}


@dataclasses.dataclass(frozen=True)
class Finding:
    """A fault or a note.

    Attributes:
        text: the observation, and what to do about it.
        is_fault: False for a note, which does not change the exit code.
    """

    text: str
    is_fault: bool = True


def check_python(machine: Machine) -> list[Finding]:
    """Finds a Python version that the pinned libraries do not support."""
    if (3, 12) <= machine.python <= (3, 13):
        return []
    version = ".".join(map(str, machine.python))
    return [Finding(f"Python is {version}; the pinned libraries need 3.12 or 3.13. `make venv` looks for one.")]


def check_versions(machine: Machine) -> list[Finding]:
    """Finds libraries that are missing or whose versions differ from the pinned ones."""
    findings = []
    jax_version, jaxlib = machine.installed.get("jax"), machine.installed.get("jaxlib")
    if jax_version != jaxlib:
        findings.append(Finding(f"jax is {jax_version} and jaxlib {jaxlib}: they must be of one version."))
    for name, version in machine.pinned.items():
        found = machine.installed.get(name)
        if found is None:
            findings.append(Finding(f"{name} is missing. `make venv` installs what requirements.lock names."))
        elif found != version:
            text = f"{name} is {found}; requirements.txt pins {version}, the version of the tests."
            findings.append(Finding(text, is_fault=name == "jax"))
    return findings


def check_backend(machine: Machine) -> list[Finding]:
    """Finds a missing backend, or the CPU backend on a machine with an NVIDIA GPU, and the first reason for it."""
    wanted = machine.environment.get("JAX_PLATFORMS", "")
    if machine.backend == "cpu" and not machine.cards:
        return []
    if machine.backend not in ("", "cpu"):
        return []
    if machine.backend == "cpu":
        what = f"JAX runs on the CPU although there is an NVIDIA GPU ({machine.cards[0].name})"
    else:
        what = f"JAX has no backend: {machine.backend_error.strip() or 'no reason given'}"
    return [Finding(f"{what}: {_why_no_gpu(machine, wanted)}")]


def _why_no_gpu(machine: Machine, wanted: str) -> str:
    """Returns the reason why JAX does not use a GPU; `wanted` is the value of JAX_PLATFORMS."""
    if wanted and not {"cuda", "gpu"} & set(wanted.split(",")):
        return f"the environment sets JAX_PLATFORMS={wanted}; unset it."
    if not machine.cards:
        return f"JAX_PLATFORMS={wanted} asks for a GPU and no NVIDIA GPU is visible."
    visible = machine.environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return f"the environment hides it, CUDA_VISIBLE_DEVICES={visible!r}; unset it."
    plugins = {name: machine.installed[name] for name in CUDA_PLUGINS if name in machine.installed}
    if not plugins:
        return "this jaxlib has no CUDA plugin; pip install -r requirements-gpu.txt."
    name, version = next(iter(plugins.items()))
    if version != machine.installed.get("jaxlib"):
        return f"{name} is {version} and jaxlib {machine.installed.get('jaxlib')}; both must be of one version."
    if not any(package.startswith("nvidia-cudnn") for package in machine.installed):
        return "the CUDA libraries are not installed; pip install -r requirements-gpu.txt."
    driver = machine.cards[0].driver
    if name == CUDA_PLUGINS[0] and driver and int(driver.split(".")[0]) < OLDEST_CUDA13_DRIVER:
        return f"its driver is {driver}, and CUDA 13 needs {OLDEST_CUDA13_DRIVER} or newer."
    if "cuda" in machine.environment.get("LD_LIBRARY_PATH", "").lower():
        return "LD_LIBRARY_PATH puts other CUDA libraries before those that came with JAX; unset it."
    return "the CUDA plugin is installed and did not start; run JAX_PLATFORMS=cuda python -m experiments.doctor."


def check_tensorflow(machine: Machine) -> list[Finding]:
    """Finds a TensorFlow that can take the GPU's memory."""
    holders = [name for name in ("tensorflow", "tf-nightly", "tensorflow-gpu") if name in machine.installed]
    if not holders or not machine.cards:
        return []
    return [
        Finding(
            f"{holders[0]} is installed and takes a GPU's whole memory when something imports and uses it: "
            f"pip uninstall {holders[0]}, then pip install -r requirements-tensorflow.txt (the CPU build)."
        )
    ]


def check_gpu_memory(machine: Machine) -> list[Finding]:
    """Finds cards whose memory other processes hold, and allocator settings that limit JAX."""
    findings = [
        Finding(
            f"{card.used:.0f} of {card.total:.0f} MiB of {card.name} (card {index}) are held by other processes; "
            "nvidia-smi names them. JAX would run out of memory early."
        )
        for index, card in enumerate(machine.cards)
        if card.total and card.used / card.total > MOST_HELD_MEMORY
    ]
    if machine.cards and machine.environment.get("XLA_PYTHON_CLIENT_PREALLOCATE", "").lower() in ("false", "0"):
        text = "XLA_PYTHON_CLIENT_PREALLOCATE is off: JAX allocates piece by piece, and the largest runs may not fit."
        findings.append(Finding(text, is_fault=False))
    if machine.cards and machine.environment.get("XLA_PYTHON_CLIENT_ALLOCATOR", "").lower() == "platform":
        text = "XLA_PYTHON_CLIENT_ALLOCATOR=platform: the driver allocates every buffer, which is slow."
        findings.append(Finding(text))
    return findings


def check_settings(machine: Machine) -> list[Finding]:
    """Finds settings of JAX that slow programs down or hide a GPU."""
    findings = []
    for name, effect in SLOW_SETTINGS.items():
        value = machine.environment.get(name, "").lower()
        if value not in ("", "0", "false", "off", "no", "f", "n"):
            findings.append(Finding(f"{name}={value}: {effect}. Unset it except to look for an error."))
    if machine.x64 and not any("JAX_ENABLE_X64" in finding.text for finding in findings):
        findings.append(Finding(f"jax_enable_x64 is on: {SLOW_SETTINGS['JAX_ENABLE_X64']}."))
    if machine.environment.get("JAX_PLATFORMS") == "cpu" and not machine.cards:
        findings.append(Finding("JAX_PLATFORMS=cpu is set: JAX would not use a GPU added later.", is_fault=False))
    return findings


def check_disk(machine: Machine) -> list[Finding]:
    """Finds a disk with too little room for checkpoints."""
    if machine.free_disk >= LEAST_FREE_DISK:
        return []
    text = f"{machine.free_disk:.1f} GiB of disk are free in this folder; checkpoints need {LEAST_FREE_DISK:.0f}."
    return [Finding(text)]


CHECKS = (
    check_python,
    check_versions,
    check_backend,
    check_tensorflow,
    check_gpu_memory,
    check_settings,
    check_disk,
)


def describe_devices() -> list[str]:
    """Returns one line for each device of this process: kind and, if known, compute capability and memory."""
    lines = []
    for device in jax.local_devices():
        words = [f"{device.id}: {device.device_kind}"]
        capability = getattr(device, "compute_capability", None)
        if capability:
            words.append(f"compute capability {capability}")
        limit = (device.memory_stats() or {}).get("bytes_limit")
        if limit:
            words.append(f"{limit / 2**30:.1f} GiB for JAX")
        lines.append(", ".join(words))
    return lines


def describe_model(
    name: str, image_size: int, batch_size: int, dtype: str = "bfloat16", assume_h200: bool = False
) -> list[Finding]:
    """Prints the implementation of each propagation in the model; the model is traced, not built.

    Args:
        name: a preset.
        image_size: side of the images in pixels; generators get latents of 1/8 of it.
        batch_size: images at a time.
        dtype: dtype of the computation.
        assume_h200: describes the choice for an NVIDIA H200 instead of this machine.

    Returns:
        Faults that keep the model from being described.
    """
    try:
        from flax import nnx

        from gspn_jax import models
    except ImportError as missing:
        return [Finding(f"the models cannot be imported: {missing}. `make venv` installs what they need.")]
    model = nnx.eval_shape(lambda: models.create_model(name, num_classes=1000, dtype=dtype, rngs=nnx.Rngs(0)))
    inputs = [jax.ShapeDtypeStruct((batch_size, image_size, image_size, 3), "float32")]
    if models.PRESETS[name].network != "classifier":  # latents have 1/8 of the image's side
        latents = (batch_size, image_size // 8, image_size // 8, 4)
        numbers = jax.ShapeDtypeStruct((batch_size,), "int32")
        inputs = [jax.ShapeDtypeStruct(latents, "float32"), numbers, numbers]
    print(f"{name} with {batch_size} images of {image_size} x {image_size} in {dtype}:")
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.numpy_dtype_promotion("standard"))  # flax mixes float32 parameters with 16-bit maps
        if assume_h200:
            from pallas_kernels.mosaic import card

            print(f"  as if on an {card.H200.name}:")
            stack.enter_context(card.assume(card.H200))
        lines = models.layer_report(model, *inputs)
    print("\n".join(f"  {line}" for line in lines))
    return []


def report(
    machine: Machine, model: str, image_size: int, batch_size: int, dtype: str = "bfloat16", assume_h200: bool = False
) -> int:
    """Prints the state of the machine and its faults; returns the number of faults.

    Args:
        machine: see `observe`.
        model: a preset, or "" to skip the model's description.
        image_size, batch_size, dtype, assume_h200: see `describe_model`.
    """
    python = ".".join(map(str, machine.python))
    print(f"Python {python} on {platform.platform()}, {os.cpu_count()} CPU cores, {machine.free_disk:.0f} GiB free")
    print("Libraries: " + ", ".join(f"{name} {machine.installed.get(name, 'missing')}" for name in machine.pinned))
    print(f"Backend: {machine.backend or 'none'}")
    findings = [finding for check in CHECKS for finding in check(machine)]
    if machine.backend:
        for line in describe_devices():
            print(f"  device {line}")
        print("Implementations of line scan and propagation, fastest first:")
        for name, reason in pallas_kernels.implementations().items():
            print(f"  {name}: {'can run here' if reason is None else reason}")
        findings += describe_model(model, image_size, batch_size, dtype, assume_h200) if model else []
    for finding in findings:
        print(f"{'FAULT' if finding.is_fault else 'note'}: {finding.text}")
    faults = sum(finding.is_fault for finding in findings)
    print(f"{faults} fault{'' if faults == 1 else 's'} found." if faults else "No fault found.")
    return faults


def define_flags() -> None:
    flags.DEFINE_string("model", "gspn_t", "Model whose layers are listed; empty for none.")
    flags.DEFINE_integer("image_size", 224, "Height and width of the model's images, in pixels.", 1)
    flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float16", "float32"], "Dtype that the model computes in.")
    flags.DEFINE_bool("assume_h200", False, "Lists the implementations for an NVIDIA H200.")
    flags.DEFINE_integer("batch_size", 128, "Images at a time.", 1)


def main() -> None:
    chosen = flags.FLAGS
    faults = report(
        observe(), chosen.model, chosen.image_size, chosen.batch_size, chosen.dtype, assume_h200=chosen.assume_h200
    )
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    command_line.start(main, define_flags)
