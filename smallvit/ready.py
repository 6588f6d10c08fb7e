"""A trained model that is ready to answer: on its device, in its precision, at an image size.

Axes: b batch, c channels, h w pixels, k classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, UInt8
from timm.layers import PatchEmbed
from torch import Tensor, nn

from smallvit import hardware, pretrained, trained
from smallvit.compiling import is_convolutional
from smallvit.datasets.augment import normalise
from smallvit.errors import InputError, first_line
from smallvit.evaluate import answer, batch_size
from smallvit.plugins import set_fused_attention, set_input_size
from smallvit.precision import sound_dtype
from smallvit.trained import Card


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A trained model that is ready to answer, in evaluation mode."""

    card: Card
    model: nn.Module
    img_size: int
    """Side in pixels of the images that it is asked about."""
    device: torch.device
    dtype: torch.dtype
    """Of the matrix products: bfloat16 under mixed precision."""

    @property
    def in_chans(self) -> int:
        """Channels of the images: 1 grey, 3 colour."""
        return self.card.spec["in_chans"]

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes' names; their numbers, where the weights tell none."""
        return self.card.class_names or tuple(str(number) for number in range(self.card.spec["num_classes"]))

    @property
    def batch_size(self) -> int:
        """Images that are answered fast at once."""
        return batch_size(self.device)

    @property
    def precision(self) -> str:
        """bf16 or fp32."""
        return "bf16" if self.dtype == torch.bfloat16 else "fp32"

    def normalised(self, pixels: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Grey levels as the model wants them, on its device."""
        mean, std = torch.tensor([self.card.mean, self.card.std], device=self.device)[:, :, None, None]
        return normalise(pixels.to(self.device), mean, std)

    @torch.inference_mode()
    def logits(self, images: Float[Tensor, "b c h w"], *, flip: bool = False) -> Float[Tensor, "b k"]:
        """What it answers to normalised images, in fp32; with `flip`, for each and its mirror image in the mean."""
        return answer(self.model, images, self.device, self.dtype, flip=flip)


def ready(
    name: str,
    option: str,
    *,
    arch: str | None = None,
    img_size: int | None = None,
    device: str = "auto",
    amp: Literal["auto", "bf16", "off"] = "auto",
) -> Ready:
    """The trained model that `name` stands for (a run, a weights file, a timm model), ready to answer.

    `option` is the flag or verb that it was given to, for error lines; `arch` the model in another program's file;
    `img_size` is its own by default.

    Raises:
        InputError: no such weights or device, or the model cannot take images of this size.
    """
    card = described(name, option, arch)
    return prepared(card, img_size or card.spec["img_size"], device, amp)


def described(name: str, option: str, arch: str | None) -> Card:
    """The card of trained weights, which says what model they are of; `arch` does where the file does not.

    Raises:
        InputError: no such weights, or nothing or two things say what model they are of.
    """
    card = trained.card(name, option)
    if card.spec is not None and arch is not None:
        raise InputError(f"--arch {arch}: {name} says itself what model it holds; leave --arch out")
    if card.spec is not None:
        return card
    if arch is None:
        raise card.error("another program's file, which does not say what model it holds; give --arch")
    return pretrained.of_file(card, arch)


def prepared(card: Card, img_size: int, device: str, amp: Literal["auto", "bf16", "off"]) -> Ready:
    """The model of a card, ready to answer.

    Raises:
        InputError: no such device, or the model cannot take images of this size.
    """
    place = hardware.pick_device(device)
    model = _resized(card, img_size)
    dtype = sound_dtype(place, amp, model, card.spec["in_chans"], img_size)
    return Ready(card=card, model=settled(model, place, dtype), img_size=img_size, device=place, dtype=dtype)


def settled(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model on its device, in evaluation mode, with the fast path of its attention and layout of its images."""
    set_fused_attention(model, device.type, dtype)
    model.eval().to(device)
    return model.to(memory_format=torch.channels_last) if is_convolutional(model) else model


def _resized(card: Card, size: int) -> nn.Module:
    """The model, taking images of this size."""
    model = trained.load(card)
    if size == card.spec["img_size"]:
        return model
    embedding = getattr(model, "patch_embed", None)
    if isinstance(embedding, PatchEmbed) and size % embedding.patch_size[0]:  # timm would cut off what is too much
        raise InputError(f"--img-size {size}: {card.name} takes multiples of its patch size {embedding.patch_size[0]}")
    try:
        if hasattr(model, "pos_embed") or hasattr(model, "set_input_size"):  # convolutions take any
            set_input_size(model, size)
        with torch.inference_mode():
            model(torch.zeros(1, card.spec["in_chans"], size, size))
    except Exception as error:  # whatever a thousand models raise at sizes not foreseen
        raise InputError(f"--img-size {size}: {card.name} cannot take it ({first_line(error)})") from None
    return model
