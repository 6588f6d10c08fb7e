"""The options of a training run, in groups of frozen dataclasses.

Each field's sentence is its documentation and the help of its flag. Option names are unique across the groups.
"""

from smallvit.options.checks import flag, require
from smallvit.options.data import DATA_NAMES, AugmentConfig, DataConfig
from smallvit.options.model import BINARYVIT_PARTS, PLUGINS, InitConfig, ModelConfig, is_binaryvit
from smallvit.options.optim import DistillConfig, OptimConfig
from smallvit.options.run import LOGGERS, ComputeConfig, RunConfig

__all__ = [
    "BINARYVIT_PARTS",
    "DATA_NAMES",
    "LOGGERS",
    "PLUGINS",
    "AugmentConfig",
    "ComputeConfig",
    "DataConfig",
    "DistillConfig",
    "InitConfig",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "flag",
    "is_binaryvit",
    "require",
]
