"""The paper's models in timm's registry: after `import smallvit.registry`, timm creates them by name.

    timm.create_model("smallvit_vit_spt_lsa", img_size=64, num_classes=200)

`smallvit_vit`, `smallvit_cait`, `smallvit_pit`, `smallvit_swin`, `smallvit_t2t`, each also with `_spt`, `_lsa` and
`_spt_lsa`. There are no trained weights of these. Arguments are those of `smallvit.create_model`, with timm's names
for stochastic depth (`drop_path_rate`) and features (`features_only`, `out_indices`), and images of 32 pixels unless
`img_size` says else. A script that is not yours, such as timm's own for training, runs with them so:

    python -c "import smallvit.registry, runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], {}, '__main__')" \\
        train.py DATA --model smallvit_vit_spt_lsa --img-size 32
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import product
from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models._features import FeatureGetterNet
from torch import nn

from smallvit.models import create_model
from smallvit.published import PUBLISHED

PLUGINS: dict[str, dict[str, bool]] = {
    "": {},
    "_spt": {"spt": True},
    "_lsa": {"lsa": True},
    "_spt_lsa": {"spt": True, "lsa": True},
}
NAMES = {f"smallvit_{arch}{suffix}": (arch, plugins) for arch, (suffix, plugins) in product(PUBLISHED, PLUGINS.items())}
"""Names in timm's registry: architecture and plugins."""
IGNORED = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "bn_momentum", "bn_eps", "scriptable")
"""What timm's own train script passes to every model, as far as it means nothing here."""

default_cfgs = generate_default_cfgs(
    {
        f"{name}.untrained": {
            "num_classes": 1000,
            "input_size": (3, 32, 32),
            "fixed_input_size": arch != "t2t",
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "first_conv": None,
            "classifier": "head.fc" if arch == "swin" else "head",
        }
        for name, (arch, _) in NAMES.items()
    }
)


def _entrypoint(name: str) -> Callable[..., nn.Module]:
    arch, plugins = NAMES[name]

    def create(
        pretrained: bool = False,
        img_size: int = 32,
        num_classes: int = 1000,
        drop_path_rate: float | None = None,
        **rest: Any,
    ) -> nn.Module:
        if pretrained:
            raise ValueError(f"{name} has no trained weights; create it with pretrained=False")
        if rest.pop("drop_rate", 0.0):
            raise ValueError(f"{name} has no dropout: leave out drop_rate, or use drop_path_rate")
        if not isinstance(img_size, int):
            raise ValueError(f"img_size {img_size}: {name} is made for square images, one number")
        features_only, out_indices = rest.pop("features_only", False), rest.pop("out_indices", None)
        arguments = {key: value for key, value in rest.items() if key not in IGNORED}
        model = create_model(
            arch, img_size=img_size, num_classes=num_classes, drop_path=drop_path_rate, **plugins | arguments
        )
        if features_only:
            return FeatureGetterNet(model, out_indices=out_indices or len(model.feature_info))
        model.pretrained_cfg = model.default_cfg = default_cfgs[name].default.to_dict() | {
            "architecture": name,
            "input_size": (rest.get("in_chans", 3), img_size, img_size),
            "num_classes": num_classes,
        }
        return model

    create.__name__, create.__module__ = name, __name__
    create.__doc__ = f"{arch} of arXiv:2112.13492" + "".join(f" + {plugin.upper()}" for plugin in plugins)
    return create


for _name in NAMES:
    setattr(sys.modules[__name__], _name, register_model(_entrypoint(_name)))
