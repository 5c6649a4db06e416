"""Trains a classifier or a generator.

    python -m experiments.train --config=configs/classifier.py:digits --workdir=runs/digits
    python -m experiments.train --config=configs/generator.py:digits --workdir=runs/digits_generator

The command resumes a run that it finds in the workdir. With several processes, start the same command in each: they
find each other by the launcher's environment (SLURM, Open MPI, Cloud TPU), or by --coordinator_address, --num_processes
and --process_id.
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
    """Trains a model by a configuration.

    Args:
        config: configuration of `configs/classifier.py` or `configs/generator.py`.
        workdir: folder of checkpoints, metrics and events.

    Returns:
        The trained run, and its state and last evaluation.

    Raises:
        ValueError, OSError, CheckpointError, NonFinite: the message is one line.
        Preempted: SIGTERM arrived; the state is saved.
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
