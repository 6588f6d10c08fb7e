"""The options of a training run, in groups of frozen dataclasses.

Each field's sentence is its documentation and the help of its flag. Option names are unique across the groups.
"""

from smallvit.options.checks import flag, require
from smallvit.options.data import DATA_NAMES, AugmentConfig, DataConfig
from smallvit.options.model import InitConfig, ModelConfig
from smallvit.options.optim import DistillConfig, OptimConfig
from smallvit.options.run import LOGGERS, ComputeConfig, RunConfig

__all__ = [
    "DATA_NAMES",
    "LOGGERS",
    "AugmentConfig",
    "ComputeConfig",
    "DataConfig",
    "DistillConfig",
    "InitConfig",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "flag",
    "require",
]
