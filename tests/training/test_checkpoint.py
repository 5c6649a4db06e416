"""Checkpoints: exact, on any devices, and distrusted until verified."""

import dataclasses
import gc
import os
import random
import resource
import shutil
import signal
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gspn_jax.training.checkpoints import CheckpointError, Checkpoints, load_parameters
from gspn_jax.training.checkpoints.fingerprint import fingerprints
from gspn_jax.training.checkpoints.record import changed_keys
from gspn_jax.training.optimizer import OptimizerOptions, make_optimizer
from gspn_jax.training.sharding import MeshOptions, make_mesh, tree_shardings
from gspn_jax.training.state import TrainState, initial_state
from tests.training.toy import Started, digest

# Where reading fails, the libraries leave coroutines behind that nobody awaits.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """Warnings about what a test leaves behind belong to that test."""
    yield
    gc.collect()


SHAPES = {"layer": {"kernel": (256, 128), "bias": (128,)}, "head": {"kernel": (128, 7)}}


def shapes_tree(make: Any) -> Any:
    return jax.tree.map(make, SHAPES, is_leaf=lambda node: isinstance(node, tuple))


def make_state() -> TrainState:
    optimizer = make_optimizer(OptimizerOptions(), num_steps=100, batch_size=512)

    def init(key: jax.Array) -> Any:
        return shapes_tree(lambda shape: jax.random.normal(jax.random.fold_in(key, len(shape)), shape))

    return initial_state(init, optimizer, seed=0, keep_ema=True)


def placed(mesh: MeshOptions) -> tuple[TrainState, TrainState]:
    """A state on a mesh, and its abstract form."""
    shapes = jax.eval_shape(make_state)
    shardings = tree_shardings(shapes, make_mesh(mesh), fsdp=mesh.fsdp)
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )
    return jax.jit(make_state, out_shardings=shardings)(), abstract


def advance(state: TrainState) -> TrainState:
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)

    def step(state: TrainState) -> TrainState:
        params = jax.tree.map(lambda leaf: leaf * 1.5, state.params)
        return dataclasses.replace(state, step=state.step + 1, params=params)

    return jax.jit(step, donate_argnums=0, out_shardings=shardings)(state)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, str]]:
    """A workdir with checkpoints 1 and 2, written under a mesh of 4 x 2, and what they hold."""
    workdir = tmp_path_factory.mktemp("saved")
    state, _ = placed(MeshOptions(model=2, fsdp=True))
    digests = {}
    checkpoints = Checkpoints(workdir)
    for step in (1, 2):
        state = advance(state)
        digests[step] = digest(state)
        checkpoints.save(state, {"config": {"seed": 0}}, {"batches": {"position": step}})
        state = advance(state)  # donated while the save runs in the background
        state = dataclasses.replace(state, step=state.step - 1)
    checkpoints.close()
    return workdir, digests


def test_fingerprint_sees_every_bit_and_no_sharding():
    mesh = make_mesh(MeshOptions(model=2))
    array = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    one = jax.jit(fingerprints)
    want = int(one({"a": array})["a"])
    for spec in (P("data"), P("model", "data"), P(None, "model")):
        assert int(one({"a": jax.device_put(array, NamedSharding(mesh, spec))})["a"]) == want
    for dtype in (np.float32, np.float16, jnp.bfloat16, np.int8, bool):
        leaf = (np.abs(array) * 9).astype(dtype)
        before = int(one({"a": leaf})["a"])
        for byte in random.Random(0).sample(range(leaf.nbytes), 8):
            flipped = bytearray(leaf.tobytes())
            flipped[byte] ^= 1
            assert int(one({"a": np.frombuffer(bytes(flipped), leaf.dtype).reshape(leaf.shape)})["a"]) != before
    swapped = array.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    assert int(one({"a": swapped})["a"]) != want


@pytest.mark.parametrize("mesh", [MeshOptions(), MeshOptions(model=4), MeshOptions(model=8, fsdp=True)])
def test_restore_on_another_mesh(saved: tuple[Path, dict[int, str]], mesh: MeshOptions):
    workdir, digests = saved
    _, abstract = placed(mesh)
    checkpoints = Checkpoints(workdir, read_only=True)
    found = checkpoints.restore(abstract)
    assert found is not None
    state, record = found
    assert int(state.step) == 2 and digest(state) == digests[2]
    assert record["progress"] == {"batches": {"position": 2}} and record["description"] == {"config": {"seed": 0}}
    assert jax.tree.all(jax.tree.map(lambda leaf, want: leaf.sharding == want.sharding, state, abstract))


@pytest.mark.full
def test_restore_on_one_device(tmp_path: Path):
    """Written on 8 devices, continued on 1, by runs in processes of their own."""
    arguments = {"workdir": str(tmp_path / "run"), "num_steps": 12, "checkpoint_steps": 3}
    killed = Started(arguments | {"devices": 8, "batches": {"kill_at": 10}, "mesh": {"data": 8}}, tmp_path).wait()
    assert killed.code == -signal.SIGKILL
    went_on = Started(arguments | {"devices": 1}, tmp_path).wait()
    whole = Started(arguments | {"devices": 1, "workdir": str(tmp_path / "whole")}, tmp_path).wait()
    assert "resuming at step" in went_on.out
    assert went_on.result["loss"] == pytest.approx(whole.result["loss"], rel=1e-4)


def damage(path: Path, how: str, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "removed":
        path.unlink()
    else:
        for _ in range(1 if how == "flipped" else 64):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)


def large_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.parent.name == "d")


@pytest.mark.parametrize("how", ["truncated", "flipped", "scrambled", "removed"])
def test_damaged_checkpoint_falls_back_and_names_both(
    saved: tuple[Path, dict[int, str]], tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
):
    workdir = tmp_path / "run"
    shutil.copytree(saved[0], workdir)
    files = [path for path in large_files(workdir / "checkpoints" / "2") if "ocdbt.process_0" in str(path)]
    damage(max(files, key=lambda path: path.stat().st_size), how, random.Random(0))
    _, abstract = placed(MeshOptions())
    checkpoints = Checkpoints(workdir)
    with caplog.at_level("WARNING"):
        found = checkpoints.restore(abstract)
    assert found is not None and digest(found[0]) == saved[1][1]
    (warning,) = [line for line in caplog.messages if "damaged" in line]
    assert str(workdir / "checkpoints" / "2") in warning and str(workdir / "checkpoints" / "1") in warning
    assert (workdir / "rejected" / "2").is_dir() and checkpoints.steps() == [1]
    checkpoints.save(
        dataclasses.replace(found[0], step=found[0].step + 1), {}, {"batches": {}}
    )  # step 2 can be written again
    checkpoints.close()
    assert Checkpoints(workdir).steps() == [1, 2]


@pytest.mark.parametrize("item", ["params", "ema"])
@pytest.mark.parametrize("ema", [False, True])
def test_readers_agree_on_the_checkpoint_whichever_item_is_damaged(
    saved: tuple[Path, dict[int, str]], tmp_path: Path, item: str, ema: bool
):
    workdir = tmp_path / "run"
    shutil.copytree(saved[0], workdir)
    for path in large_files(workdir / "checkpoints" / "2" / item):
        damage(path, "truncated", random.Random(0))
    _, description = load_parameters(workdir, ema=ema)
    assert description["step"] == 1 and description["ema"] == ema
    with pytest.raises(CheckpointError, match="step 2"):
        load_parameters(workdir, 2, ema=ema)


def test_no_damage_to_any_file_passes_as_good(saved: tuple[Path, dict[int, str]], tmp_path: Path):
    """Whatever file is hit: the newest state comes back exact, or the one before it does."""
    rng = random.Random(0)
    _, abstract = placed(MeshOptions())
    names = [path.relative_to(saved[0]) for path in (saved[0] / "checkpoints" / "2").rglob("*") if path.is_file()]
    got = []
    for number, name in enumerate(rng.sample(sorted(names), 10)):
        workdir = tmp_path / str(number)
        shutil.copytree(saved[0], workdir)
        if (workdir / name).stat().st_size:
            damage(workdir / name, "flipped", rng)
        found = Checkpoints(workdir).restore(abstract)
        assert found is not None and digest(found[0]) == saved[1][int(found[0].step)], name
        got.append(int(found[0].step))
    assert 1 in got and 2 in got


def test_a_changed_record_is_not_believed(saved: tuple[Path, dict[int, str]], tmp_path: Path):
    shutil.copytree(saved[0], tmp_path / "run")
    (file,) = [
        path for path in (tmp_path / "run" / "checkpoints" / "2" / "record").iterdir() if path.name == "metadata"
    ]
    text = file.read_text()
    assert '"position": 2' in text
    file.write_text(text.replace('"position": 2', '"position": 3'))
    _, abstract = placed(MeshOptions())
    found = Checkpoints(tmp_path / "run").restore(abstract)
    assert found is not None and int(found[0].step) == 1


def test_all_damaged_is_an_error_and_nothing_is_deleted(saved: tuple[Path, dict[int, str]], tmp_path: Path):
    shutil.copytree(saved[0], tmp_path / "run")
    for path in large_files(tmp_path / "run"):
        damage(path, "truncated", random.Random(0))
    before = sorted(path for path in (tmp_path / "run").rglob("*") if path.is_file())
    _, abstract = placed(MeshOptions())
    with pytest.raises(CheckpointError, match="no checkpoint under .* can be read .*step 2.*step 1"):
        Checkpoints(tmp_path / "run").restore(abstract)
    assert sorted(path for path in (tmp_path / "run").rglob("*") if path.is_file()) == before


def test_other_shapes_are_an_error_that_names_them(saved: tuple[Path, dict[int, str]]):
    _, abstract = placed(MeshOptions())
    abstract.params["head"]["kernel"] = jax.ShapeDtypeStruct((128, 9), jnp.float32)
    with pytest.raises(
        ValueError, match=r"head/kernel: has \(\(128, 7\), 'float32'\), needs \(\(128, 9\), 'float32'\)"
    ):
        Checkpoints(saved[0], read_only=True).restore(abstract)


def test_only_newest_are_kept_and_states_that_are_not_finite_are_refused(tmp_path: Path):
    state, _ = placed(MeshOptions())
    checkpoints = Checkpoints(tmp_path, keep=2)
    for _ in range(4):
        state = advance(state)
        checkpoints.save(state, {}, {"batches": {}})
    checkpoints.wait()
    assert checkpoints.steps() == [3, 4]
    bad = advance(state)
    bad.params["head"]["kernel"] = bad.params["head"]["kernel"].at[3, 3].set(jnp.nan)
    with pytest.raises(
        CheckpointError,
        match="step 5 is not saved: NaN or Inf in params/head/kernel; the last good checkpoint is step 4",
    ):
        checkpoints.save(bad, {}, {"batches": {}})
    assert checkpoints.steps() == [3, 4]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot use .*file/run/checkpoints") as error:
        Checkpoints(tmp_path / "file" / "run")
    assert "\n" not in str(error.value)


def _write_until_full(workdir: str, answers: Any) -> None:
    jax.config.update("jax_num_cpu_devices", 1)
    state, _ = placed(MeshOptions())
    checkpoints = Checkpoints(workdir)
    checkpoints.save(advance(state), {}, {"batches": {}})
    checkpoints.wait()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # writes fail as they do where the disk is full
    state = advance(advance(placed(MeshOptions())[0]))
    try:
        checkpoints.save(state, {}, {"batches": {}})
        checkpoints.wait()
        answers.put("no error")
    except CheckpointError as error:
        answers.put(str(error))
    answers.close()
    answers.join_thread()
    os._exit(0)


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(tmp_path: Path):
    context = get_context("forkserver")
    context.set_forkserver_preload(["tests.training.toy"])
    answers = context.Queue()
    process = context.Process(target=_write_until_full, args=(str(tmp_path), answers))
    process.start()
    answer = answers.get(timeout=120)
    process.join(60)
    assert "cannot write checkpoint" in answer and str(tmp_path / "checkpoints" / "2") in answer, answer
    assert "last good checkpoint is step 1" in answer and "\n" not in answer
    assert Checkpoints(tmp_path, read_only=True).steps() == [1]
    assert load_parameters(tmp_path)[1]["step"] == 1


def test_changed_keys_names_old_and_new_and_spares_free_ones():
    before = {"seed": 0, "model": {"name": "a", "dims": (1, 2)}, "log": {"steps": 5}}
    after = {"seed": 1, "model": {"name": "a", "dims": [1, 2]}, "log": {"steps": 9}, "new": 1}
    assert changed_keys(before, after, frozenset({"log"})) == ["new (was None, is 1)", "seed (was 0, is 1)"]
