"""smallvit: Vision Transformers that learn from small image sets.

Attributes are imported when first used, so that `import smallvit` and `smallvit --help` load no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from smallvit.plugins import PLUGINS

__version__ = "0.1.0"

_HOMES = {
    "Config": "smallvit.config.config",
    "InputError": "smallvit.utils.errors",
    "TrainingError": "smallvit.utils.errors",
    "add_distillation_token": "smallvit.plugins.distillation",
    "create_model": "smallvit.models.factory",
    "describe": "smallvit.plugins.patch",
    "embed": "smallvit.evaluation.embed",
    "fuse": "smallvit.plugins.patch",
    "initialize": "smallvit.models.initialization",
    "load_model": "smallvit.models.checkpoint",
    "load_base_state_dict": "smallvit.plugins.patch",
    "patch": "smallvit.plugins.patch",
    "predict": "smallvit.evaluation.predict",
    "set_input_size": "smallvit.plugins.resize",
    "set_lsa_strength": "smallvit.plugins.lsa_layer",
    "train": "smallvit.training.train",
    "unpatch": "smallvit.plugins.patch",
    **{plugin.config.__name__: plugin.config.__module__ for plugin in PLUGINS.values()},
}

_PACKAGES = (
    "attention",
    "config",
    "datasets",
    "evaluation",
    "experiments",
    "export",
    "models",
    "plugins",
    "profiling",
    "report",
    "runs",
    "training",
    "utils",
)

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from smallvit.config.config import Config as Config
    from smallvit.evaluation.embed import embed as embed
    from smallvit.evaluation.predict import predict as predict
    from smallvit.models.checkpoint import load_model as load_model
    from smallvit.models.factory import create_model as create_model
    from smallvit.models.initialization import initialize as initialize
    from smallvit.plugins import *  # noqa: F403
    from smallvit.plugins.distillation import add_distillation_token as add_distillation_token
    from smallvit.plugins.lsa_layer import set_lsa_strength as set_lsa_strength
    from smallvit.plugins.patch import describe as describe
    from smallvit.plugins.patch import fuse as fuse
    from smallvit.plugins.patch import load_base_state_dict as load_base_state_dict
    from smallvit.plugins.patch import patch as patch
    from smallvit.plugins.patch import unpatch as unpatch
    from smallvit.plugins.resize import set_input_size as set_input_size
    from smallvit.training.train import train as train
    from smallvit.utils.errors import InputError as InputError
    from smallvit.utils.errors import TrainingError as TrainingError


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"smallvit.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'smallvit' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_PACKAGES})
