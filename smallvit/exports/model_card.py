"""The card of a trained model: what it is, how good, on what terms, and how to ask it; Markdown, as the Hub has it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import smallvit
from smallvit.commands import portable, training
from smallvit.config import Config
from smallvit.datasets.table import DATASETS
from smallvit.exports import papers
from smallvit.exports.exported import preprocessing
from smallvit.exports.timm_folder import is_timms
from smallvit.judgement.chance import accuracy_interval
from smallvit.options import PLUGINS
from smallvit.pages import dossier
from smallvit.pages.dossier import Dossier
from smallvit.plugins.patching import TITLES
from smallvit.ready import Ready
from smallvit.runs import Run

ON_THE_HUB = {
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "cifar100-coarse": "uoft-cs/cifar100",
    "svhn": "ufldl-stanford/svhn",
    "svhn-extra": "ufldl-stanford/svhn",
    "tiny-imagenet": "zh-plus/tiny-imagenet",
    "mnist": "ylecun/mnist",
    "fashion-mnist": "zalando-datasets/fashion_mnist",
    "imagenet": "ILSVRC/imagenet-1k",
}
"""Names that data sets have on the Hub."""
APART = (
    *("data_dir", "data_url", "streaming", "workers", "device", "compile", "checkpoint_minutes"),
    *("out", "overwrite", "resume", "auto_resume", "log", "profile", "keep"),
)
"""Options that say where a run was and what it left, not what it learnt."""
PLACE = "OWNER/NAME"
"""A repository that has no name yet."""
NAMED = 20
"""Classes that are named in the card; all are in config.json."""


def text(model: Ready, run: Path | None, terms: str | None = None, repository: str | None = None) -> str:
    """The card of a finished run, for its repository on the Hub.

    `terms` are the identifier of its weights' license, if its owner has named one.

    Raises:
        InputError: there is no run, it is not finished, or its records are damaged.
    """
    found = _finished(model, run)
    config, summary = found.view.config, found.summary
    name = os.path.basename(os.path.realpath(run))
    metrics = found.metrics if model.img_size == model.card.spec["img_size"] else None
    sections = {
        f"# {name}": _opening(model, config),
        "## Accuracy": _accuracy(model, config, summary, metrics),
        "## Use": _use(model, repository or PLACE),
        "## Data": _data(model, config),
        "## Training": _training(config, summary),
        "## Limits": _limits(model, summary, metrics),
        "## License": f"The weights: `{terms}`." if terms else "None has been stated for the weights; ask their owner.",
        "## Citation": papers.citation(model.card.spec, config.data.data),
    }
    body = "\n\n".join(f"{title}\n\n{content}" for title, content in sections.items())
    return f"---\n{_front(model, config, summary, metrics, terms, name)}---\n\n{body}\n"


def _finished(model: Ready, run: Path | None) -> Dossier:
    """What there is of a finished run."""
    if run is None or not os.path.isdir(run):
        raise model.card.error("--format hub writes a card of a finished run: give its folder, or --format timm")
    found = dossier.read(run)
    if not found.summary:
        raise model.card.error(f"not finished: there is no {Run.SUMMARY} yet; smallvit train --resume {run}")
    return found


def _front(
    model: Ready,
    config: Config,
    summary: dict[str, Any],
    metrics: dict[str, Any] | None,
    terms: str | None,
    name: str,
) -> str:
    """What the Hub reads, in YAML."""
    from huggingface_hub import EvalResult, ModelCardData

    data, spec = config.data.data, model.card.spec
    known = ON_THE_HUB.get(data)
    result = EvalResult(
        task_type="image-classification",
        dataset_type=known or _called(data),
        dataset_name=_title(data),
        dataset_split="test",
        metric_type="accuracy",
        metric_value=round((metrics or {"top1": summary["test_top1"]})["top1"], 2),
        metric_name="top-1, %",
    )
    plugins = [plugin for plugin in PLUGINS if spec.get(plugin)]
    return (
        ModelCardData(
            library_name="timm",
            pipeline_tag="image-classification",
            license=terms,
            tags=["image-classification", "timm", "smallvit", *plugins],
            datasets=[known] if known else None,
            metrics=["accuracy"],
            model_name=name,
            eval_results=[result],
        ).to_yaml()
        + "\n"
    )


def _opening(model: Ready, config: Config) -> str:
    spec = model.card.spec
    plugins = " and ".join(words for plugin, words in TITLES.items() if spec.get(plugin))
    kind = "colour" if model.in_chans == 3 else "grey"
    patch = f", patches of {spec['patch_size']} pixels" if spec.get("patch_size") else ""
    names = ", ".join(f"`{name}`" for name in model.class_names[:NAMED])
    more = f" and {len(model.class_names) - NAMED} more, all in `config.json`" if len(model.class_names) > NAMED else ""
    return (
        f"`{spec['arch']}`{f' with {plugins}' if plugins else ''}, trained on {_title(config.data.data)} by smallvit "
        f"{smallvit.__version__}: {kind} images of {model.img_size} × {model.img_size} pixels{patch}, "
        f"{len(model.class_names)} classes: {names}{more}."
    )


def _accuracy(model: Ready, config: Config, summary: dict[str, Any], metrics: dict[str, Any] | None) -> str:
    images = (metrics or {"images": summary["test_images"]})["images"]
    top1 = (metrics or {"top1": summary["test_top1"]})["top1"]
    low, high = metrics["interval"] if metrics else accuracy_interval(round(top1 * images / 100), images)[0]
    rows = [("top-1 accuracy", f"{top1:.2f} %"), ("95 % interval", f"{low:.2f} to {high:.2f} %")]
    if metrics and metrics.get("top5") is not None and len(model.class_names) > 5:
        rows.append(("top-5 accuracy", f"{metrics['top5']:.2f} %"))
    if metrics:
        rows.append(("calibration error (ECE)", f"{metrics['ece']:.2f} %"))
    rows += [("test images", f"{images:,}"), ("parameters", f"{summary['parameters']:,}")]
    rows.append(("multiply-accumulates", f"{summary['macs'] / 1e6:,.1f} million"))
    shown = "".join(f"\n| {what} | {value} |" for what, value in rows)
    notes = [
        "The interval is what chance in the choice of test images leaves open.",
        f"One run, seed {config.run.seed}: how much another seed would change is not known.",
    ]
    learnt = model.card.spec["img_size"]
    if metrics is None and model.img_size != learnt:
        notes.append(f"This was measured at {learnt} pixels, not at the {model.img_size} of this export.")
    if metrics["flip"] if metrics else config.augment.test_flip:
        notes.append("Predictions were averaged over each image and its mirror image.")
    return f"| | |\n|---|---|{shown}\n\n{' '.join(notes)}"


def _use(model: Ready, repository: str) -> str:
    registry = "" if is_timms(model.card.spec | {"img_size": model.img_size}) else "import smallvit.registry\n"
    mode = "RGB" if model.in_chans == 3 else "L"
    needed = "smallvit and timm" if registry else "timm"
    return f"""\
With {needed}, from the Hub (or from a folder, as `local-dir:FOLDER`):

```python
{registry}import timm, torch
from PIL import Image

model = timm.create_model("hf-hub:{repository}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = transform(Image.open("image.png").convert("{mode}"))
with torch.no_grad():
    probability, number = model(image[None]).softmax(dim=1)[0].max(dim=0)
print(model.pretrained_cfg["label_names"][number], float(probability))
```

With smallvit: `smallvit predict model.safetensors photos/`, `smallvit.load("model.safetensors")`, and
`smallvit train --init model.safetensors --data photos` for other classes.

{preprocessing(model)}"""


def _data(model: Ready, config: Config) -> str:
    data, entry = config.data, DATASETS.get(config.data.data)
    if entry is None:
        told = f"`{_called(data.data)}`, a data set of its author's; ask them on which terms it may be used."
    else:
        told = f"{entry.title} ({entry.citation}). Terms: {entry.terms}."
    drawn = f" {100 * data.test_fraction:g} % of all images were held out for the test (split seed {data.split_seed})."
    once = " In training the test images were judged once, at the end."
    return told + (drawn if model.card.test is not None else "") + once


def _training(config: Config, summary: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in (summary.get("versions") or {}).items())
    revision = f", git revision {summary['git_revision']}" if summary.get("git_revision") else ""
    val = summary["val_top1"]
    chosen = (
        "the last" if val is None else f"epoch {summary['best_epoch']}, the best on validation images ({val:.2f} %)"
    )
    return f"""\
```
{training(config, APART, in_place=False)}
```

{summary["epochs"]:,} epochs, {summary["images_seen"]:,} images seen, {summary["train_seconds"]:,.0f} s on \
{summary["hardware"]} in {summary["precision"]}. The weights are those of {chosen}. {versions}{revision}."""


def _limits(model: Ready, summary: dict[str, Any], metrics: dict[str, Any] | None) -> str:
    calibrated = "" if metrics else " How well its probabilities are calibrated was not measured."
    return (
        f"It knows its {len(model.class_names)} classes and no other: any image, also of something else, gets one of "
        f"them, often with a high probability. It has seen images of {model.img_size} pixels from one source; on "
        f"others it may do worse than the accuracy above says.{calibrated} What is wrong or one-sided in the data, it "
        "has learnt too."
    )


def _called(data: str) -> str:
    return portable(data.rstrip(os.sep))


def _title(data: str) -> str:
    entry = DATASETS.get(data)
    return entry.title if entry else _called(data)
