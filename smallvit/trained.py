"""Trained weights by the name that a person gives them, for --init, --teacher and `smallvit probe`.

A name is a run's folder (its best weights), a weights file, or one of timm's models with pretrained weights; what
exists or holds a path separator is a path. Files are safetensors: nothing in them is ever executed. What they say about
themselves is read without torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smallvit.errors import InputError
from smallvit.headers import header
from smallvit.options import flag
from smallvit.runs import Run

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor, nn

    from smallvit.datasets.images import ImageDataset
    from smallvit.options import DataConfig

ENTRY, FORMAT = "smallvit", 2
"""Of a file's metadata, where smallvit wrote it; and the version of their form."""
PACKED = "packed"
"""Of what smallvit wrote there: whether one-bit weights are packed eight to a byte."""
SUFFIX = ".safetensors"
EXPORTED = "model.safetensors"
"""The weights in a folder that smallvit export writes for timm."""
PICKLED = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".npz")
PRETRAINED = ":pretrained"
"""What may stand behind the name of a timm model."""
DRAWN = {"test": ("split_seed", "test_fraction"), "val": ("split_seed", "val_fraction")}
"""Options that decide which images are in a split, where the data brings none."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """What trained weights say about themselves."""

    name: str
    """As the user gave it."""
    option: str
    """The flag that it was given to, for error lines."""
    path: Path | None
    """The weights file; None: timm's, not downloaded yet."""
    tagged: str | None = None
    """timm's name of model and weights, with the tag; None: they are not read as timm's."""
    spec: dict[str, Any] | None = None
    """The arguments of `create_model` that make the model; None: the file does not say."""
    class_names: tuple[str, ...] | None = None
    data: str | None = None
    """Name of the data set that was learnt."""
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    learnt: dict[str, Any] | None = None
    """What `identity` says of the data that was learnt; None in older files."""
    test: dict[str, Any] | None = None
    """What `held_out` says of the test of this data."""
    val: dict[str, Any] | None = None
    """The same of its validation images; None in older files too."""
    packed: bool = False
    """Whether its one-bit weights are packed, so that it can be asked, but not trained."""

    def error(self, message: str) -> InputError:
        """An error that names the option and the weights."""
        return InputError(f"{self.option} {self.name}: {message}")


def card(name: str, option: str) -> Card:
    """What the weights that `name` stands for say about themselves; `option` is the flag it was given to.

    Raises:
        InputError: no such run, file or model; a run without weights yet; a file that is damaged or no safetensors; a
            model without pretrained weights.
    """
    if not is_path(name):
        from smallvit import pretrained  # timm imports torch

        return pretrained.card(name, option)
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path):
        return _run_card(name, option, path)
    return _file_card(name, option, path)


def load(card: Card) -> nn.Module:
    """The model with its weights: on the CPU, in evaluation mode, at its own image size.

    Raises:
        InputError: the weights do not fit the model, cannot be downloaded, or do not say what model they are of.
    """
    if card.spec is None:
        raise card.error("another program's file, which does not say what model it holds")
    if card.tagged is not None:
        from smallvit import pretrained

        return pretrained.load(card)
    from smallvit import bare, checkpoint

    if card.class_names is None:
        return bare.load(card)
    try:
        return checkpoint.load(card.path)
    except InputError as error:
        raise card.error(str(error)) from None


def features(model: nn.Module, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
    """The pooled features that the classifier is given; those of a distilled model are the mean of its two tokens."""
    found = model.forward_head(model.forward_features(images), pre_logits=True)
    if found.ndim == 3:  # tokens (b, n, d)
        return found.mean(dim=1)
    return found.flatten(2).mean(dim=2) if found.ndim > 3 else found  # maps (b, d, h, w)


def is_path(name: str) -> bool:
    """Whether a name is a file's or folder's, not a timm model's."""
    return os.path.exists(os.path.expanduser(name)) or os.sep in name or name.endswith((SUFFIX, *PICKLED))


def absolute(name: str) -> str:
    """The name as it is understood from any working directory."""
    return os.path.realpath(os.path.expanduser(name)) if is_path(name) else name


def identity(dataset: ImageDataset) -> dict[str, Any]:
    """What tells data from other data: where it lies, and what it holds where that may change."""
    source = os.fsencode(dataset.source)  # hashed: no path in a file that may be shared
    return {"source": hashlib.sha256(source).hexdigest()[:16], "content": dataset.content}


def has_learnt_from(card: Card, dataset: ImageDataset) -> bool:
    """Whether a model was trained on this data, as far as that is known: on what lay there, or on a copy."""
    now, then = identity(dataset), card.learnt or card.test
    if then is None:
        return card.data == dataset.source  # a name: other data is known by its absolute path
    return now["source"] == then["source"] or (now["content"] is not None and now["content"] == then.get("content"))


def held_out(dataset: ImageDataset, config: DataConfig, split: str = "test") -> dict[str, Any] | None:
    """What tells which images of which data are the test (or val), where the data brings none."""
    if not {"test": dataset.drew_test, "val": dataset.drew_val}[split]:
        return None
    return identity(dataset) | {name: getattr(config, name) for name in DRAWN[split]}


def require_same_test(card: Card, dataset: ImageDataset, config: DataConfig, split: str = "test") -> None:
    """Check that a model that learnt from the same data has held out the same images for the test (or val).

    Raises:
        InputError: it may have learnt images of the split.
    """
    now, then = held_out(dataset, config, split), getattr(card, split)
    if now is None or then is None or not has_learnt_from(card, dataset):
        return
    for name in DRAWN[split]:
        if now[name] != then[name]:
            option = f"{flag(name)} {then[name]}"
            held = then.get("val_fraction") != 0
            way = f"give the same here ({option})" if held else "choose another split"
            raise card.error(f"it was trained with {option}, {_may_be_learnt(split)}; {way}")


def require_channels(card: Card, dataset: ImageDataset) -> None:
    """Check that a model takes images of as many channels as a data set has.

    Raises:
        InputError: it does not.
    """
    takes, has = card.spec["in_chans"], dataset.in_chans
    if takes != has:
        raise card.error(f"the model takes images of {takes} channels, those of {dataset.name} have {has}")


def require_classifier(card: Card) -> None:
    """Check that a model tells classes apart.

    Raises:
        InputError: it gives features only.
    """
    if not card.spec["num_classes"]:
        raise card.error("these weights have no classifier; smallvit probe judges their features")


def has_changed(card: Card, dataset: ImageDataset, config: DataConfig, split: str = "test") -> bool:
    """Whether what a test (or val) is drawn from is other than when a model learnt from it, as far as that is known.

    The same options then draw other images, some of which it may have learnt.
    """
    now, then = held_out(dataset, config, split), getattr(card, split)
    if now is None or then is None or not has_learnt_from(card, dataset):
        return False
    return now["content"] != then.get("content", now["content"])


def require_unchanged(card: Card, dataset: ImageDataset, config: DataConfig, split: str = "test") -> None:
    """Check that what a test (or val) is drawn from has not changed since a model learnt from it.

    Raises:
        InputError: it has.
    """
    if has_changed(card, dataset, config, split):
        raise card.error(
            f"the images of {dataset.name} are not those that it was trained with, {_may_be_learnt(split)}; restore "
            f"them, or bring a {split}/ of new ones"
        )


def _may_be_learnt(split: str) -> str:
    called = "the test" if split == "test" else split
    return f"so images of {called} may be among those that it learnt"


def _run_card(name: str, option: str, folder: Path) -> Card:
    bare = Card(name=name, option=option, path=folder / Run.BEST)
    if not os.path.exists(bare.path):
        if os.path.exists(weights := folder / EXPORTED):
            raise bare.error(f"an exported folder; give the file in it, {weights}")
        if os.path.exists(folder / Run.CONFIG):
            raise bare.error(f"this run has not finished its first epoch: there is no {Run.BEST} yet")
        raise bare.error(f"not the folder of a run: it holds neither {Run.CONFIG} nor {Run.BEST}")
    return _described(bare)


def _file_card(name: str, option: str, path: Path) -> Card:
    bare = Card(name=name, option=option, path=path)
    if not os.path.exists(path):
        raise bare.error("no such file or folder")
    if path.suffix != SUFFIX and path.suffix not in PICKLED:
        raise bare.error(f"no weights; expected a run's folder, a {SUFFIX} file or the name of a timm model")
    if path.suffix != SUFFIX:
        raise bare.error(f"only {SUFFIX} files are read, since others may run code; convert it where you trust it")
    return _described(bare)


def _described(bare: Card) -> Card:
    """The card of a file, with what its metadata say; nothing, where another program wrote it."""
    try:
        entry = (header(bare.path).get("__metadata__") or {}).get(ENTRY)
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise bare.error(f"{bare.path.name} is damaged or no safetensors file ({reason})") from None
    if entry is None:
        return bare
    try:
        metadata = json.loads(entry)
        if metadata["format"] != FORMAT:
            raise ValueError
        model, data = metadata["model"], metadata["data"]
        spec = model | {name: int(model[name]) for name in ("img_size", "in_chans", "num_classes")}
        mean, std = (tuple(map(float, data[name])) for name in ("mean", "std"))
        if not len(mean) == len(std) == spec["in_chans"] or not all(0 < each < math.inf for each in std):
            raise ValueError
        return replace(
            bare,
            spec=spec | {"arch": str(model["arch"])},
            class_names=tuple(map(str, data["class_names"])),
            data=str(data["name"]),
            mean=mean,
            std=std,
            packed=bool(metadata.get(PACKED)),
            **{name: data.get(name) for name in ("learnt", "test", "val")},
        )
    except (KeyError, TypeError, ValueError, RecursionError, AttributeError):
        raise bare.error(
            f"{bare.path.name} does not describe a model in format {FORMAT}; it may be another version's"
        ) from None
