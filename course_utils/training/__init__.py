"""Training: one readable loop and its step, optimizers, schedules and checkpoints."""

from course_utils.training.checkpoint import CheckpointError
from course_utils.training.fit import fit, supervised
from course_utils.training.freezing import stages, train_mode, unfreeze_top
from course_utils.training.optimizers import adamw, constant, one_cycle, parameter_groups, sgd

__all__ = ["CheckpointError", "adamw", "constant", "fit", "one_cycle"]
__all__ += ["parameter_groups", "sgd", "stages", "supervised", "train_mode", "unfreeze_top"]
