"""Regularisation presets: dropout, stochastic depth, weight decay and label smoothing, as published.

AugReg's grid crosses its seven levels of augmentation (`--aug augreg-…`) with four of these: none, or dropout and
stochastic depth of 0.1, each with a weight decay of 0.03 or 0.1.
"""

from __future__ import annotations

from smallvit.config import Config

PRESETS: dict[str, dict[str, float]] = {
    "none": {"dropout": 0.0, "drop_path": 0.0, "weight_decay": 0.0, "smoothing": 0.0},
    # Lee, Lee, Song 2021, arXiv:2112.13492, its code
    "paper": {"dropout": 0.0, "drop_path": 0.1, "weight_decay": 0.05, "smoothing": 0.1},
    # Touvron et al. 2021, arXiv:2012.12877, table 9
    "deit": {"dropout": 0.0, "drop_path": 0.1, "weight_decay": 0.05, "smoothing": 0.1},
    # Touvron et al. 2022, arXiv:2204.07118: the small model
    "deit3": {"dropout": 0.0, "drop_path": 0.05, "weight_decay": 0.05, "smoothing": 0.0},
    # Steiner et al. 2021, arXiv:2106.10270, section 3.3
    "augreg-none-0.03": {"dropout": 0.0, "drop_path": 0.0, "weight_decay": 0.03, "smoothing": 0.0},
    "augreg-none-0.1": {"dropout": 0.0, "drop_path": 0.0, "weight_decay": 0.1, "smoothing": 0.0},
    "augreg-0.03": {"dropout": 0.1, "drop_path": 0.1, "weight_decay": 0.03, "smoothing": 0.0},
    "augreg-0.1": {"dropout": 0.1, "drop_path": 0.1, "weight_decay": 0.1, "smoothing": 0.0},
}
AUTO = {"weight_decay": 0.05, "smoothing": 0.1}
"""What `auto` sets; dropout and stochastic depth follow the architecture."""


def regularised(config: Config) -> Config:
    """The configuration with what its preset says, where no other value was given."""
    values = AUTO if config.optim.reg == "auto" else PRESETS[config.optim.reg]
    if config.optim.loss == "bce":
        values = values | {"smoothing": 0.0}
    options = config.options()
    return config.replace(**{name: value for name, value in values.items() if options[name] is None})
