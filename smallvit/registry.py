"""The paper's models in timm's registry: after `import smallvit.registry`, timm creates them by name.

    timm.create_model("smallvit_vit_spt_lsa", img_size=64, num_classes=200)

`smallvit_vit`, `smallvit_cait`, `smallvit_pit`, `smallvit_swin`, `smallvit_t2t`, each also with `_spt`, `_lsa` and
`_spt_lsa`. There are no trained weights of these. `smallvit_model` is whatever `arch=` names; folders that `smallvit
export` writes say so where timm alone cannot build a model, and are loaded with their weights:

    timm.create_model("local-dir:runs/mine/export/timm", pretrained=True)

Arguments are those of `smallvit.create_model`, with timm's names
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

from timm.models import generate_default_cfgs, load_pretrained, register_model, resolve_pretrained_cfg
from timm.models._features import FeatureGetterNet
from torch import nn

from smallvit.models import create_model
from smallvit.plugins import set_input_size
from smallvit.published import PUBLISHED

PLUGINS: dict[str, dict[str, bool]] = {
    "": {},
    "_spt": {"spt": True},
    "_lsa": {"lsa": True},
    "_spt_lsa": {"spt": True, "lsa": True},
}
NAMES = {f"smallvit_{arch}{suffix}": (arch, plugins) for arch, (suffix, plugins) in product(PUBLISHED, PLUGINS.items())}
"""Names in timm's registry: architecture and plugins."""
ANY = "smallvit_model"
"""The name in timm's registry of whatever `arch` names."""
IGNORED = ("pretrained_cfg_overlay", "pretrained_model_args", "bn_momentum", "bn_eps", "scriptable")
"""What timm's own train script and factory pass to every model, as far as it means nothing here."""

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
        for name, (arch, _) in (NAMES | {ANY: ("vit", {})}).items()
    }
)


def _entrypoint(name: str) -> Callable[..., nn.Module]:
    arch, plugins = NAMES[name]

    def create(
        pretrained: bool = False,
        img_size: int = 32,
        num_classes: int = 1000,
        pretrained_cfg: dict[str, Any] | None = None,
        cache_dir: str | None = None,
        **rest: Any,
    ) -> nn.Module:
        if pretrained:
            raise ValueError(f"{name} has no trained weights; create it with pretrained=False")
        return _created(name, arch, img_size=img_size, num_classes=num_classes, **plugins | rest)

    create.__name__, create.__module__ = name, __name__
    create.__doc__ = f"{arch} of arXiv:2112.13492" + "".join(f" + {plugin.upper()}" for plugin in plugins)
    return create


def smallvit_model(
    pretrained: bool = False,
    arch: str = "vit",
    img_size: int = 32,
    num_classes: int = 1000,
    pretrained_cfg: dict[str, Any] | None = None,
    cache_dir: str | None = None,
    **rest: Any,
) -> nn.Module:
    """Whatever `arch` names, as `smallvit.create_model` makes it; with weights where timm has found some.

    Weights are fitted to other classes by a new classifier, and to another `img_size` as timm's own are.
    """
    if not pretrained:
        return _created(ANY, arch, img_size=img_size, num_classes=num_classes, **rest)
    cfg = resolve_pretrained_cfg(ANY, pretrained_cfg).to_dict()
    channels, learnt, _ = cfg["input_size"]
    features = {name: rest.pop(name) for name in ("features_only", "out_indices") if name in rest}
    model = _created(ANY, arch, img_size=learnt, num_classes=num_classes, **{"in_chans": channels} | rest)
    load_pretrained(model, cfg, num_classes, rest.get("in_chans", channels), cache_dir=cache_dir)
    if img_size != learnt and (hasattr(model, "pos_embed") or hasattr(model, "set_input_size")):
        set_input_size(model, img_size)  # convolutions take any
    model.pretrained_cfg = model.default_cfg = cfg
    return _shown(model, **features)


def _created(
    name: str,
    arch: str,
    *,
    img_size: int,
    num_classes: int,
    drop_path_rate: float | None = None,
    drop_rate: float = 0.0,
    features_only: bool = False,
    out_indices: int | tuple[int, ...] | None = None,
    **rest: Any,
) -> nn.Module:
    """An untrained model, by timm's arguments and those of `create_model`."""
    if drop_rate:
        raise ValueError(f"{name} has no dropout: leave out drop_rate, or use drop_path_rate")
    if not isinstance(img_size, int):
        raise ValueError(f"img_size {img_size}: {name} is made for square images, one number")
    arguments = {key: value for key, value in rest.items() if key not in IGNORED}
    if drop_path_rate is not None:
        arguments["drop_path"] = drop_path_rate
    model = create_model(arch, img_size=img_size, num_classes=num_classes, **arguments)
    model.pretrained_cfg = model.default_cfg = default_cfgs[name].default.to_dict() | {
        "architecture": name,
        "input_size": (rest.get("in_chans", 3), img_size, img_size),
        "num_classes": num_classes,
    }
    return _shown(model, features_only, out_indices)


def _shown(
    model: nn.Module, features_only: bool = False, out_indices: int | tuple[int, ...] | None = None
) -> nn.Module:
    """The model, or what gives its features alone."""
    return FeatureGetterNet(model, out_indices=out_indices or len(model.feature_info)) if features_only else model


register_model(smallvit_model)
for _name in NAMES:
    setattr(sys.modules[__name__], _name, register_model(_entrypoint(_name)))
