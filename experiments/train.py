"""Trains a classifier or a generator.

    python -m experiments.train --config=configs/classifier.py:digits --workdir=runs/digits
    python -m experiments.train --config=configs/generator.py:digits --workdir=runs/digits_generator

A run found in the workdir is continued. On several processes: the same command in each, found through the launcher's
environment (SLURM, Open MPI, Cloud TPU) or with --coordinator_address, --num_processes and --process_id.
"""

from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from experiments import command_line, settings
from gspn_jax import data
from gspn_jax.runs import Run, make_evaluate, start_from, upgraded
from gspn_jax.training import Result, train


def run(config: Any, workdir: str) -> tuple[Run, Result]:
    """Trains what a configuration says.

    Args:
        config: from `configs/classifier.py` or `configs/generator.py`.
        workdir: folder of checkpoints, metrics and events.

    Returns:
        The run that was trained, and its state and last evaluation.

    Raises:
        ValueError, OSError, CheckpointError, NonFinite: in one line, what is wrong.
        Preempted: SIGTERM came and the state is saved.
    """
    if config.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", config.compilation_cache)
    settings.check_sizes(config)
    dataset = data.load(config.data.name, config.data.path or None)
    made = settings.make_run(config, dataset)
    epoch = settings.steps_per_epoch(config, dataset.train)
    options = settings.train_options(config, epoch, workdir)
    task = made.make_task(**settings.task_options(config))
    batches = settings.training_batches(config, dataset.train)
    try:
        result = train(
            task,
            batches,
            options=options,
            optimizer=settings.optimizer_options(config, epoch, options.num_steps),
            evaluate=make_evaluate(
                task,
                dataset.test,
                made.description,
                batch_size=config.batch_size,
                num_threads=config.data.num_threads,
                num_workers=config.data.num_workers,
                on_corrupt=config.data.on_corrupt,
            ),
            description=made.description,
            upgrade=upgraded,
            free_keys=settings.FREE_KEYS,
            initial=start_from(config.init_from, made) if config.init_from else None,
            report=made.layer_report(config.batch_size // config.accumulate),
        )
    finally:
        batches.close()
    return made, result


def define_flags() -> None:
    config_flags.DEFINE_config_file("config", None, "Configuration and preset, such as configs/classifier.py:digits.")
    flags.DEFINE_string("workdir", None, "Folder of checkpoints, metrics and events.")
    flags.mark_flags_as_required(["config", "workdir"])


def main() -> None:
    made, result = run(flags.FLAGS.config, flags.FLAGS.workdir)
    if jax.process_index() == 0:
        print(*made.summary(result.evaluation), sep="\n")


if __name__ == "__main__":
    command_line.start(main, define_flags)
