import dataclasses
import os
import re
import subprocess
import sys

import pytest

from experiments import doctor, machine
from experiments.machine import Card, Machine

PINNED = {"jax": "0.11.2", "flax": "0.12.12"}
WITH_CUDA = PINNED | {"jaxlib": "0.11.2", "jax-cuda13-plugin": "0.11.2", "nvidia-cudnn-cu13": "9.28.0"}
ON_CPU = PINNED | {"jaxlib": "0.11.2"}
CPU = Machine(
    python=(3, 12),
    environment={},
    installed=ON_CPU,
    pinned=PINNED,
    cards=(),
    backend="cpu",
    backend_error="",
    free_disk=100.0,
    x64=False,
)
H200 = Card("NVIDIA H200", used=500.0, total=143771.0, driver="580.65.06")
GPU = dataclasses.replace(CPU, cards=(H200,), backend="gpu", installed=WITH_CUDA)


def findings(here: Machine) -> list[doctor.Finding]:
    return [finding for check in doctor.CHECKS for finding in check(here)]


@pytest.mark.parametrize("here", [CPU, GPU, dataclasses.replace(CPU, python=(3, 13))])
def test_healthy_machines_have_no_findings(here):
    assert findings(here) == []


@pytest.mark.parametrize(
    "here, changes, words",
    [
        (CPU, {"python": (3, 11)}, "Python is 3.11"),
        (CPU, {"python": (3, 14)}, "Python is 3.14"),
        (CPU, {"installed": ON_CPU | {"jaxlib": "0.11.1"}}, "jax is 0.11.2 and jaxlib 0.11.1"),
        (CPU, {"installed": {"jax": "0.11.2", "jaxlib": "0.11.2"}}, "flax is missing"),
        (CPU, {"installed": ON_CPU | {"jax": "0.12.0", "jaxlib": "0.12.0"}}, "jax is 0.12.0; requirements.txt"),
        (CPU, {"free_disk": 1.5}, "1.5 GiB of disk are free"),
        (CPU, {"x64": True}, "jax_enable_x64 is on"),
        (CPU, {"environment": {"JAX_ENABLE_X64": "1"}, "x64": True}, "JAX_ENABLE_X64=1"),
        (CPU, {"environment": {"JAX_DISABLE_JIT": "true"}}, "JAX_DISABLE_JIT=true: nothing is compiled"),
        (
            CPU,
            {"backend": "", "backend_error": "Unknown backend cuda", "environment": {"JAX_PLATFORMS": "cuda"}},
            "Unknown backend cuda: JAX_PLATFORMS=cuda asks for a GPU and no NVIDIA GPU is visible",
        ),
        (GPU, {"backend": "cpu", "installed": ON_CPU}, "no CUDA plugin; pip install -r requirements-gpu.txt"),
        (
            GPU,
            {"backend": "cpu", "environment": {"JAX_PLATFORMS": "cpu"}},
            "although .* H200.*JAX_PLATFORMS=cpu; unset",
        ),
        (GPU, {"backend": "cpu", "environment": {"CUDA_VISIBLE_DEVICES": ""}}, "hides it, CUDA_VISIBLE_DEVICES=''"),
        (
            GPU,
            {"backend": "cpu", "installed": WITH_CUDA | {"jax-cuda13-plugin": "0.11.1"}},
            "jax-cuda13-plugin is 0.11.1 and jaxlib 0.11.2",
        ),
        (
            GPU,
            {"backend": "cpu", "installed": ON_CPU | {"jax-cuda13-plugin": "0.11.2"}},
            "CUDA libraries are not installed",
        ),
        (
            GPU,
            {"backend": "cpu", "cards": (dataclasses.replace(H200, driver="550.54.15"),)},
            "driver is 550.54.15, and CUDA 13 needs 580",
        ),
        (GPU, {"backend": "cpu", "environment": {"LD_LIBRARY_PATH": "/usr/local/cuda/lib64"}}, "LD_LIBRARY_PATH puts"),
        (GPU, {"backend": "cpu"}, "is installed and did not start"),
        (GPU, {"installed": WITH_CUDA | {"tensorflow": "2.21.0"}}, "tensorflow is installed and takes a GPU's whole"),
        (GPU, {"cards": (H200, dataclasses.replace(H200, used=70000.0))}, r"70000 of 143771 MiB .*\(card 1\)"),
        (GPU, {"environment": {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}}, "ALLOCATOR=platform"),
    ],
)
def test_a_fault_is_found_once_and_alone(here, changes, words):
    found = findings(dataclasses.replace(here, **changes))
    assert [finding.is_fault for finding in found] == [True], found
    assert re.search(words, found[0].text), found[0].text


@pytest.mark.parametrize(
    "here, changes, words",
    [
        (CPU, {"installed": ON_CPU | {"flax": "0.12.13"}}, "flax is 0.12.13; requirements.txt pins 0.12.12"),
        (CPU, {"environment": {"JAX_PLATFORMS": "cpu"}}, "a GPU added later"),
        (GPU, {"environment": {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}}, "PREALLOCATE is off"),
    ],
)
def test_a_note_is_no_fault(here, changes, words):
    found = findings(dataclasses.replace(here, **changes))
    assert [(finding.is_fault, words in finding.text) for finding in found] == [(False, True)]


def test_tensorflow_for_the_cpu_is_welcome_and_so_is_the_other_without_a_gpu():
    assert findings(dataclasses.replace(GPU, installed=WITH_CUDA | {"tensorflow-cpu": "2.21.0"})) == []
    assert findings(dataclasses.replace(CPU, installed=ON_CPU | {"tensorflow": "2.21.0"})) == []


def fake_nvidia_smi(tmp_path, monkeypatch, body: str) -> None:
    command = tmp_path / "nvidia-smi"
    command.write_text(f"#!/bin/sh\n{body}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)


def test_cards_come_from_nvidia_smi(tmp_path, monkeypatch):
    lines = "NVIDIA H200, 512, 143771, 580.65.06\\nNVIDIA GB10, [N/A], [N/A], 580.95.05\\n"
    fake_nvidia_smi(tmp_path, monkeypatch, f"printf '{lines}'")
    assert machine.find_cards() == (
        Card("NVIDIA H200", 512.0, 143771.0, "580.65.06"),
        Card("NVIDIA GB10", 0.0, 0.0, "580.95.05"),
    )


def test_without_a_working_nvidia_smi_cards_come_from_the_drivers_files(tmp_path, monkeypatch):
    fake_nvidia_smi(tmp_path, monkeypatch, "exit 9")
    assert machine.find_cards(tmp_path) == ()
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / "dev" / name).touch()
    assert machine.find_cards(tmp_path) == (Card("NVIDIA GPU"),) * 2
    (tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0").mkdir(parents=True)
    assert machine.find_cards(tmp_path) == (Card("NVIDIA GPU"),)


def test_observe_sees_this_process(monkeypatch):
    monkeypatch.setenv("GSPN_DOCTOR_TEST", "seen")
    here = machine.observe()
    assert here.python == sys.version_info[:2] and here.environment["GSPN_DOCTOR_TEST"] == "seen"
    assert here.installed["jax"] == here.pinned["jax"] and here.installed["orbax-checkpoint"]
    assert here.backend in ("cpu", "gpu") and not here.x64 and here.free_disk > 0


def test_observe_reports_a_backend_that_does_not_start(monkeypatch):
    def fail():
        raise RuntimeError("Unable to initialize backend 'cuda'")

    monkeypatch.setattr(machine.jax, "default_backend", fail)
    here = machine.observe()
    assert (here.backend, here.backend_error) == ("", "Unable to initialize backend 'cuda'")


def test_report_names_backend_devices_implementations_and_layers(capsys):
    assert doctor.report(CPU, "gspn_nano", 32, 8) == 0
    printed = capsys.readouterr().out
    for words in ("jax 0.11.2", "Backend: cpu", "device 7: cpu", "xla: can run here", "No fault found."):
        assert words in printed
    layers = printed.split("gspn_nano with 8 images of 32 x 32 in bfloat16:\n")[1].splitlines()
    assert any("xla" in line for line in layers)


def test_report_counts_faults(capsys):
    broken = dataclasses.replace(CPU, python=(3, 11), free_disk=0.0, environment={"JAX_PLATFORMS": "cpu"})
    assert doctor.report(broken, "", 224, 1) == 2
    printed = capsys.readouterr().out
    assert printed.count("FAULT: ") == 2 and printed.count("note: ") == 1 and printed.endswith("2 faults found.\n")


def run_doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "experiments.doctor", *arguments]
    root = machine.REQUIREMENTS.parent
    return subprocess.run(command, cwd=root, env=os.environ | environment, capture_output=True, text=True, timeout=120)


def test_command_exits_with_one_if_there_is_a_fault():
    faulty = run_doctor("--model=", JAX_DISABLE_JIT="1")
    assert faulty.returncode == 1 and "FAULT: JAX_DISABLE_JIT=1" in faulty.stdout, faulty.stderr


def test_command_refuses_an_unknown_model_in_one_line():
    refused = run_doctor("--model=gspn_q")
    assert refused.returncode == 1 and "gspn_q" in refused.stderr and "Traceback" not in refused.stderr
