"""Training: one readable loop, its steps, optimizers, schedules and checkpoints."""

from course_utils.training.checkpoint import CheckpointError
from course_utils.training.fit import fit
from course_utils.training.optimizers import adamw, constant, one_cycle, sgd
from course_utils.training.steps import supervised

__all__ = ["CheckpointError", "adamw", "constant", "fit", "one_cycle", "sgd", "supervised"]
