"""README, docs and docstrings hold: their Python runs, their commands parse, their files and names exist."""

import ast
import functools
import importlib
import inspect
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from absl import flags
from flax import nnx
from ml_collections import config_flags
from PIL import Image

import gspn_jax
from experiments import command_line
from gspn_jax.training import save_parameters
from gspn_jax.training.functional import to_nested
from tests.test_layout import PACKAGES, REPOSITORY, python_files

README = REPOSITORY / "README.md"
PAGES = [README, REPOSITORY / "CHANGELOG.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
PAGES += sorted((REPOSITORY / "experiments" / "results").glob("*.md"))
GUIDES = [README, *sorted((REPOSITORY / "docs").glob("*.md"))]  # the pages whose examples are of today
LANGUAGES = {"python", "sh", "text", ""}
TOP_FOLDERS = (*PACKAGES, "tests", "docs")
README_LINES = 120

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SLOW = re.compile(r"^<!-- slow -->\n```python\n.*?^```$", re.MULTILINE | re.DOTALL)  # run by make test-all only
LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMAND = re.compile(r"-m (experiments[\w.]*)(.*)")
TARGET = re.compile(r"(?:^|`)make ([a-z][\w-]*)", re.MULTILINE)


def name_of(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    return [text for found, text in FENCE.findall(page.read_text()) if found == language]


def inline(page: Path) -> list[str]:
    """The code spans in the prose of a page."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text()))


# Python blocks


DATA: dict[str, Any] = dict(
    num_classes=10,
    class_names=[f"digit {number}" for number in range(10)],
    data=dict(name="digits", path="", image_size=8, resize=0),
)
TINY: dict[str, Any] = dict(widths=(8,), depths=(1,), global_stages=(0,), stem_stride=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the classifiers that the pages name: tiny, with random parameters."""
    folder = tmp_path_factory.mktemp("documentation")
    data = DATA["data"] | dict(mean=(77.9,) * 3, std=(95.9,) * 3)
    classifier = DATA | dict(model=dict(name="gspn_nano", options=TINY), data=data)
    save(folder / "runs" / "digits", classifier)
    (folder / "runs" / "released").symlink_to(folder / "runs" / "digits")
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(folder / "photo.jpg")
    (folder / "stable-diffusion-v1-5").symlink_to(REPOSITORY / "tests" / "golden" / "text_to_image" / "sd15_folder")
    return folder


@pytest.fixture(scope="module")
def folder_with_generator(folder) -> Path:
    options = dict(width=16, depth=2, patch=2, in_channels=3, global_blocks=(0, 1, 2))
    task = dict(objective="linear", label_dropout=0.1, input=dict(shape=[8, 8, 3]))
    save(folder / "runs" / "digits_generator", dict(model=dict(name="gspn_s2", options=options), **task, **DATA))
    return folder


def save(workdir: Path, description: dict[str, Any]) -> None:
    name, options = description["model"]["name"], description["model"]["options"]
    model = gspn_jax.create_model(name, num_classes=10, rngs=nnx.Rngs(0), **options)
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    parameters = to_nested({tuple(map(str, path)): np.asarray(variable[...]) for path, variable in flat})
    save_parameters(workdir, parameters, description)


def run_blocks(page: Path, texts: list[str], folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Runs the blocks of a page one after the other, with `gspn_nano` made smaller unless a block gives sizes."""
    create_model = gspn_jax.create_model

    def tiny(name: str, **options: Any) -> nnx.Module:
        return create_model(name, **((TINY if name == "gspn_nano" else {}) | options))

    patch.setattr(gspn_jax, "create_model", tiny)
    patch.chdir(folder)
    names: dict[str, Any] = {"__name__": "page"}
    for number, text in enumerate(texts, 1):
        exec(compile(text, f"{page.name}, Python block {number}", "exec"), names)


PAGES_WITH_PYTHON = [page for page in GUIDES if blocks(page, "python")]


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=() if page == README else pytest.mark.full) for page in PAGES_WITH_PYTHON],
    ids=name_of,
)
def test_python_of_a_page_runs_from_top_to_bottom(page, folder, monkeypatch):
    assert README in PAGES_WITH_PYTHON
    quick = re.sub(SLOW, "", page.read_text())
    run_blocks(page, [text for language, text in FENCE.findall(quick) if language == "python"], folder, monkeypatch)


@pytest.mark.full
@pytest.mark.parametrize("page", [page for page in PAGES_WITH_PYTHON if SLOW.search(page.read_text())], ids=name_of)
def test_slow_python_of_a_page_runs_as_well(page, folder_with_generator, monkeypatch):
    run_blocks(page, blocks(page, "python"), folder_with_generator, monkeypatch)


def test_every_block_has_a_language_that_is_tested():
    for page in GUIDES:
        for language, text in FENCE.findall(page.read_text()):
            assert language in LANGUAGES, f"{name_of(page)}: a block in {language!r}"
            assert language or "python" not in text, f"{name_of(page)}: a block without a language holds a command"


# Shell commands


def commands(text: str) -> list[str]:
    """The lines of a text that start a module of experiments, from `-m` on; continued lines are joined."""
    joined = re.sub(r"\\\n\s*", " ", text)
    return [f"{module}{rest}" for line in joined.splitlines() for module, rest in COMMAND.findall(line)]


@functools.cache
def documented_commands() -> list[tuple[str, str]]:
    """(where, command) of the pages, of docstrings, of the Makefile and of `.ci/run`."""
    texts = []
    for page in GUIDES:
        texts += [(name_of(page), text) for text in [*blocks(page, "sh"), *inline(page)]]
    for page in set(PAGES) - set(GUIDES):
        texts += [(name_of(page), text) for text in re.findall(r"(?:^    .*\n)+", page.read_text(), re.MULTILINE)]
    for file in python_files(REPOSITORY, ("configs", "experiments")):
        docstring = ast.get_docstring(ast.parse(file.read_text()), clean=False) or ""
        texts.append((name_of(file), re.sub(r"[\[\]]", "", docstring).replace(":PRESET", ":digits")))
    dry = subprocess.run(
        ["make", "--dry-run", "train", "generate"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    texts += [("Makefile", dry.stdout), (".ci/run", (REPOSITORY / ".ci" / "run").read_text())]
    return [(where, command) for where, text in texts for command in commands(text)]


@functools.cache
def definition(module: str) -> tuple[Callable[[], object], str | None]:
    """The arguments of a command's call of `command_line.start`: flag definitions and positional argument."""
    started = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command_line, "start", lambda main, define, positional=None: started.append((define, positional)))
        patch.delitem(sys.modules, module, raising=False)
        runpy.run_module(module, run_name="__main__")
    assert started, f"{module} does not call command_line.start"
    return started[0]


def parsed(module: str, words: list[str], patch: pytest.MonkeyPatch) -> list[str]:
    """The positional arguments of a command line; raises the errors of its flags. Nothing runs."""
    define, positional = definition(module)
    values = flags.FlagValues()

    def into_values(function: Any) -> Any:
        def with_values(*given: Any, **options: Any) -> Any:
            bound = inspect.signature(function).bind_partial(*given, **options).arguments
            return function(*given, **options, **({} if "flag_values" in bound else {"flag_values": values}))

        return with_values

    for home in (flags, config_flags):
        for name, function in inspect.getmembers(home, inspect.isfunction):
            if "flag_values" in inspect.signature(function).parameters:
                patch.setattr(home, name, into_values(function))
    patch.setattr(command_line, "FLAGS", values)
    patch.setattr(command_line.app, "run", lambda *_, **__: None)
    patch.setattr(sys, "argv", [module, *words])  # where ml_collections looks for --config.KEY
    command_line.start(lambda *_: None, define, positional)
    return values(sys.argv)[1:]


# Its flags are argparse's: a card's machine may lack absl.
WITHOUT_ABSL = "experiments.benchmarks.first_card"


# ml_collections loads a configuration file so.
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.parametrize("module", sorted({command.split()[0] for _, command in documented_commands()}))
def test_documented_commands_parse(module, monkeypatch):
    """Modules exist, flags exist, and their values are of the right kind."""
    monkeypatch.chdir(REPOSITORY)
    for where, command in documented_commands():
        name, *words = shlex.split(command.replace("`", ""), comments=True)
        if name != module:
            continue
        ends = [number for number, word in enumerate(words) if word in ("|", ">", ">>", "&&", "||", "\\")]
        ends += [number + 1 for number, word in enumerate(words) if word.endswith(";")]
        words = [word.rstrip(";") for word in words[: min(ends, default=None)] if word != "--help"]
        if name.startswith(WITHOUT_ABSL):
            home = f"{name}.__main__" if name == WITHOUT_ABSL else name
            if words:
                importlib.import_module(home).parser().parse_args(words)  # exits with a message where it cannot
            continue
        with monkeypatch.context() as patch:
            try:
                rest = parsed(name, words, patch)
            except flags.IllegalFlagValueError as error:
                if "other than None" not in str(error) or words:  # a bare name, or --help
                    pytest.fail(f"{where}: {command}: {error}")
            except (flags.Error, ValueError, KeyError, AttributeError) as error:
                pytest.fail(f"{where}: {command}: {error}")
            else:
                assert not rest or definition(name)[1], f"{where}: {command}: takes flags only"


def test_the_commands_of_the_readme_are_those_at_the_top_of_experiments():
    """Each command has a line in the README, and the README names no other."""
    top = {file.stem for file in (REPOSITORY / "experiments").glob("*.py") if "command_line.start" in file.read_text()}
    named = {command.split()[0].split(".")[1] for text in blocks(README, "sh") for command in commands(text)}
    assert named == top and len(top) > 5


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z][\w-]*):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    for page in GUIDES:
        texts = [*blocks(page, "sh"), *(f"`{text}" for text in inline(page))]
        for target in (target for text in texts for target in TARGET.findall(text)):
            assert target in targets, f"{name_of(page)}: make {target}"


def test_configuration_keys_exist():
    """Those of flags in the prose; those of whole commands are parsed above."""
    configs = [importlib.import_module(f"configs.{name}").get_config() for name in ("classifier", "generator")]
    for page in GUIDES:
        for key in (key for text in inline(page) for key in re.findall(r"--config\.([\w.]+)", text)):
            assert any(has(config, key.split(".")) for config in configs), f"{name_of(page)}: --config.{key}"


def has(config: Any, keys: list[str]) -> bool:
    return keys[0] in config and (len(keys) == 1 or has(config[keys[0]], keys[1:]))


# Files and names


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_resolve(page):
    for link in LINK.findall(FENCE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(REPOSITORY) and target.exists(), f"{name_of(page)}: {link}"
        assert not anchor or anchor in anchors(target), f"{name_of(page)}: {link}: no such heading"


def names_in(page: Path) -> Iterator[tuple[str, bool]]:
    """(name, whether it is dotted) of the files and Python names in the code spans of a page."""
    for text in (text for text in inline(page) if "NAME" not in text):
        if re.fullmatch(rf"({'|'.join(TOP_FOLDERS)})/[\w./-]*", text):
            yield text, False
        elif re.fullmatch(rf"({'|'.join(PACKAGES)})(\.\w+)+(\(.*\))?", text):
            yield text.partition("(")[0], True


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_named_files_and_names_exist(page):
    for text, is_dotted in names_in(page):
        assert exists(text) if is_dotted else (REPOSITORY / text).exists(), f"{name_of(page)}: {text}"


def exists(name: str) -> bool:
    module, rest = name.split(".")[0], name.split(".")[1:]
    found: Any = importlib.import_module(module)
    for part in rest:
        module = f"{module}.{part}"
        if not hasattr(found, part):
            try:
                importlib.import_module(module)
            except ModuleNotFoundError:
                return False
        found = getattr(found, part, None) or sys.modules[module]
    return True


def test_the_readme_is_short_and_the_guides_are_linked():
    assert len(README.read_text().splitlines()) <= README_LINES
    linked = {(README.parent / link.partition("#")[0]).resolve() for link in LINK.findall(README.read_text())}
    assert set(GUIDES) - {README} <= linked
