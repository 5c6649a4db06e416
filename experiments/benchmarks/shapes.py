"""The maps at which kernels are compiled, checked and timed: those of the papers, and those of layers of models.

Importing this file needs only the standard library.
"""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class KernelShape:
    """A map (batch, height, width, channels) whose weights have `weight_channels`, a divisor of `channels`.

    The scans restart after `chunk` lines, None for never. `rank` is the rank of a layer's proxy, 0 without a layer.
    """

    name: str
    batch: int
    height: int
    width: int
    channels: int
    weight_channels: int = 0  # 0 is replaced by the number of channels
    chunk: int | None = None
    rank: int = 0

    def __post_init__(self):
        if not self.weight_channels:
            object.__setattr__(self, "weight_channels", self.channels)


# GSPN-2, figures 3, S3 and the per-channel case of section 5.
GSPN2 = (
    KernelShape("gspn2_1024_b16_c8", 16, 1024, 1024, 8),
    KernelShape("gspn2_1024_b256_c1", 256, 1024, 1024, 1),
    KernelShape("gspn2_1024_b1_c1152", 1, 1024, 1024, 1152),
)

# Maps of GSPN-2 with one affinity for all channels (its section 4.2).
COMPACT = (
    KernelShape("compact_1024_b16_c8", 16, 1024, 1024, 8, 1),
    KernelShape("compact_512_b1_c128", 1, 512, 512, 128, 1),
)

# One line is as long as the shortest that no CTA holds whole in the backward pass.
LONG = (KernelShape("line_2048", 1, 64, 2048, 64),)

# GSPN-2, table 1.
TABLE1 = (
    KernelShape("table1_32_b32_c196", 32, 32, 32, 196),
    KernelShape("table1_64_b1_c768", 1, 64, 64, 768),
    KernelShape("table1_128_b1_c32", 1, 128, 128, 32),
    KernelShape("table1_512_b1_c128", 1, 512, 512, 128),
)

# The stages of the classifiers at 224 x 224: the mixer has 1.5 times the channels of its block, at the next multiple of
# 8. Local stages restart every 2 lines; stage 3 of GSPN-B has blocks of both kinds.
GSPN_T = (
    KernelShape("gspn_t_stage1", 128, 56, 56, 144, chunk=2, rank=8),
    KernelShape("gspn_t_stage2", 128, 28, 28, 288, chunk=2, rank=8),
    KernelShape("gspn_t_stage3", 128, 14, 14, 576, rank=8),
    KernelShape("gspn_t_stage4", 128, 7, 7, 1152, rank=8),
)
GSPN_S = (
    KernelShape("gspn_s_stage1", 128, 56, 56, 168, chunk=2, rank=16),
    KernelShape("gspn_s_stage2", 128, 28, 28, 328, chunk=2, rank=16),
    KernelShape("gspn_s_stage3", 128, 14, 14, 648, chunk=2, rank=16),
    KernelShape("gspn_s_stage4", 128, 7, 7, 1296, rank=16),
)
GSPN_B = (
    KernelShape("gspn_b_stage1", 128, 56, 56, 184, chunk=2, rank=8),
    KernelShape("gspn_b_stage2", 128, 28, 28, 360, chunk=2, rank=8),
    KernelShape("gspn_b_stage3", 128, 14, 14, 720, rank=8),
    KernelShape("gspn_b_stage3_local", 128, 14, 14, 720, chunk=2, rank=8),
    KernelShape("gspn_b_stage4", 128, 7, 7, 1440, rank=8),
)
# The small classifier of the digits; its maps are no multiples of a tile.
GSPN_NANO = (
    KernelShape("gspn_nano_stage1", 128, 28, 28, 48, chunk=2, rank=8),
    KernelShape("gspn_nano_stage2", 128, 14, 14, 96, rank=8),
    KernelShape("gspn_nano_stage3", 128, 7, 7, 192, rank=8),
)

# The class-conditional generators on 16 x 16 tokens: widths 900, 1200 and 1500, at the next multiple of 8.
GENERATORS = (
    KernelShape("gspn_b_generator", 32, 16, 16, 904, rank=56),
    KernelShape("gspn_l_generator", 32, 16, 16, 1200, rank=75),
    KernelShape("gspn_xl_generator", 32, 16, 16, 1504, rank=93),
)

# The same layers at larger images: classifiers at 384 x 384, generators on the 32 x 32 tokens of 512 x 512.
GSPN_T_384, GSPN_S_384, GSPN_B_384 = (
    tuple(
        dataclasses.replace(
            shape,
            name=shape.name.replace("_stage", "_384_stage"),
            batch=32,
            height=shape.height * 12 // 7,
            width=shape.width * 12 // 7,
        )
        for shape in group
    )
    for group in (GSPN_T, GSPN_S, GSPN_B)
)
GENERATORS_512 = tuple(
    dataclasses.replace(shape, name=f"{shape.name}_512", batch=8, height=32, width=32) for shape in GENERATORS
)

# SDXL in the paper, with scans over whole maps: latents have 1/8 of the image's side, self-attention is at 1/2 of that
# with 640 channels and at 1/4 with 1280. Batch 2 is one image under classifier-free guidance. 16K is 16384 x 8192 in
# the paper; wide_1k is 1344 x 768.
SDXL = (
    KernelShape("sdxl_1k_level1", 2, 64, 64, 640, rank=80),
    KernelShape("sdxl_1k_level2", 2, 32, 32, 1280, rank=160),
    KernelShape("sdxl_wide_1k_level1", 2, 48, 84, 640, rank=80),
    KernelShape("sdxl_wide_1k_level2", 2, 24, 42, 1280, rank=160),
    KernelShape("sdxl_2k_level1", 2, 128, 128, 640, rank=80),
    KernelShape("sdxl_2k_level2", 2, 64, 64, 1280, rank=160),
    KernelShape("sdxl_4k_level1", 2, 256, 256, 640, rank=80),
    KernelShape("sdxl_4k_level2", 2, 128, 128, 1280, rank=160),
    KernelShape("sdxl_8k_level1", 2, 512, 512, 640, rank=80),
    KernelShape("sdxl_8k_level2", 2, 256, 256, 1280, rank=160),
    KernelShape("sdxl_16k_level1", 2, 512, 1024, 640, rank=80),
    KernelShape("sdxl_16k_level2", 2, 256, 512, 1280, rank=160),
)

# GSPN in our UNets of SD-1.5 (images of 512 and 1024 pixels a side) and SDXL (1024 and 2048), with scans of 4 lines and
# one image under guidance: pixels a side, and channels C. The proxy has C / 8 channels; layers with query, key and
# value read three proxies of C / 32 side by side.
_UNET_MAPS = (
    (128, 320), (64, 320), (128, 640), (64, 640), (32, 640), (64, 1280), (32, 1280), (16, 1280), (8, 1280),
)  # fmt: skip
UNETS = tuple(
    KernelShape(f"unet_{side}_c{channels}{kind}", 2, side, side, channels, chunk=4, rank=rank)
    for side, channels in _UNET_MAPS
    for kind, rank in (("", channels // 8), ("_qkv", 3 * channels // 32))
)

# To find the resolution from which GSPN beats flash attention: with SDXL's maps, squares of 8 to 128 tokens a side at
# widths 640 and 1280, batch 2; and at 1152, the width of diffusion transformers, batch 32.
CROSSOVER = (
    KernelShape("width640_8", 2, 8, 8, 640, rank=80),
    KernelShape("width640_16", 2, 16, 16, 640, rank=80),
    KernelShape("width640_32", 2, 32, 32, 640, rank=80),
    KernelShape("width1152_8", 32, 8, 8, 1152, rank=72),
    KernelShape("width1152_16", 32, 16, 16, 1152, rank=72),
    KernelShape("width1152_32", 32, 32, 32, 1152, rank=72),
    KernelShape("width1152_64", 32, 64, 64, 1152, rank=72),
    KernelShape("width1152_128", 32, 128, 128, 1152, rank=72),
    KernelShape("width1280_8", 2, 8, 8, 1280, rank=160),
    KernelShape("width1280_16", 2, 16, 16, 1280, rank=160),
)

# Layers of GSPN-2: one affinity for all channels.
SHARED = tuple(
    dataclasses.replace(shape, name=f"{shape.name}_shared", weight_channels=1) for shape in (*GSPN_T, *GENERATORS)
)

GROUPS = {
    "gspn2": GSPN2,
    "table1": TABLE1,
    "gspn_t": GSPN_T,
    "gspn_s": GSPN_S,
    "gspn_b": GSPN_B,
    "gspn_t_384": GSPN_T_384,
    "gspn_s_384": GSPN_S_384,
    "gspn_b_384": GSPN_B_384,
    "gspn_nano": GSPN_NANO,
    "generators": GENERATORS,
    "generators_512": GENERATORS_512,
    "sdxl": SDXL,
    "unets": UNETS,
    "compact": COMPACT,
    "long": LONG,
    "crossover": CROSSOVER,
    "shared": SHARED,
}
SHAPES = tuple(shape for group in GROUPS.values() for shape in group)
# Layers of the same widths as others, at larger images.
LARGER = (*GSPN_T_384, *GSPN_S_384, *GSPN_B_384, *GENERATORS_512)
# Maps of layers, which propagate in four directions.
LAYERS = (*GSPN_T, *GSPN_S, *GSPN_B, *GSPN_NANO, *GENERATORS, *SDXL, *UNETS, *LARGER)
# The maps in the table of variants.
CHOSEN = (*LAYERS, *CROSSOVER, *SHARED)


def select(names: Sequence[str]) -> tuple[KernelShape, ...]:
    """Returns the shapes of the named groups and the single named shapes, in the order of `SHAPES`.

    Raises:
        ValueError: a name belongs to no group and no shape.
    """
    wanted = set()
    for name in names:
        group = GROUPS.get(name) or [shape for shape in SHAPES if shape.name == name]
        if not group:
            known = ", ".join([*GROUPS, *(shape.name for shape in SHAPES)])
            raise ValueError(f"shapes: expected some of {known}; got {name!r}")
        wanted.update(group)
    return tuple(shape for shape in SHAPES if shape in wanted)


def select_layers(names: Sequence[str]) -> tuple[KernelShape, ...]:
    """As `select`; ValueError for maps that have no proxy."""
    chosen = select(names)
    without = [shape.name for shape in chosen if not shape.rank]
    if without:
        raise ValueError(f"shapes: expected maps of layers, which have a proxy; got {', '.join(without)}")
    return chosen
