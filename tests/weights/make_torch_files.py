"""Makes the files in tests/weights/torch_files with PyTorch, which the tests themselves do not need.

    python3.11 -m venv VENV && VENV/bin/pip install torch==2.13.0 numpy
    VENV/bin/python tests/weights/make_torch_files.py

Tensor number n of a network holds n + 0/64, n + 1/64, n + 2/64, ... in order, so that the tests know the numbers.
"""

import argparse
import pathlib
from typing import Any

import torch  # pyright: ignore[reportMissingImports]

FOLDER = pathlib.Path(__file__).parent / "torch_files"
WIDTHS, INNER, RANK = (4, 8), (6, 12), 2


def gspn_classifier() -> dict[str, tuple[int, ...]]:
    """Names and shapes of a classifier with two stages of one block each and three classes."""
    shapes: dict[str, tuple[int, ...]] = {}

    def norm(name: str, width: int) -> None:
        shapes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    def affine(name: str, *shape: int) -> None:
        shapes.update({f"{name}.weight": shape, f"{name}.bias": shape[:1]})

    affine("patch_embed.0", WIDTHS[0] // 2, 3, 3, 3)
    norm("patch_embed.2", WIDTHS[0] // 2)
    affine("patch_embed.5", WIDTHS[0], WIDTHS[0] // 2, 3, 3)
    norm("patch_embed.7", WIDTHS[0])
    for stage, (width, inner) in enumerate(zip(WIDTHS, INNER, strict=True)):
        block = f"layers.{stage}.blocks.0"
        norm(f"{block}.norm", width)
        shapes[f"{block}.op.in_proj.weight"] = inner, width
        shapes[f"{block}.op.conv2d.weight"] = inner, 1, 7, 7
        shapes[f"{block}.op.x_conv_down.weight"] = RANK, inner, 1, 1
        shapes[f"{block}.op.w_conv_up.weight"] = 12 * inner, RANK, 1, 1
        for name in ("l_conv_up", "u_conv_up", "d_conv"):
            shapes[f"{block}.op.{name}.weight"] = 4 * inner, RANK, 1, 1
        shapes[f"{block}.op.m_conv.weight"] = 1, 4, 1, 1
        norm(f"{block}.op.out_norm", inner)
        shapes.update({f"{block}.op.grn.{name}": (1, inner, 1, 1) for name in ("gamma", "beta")})
        shapes[f"{block}.op.out_proj.weight"] = width, inner
        norm(f"{block}.norm2", width)
        affine(f"{block}.mlp.fc1", 4 * width, width)
        affine(f"{block}.mlp.fc2", width, 4 * width)
    affine("layers.0.downsample.1", WIDTHS[1], WIDTHS[0], 3, 3)
    norm("layers.0.downsample.3", WIDTHS[1])
    norm("classifier.norm", WIDTHS[1])
    affine("classifier.head", 3, WIDTHS[1])
    return shapes


def dit() -> dict[str, tuple[int, ...]]:
    """Names and shapes of a DiT with one block, width 4 and five classes."""
    linear = {
        "t_embedder.mlp.0": (4, 256),
        "t_embedder.mlp.2": (4, 4),
        "blocks.0.attn.qkv": (12, 4),
        "blocks.0.attn.proj": (4, 4),
        "blocks.0.mlp.fc1": (16, 4),
        "blocks.0.mlp.fc2": (4, 16),
        "blocks.0.adaLN_modulation.1": (24, 4),
        "final_layer.linear": (32, 4),
        "final_layer.adaLN_modulation.1": (8, 4),
        "x_embedder.proj": (4, 4, 2, 2),
    }
    shapes = {f"{name}.weight": shape for name, shape in linear.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in linear.items()}
    return shapes | {"y_embedder.embedding_table.weight": (6, 4)}


def numbered(shapes: dict[str, tuple[int, ...]], *, start: int = 0) -> dict[str, torch.Tensor]:
    return {
        name: number + torch.arange(torch.Size(shape).numel()).reshape(shape) / 64
        for number, (name, shape) in enumerate(shapes.items(), start)
    }


def views() -> dict[str, Any]:
    """Tensors of all dtypes, views of shared storages, and what a checkpoint holds besides."""
    dtypes = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 uint16 uint32 uint64".split()
    tensors: dict[str, Any] = {name: torch.arange(5).to(getattr(torch, name)) for name in dtypes}
    base = torch.arange(24.0).reshape(4, 6)
    tagged = torch.ones(2)
    tagged.tag = "an attribute, which makes PyTorch pickle the tensor in another way"
    return tensors | {
        "bool": torch.tensor([True, False]),
        "base": base,
        "rows": base[1:3],
        "columns": base.T,
        "odd": base[1::2, ::3],
        "expanded": base[0, :3].expand(4, 3),
        "number": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "tagged": tagged,
        "step": 7,
        "history": [0.5, None, True, ("text", 2**70), {1, 2}, b"bytes"],
        "device": torch.device("cpu"),
        "size": base.size(),
    }


class Script(torch.nn.Module):
    """A module with modules in a list, as TorchScript compiles it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)])
        self.scale = torch.nn.Parameter(torch.tensor([2.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[1](self.layers[0](x)) * self.scale


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    torch.manual_seed(0)
    classifier, network = numbered(gspn_classifier()), numbered(dit())
    arguments = argparse.Namespace(model="DiT", lr=1e-4, folder=pathlib.PurePosixPath("a/b"))
    optimizer = torch.optim.AdamW(torch.nn.Linear(1, 1).parameters()).state_dict()
    everything = {"model": network, "ema": numbered(dit(), start=100), "opt": optimizer, "args": arguments}
    torch.save({"model": classifier, "epoch": 3}, FOLDER / "gspn_classifier.pth")
    torch.save(everything, FOLDER / "dit_checkpoint.pt")
    torch.save(views(), FOLDER / "views.pt")
    torch.save(views(), FOLDER / "protocol_4.pt", pickle_protocol=4)
    torch.save({"good": torch.ones(2), "small": torch.ones(2).to(torch.float8_e4m3fn)}, FOLDER / "float8.pt")
    torch.save({"good": torch.ones(2), "wave": torch.ones(2, dtype=torch.complex64)}, FOLDER / "complex.pt")
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Sequential(torch.nn.BatchNorm1d(2)))
    for number, tensor in enumerate(module.state_dict().values()):
        tensor.copy_(number + torch.arange(tensor.numel()).reshape(tensor.shape) / 64)
    torch.save(module, FOLDER / "module.pt")
    script = Script()
    for number, tensor in enumerate(script.state_dict().values()):
        tensor.copy_(number + torch.arange(tensor.numel()).reshape(tensor.shape) / 64)
    torch.jit.script(script.eval()).save(str(FOLDER / "script.pt"))
    old = {name: tensor for name, tensor in views().items() if not name.startswith("uint") or name == "uint8"}
    torch.save(old, FOLDER / "before_1_6.pt", _use_new_zipfile_serialization=False)


if __name__ == "__main__":
    main()
