"""Contact sheets: pictures in a grid, a caption under each.

Axes: r rows, v views, c channels, h w pixels, k classes.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from smallvit import datasets
from smallvit.config import Config
from smallvit.datasets.augment import Augment
from smallvit.datasets.images import Images
from smallvit.datasets.sampling import DRAWS
from smallvit.words import one_line

ROWS, VIEWS = 8, 7
CELL = 128
"""Side of a picture on the sheet in pixels, about."""
MARGIN, LINE = 6, 14


def augmented(config: Config) -> Image.Image:
    """Eight training images, each with seven augmented views, captioned with the labels and their weights.

    Raises:
        InputError: the data or the augmentation cannot be had.
    """
    dataset = datasets.load(config.data)
    augment = Augment.from_config(config.augment, dataset.img_size, dataset.flip, dataset.aug, dataset.policy)
    train = dataset.train
    order = np.random.default_rng(config.run.seed).permutation(len(train))[:ROWS]
    images = train.subset(order) if isinstance(train, Images) else train.subset(order).sample(ROWS)
    mean, std = dataset.statistics(torch.device("cpu"))
    pictures, captions = [images.pixels / 255], [[dataset.class_names[label] for label in images.labels.tolist()]]
    for view in range(VIEWS):
        rng = np.random.default_rng((config.run.seed, DRAWS, view))
        draws = augment.draw(rng, len(images), *images.pixels.shape[-2:])
        x, targets = augment.apply(images.pixels, images.labels, draws, mean, std, len(dataset.class_names))
        pictures.append((x * std + mean).clamp(0, 1))
        captions.append([caption(target, dataset.class_names) for target in targets])
    rows = torch.stack(pictures, dim=1).flatten(0, 1)
    return grid(rows, [line for row in zip(*captions, strict=True) for line in row], VIEWS + 1)


def caption(target: Float[Tensor, " k"], class_names: tuple[str, ...]) -> str:
    """The classes of a label distribution, with their weights where there are two."""
    weights, labels = target.topk(min(2, len(target)))
    if len(weights) < 2 or weights[1] < 0.005:
        return one_line(class_names[labels[0]])
    return "\n".join(
        f"{one_line(class_names[label])} {100 * weight:.0f}%" for weight, label in zip(weights, labels, strict=True)
    )


def grid(
    pictures: Float[Tensor, "n c h w"], captions: list[str], columns: int, *, title: str | None = None
) -> Image.Image:
    """Pictures of values in [0, 1] in rows of `columns`, enlarged by whole factors, a caption under each.

    A title stands above them, in as many lines as it has.
    """
    factor = max(1, round(CELL / pictures.shape[-1]))
    pixels = (pictures.expand(-1, 3, -1, -1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    height, width = pixels.shape[1] * factor, pixels.shape[2] * factor
    rows = -(-len(pixels) // columns)
    above = MARGIN + (0 if title is None else LINE * len(title.split("\n")) + MARGIN)
    size = (columns * (width + MARGIN) + MARGIN, rows * (height + MARGIN + 2 * LINE) + above)
    page = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(LINE - 3)
    draw.multiline_text((MARGIN, MARGIN), title or "", "black", font)
    for index, (picture, text) in enumerate(zip(pixels, captions, strict=True)):
        left = MARGIN + index % columns * (width + MARGIN)
        top = above + index // columns * (height + MARGIN + 2 * LINE)
        page.paste(Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST), (left, top))
        for number, line in enumerate(text.split("\n")[:2]):
            while draw.textlength(line, font) > width and len(line) > 1:
                line = line[:-2] + "…"
            draw.text((left, top + height + number * LINE), line, "black", font)
    return page
