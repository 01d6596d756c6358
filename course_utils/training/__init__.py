"""Training: one readable loop, its steps, optimizers, schedules and checkpoints."""

from course_utils.training.checkpoint import CheckpointError
from course_utils.training.fit import fit
from course_utils.training.freezing import gradually, head_first, stages, train_mode, unfreeze_top
from course_utils.training.optimizers import adamw, constant, one_cycle, parameter_groups, sgd
from course_utils.training.steps import supervised

__all__ = ["CheckpointError", "adamw", "constant", "fit", "gradually", "head_first", "one_cycle"]
__all__ += ["parameter_groups", "sgd", "stages", "supervised", "train_mode", "unfreeze_top"]
