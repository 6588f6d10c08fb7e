"""Report which timm models each plugin can patch, and why not the others.

    python benchmarks/coverage.py 'swin*'        one line per model of that name, then totals per family
    python benchmarks/coverage.py --all          families without attention too

Models are created on the meta device, without memory for weights. Nothing is downloaded or written.
"""

from __future__ import annotations

import argparse
import copy
from collections import defaultdict

import timm
import torch
from timm.models import get_arch_name
from timm.models._registry import _model_to_module

from smallvit.plugins import PLUGINS
from smallvit.plugins.patch import patch, unsupported_reason

FAMILIES = (
    "vision_transformer",
    "vision_transformer_hybrid",
    "vision_transformer_relpos",
    "vision_transformer_sam",
    "deit",
    "cait",
    "pit",
    "swin_transformer",
    "swin_transformer_v2",
    "swin_transformer_v2_cr",
    "beit",
    "byoanet",
    "cpubone",
    "csatv2",
    "lowformer",
    "eva",
    "maxxvit",
    "nest",
    "twins",
    "levit",
    "tnt",
    "crossvit",
    "coat",
    "convit",
    "davit",
    "deepseek_vit",
    "efficientformer",
    "efficientformer_v2",
    "efficientvit_msra",
    "fastvit",
    "gcvit",
    "gemma4_vit",
    "hiera",
    "hieradet_sam2",
    "metaformer",
    "mobilevit",
    "mvitv2",
    "naflexvit",
    "nextvit",
    "pvt_v2",
    "qwen3_vit",
    "shvit",
    "tiny_vit",
    "visformer",
    "vitamin",
    "volo",
    "xcit",
)
"""Modules of timm whose models have attention."""


def survey(name: str) -> dict[str, str]:
    """Patch a timm model with each plugin in turn; return the outcome by plugin."""
    outcome = {}
    with torch.device("meta"):
        unpatched = timm.create_model(name, pretrained=False)
    for plugin in PLUGINS.values():
        model = copy.deepcopy(unpatched)
        if (reason := unsupported_reason(model, plugin.name)) is not None:
            outcome[plugin.name] = f"no: {reason}"
            continue
        try:
            patch(model, **{plugin.name: True})
        except TypeError as error:
            outcome[plugin.name] = f"no: {error}"
            continue
        changed, skipped = len(list(plugin.patched(model))), len(list(plugin.sites(model)))
        outcome[plugin.name] = f"yes ({changed} layers{f', {skipped} skipped' if skipped else ''})"
    return outcome


def main() -> None:
    """Print a line for each model, then the number of models that each plugin patches, by family."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pattern", nargs="?", default="*", help="models, such as 'swin*' [all]")
    parser.add_argument("--all", action="store_true", help="include families without attention")
    given = parser.parse_args()
    totals: dict[str, list[dict[str, str]]] = defaultdict(list)
    for name in timm.list_models(given.pattern):
        family = _model_to_module[get_arch_name(name)]
        if given.all or family in FAMILIES:
            totals[family].append(survey(name))
            print(f"{name:48} {family:26} " + "; ".join(f"{key} {text}" for key, text in totals[family][-1].items()))
    totals["all"] = [outcome for outcomes in totals.values() for outcome in outcomes]
    for family, outcomes in totals.items():
        counts = (f"{key} {sum(each[key].startswith('yes') for each in outcomes)}" for key in PLUGINS)
        print(f"{family:26} {len(outcomes):4} models: {', '.join(counts)}")


if __name__ == "__main__":
    main()
