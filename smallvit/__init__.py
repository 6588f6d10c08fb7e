"""smallvit: Vision Transformers that learn from small image sets.

Attributes are imported when first used, so that `import smallvit` and `smallvit --help` load no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "BinaryConfig": "smallvit.plugins",
    "Config": "smallvit.config",
    "InputError": "smallvit.errors",
    "LSAConfig": "smallvit.plugins",
    "SPTConfig": "smallvit.plugins",
    "TrainingError": "smallvit.errors",
    "add_distillation_token": "smallvit.plugins",
    "create_model": "smallvit.models",
    "describe": "smallvit.plugins",
    "load": "smallvit.checkpoint",
    "load_base": "smallvit.plugins",
    "patch": "smallvit.plugins",
    "set_input_size": "smallvit.plugins",
    "set_openness": "smallvit.plugins",
    "train": "smallvit.engine",
    "unpatch": "smallvit.plugins",
}

_ROOMS = (
    "attention",
    "checkpoint",
    "config",
    "datasets",
    "engine",
    "keeper",
    "models",
    "plugins",
    "profile",
    "recipes",
    "registry",
    "report",
)

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from smallvit.checkpoint import load as load
    from smallvit.config import Config as Config
    from smallvit.engine import train as train
    from smallvit.errors import InputError as InputError
    from smallvit.errors import TrainingError as TrainingError
    from smallvit.models import create_model as create_model
    from smallvit.plugins import BinaryConfig as BinaryConfig
    from smallvit.plugins import LSAConfig as LSAConfig
    from smallvit.plugins import SPTConfig as SPTConfig
    from smallvit.plugins import add_distillation_token as add_distillation_token
    from smallvit.plugins import describe as describe
    from smallvit.plugins import load_base as load_base
    from smallvit.plugins import patch as patch
    from smallvit.plugins import set_input_size as set_input_size
    from smallvit.plugins import set_openness as set_openness
    from smallvit.plugins import unpatch as unpatch


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"smallvit.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'smallvit' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_ROOMS})
