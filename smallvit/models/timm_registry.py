"""Register the models of Lee et al. 2021 with timm, which then creates them by name.

    timm.create_model("smallvit_vit_spt_lsa", img_size=64, num_classes=200)

`smallvit_vit`, `smallvit_cait`, `smallvit_pit`, `smallvit_swin`, `smallvit_t2t`, each also with `_spt`, `_lsa` and
`_spt_lsa`, without pretrained weights. `smallvit_model` creates any `arch=`; folders of `smallvit export` use it for
models that timm alone cannot create, and are loaded with their weights:

    timm.create_model("local-dir:runs/mine/export/timm", pretrained=True)

Arguments are those of `smallvit.create_model`, with 32 pixels as the default `img_size`. To use the models in another
program, such as timm's training script:

    python -c "import smallvit.models.timm_registry, runpy, sys; del sys.argv[0]; \\
        runpy.run_path(sys.argv[0], {}, '__main__')" train.py DATA --model smallvit_vit_spt_lsa --img-size 32
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import product
from typing import Any

from timm.layers import to_2tuple
from timm.models import generate_default_cfgs, load_pretrained, register_model, resolve_pretrained_cfg
from torch import nn

from smallvit.config.spec import LEE2021_ABLATION
from smallvit.models.architectures import LEE2021
from smallvit.models.factory import create_model
from smallvit.models.weights_info import RESIZING
from smallvit.plugins.resize import set_input_size

NAMES = {
    "_".join(["smallvit", arch, *plugins]): (arch, plugins) for arch, plugins in product(LEE2021, LEE2021_ABLATION)
}
"""Names in timm's registry: architecture and plugins."""
ANY = "smallvit_model"
"""Name in timm's registry of the model that creates any `arch`."""
IGNORED = ("pretrained_cfg_overlay", "pretrained_model_args", "bn_momentum", "bn_eps", "scriptable")
"""Arguments that timm's training script and factory pass to every model, without effect here."""

default_cfgs = generate_default_cfgs(
    {
        f"{name}.untrained": {
            "num_classes": 1000,
            "input_size": (3, 32, 32),
            "fixed_input_size": arch != "t2t",
            **RESIZING,
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "first_conv": None,
            "classifier": "head.fc" if arch == "swin" else "head",
        }
        for name, (arch, _) in (NAMES | {ANY: ("vit", {})}).items()
    }
)


def _entrypoint(name: str, arch: str, doc: str) -> Callable[..., nn.Module]:
    def create(
        pretrained: bool = False,
        arch: str = arch,
        img_size: int | tuple[int, int] = 32,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        pretrained_cfg: dict[str, Any] | None = None,
        cache_dir: str | None = None,
        **rest: Any,
    ) -> nn.Module:
        if pretrained and name != ANY:
            raise ValueError(f"{name} has no trained weights; create it with pretrained=False")
        if drop_rate:
            raise ValueError(f"{name} has no dropout: remove drop_rate, or use drop_path_rate")
        channels, size = rest.pop("in_chans", None), img_size
        cfg = default_cfgs[name].default.to_dict()
        if pretrained:
            cfg = resolve_pretrained_cfg(name, pretrained_cfg).to_dict()
            size = cfg["input_size"][1:]
        channels = channels or cfg["input_size"][0]
        arguments = {key: value for key, value in rest.items() if key not in IGNORED}
        model = create_model(arch, img_size=size, num_classes=num_classes, in_chans=channels, **arguments)
        if pretrained:
            load_pretrained(model, cfg, num_classes, channels, cache_dir=cache_dir)
            if to_2tuple(img_size) != to_2tuple(size) and (
                hasattr(model, "pos_embed") or hasattr(model, "set_input_size")
            ):
                set_input_size(model, img_size)  # CNNs take any size
        else:
            cfg |= {"architecture": name, "input_size": (channels, *to_2tuple(size)), "num_classes": num_classes}
        model.pretrained_cfg = model.default_cfg = cfg
        return model

    create.__name__, create.__module__, create.__doc__ = name, __name__, doc
    return create


for _name, (_arch, _plugins) in NAMES.items():
    _doc = f"{_arch} of arXiv:2112.13492" + "".join(f" + {plugin.upper()}" for plugin in _plugins)
    setattr(sys.modules[__name__], _name, register_model(_entrypoint(_name, "+".join([_arch, *_plugins]), _doc)))
smallvit_model = register_model(
    _entrypoint(
        ANY,
        "vit",
        """Create any `arch` by `smallvit.create_model`, and load the weights that timm has found.

        Other classes get a new classifier, and another `img_size` interpolated position embeddings, as in timm.
        """,
    )
)
