"""The steps of each part, in the order in which time is best spent."""

import dataclasses

# Maps whose variants are timed, the most telling first.
TIMED = (
    "gspn_t_stage1", "sdxl_1k_level1", "gspn_t_stage3", "gspn_t_stage4", "width1152_16", "sdxl_4k_level1",
    "sdxl_16k_level1", "sdxl_1k_level2",
)  # fmt: skip
SCANNED = ("gspn2_1024_b16_c8", "gspn2_1024_b1_c1152")
TRAINED = ("gspn_t", "gspn_xl2", "dit_xl2")
# Layers that take most of their models' time.
TILED = (
    "gspn_t_stage1", "sdxl_1k_level1", "gspn_t_stage2", "gspn_xl_generator", "gspn_t_stage3", "sdxl_4k_level1",
    "gspn_t_stage4", "sdxl_16k_level1",
)  # fmt: skip
FAMILIES = ("scan", "warpgroups", "ghost", "in_turn", "overlapping", "on_chip")
TOOLS = ("memcheck", "racecheck", "synccheck")
PARTS = (1, 2, 3)
SECONDS_OF_PART = 350.0
DRY_PATIENCE = 10  # times as long may a dry run take, on a machine that does other things as well


@dataclasses.dataclass(frozen=True)
class Step:
    """A process with a time limit.

    Attributes:
        work: a function's name in `step.WORK`.
        of: its argument: a shape, a family, a model or a tool.
        seconds: its limit.
        beside: whether the next steps run beside it; it must not time anything, nor they.
    """

    work: str
    of: str = ""
    seconds: float = 45.0
    beside: bool = False

    @property
    def name(self) -> str:
        return f"{self.work} {self.of}".strip()


def steps(part: int, dry: bool = False) -> list[Step]:
    """Returns the steps of a part; a dry run has all families, and one step of each other kind."""
    tiles = [Step("tiles", shape, 60) for shape in TILED]
    found = {
        1: [
            Step("facts", seconds=60),
            Step("copies"),
            # Compilation takes longer than training: here it costs no time that a measurement needs.
            *(Step("compile", model, SECONDS_OF_PART, beside=True) for model in reversed(TRAINED)),
            *(Step("family", family) for family in FAMILIES),
            Step("tests", seconds=200),
        ],
        2: [
            *(Step("variants", shape, 60) for shape in TIMED[:4]),
            Step("lines"),
            Step("train", "gspn_t", 90),
            *(Step("variants", shape, 60) for shape in TIMED[4:]),
            Step("attention"),
            *(Step("scans", shape, 60) for shape in SCANNED),
            *(Step("train", model, 150) for model in TRAINED[1:]),
        ],
        3: [
            Step("refit"),
            *tiles[:4],
            *(Step("sanitizer", tool, 60) for tool in TOOLS),
            *tiles[4:],
        ],
    }[part]  # fmt: skip
    if not dry:
        return found
    one_of_each = {step.work if step.work != "family" else step.name: step for step in reversed(found)}
    return [dataclasses.replace(step, seconds=DRY_PATIENCE * step.seconds) for step in reversed(one_of_each.values())]
