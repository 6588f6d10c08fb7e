"""Read a run with its test results and attention maps, and compute those that are missing. Imports no torch."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console

from smallvit.config.config import Config
from smallvit.config.model import ARCH, added_plugins
from smallvit.datasets.gray import takes_arrays
from smallvit.evaluation import stats
from smallvit.models import weights_info
from smallvit.models.weights_info import WeightsInfo
from smallvit.plugins import PLUGINS
from smallvit.report import pictures
from smallvit.report.pictures import Gallery
from smallvit.runs import aggregate, curves
from smallvit.runs.curves import RunView
from smallvit.runs.run import ATTENTION, METRICS, NEIGHBORS, Run, best_epoch, primary_metric
from smallvit.utils.errors import InputError

REQUIRED = {
    METRICS: [
        {"top1", "ece", "images", "classes", "confusion", "reliability", "hardware", "precision"},
        {"map", "macro_f1", "micro_f1", "images", "classes", "hardware", "precision"},
    ],
    ATTENTION: [{"layers", "images"}],
    NEIGHBORS: [{"data", "split", "images", "queries"}],
}
"""What the page needs, by file; with several labels an image, the second."""
COMMANDS = {METRICS: "eval", ATTENTION: "attend", NEIGHBORS: "report"}
TITLES = {METRICS: "Test results", ATTENTION: "Attention maps", NEIGHBORS: "Nearest neighbors"}
QUERIES = re.compile(r"qkv|kqv|\bq_proj\b|\.q\.")
"""Names of attention weights."""
IMAGES = 4
"""Number of test images whose attention is plotted."""


@dataclass(frozen=True)
class RunSummary:
    """A run, with the results of its best weights."""

    view: RunView
    info: WeightsInfo | None
    """Metadata of the best weights; None before the first epoch is finished."""
    metrics: dict[str, Any] | None = None
    attention: dict[str, Any] | None = None
    neighbors: dict[str, Any] | None = None
    missing: tuple[str, ...] = ()
    """Missing results and the reasons, one line each."""
    computable: tuple[str, ...] = ()
    """Files of missing results that can be computed."""

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.view.folder

    @property
    def pretrained(self) -> bool:
        """Whether the run trains features without labels."""
        return not self.view.config.pretrain.labels

    @property
    def summary(self) -> dict[str, Any]:
        """Final results; empty for an unfinished run."""
        return self.view.summary or {}

    @property
    def spec(self) -> dict[str, Any]:
        """Arguments of `create_model`; empty before the first epoch is finished."""
        return (self.info.spec if self.info is not None else None) or {}

    @property
    def takes_arrays(self) -> bool:
        """Whether the model takes arrays rather than photos."""
        return self.info is not None and takes_arrays(self.spec.get("in_chans", 3), self.info.gray_ranges)

    @property
    def best(self) -> dict[str, Any] | None:
        """Metrics of the best epoch on validation images; None without validation."""
        return best_epoch(self.view.history, self.view.config.run.select_by)

    @cached_property
    def gallery(self) -> Gallery:
        """Pictures from the run's folder."""
        return pictures.read_gallery(self.folder, self.metrics, self.attention, self.neighbors)

    @property
    def notes(self) -> tuple[str, ...]:
        """Missing or damaged results, one line each."""
        return (*self.missing, *self.gallery.notes)

    @property
    def arch(self) -> str:
        """Name of the architecture."""
        return self.spec.get("arch") or self.view.config.model.arch or ARCH

    @property
    def plugins(self) -> dict[str, dict[str, Any]]:
        """Options of each plugin in the model, including those of its initial weights."""
        plugins = self.spec.get("plugins", {}) if self.spec else self.view.config.model.plugins
        return {name: plugins[name] for name in PLUGINS if name in plugins}

    @property
    def title(self) -> str:
        """Model and data."""
        labels = [PLUGINS[name].label for name in added_plugins(self.arch, self.plugins)]
        verb = "pretrained on" if self.pretrained else "on"
        return f"{' + '.join([self.arch, *labels])} {verb} {self.view.data_name}"

    @property
    def metric(self) -> str:
        """The main metric: map with several labels an image, else top1."""
        return primary_metric(self.view.history)

    @property
    def score(self) -> float | None:
        """The main metric of the test in per cent; of an unfinished run, the best validation; None if there is none."""
        return self.summary.get(f"test_{self.metric}", self.best and self.best[f"val_{self.metric}"])

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the test accuracy in per cent; None for an unfinished run, or for several labels."""
        if not self.summary or self.metric == "map" or self.score is None:
            return None
        count = self.summary["test_images"]
        low, high = stats.accuracy_interval(round(self.score * count / 100), count)[0]
        return low, high


def read_run_summary(folder: Path, reasons: dict[str, str] | None = None) -> RunSummary:
    """Read a run and the results of its current best weights.

    Args:
        folder: The run's folder.
        reasons: Why results could not be computed, by file.

    Raises:
        InputError: The folder holds no run, or one of the run's own files is damaged.
    """
    view = curves.read_run(folder)
    if view.summary is not None:
        view = aggregate.read_finished_run(folder)
    if not (folder / Run.BEST).exists():
        return RunSummary(view, None)
    info = weights_info.read_weights_info(str(folder), "report")
    digest = weights_info.compute_sha256(info)
    results, missing, computable = {}, [], []
    if not view.config.pretrain.labels:
        names = [NEIGHBORS]
    else:
        names = [METRICS] * (view.summary is not None) + [ATTENTION] * has_attention(folder)
        if view.summary is None:
            missing.append(f"{TITLES[METRICS]} are missing: the test split is used once, when the run is finished")
    for name in names:
        result, reason = _read_result(view, info, name, digest)
        if reason is None:
            results[name] = result
            continue
        missing.append(f"{TITLES[name]} are missing: {(reasons or {}).get(name, reason)}")
        if result is None:
            computable.append(name)
    return RunSummary(
        view,
        info,
        *(results.get(name) for name in (METRICS, ATTENTION, NEIGHBORS)),
        missing=tuple(missing),
        computable=tuple(computable),
    )


def _read_result(
    view: RunView, info: WeightsInfo, name: str, digest: str | None
) -> tuple[dict[str, Any] | None, str | None]:
    """Read the results of `smallvit eval`, `attend` or `report`, and why they cannot be shown.

    The results are None if they are missing, damaged, or not of the best weights, which have this SHA-256.
    """
    command = shlex.join(_result_command(view, name))
    try:
        result = json.loads((view.folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None, f"compute them with {command}"
    except (OSError, ValueError):
        result = {}
    if not isinstance(result, dict) or not any(result.keys() >= each for each in REQUIRED[name]):
        return None, f"{name} is damaged; replace it with {command} --overwrite"
    if result.get("weights_sha256") != digest:
        return None, f"{name} is of other weights than {Run.BEST}; replace it with {command} --overwrite"
    if name == METRICS:
        expected = {
            "split": "test",
            "data": info.data,
            "img_size": info.spec["img_size"],
            "flip": view.config.augment.test_flip,
            "images": view.summary["test_images"],
        }
        differing = [
            f"{key} {result.get(key)}, not {each}"
            for key, each in json.loads(json.dumps(expected)).items()
            if result.get(key) != each
        ]
        if differing:
            reason = f"{name} is of another test than the run's own ({', '.join(differing)})"
            return result, f"{reason}; replace it with {command} --overwrite"
    return result, None


def _result_command(view: RunView, name: str) -> list[str]:
    """Return the command that computes a result."""
    flip = ["--flip"] if name == METRICS and view.config.augment.test_flip else []
    return ["smallvit", COMMANDS[name], str(view.folder), *flip]


def has_attention(folder: Path) -> bool:
    """Return whether a run's model has attention, by the names of its weights."""
    return any(QUERIES.search(name) for name in weights_info.read_shapes(folder / Run.BEST))


def complete_summary(run: RunSummary, device: str, console: Console, data: str | None = None) -> RunSummary:
    """Compute the missing results of the run's best weights; results that cannot be computed are noted. Imports torch.

    The test split of an unfinished run stays unused.

    Args:
        run: The run.
        device: Device to compute on.
        console: Console for progress.
        data: New location of the run's data, if it has moved.

    Raises:
        InputError: One of the run's own files is damaged, the device is missing, or `data` holds other images.
    """
    from smallvit import datasets
    from smallvit.attention.attend import attend
    from smallvit.evaluation import evaluator, neighbors
    from smallvit.evaluation.predictor import is_trained_on
    from smallvit.utils import hardware

    hardware.pick_device(device)
    folder, reasons, moved = str(run.folder), {}, []
    if run.pretrained:
        config = run.view.config.replace(device=device)
    else:
        config = Config.build(**(weights_info.read_data_options(folder) or {}), device=device)
    if data is not None:
        config, moved = config.replace(data=data), ["--data", data]
        own = replace(config.data, img_size=run.spec["img_size"], **run.info.data_options)
        dataset = datasets.create_dataset(own, labels=not run.pretrained)
        if not is_trained_on(run.info, dataset):
            raise InputError(f"--data {data}: differs from the images of {run.folder}")
    for name in run.computable:
        command, out = _result_command(run.view, name), (run.folder / name).parent
        common = {"overwrite": True, "console": console}
        try:
            weights_info.check_data_exists(run.info, config.data.data)
            if name == METRICS:
                flip, command = run.view.config.augment.test_flip, shlex.join([*command, *moved])
                evaluator.evaluate_run(folder, config, flip=flip, out=str(out), command=command, **common)
            elif name == NEIGHBORS:
                neighbors.write_neighbors(folder, config, out)
            else:
                command = shlex.join([*command, "--count", str(IMAGES), *moved])
                attend(folder, [], config, count=IMAGES, out=out, command=command, **common)
        except (InputError, OSError) as error:
            reasons[name] = f"{name}: {error}"
    return read_run_summary(run.folder, reasons)
