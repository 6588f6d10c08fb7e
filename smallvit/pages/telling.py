"""A run in words and figures, for its page. Imports no torch."""

from __future__ import annotations

import json
import os
from typing import Any

from smallvit import commands
from smallvit.comparison.rows import spelt
from smallvit.config import Config, option_homes
from smallvit.inherit import ARCH
from smallvit.judgement import chance
from smallvit.options import PLUGINS, flag, is_binaryvit
from smallvit.pages.dossier import Dossier

UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
APART = ("out", "overwrite", "resume", "auto_resume")
"""Options that say where a run lies, not what it is."""
SNIPPET = """\
import smallvit, timm
from PIL import Image

model = smallvit.load({folder})  # the best weights, in evaluation mode
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = Image.open("image.png").convert("{mode}")
probabilities = model(transform(image)[None]).softmax(dim=1)[0]
print(model.pretrained_cfg["label_names"][probabilities.argmax()])"""


def title(run: Dossier) -> str:
    """The model and its data."""
    model = run.view.config.model
    arch = (run.card.spec or {}).get("arch") if run.card is not None else None
    parts = [arch or model.arch or ARCH, *(called for name, called in PLUGINS.items() if has(run, name))]
    return f"{' + '.join(parts)} on {data_name(run)}"


def has(run: Dossier, plugin: str) -> bool:
    """Whether the model has a plugin; trained weights may have brought it."""
    spec = run.card.spec if run.card is not None else None
    return bool((spec or run.view.config.options()).get(plugin))


def data_name(run: Dossier) -> str:
    """The data's name, without its folder."""
    data = run.view.config.data.data
    return os.path.basename(data) if os.path.isabs(data) else data


def state(run: Dossier) -> str:
    """How far an unfinished run has come; empty for a finished one."""
    if run.view.summary is not None:
        return ""
    done, epochs = len(run.view.history), run.view.config.optim.epochs
    if not done:
        return f"Not finished: no epoch of {epochs} is done yet."
    return f"Not finished: {run.view.history[-1]['epoch']} of {epochs} epochs are done; this page shows what there is."


def headline(run: Dossier) -> dict[str, Any]:
    """The one figure that counts, in per cent (None where there is none yet), what it is, and its interval."""
    summary = run.summary
    if summary:
        shown: dict[str, Any] = {"top1": summary["test_top1"], "what": "test accuracy (top-1)"}
        shown["images"] = f"{summary['test_images']:,} test images"
    elif run.best is not None:
        shown = {"top1": run.best["val_top1"], "what": "best validation accuracy (top-1) so far"}
        shown["images"] = f"epoch {run.best['epoch']}; the test split is untouched until the run is finished"
    else:
        return {"top1": None, "what": "no accuracy yet", "images": "no epoch has been validated", "interval": None}
    return shown | {"interval": interval(run)}


def interval(run: Dossier) -> tuple[float, float] | None:
    """The 95 % interval of the test accuracy in per cent; None where there is none yet."""
    if not run.summary:
        return None
    images = run.summary["test_images"]
    low, high = chance.accuracy_interval(round(run.summary["test_top1"] * images / 100), images)[0]
    return low, high


def figures(run: Dossier) -> list[tuple[str, str, str]]:
    """Key figures: what, how much, and the exact number or what else there is to say."""
    summary, history = run.summary, run.view.history
    shown = []
    if summary:
        shown += [
            ("parameters", short(summary["parameters"]), f"{summary['parameters']:,} trainable values"),
            ("multiply-accumulates", short(summary["macs"]), "one image, forward"),
            ("images seen", short(summary["images_seen"]), f"{summary['epochs']:,} epochs"),
            ("training time", duration(summary["train_seconds"]), summary["hardware"]),
            ("training speed", f"{summary['images_per_second']:,.0f}", "images/s, augmentation included"),
            ("memory", f"{summary['peak_memory_bytes'] / 1e9:.2f} GB", _memory(summary["device"])),
        ]
    elif history:
        shown += [
            ("training time so far", duration(history[-1]["seconds"]), f"{history[-1]['epoch']:,} epochs"),
            ("training speed", f"{history[-1]['images_per_second']:,.0f}", "images/s, in the last epoch"),
        ]
    if run.metrics is not None and run.metrics.get("top5") is not None and len(run.metrics["classes"]) > 5:
        shown.append(("top-5 accuracy", f"{run.metrics['top5']:.2f} %", "test"))
    if run.metrics is not None:
        shown.append(("calibration error", f"{run.metrics['ece']:.2f} %", "expected (ECE), test"))
    return shown


def comparison(run: Dossier) -> str | None:
    """How the test went beside another model's, where `smallvit eval --compare` was asked; who is first is the run."""
    found = (run.metrics or {}).get("comparison")
    if found is None:
        return None
    return (
        f"Beside {found['name']}, on the same {found['images']:,} images: {found['top1']:.2f} % here, "
        f"{found['other_top1']:.2f} % there; {chance.in_words(found)}."
    )


def facts(run: Dossier) -> list[tuple[str, str]]:
    """What decides the result, by name."""
    config, summary, spec = run.view.config, run.summary, (run.card.spec if run.card is not None else None) or {}
    shown = {
        "Architecture": spec.get("arch") or config.model.arch or ARCH,
        "Plugins": _plugins(run),
        "Data": config.data.data,
        "Images": f"{spec['img_size']} px, {_channels(spec['in_chans'])}" if spec else None,
        "Classes": f"{spec['num_classes']:,}" if spec else None,
        "Seed": str(config.run.seed),
        "Batch size": str(config.optim.batch_size),
        "Epochs": _epochs(run),
        "Hardware": summary.get("hardware"),
        "Precision": summary.get("precision"),
        "Compiled": summary.get("compile"),
        "Versions": ", ".join(" ".join(each) for each in (summary.get("versions") or {}).items()),
        "Git revision": summary.get("git_revision"),
        "Weights (SHA-256)": (run.metrics or run.attention or {}).get("weights_sha256"),
        "Folder": str(run.folder),
    }
    return [(name, value) for name, value in shown.items() if value]


def options(run: Dossier) -> tuple[list[tuple[str, str, str]], list[tuple[str, list[tuple[str, str]]]]]:
    """Options that differ from the defaults, as flag, value and default; and all others, in their groups."""
    mine, usual, homes = run.view.config.options(), Config().options(), option_homes()
    differing = [(flag(name), spelt(mine[name]), spelt(usual[name])) for name in mine if mine[name] != usual[name]]
    groups: dict[str, list[tuple[str, str]]] = {}
    for name in mine:
        if mine[name] == usual[name] and name not in APART:
            groups.setdefault(homes[name][0], []).append((flag(name), spelt(mine[name])))
    return differing, list(groups.items())


def command(run: Dossier, *, full: bool = False) -> str:
    """What repeats the run: the options that differ from the defaults, or all of them, whatever the defaults may be."""
    return commands.training(run.view.config, APART, full=full)


def snippet(run: Dossier) -> str:
    """How to load the run's model in Python, and ask it."""
    mode = "L" if run.card is not None and (run.card.spec or {}).get("in_chans") == 1 else "RGB"
    return SNIPPET.format(folder=json.dumps(str(run.folder), ensure_ascii=False), mode=mode)


def caveats(run: Dossier, seeds: int = 1) -> list[str]:
    """What the figures do not say; `seeds` is how many runs of the same kind the page shows."""
    config, summary, lines = run.view.config, run.summary, []
    if seeds == 1:
        lines.append(
            f"One seed ({config.run.seed}). Another gives another accuracy, by how much only more seeds tell; the "
            "interval is about the chance of which images are in the test, not about the chance in training."
        )
    if config.data.val_fraction and run.best is not None:
        lines.append(
            "The epoch was chosen by validation accuracy, so that accuracy is a little optimistic. The test had no "
            "part in the choice."
        )
    if summary:
        lines.append(
            "The test split was used once, when training had ended. Choosing between runs by its accuracy makes it a "
            "validation split: choose by validation accuracy, and compare the chosen ones with new seeds."
        )
        lines.append(f"One of {summary['test_images']:,} test images is {100 / summary['test_images']:.2f} points.")
        if run.metrics is not None and run.metrics.get("left_out"):
            lines.append(f"{run.metrics['left_out']:,} images of the test cannot be decoded and are left out.")
        lines.append("Speeds and memory were taken while training, with whatever else the machine did then.")
    if str(summary.get("git_revision") or "").endswith("-dirty"):
        lines.append("The code had changes that its git revision does not hold.")
    if (run.metrics is not None and summary) and abs(run.metrics["top1"] - summary["test_top1"]) > 5e-3:
        lines.append(
            f"Judged again for this page, top-1 was {run.metrics['top1']:.2f} % ({run.metrics.get('hardware')}, "
            f"{run.metrics.get('precision')}): rounding differs from machine to machine. Classes, confusions, "
            "and calibration are of that judgement."
        )
    return lines


def short(value: float) -> str:
    """A large number in three figures."""
    for unit, letter in UNITS:
        if value >= unit:
            return f"{value / unit:.3g} {letter}" if value < 999.5 * unit else f"{value / unit:,.0f} {letter}"
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    """Seconds in the largest unit that there is one of."""
    for unit, name in ((3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:.1f} s"


def _memory(device: str) -> str:
    return "most of the whole process" if device == "cpu" else "most allocated on the device"


def _channels(count: int) -> str:
    return {1: "grey", 3: "colour"}.get(count, f"{count} channels")


def _plugins(run: Dossier) -> str:
    """With their variants."""
    spec = (run.card.spec if run.card is not None else None) or run.view.config.options()
    told = []
    if has(run, "spt"):
        told.append(
            f"SPT ({spec['spt_directions']}, shift {spec['spt_shift']:g}{'' if spec['spt_norm'] else ', no norm'})"
        )
    if has(run, "lsa"):
        told.append(f"LSA (temperature per {spec['lsa_temperature']}{'' if spec['lsa_mask'] else ', no mask'})")
    bits = [each for each in ("weights", "activations", "attention") if spec.get(f"binary_{each}", True)]
    if bits and (has(run, "binary") or is_binaryvit(spec["arch"])):
        told.append(f"one bit for {', '.join(bits)}")
    return ", ".join(told) or "none"


def _epochs(run: Dossier) -> str | None:
    if not run.view.history:
        return None
    done = run.view.history[-1]["epoch"]
    chosen = run.summary.get("best_epoch", run.best["epoch"] if run.best is not None else done)
    return f"{done} of {run.view.config.optim.epochs}; weights of epoch {chosen}"
