"""Load a trained model for inference, and detect test images that it was trained on.

Axes: b batch, c channels, h w pixels, k classes.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import mod
from typing import Literal

import torch
from jaxtyping import Float, UInt8
from timm.layers import PatchEmbed
from torch import Tensor, nn

from smallvit.config.config import option_names
from smallvit.config.options import Amp, DataConfig
from smallvit.datasets.augment import normalize
from smallvit.datasets.dataset import ImageDataset
from smallvit.evaluation.evaluate import BatchParts, compute_logits
from smallvit.models import weights, weights_info
from smallvit.models.factory import fuse_for_inference, prepare_for_inference
from smallvit.models.weights_info import WeightsInfo
from smallvit.plugins.resize import set_input_size
from smallvit.utils import hardware
from smallvit.utils.errors import InputError, first_line, flag
from smallvit.utils.hardware import batch_size, choose_dtype
from smallvit.utils.sizes import ImageSize, height_width, parse_size


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """A trained model in evaluation mode, with its preprocessing and class names."""

    info: WeightsInfo
    model: nn.Module
    img_size: ImageSize
    """Image height and width in pixels."""
    device: torch.device
    dtype: torch.dtype
    """Precision of matrix products: bfloat16 or float16 under mixed precision."""
    parts: BatchParts = field(default_factory=BatchParts)
    """Parts of batches that fit into memory."""

    @property
    def in_chans(self) -> int:
        """Channels of the images: 1 gray, 3 color, others of arrays."""
        return self.info.spec["in_chans"]

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes' names; their numbers if the weights name none."""
        return self.info.class_names or tuple(str(number) for number in range(self.info.spec["num_classes"]))

    @property
    def batch_size(self) -> int:
        """A batch size that is fast on the device, or that fits into its memory."""
        return self.parts.size or batch_size(self.device)

    @property
    def precision(self) -> str:
        """Precision of matrix products: bf16, fp16, tf32 or fp32."""
        return hardware.precision_name(self.device, self.dtype)

    def normalize(self, pixels: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Move pixels to the device and normalize them as in training."""
        mean, std = torch.tensor([self.info.mean, self.info.std], device=self.device)[:, :, None, None]
        return normalize(pixels.to(self.device), mean, std)

    def fused(self) -> Predictor:
        """Return the predictor with its model fused for inference if it is in fp32: the same logits up to rounding."""
        return replace(self, model=fuse_for_inference(self.model, self.device, self.dtype))

    @torch.inference_mode()
    def predict_logits(self, images: Float[Tensor, "b c h w"], *, flip: bool = False) -> Float[Tensor, "b k"]:
        """Compute logits of normalized images in fp32; with `flip`, average over each image and its mirror image."""
        options = {"flip": flip, "multi_label": self.info.multi_label}
        function = partial(compute_logits, self.model, device=self.device, dtype=self.dtype, **options)
        return self.parts.compute(function, images)

    def probabilities(self, logits: Float[Tensor, "b k"]) -> Float[Tensor, "b k"]:
        """Return the probabilities of the classes: a softmax, or sigmoids if images have several labels."""
        return logits.sigmoid() if self.info.multi_label else logits.softmax(dim=1)


def load_predictor(
    name: str,
    option: str,
    *,
    arch: str | None = None,
    img_size: int | str | tuple[int, int] | None = None,
    device: str = "auto",
    amp: Amp = "auto",
) -> Predictor:
    """Load a trained model for inference.

    Args:
        name: A run folder, a weights file, or a timm model with pretrained weights.
        option: The flag or verb that the name was given to, for error messages.
        arch: The timm model in a file of another program.
        img_size: Image size in pixels, or height and width; by default the model's.
        device: auto, cpu, cuda, cuda:1, mps.
        amp: Mixed precision: auto, bf16, fp16 or off.

    Raises:
        InputError: There are no such weights or device, or the model cannot take images of this size.
    """
    info = read_model_info(name, option, arch)
    size = info.spec["img_size"] if img_size is None else parse_size(img_size)
    return create_predictor(info, size, device, amp)


def read_model_info(name: str, option: str, arch: str | None) -> WeightsInfo:
    """Read the metadata of trained weights, named as for `load_predictor`, and check that their model is known.

    Raises:
        InputError: There are no such weights, or their model is unknown or given twice.
    """
    info = weights_info.read_weights_info(name, option)
    if info.spec is not None and arch is not None:
        raise InputError(f"--arch {arch}: {name} already names its model; remove --arch")
    if info.spec is not None:
        return info
    if arch is None:
        raise info.error("this file of another program does not name its model; add --arch")
    return weights.describe_file(info, arch)


def create_predictor(
    info: WeightsInfo, img_size: ImageSize, device: str, amp: Amp, batch_size: int | Literal["auto"] = "auto"
) -> Predictor:
    """Load a model for inference.

    Args:
        info: The weights and their metadata.
        img_size: Image size in pixels, or height and width.
        device: auto, cpu, cuda, cuda:1, mps.
        amp: Mixed precision: auto, bf16, fp16 or off.
        batch_size: Images of a batch; auto is fast on the device.

    Raises:
        InputError: There is no such device, or the model cannot take images of this size.
    """
    target = hardware.pick_device(device)
    model = _load_resized(info, img_size)
    dtype = choose_dtype(target, amp, model, info.spec["in_chans"], img_size)
    model = prepare_for_inference(model, target, dtype)
    parts = BatchParts(None if batch_size == "auto" else batch_size)
    return Predictor(info=info, model=model, img_size=img_size, device=target, dtype=dtype, parts=parts)


def _load_resized(info: WeightsInfo, size: ImageSize) -> nn.Module:
    """Load a model and adapt it to an image size."""
    model = weights.load_trained_model(info)
    if size == info.spec["img_size"]:
        return model
    embedding, sides = getattr(model, "patch_embed", None), height_width(size)
    if isinstance(embedding, PatchEmbed) and any(map(mod, sides, embedding.patch_size)):  # timm would crop the image
        patch = embedding.patch_size[0]
        raise InputError(f"--img-size {size}: expected a multiple of the patch size {patch} of {info.name}")
    try:
        if hasattr(model, "pos_embed") or hasattr(model, "set_input_size"):  # CNNs take any size
            set_input_size(model, size)
        with torch.inference_mode():
            model(torch.zeros(1, info.spec["in_chans"], *sides))
    except Exception as error:  # models raise anything for unsupported sizes
        raise InputError(f"--img-size {size}: not supported by {info.name} ({first_line(error)})") from None
    return model


# Images that a model was trained on


def is_trained_on(info: WeightsInfo, dataset: ImageDataset) -> bool:
    """Return whether a model is known to be trained on a data set, or on a copy of it."""
    if info.training_data is None:
        return info.data == dataset.source  # only the data set's name is known of timm's weights
    return info.training_data["fingerprint"] == dataset.source_hash


def check_test_split(
    info: WeightsInfo, dataset: ImageDataset, config: DataConfig, splits: Sequence[str] = ("test",)
) -> list[str]:
    """Check that the images to evaluate a model on were not used to train it.

    Returns:
        Warnings about images that were or may have been used in training.

    Raises:
        InputError: Only the test split is evaluated, and it is known to contain training images.
    """
    if not is_trained_on(info, dataset):
        if info.training_data is not None and info.data == dataset.name and dataset.drew_test:
            return [f"{dataset.name} has changed since {info.name} was trained on it; test may contain training images"]
        return []
    if tuple(splits) == ("test",):
        now = dataset.describe_training_data(config)["test_split"]
        then = (info.training_data or {}).get("test_split")
        then = then and {name: getattr(DataConfig, name) for name in option_names("draws_test")} | then
        if now is not None and then is not None and now != then:
            changed = {flag(name): value for name, value in then.items() if value != now[name]}
            given = [f"add {name} {shlex.quote(str(value))}" for name, value in changed.items() if value is not None]
            remedy = " and ".join([*given, *(f"remove {name}" for name, value in changed.items() if value is None)])
            raise info.error(f"the test split contains images that it was trained on; {remedy} as in training")
        return []
    if "train" in splits:
        return [f"{info.name} was trained on images of train; accuracy on other images may be lower"]
    return [f"validation images helped to choose the weights of {info.name}; accuracy on other images may be lower"]
