"""Compute a model's accuracy and loss over batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from smallvit.datasets.loader import IGNORED_LABEL
from smallvit.utils.distributed import is_sharded
from smallvit.utils.errors import InputError, TrainingError, warn
from smallvit.utils.hardware import autocast, is_out_of_memory


class BatchParts:
    """Compute batches in parts that fit into memory: halve the parts when memory runs out, and say so.

    Args:
        size: Maximum number of images of a part; by default a batch is one part at first.
    """

    def __init__(self, size: int | None = None) -> None:
        self.size = size

    def compute(
        self, function: Callable[[Tensor], Tensor], images: Float[Tensor, "b c h w"], *, divisible: bool = True
    ) -> Float[Tensor, "b ..."]:
        """Return the outputs of a function of images, computed in parts.

        Args:
            function: Computes outputs of images independently of each other.
            images: A batch.
            divisible: Whether parts may be halved: not if the function communicates with other processes.

        Raises:
            TrainingError: Memory is exhausted by parts that cannot be halved.
        """
        outputs: list[Tensor] = []
        start = 0
        while start < len(images):
            part = images[start : start + (self.size or len(images))]
            output = self._try(function, part)
            if output is not None:
                outputs.append(output)
                start += len(part)
                continue
            if len(part) == 1:
                raise TrainingError("out of memory in the evaluation of a single image: try a smaller --img-size")
            self.size = len(part) // 2
            if not divisible:
                raise TrainingError(f"out of memory in evaluation: give --eval-batch-size {self.size}, or less")
            warn(f"out of memory in the evaluation of {len(part)} images; continuing with {self.size} at a time")
            if images.device.type == "cuda":
                torch.cuda.empty_cache()
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    @staticmethod
    def _try(function: Callable[[Tensor], Tensor], part: Tensor) -> Tensor | None:
        """Return the outputs; None if memory is exhausted, which is free again then."""
        try:
            return function(part)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return None


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    dtype: torch.dtype,
    *,
    flip: bool = False,
    total: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> dict[str, float]:
    """Evaluate one model as `evaluate_models` does."""
    return evaluate_models([model], batches, device, dtype, flip=flip, total=total)[0]


def evaluate_models(
    models: Sequence[nn.Module],
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    dtype: torch.dtype,
    *,
    flip: bool = False,
    total: Callable[[Tensor], Tensor] = lambda sums: sums,
    parts: BatchParts | None = None,
) -> list[dict[str, float]]:
    """Compute accuracy, macro F1 and balanced accuracy in percent, and mean cross-entropy of models over batches.

    Macro F1 and balanced accuracy are scikit-learn's for labels=classes with images, means over these.

    Args:
        models: Models of the same classes; each batch is read once for all of them.
        batches: Normalized images (b, c, h, w) and labels (b,); images labeled `IGNORED_LABEL` are not counted.
        device: The models' device.
        dtype: Precision of matrix products.
        flip: Average the probabilities over each image and its mirror image.
        total: Adds up sums over torchrun's processes.
        parts: Divides batches that do not fit into memory.

    Returns:
        `top1`, `macro_f1`, `balanced_accuracy`, `loss`, and the number of `images`, of each model.

    Raises:
        InputError: There are no images.
        TrainingError: Memory is exhausted.
    """
    sums: list[Tensor | float] = [0.0] * len(models)
    for labels, outputs in predict_batches(models, batches, device, dtype, flip=flip, parts=parts):
        with torch.no_grad():
            for number, logits in enumerate(outputs):
                loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED_LABEL)
                predicted, counted = logits.argmax(dim=1), labels != IGNORED_LABEL
                classes = torch.stack([labels, labels, predicted]).clamp(min=0)
                values = torch.stack([predicted == labels, counted, counted]).float()
                counts = logits.new_zeros(3, logits.shape[1]).scatter_add_(1, classes, values)
                sums[number] += torch.cat([loss[None], counts.flatten()])
    return [_reduce_sums(each) for each in total(torch.stack(sums)).cpu().double()]


def _reduce_sums(sums: Float[Tensor, " 3k+1"]) -> dict[str, float]:
    """Return the metrics from the summed loss and the correct, true and predicted images of each class."""
    loss, *counts = sums.split([1, *3 * [(len(sums) - 1) // 3]])
    correct, images, predicted = counts
    if not (count := images.sum().item()):
        raise InputError("none of the images can be decoded")
    present = images > 0
    return {
        "top1": 100 * correct.sum().item() / count,
        "macro_f1": 100 * (2 * correct / (images + predicted))[present].mean().item(),
        "balanced_accuracy": 100 * (correct / images)[present].mean().item(),
        "loss": loss.item() / count,
        "images": int(count),
    }


def predict_batches(
    models: Sequence[nn.Module],
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    dtype: torch.dtype,
    *,
    flip: bool = False,
    multi_label: bool = False,
    parts: BatchParts | None = None,
) -> Iterator[tuple[Int64[Tensor, " b"], list[Float[Tensor, "b k"]]]]:
    """Yield labels, and logits of each model in evaluation mode; each batch is read once. See `evaluate_models`."""
    parts = parts or BatchParts()
    training = [model.training for model in models]
    for model in models:
        model.eval()
    # FSDP keeps gathered weights
    sharded = any(map(is_sharded, models))
    options = {"device": device, "dtype": dtype, "flip": flip, "multi_label": multi_label}
    for images, labels in batches:
        with torch.no_grad() if sharded else torch.inference_mode():
            outputs = [
                parts.compute(partial(compute_logits, model, **options), images, divisible=not sharded)
                for model in models
            ]
        yield labels, outputs
    for model, mode in zip(models, training, strict=True):
        model.train(mode)


def compute_logits(
    model: nn.Module,
    images: Float[Tensor, "b c h w"],
    device: torch.device,
    dtype: torch.dtype,
    *,
    flip: bool = False,
    multi_label: bool = False,
) -> Float[Tensor, "b k"]:
    """Compute logits in fp32; with `flip`, those of the mean probabilities for each image and its mirror image.

    Args:
        model: The model.
        images: Normalized images.
        device: The model's device.
        dtype: Precision of matrix products.
        flip: Average over each image and its mirror image.
        multi_label: Whether probabilities are sigmoids instead of a softmax.

    Raises:
        InputError: Logits are not finite in fp16.
    """
    with autocast(device, dtype):
        logits = model(images).float()
        mirrored = model(images.flip(-1)).float() if flip else None
    if dtype == torch.float16 and not logits.isfinite().all():
        raise InputError("--amp fp16: the model's logits are not finite in fp16; use --amp off")
    if mirrored is None:
        return logits
    from smallvit.plugins.distillation import average_probabilities

    both = torch.stack([logits, mirrored])
    if multi_label:  # log p − log(1 − p) of the mean p
        return F.logsigmoid(both).logsumexp(0) - F.logsigmoid(-both).logsumexp(0)
    return average_probabilities(both)
