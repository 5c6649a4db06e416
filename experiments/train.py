"""Trains a classifier or a generator.

    python -m experiments.train --config=configs/classifier.py:digits --workdir=runs/digits
    python -m experiments.train --config=configs/generator.py:digits --workdir=runs/digits_generator

A run found in the workdir is continued. On several processes: the same command in each, found through the launcher's
environment (SLURM, Open MPI, Cloud TPU) or with --coordinator_address, --num_processes and --process_id.
"""

from collections.abc import Sequence
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from experiments import classification, command_line, generation
from gspn_jax import data
from gspn_jax.training import Result, train


def run(config: Any, workdir: str) -> Result:
    """Trains what a configuration says.

    Args:
        config: as `configs/classifier.py` or `configs/generator.py` makes it.
        workdir: folder of checkpoints, metrics and events.

    Raises:
        ValueError, OSError, CheckpointError, NonFinite: in one line, what is wrong.
        Preempted: SIGTERM came and the state is saved.
    """
    if config.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", config.compilation_cache)
    classification.check_sizes(config)
    dataset = data.load(config.data.name, config.data.path or None)
    family: Any = generation if is_generation(config) else classification
    meta = family.describe(config, dataset)
    epoch = classification.steps_per_epoch(config, dataset.train)
    options = classification.train_options(config, epoch, workdir)
    task = family.make_training_task(meta, config)
    batches = classification.training_batches(config, dataset.train)
    try:
        return train(
            task,
            batches,
            options=options,
            optimizer=classification.optimizer_options(config, epoch, options.num_steps),
            evaluate=family.make_evaluate(
                task,
                dataset.test,
                meta,
                batch_size=config.batch_size,
                num_threads=config.data.num_threads,
                num_workers=config.data.num_workers,
                on_corrupt=config.data.on_corrupt,
            ),
            meta=meta,
            free_keys=family.FREE_KEYS,
            initial=classification.start_from(config.init_from, meta, family.differences) if config.init_from else None,
            report=family.layer_lines(meta, config.batch_size // config.accumulate),
        )
    finally:
        batches.close()


def is_generation(config: Any) -> bool:
    """Whether the configuration says so; a classifier's says nothing."""
    return config.get("task") == "generation"


def define_flags() -> None:
    config_flags.DEFINE_config_file("config", None, "Configuration and preset, such as configs/classifier.py:digits.")
    flags.DEFINE_string("workdir", None, "Folder of checkpoints, metrics and events.")
    flags.mark_flags_as_required(["config", "workdir"])


def main(argv: Sequence[str]) -> None:
    if argv:
        raise ValueError(f"expected flags only, got {' '.join(argv)}")
    result = run(flags.FLAGS.config, flags.FLAGS.workdir)
    if jax.process_index() == 0:
        lines = generation.lines_of if is_generation(flags.FLAGS.config) else classification.accuracy_lines
        print(*lines(result.evaluation), sep="\n")


if __name__ == "__main__":
    command_line.start(main, define_flags)
