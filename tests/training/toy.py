"""A run small enough to be killed often: a two-layer classifier or a generator of coloured noise, and its command.

    python -m tests.training.toy '{"workdir": "/tmp/run", "num_steps": 20, ...}'

prints one line of JSON: the final step, a digest of the final state, and the evaluation.
"""

import hashlib
import json
import os
import signal
import sys
import threading
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from gspn_jax.diffusion import GaussianDiffusion
from gspn_jax.training import Classification, MeshOptions, MixingOptions, OptimizerOptions, Preempted, TrainOptions
from gspn_jax.training.checkpoints import Checkpoints, load_parameters
from gspn_jax.training.distributed import initialise
from gspn_jax.training.loop import train
from gspn_jax.training.tasks.generation import Generation

CLASSES, SIZE, BATCH = 6, 4, 16


class Toy(nnx.Module):
    """Pixels, a hidden layer, a head; noise on the hidden layer in training, so that keys matter."""

    def __init__(self, rngs: nnx.Rngs, num_classes: int = CLASSES, width: int = 32, noise: float = 0.1):
        self.layers = nnx.List([nnx.Linear(SIZE * SIZE * 3, width, rngs=rngs)])
        self.noise = noise
        self.head = nnx.Linear(width, num_classes, rngs=rngs)

    def __call__(self, images: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        hidden = jax.nn.gelu(self.layers[0](images.reshape(images.shape[0], -1)))
        if key is not None:
            hidden = hidden + self.noise * jax.random.normal(key, hidden.shape)
        return self.head(hidden)


class ToyDenoiser(nnx.Module):
    """Pixels, time and label to noise and variance by the same layers; noise on the hidden layer again."""

    def __init__(self, rngs: nnx.Rngs):
        pixels = SIZE * SIZE * 3
        self.label = nnx.Embed(CLASSES + 1, pixels, rngs=rngs)
        self.toy = Toy(rngs, num_classes=2 * pixels)

    def __call__(self, x: jax.Array, time: jax.Array, label: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        scale = 1 + 1e-3 * time.astype(x.dtype).reshape(-1, 1, 1, 1)
        return self.toy(x * scale + self.label(label).reshape(x.shape), key=key).reshape(*x.shape[:3], 6)


class ToyBatches:
    """Batch n is drawn from seed n; a label shows as a brighter row of pixels."""

    def __init__(self, batch_size: int = BATCH, nan_at: int = -1, kill_at: int = -1, pause: float = 0.0):
        self.position, self.batch_size, self.nan_at, self.kill_at, self.pause = 0, batch_size, nan_at, kill_at, pause

    def __next__(self) -> dict[str, Any]:
        if self.position == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.pause)
        images, labels = samples(self.position, self.batch_size)
        share = self.batch_size // jax.process_count()
        rows = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
        batch: dict[str, Any] = {"image": images[rows], "label": labels[rows], "replaced": 1}
        if self.position == self.nan_at:
            batch["image"] = np.full_like(batch["image"], np.nan, np.float32)
        self.position += 1
        return batch

    def state(self) -> dict[str, int]:
        return {"position": self.position}

    def restore(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def samples(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (count, SIZE, SIZE, 3) uint8 and labels (count,) int32."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(CLASSES, size=count).astype(np.int32)
    images = rng.integers(0, 160, (count, SIZE, SIZE, 3), np.uint8)
    images[np.arange(count), labels % SIZE, labels // SIZE] += 95
    return images, labels


def toy_task(mixing: MixingOptions | None = None, num_classes: int = CLASSES, **model: Any) -> Classification:
    return Classification(
        lambda rngs: Toy(rngs, num_classes, **model),
        num_classes=num_classes,
        mean=[80.0] * 3,
        std=[46.0] * 3,
        mixing=mixing,
    )


def toy_generation() -> Generation:
    objective = GaussianDiffusion.linear()
    return Generation(ToyDenoiser, num_classes=CLASSES, objective=objective)


def toy_evaluate(task: Classification | Generation, count: int = 40) -> Any:
    """Parameters -> the task's numbers on `count` held-out images, in padded batches of BATCH."""
    images, labels = samples(2**31, count)

    def batches():
        share = BATCH // jax.process_count()
        mine = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
        for first in range(0, count, BATCH):
            rows = np.arange(first, first + BATCH)[mine]
            mask = rows < count
            yield {"image": images[rows * mask], "label": labels[rows * mask], "mask": mask}

    return lambda params: task.evaluate(params, batches())


def toy_train(
    workdir: str,
    *,
    num_steps: int = 20,
    mixing: bool = True,
    generates: bool = False,
    config: dict[str, Any] | None = None,
    mesh: dict[str, Any] | None = None,
    batches: dict[str, Any] | None = None,
    learning_rate: float = 0.3,
    width: int = 32,
    noise: float = 0.1,
    **options: Any,
):
    """Trains the toy; options as in TrainOptions, `batches` as in ToyBatches."""
    how = MixingOptions(mixup=0.8, label_smoothing=0.1) if mixing else None
    task = toy_generation() if generates else toy_task(how, width=width, noise=noise)
    axes: dict[str, Any] = mesh or {"data": 1, "model": jax.device_count()}
    return train(
        task,
        ToyBatches(**(batches or {})),
        options=TrainOptions(
            **{"workdir": workdir, "num_steps": num_steps, "batch_size": BATCH, "log_steps": 1}
            | {"checkpoint_steps": 5, "mesh": MeshOptions(**axes)}
            | options
        ),
        optimizer=OptimizerOptions(
            learning_rate=learning_rate, warmup_steps=min(3, num_steps - 1), ema_decay=0.9, ema_warmup=True
        ),
        evaluate=toy_evaluate(task),
        description={"config": config or {"seed": 0}},
        free_keys=("free",),
    )


def digest(tree: Any) -> str:
    """Bits of all leaves, in one number."""
    total = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        total.update(np.asarray(leaf).tobytes())
    return total.hexdigest()


def kill_during_save(step: int, seconds: float) -> None:
    """Ends this process by SIGKILL so many seconds after it began to save `step`."""
    save = Checkpoints.save

    def saving(self: Checkpoints, state: Any, *rest: Any) -> None:
        if int(jax.device_get(state.step)) == step:
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
        save(self, state, *rest)

    Checkpoints.save = saving  # pyright: ignore[reportAttributeAccessIssue]


def main(arguments: dict[str, Any]) -> None:
    jax.config.update("jax_num_cpu_devices", arguments.pop("devices", 1))
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_compilation_cache_dir", arguments.pop("cache", None))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    initialise(*arguments.pop("distributed", (None, None, None)))
    if "kill_save" in arguments:
        kill_during_save(*arguments.pop("kill_save"))
    loads = arguments.pop("loads", False)
    try:
        result = toy_train(**arguments)
    except Preempted as stop:
        print(stop, file=sys.stderr)
        sys.exit(143)
    numbers = {"step": int(result.state.step), "digest": digest(result.state), **result.evaluation}
    if loads:
        loaded, _ = load_parameters(arguments["workdir"], ema=False)
        numbers |= {"params": digest(result.state.params), "loaded": digest(loaded)}
    print(json.dumps(numbers))


class Outcome:
    """How a run in another process went: exit code (negative: the signal), printed lines, the line of JSON."""

    def __init__(self, code: int | None, out: str, err: str):
        self.code, self.out, self.err = code, out, err

    @property
    def result(self) -> dict[str, Any]:
        assert self.code == 0, self.err
        return json.loads(self.out.splitlines()[-1])


class Started:
    """A run in another process, forked from a server that has imported everything: most of a short run is imports."""

    def __init__(self, arguments: dict[str, Any], folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        names = [folder / f"{time.monotonic_ns()}.{name}" for name in ("out", "err")]
        self._out, self._err = names
        arguments = {"cache": str(folder.parent / "compiled"), **arguments}  # shared by the tests of a session
        context = get_context("forkserver")
        context.set_forkserver_preload(["tests.training.toy"])
        self.process = context.Process(target=_redirected, args=(arguments, str(names[0]), str(names[1])))
        self.process.start()

    def wait(self, timeout: float = 120.0) -> Outcome:
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise TimeoutError(f"still running after {timeout} s: {self.printed()}")
        return Outcome(self.process.exitcode, self.printed(), self._err.read_text())

    def printed(self) -> str:
        return self._out.read_text() if self._out.exists() else ""


def _redirected(arguments: dict[str, Any], out: str, err: str) -> None:
    for number, name in ((1, out), (2, err)):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    main(arguments)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
