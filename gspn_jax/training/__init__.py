"""Training: one loop for every task, its optimiser, sharding, checkpoints and reports.

Exports `train`, its options and its errors; the task `Classification`; `load_parameters`, `load_both` and
`save_parameters`, which read and write working directories.
"""

from gspn_jax.training.checkpoints import CheckpointError, load_both, load_parameters, save_parameters
from gspn_jax.training.loop import NonFinite, Preempted, Result, train
from gspn_jax.training.mixing import MixingOptions
from gspn_jax.training.optimizer import OptimizerOptions
from gspn_jax.training.options import TrainOptions
from gspn_jax.training.sharding import MeshOptions
from gspn_jax.training.tasks import Task
from gspn_jax.training.tasks.classification import Classification

__all__ = [
    "CheckpointError",
    "Classification",
    "MeshOptions",
    "MixingOptions",
    "NonFinite",
    "OptimizerOptions",
    "Preempted",
    "Result",
    "Task",
    "TrainOptions",
    "load_both",
    "load_parameters",
    "save_parameters",
    "train",
]
