"""Draw augmented training images with their labels."""

from __future__ import annotations

import sys

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from smallvit.config.config import Config
from smallvit.datasets.augment import Augment
from smallvit.datasets.dataset import Files
from smallvit.datasets.factory import create_dataset
from smallvit.datasets.sampler import DRAWS
from smallvit.utils.errors import collapse_whitespace, escape_undecodable
from smallvit.utils.plots import draw_grid

ROWS, VIEWS = 8, 7


def draw_augmented(config: Config) -> Image.Image:
    """Draw eight training images with seven augmented views each; captions are the labels and their weights.

    Notes on the data are printed to standard error.

    Raises:
        InputError: the data or the augmentation is unusable.
    """
    dataset = create_dataset(config.data)
    augment = Augment.from_config(config.augment, dataset.img_size, dataset.flip, dataset.aug, dataset.policy)
    for note in dataset.notes:
        print(escape_undecodable(note), file=sys.stderr)
    order = np.random.default_rng(config.run.seed).permutation(len(dataset.train))[:ROWS]
    images = dataset.train.subset(order)
    images = images.sample(ROWS) if isinstance(images, Files) else images
    mean, std = dataset.statistics(torch.device("cpu"))
    views, captions = [images.pixels / 255], [[dataset.class_names[label] for label in images.labels.tolist()]]
    for view in range(VIEWS):
        rng = np.random.default_rng((config.run.seed, DRAWS, view))
        draws = augment.draw(rng, len(images), *images.pixels.shape[-2:])
        x, targets = augment.apply(images.pixels, images.labels, draws, mean, std, len(dataset.class_names))
        views.append((x * std + mean).clamp(0, 1))
        captions.append([format_caption(target, dataset.class_names) for target in targets])
    rows = torch.stack(views, dim=1).flatten(0, 1)
    return draw_grid(rows, [line for row in zip(*captions, strict=True) for line in row], VIEWS + 1)


def format_caption(target: Float[Tensor, " k"], class_names: tuple[str, ...]) -> str:
    """Return the classes of a label distribution, with their weights if there are two."""
    weights, labels = target.topk(min(2, len(target)))
    if len(weights) < 2 or weights[1] < 0.005:
        return collapse_whitespace(class_names[labels[0]])
    return "\n".join(
        f"{collapse_whitespace(class_names[label])} {100 * weight:.0f}%"
        for weight, label in zip(weights, labels, strict=True)
    )
