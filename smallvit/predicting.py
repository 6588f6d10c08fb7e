"""Classifying image files: a trained model's likeliest classes for each, and their probabilities.

Threads decode ahead of the model, as images are decoded for training; at most `AHEAD` bytes of pixels wait for it,
about. Axes: c channels, s image size, k classes.
"""

from __future__ import annotations

import os
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from timm.data import ImageNetInfo

from smallvit.datasets.decode import decode_image, reason, usable_cores
from smallvit.datasets.listing import is_hidden, is_image
from smallvit.ready import Ready

AHEAD = 2**28
"""Bytes of decoded images that may wait for the model, about."""
CHUNK = 16
"""Images that a thread decodes at a time."""
WORDNET = re.compile(r"n\d{8}")
"""What ImageNet's classes are called in files and by timm."""
SUBSETS = ("imagenet-1k", "imagenet-21k-goog")
"""Of timm's, those that have all of ImageNet's classes together."""


@dataclass(frozen=True)
class Prediction:
    """What a model says of one file."""

    path: str
    classes: tuple[tuple[str, float], ...] = ()
    """Names and probabilities, the likeliest first; names as `readable` has them."""
    error: str | None = None
    """Why the file cannot be read, if it cannot."""


class Decoded(NamedTuple):
    """A file's grey levels (c, s, s), or what is wrong with it."""

    path: str
    pixels: np.ndarray | None
    error: str | None


def predict(model: Ready, paths: Sequence[str], *, top: int = 5, flip: bool = False) -> Iterator[Prediction]:
    """The `top` likeliest classes of each file, in the order of the paths; files that cannot be read say why.

    With `flip`, of the mean probabilities for each image and its mirror image.

    Raises:
        InputError: the model's answers are not finite.
    """
    names = readable(model.class_names)
    with closing(_decoded(model, paths)) as decoded:
        while batch := list(islice(decoded, model.batch_size)):
            good = [pixels for _, pixels, _ in batch if pixels is not None]
            answers = iter(_likeliest(model, names, good, top, flip) if good else ())
            for path, pixels, error in batch:
                yield Prediction(path, () if pixels is None else next(answers), error)


def image_paths(names: Iterable[str]) -> list[str]:
    """Files as they are named; for a folder all below it that are named like images, sorted, hidden ones left out.

    A folder without images stands for itself, and so does one that cannot be listed, so that they are told of among
    what cannot be read.
    """
    return [path for name in names for path in (_below(name) if os.path.isdir(name) else [name])]


def readable(names: Sequence[str]) -> tuple[str, ...]:
    """The names of classes, where they are WordNet's ids with the first word that timm has for them.

    Words that several classes have are followed by the id.
    """
    if not any(map(WORDNET.fullmatch, names)):
        return tuple(names)
    words = [_words().get(name, name) for name in names]
    often = Counter(words)
    return tuple(word if often[word] == 1 else f"{word} ({name})" for name, word in zip(names, words, strict=True))


def decode(path: str, size: int, in_chans: int) -> UInt8[np.ndarray, "c s s"]:
    """Grey levels of an image file, as training on folders has them; for one channel, of the colours' luma.

    Raises whatever Pillow raises for files that are damaged or no images.
    """
    pixels = decode_image(path, size)
    return pixels if in_chans == 3 else np.asarray(Image.fromarray(pixels.transpose(1, 2, 0)).convert("L"))[None]


@lru_cache(maxsize=1)
def _words() -> dict[str, str]:
    """The first word for each of ImageNet's classes, by its id."""
    subsets = map(ImageNetInfo, SUBSETS)
    told = [pair for subset in subsets for pair in subset.label_descriptions(as_dict=True).items()]
    return {name: words.partition(",")[0] for name, words in told}


def _below(folder: str) -> list[str]:
    found: list[str] = []
    seen: set[str] = set()

    def refused(error: OSError) -> None:
        found.append(error.filename)

    for place, subfolders, names in os.walk(folder, followlinks=True, onerror=refused):
        if os.path.realpath(place) in seen:  # a link back
            subfolders.clear()
            continue
        seen.add(os.path.realpath(place))
        subfolders[:] = sorted(name for name in subfolders if not is_hidden(name))
        found += [os.path.join(place, name) for name in sorted(names) if is_image(name) and not is_hidden(name)]
    return found or [folder]


def _decoded(model: Ready, paths: Sequence[str]) -> Iterator[Decoded]:
    """The files' pixels in order, decoded by threads ahead of their use."""
    size, in_chans = model.img_size, model.in_chans
    images = min(2 * model.batch_size, AHEAD // (in_chans * size**2))
    ahead = max(usable_cores(), images // CHUNK)
    waiting: deque[Future[list[Decoded]]] = deque()
    pool = ThreadPoolExecutor(usable_cores())
    try:
        for start in range(0, len(paths), CHUNK):
            waiting.append(pool.submit(_decode_some, paths[start : start + CHUNK], size, in_chans))
            if len(waiting) > ahead:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _decode_some(paths: Sequence[str], size: int, in_chans: int) -> list[Decoded]:
    found = []
    for path in paths:
        try:
            found.append(Decoded(path, decode(path, size, in_chans), None))
        except Exception as error:  # whatever a damaged file provokes
            found.append(Decoded(path, None, _why(error, path)))
    return found


def _why(error: Exception, path: str) -> str:
    """Why a file or folder cannot be read, in a few words."""
    if isinstance(error, IsADirectoryError):
        return "a folder without images"
    return (error.strerror if isinstance(error, OSError) else None) or reason(error, path)


def _likeliest(
    model: Ready, names: tuple[str, ...], pixels: list[UInt8[np.ndarray, "c s s"]], top: int, flip: bool
) -> list[tuple[tuple[str, float], ...]]:
    """Names and probabilities of the likeliest classes of each image."""
    images = model.normalised(torch.from_numpy(np.stack(pixels)))
    logits = model.logits(images, flip=flip).cpu()
    if not logits.isfinite().all():
        raise model.card.error("its answers are not finite")
    probabilities, classes = logits.double().softmax(dim=1).topk(min(top, len(names)))
    return [
        tuple((names[number], probability) for number, probability in zip(*row, strict=True))
        for row in zip(classes.tolist(), probabilities.tolist(), strict=True)
    ]
