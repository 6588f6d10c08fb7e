"""Render the model card of a finished run for the Hugging Face Hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import smallvit
from smallvit.config.config import format_train_command, option_names, strip_folder
from smallvit.config.model import added_plugins, is_binaryvit
from smallvit.datasets.catalog import DATASETS
from smallvit.evaluation.predictor import Predictor
from smallvit.evaluation.stats import has_unequal_classes
from smallvit.export.timm_folder import is_timm_model
from smallvit.export.verify import describe_preprocessing
from smallvit.models import binaryvit, cifar_resnet, lee2021
from smallvit.models.architectures import CIFAR_RESNETS, OURS
from smallvit.plugins import PLUGINS
from smallvit.plugins.base import Citation
from smallvit.report.run_summary import read_run_summary
from smallvit.runs.run import Run
from smallvit.utils.sizes import height_width

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
PLACEHOLDER = "OWNER/NAME"
"""Repository of a card that is not pushed."""
DEIT = Citation(
    "touvron2020training",
    "Training data-efficient image transformers & distillation through attention",
    "Touvron, Hugo and Cord, Matthieu and Douze, Matthijs and Massa, Francisco and Sablayrolles, Alexandre and "
    "J{\\'e}gou, Herv{\\'e}",
    "2012.12877",
    2020,
)


def render_model_card(
    model: Predictor, run: Path | None, terms: str | None = None, repository: str | None = None
) -> str:
    """Return the model card of a finished run in Markdown.

    Args:
        model: The exported model.
        run: The run's folder.
        terms: License identifier of the weights, such as "mit".
        repository: Repository on the Hub, as "OWNER/NAME".

    Raises:
        InputError: There is no run, it is not finished, or its files are damaged.
    """
    from huggingface_hub import ModelCard

    if run is None or not os.path.isdir(run):
        raise model.info.error("--format hub writes a card of a finished run: give its folder, or --format timm")
    if model.info.multi_label:
        raise model.info.error("--format hub writes no card of models for several labels an image; use --format timm")
    summary = read_run_summary(run)
    if not summary.summary:
        raise model.info.error(f"not finished: there is no {Run.SUMMARY} yet; smallvit train --resume {run}")
    spec, config = model.info.spec, summary.view.config
    name, data = os.path.basename(os.path.realpath(run)), config.data.data
    plugins = list(added_plugins(spec["arch"], summary.plugins))
    metrics = summary.metrics if model.img_size == spec["img_size"] else None
    top1 = metrics["top1"] if metrics else summary.score
    card = ModelCard.from_template(
        _card_data(name, data, top1, plugins, terms),
        template_path=str(TEMPLATE),
        name=name,
        spec=spec,
        config=config,
        version=smallvit.__version__,
        plugins=[PLUGINS[plugin].title for plugin in plugins],
        data_title=_data_title(data),
        data_entry=DATASETS.get(data),
        in_chans=model.in_chans,
        takes_arrays=summary.takes_arrays,
        img_size=model.img_size,
        **dict(zip(("height", "width"), height_width(model.img_size), strict=True)),
        classes=list(model.class_names),
        top1=top1,
        interval=metrics["interval"] if metrics else summary.interval,
        metrics=metrics,
        unequal=has_unequal_classes(summary.summary),
        summary={"val_top1": None, "git_revision": None} | summary.summary,
        is_timm=is_timm_model(spec | {"img_size": model.img_size}),
        repository=repository or PLACEHOLDER,
        preprocessing=describe_preprocessing(model),
        drew_test=bool((model.info.training_data or {}).get("test_split")),
        command=format_train_command(config, (*option_names("resumable", "launch"), "streaming"), keep_folders=False),
        license=terms,
        citation=format_citation(spec, data),
    )
    return f"{card.content.rstrip()}\n"


def _card_data(name: str, data: str, top1: float, plugins: list[str], terms: str | None) -> Any:
    """Return the card's metadata for the Hub."""
    from huggingface_hub import EvalResult, ModelCardData

    dataset = DATASETS[data].hub if data in DATASETS else None
    result = EvalResult(
        task_type="image-classification",
        dataset_type=dataset or strip_folder(data.rstrip(os.sep)),
        dataset_name=_data_title(data),
        dataset_split="test",
        metric_type="accuracy",
        metric_value=round(top1, 2),
        metric_name="top-1, %",
    )
    return ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        license=terms,
        tags=["image-classification", "timm", "smallvit", *plugins],
        datasets=[dataset] if dataset else None,
        metrics=["accuracy"],
        model_name=name,
        eval_results=[result],
    )


def _data_title(data: str) -> str:
    return DATASETS[data].title if data in DATASETS else strip_folder(data.rstrip(os.sep))


def format_citation(spec: dict[str, Any], data: str) -> str:
    """Return BibTeX entries for a model with these arguments of `create_model`, and its data's source, in Markdown."""
    arch = spec["arch"]
    entries = [PLUGINS[name].citation for name in spec.get("plugins", {})]
    entries += [lee2021.CITATION] if arch in OURS and not is_binaryvit(arch) else []
    entries += [DEIT] if arch.startswith("deit") or spec.get("dist_token") else []
    entries += [cifar_resnet.CITATION] if arch in CIFAR_RESNETS else []
    entries += [binaryvit.CITATION] if is_binaryvit(arch) else []
    bibtex = "\n".join(each.bibtex for each in dict.fromkeys(entries))
    source = f"\n\nData: {DATASETS[data].citation}." if data in DATASETS else ""
    return (f"```bibtex\n{bibtex}\n```" if bibtex else "The architecture is from timm.") + source
