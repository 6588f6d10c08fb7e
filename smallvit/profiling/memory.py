"""Measure the memory of training: activations kept for the backward pass, and the peak of a training step on a GPU.

Axes: b batch, c channels, h w pixels.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from itertools import chain
from typing import TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from smallvit.utils.hardware import autocast

BATCHES = (2, 3)
"""Batch sizes whose difference is the memory per image; some batch norms cannot train on one image."""
STEPS = 2
"""Training steps until the peak is reached: the first creates the optimizer's state."""
OUT_OF_MEMORY = ("can't allocate memory", "out of memory")
"""Texts of torch's errors."""

T = TypeVar("T")


def activation_bytes(model: nn.Module, in_chans: int, img_size: int, device: torch.device, dtype: torch.dtype) -> int:
    """Measure the bytes that each further image of a batch adds to what is kept for the backward pass."""
    fewer, more = (
        kept_bytes(model, torch.zeros(count, in_chans, img_size, img_size, device=device), dtype) for count in BATCHES
    )
    return (more - fewer) // (BATCHES[1] - BATCHES[0])


def kept_bytes(model: nn.Module, images: Float[Tensor, "b c h w"], dtype: torch.dtype) -> int:
    """Measure the bytes that a forward pass keeps for the backward pass, without parameters and buffers.

    Tensors that share memory count once. They are released at once, so the pass needs no more memory than inference.
    """
    own = _get_storages(chain(model.parameters(), model.buffers()))
    kept: dict[StorageWeakRef, int] = {}

    def keep(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        kept[StorageWeakRef(storage)] = storage.nbytes()  # while the reference lives, no other storage is equal to it

    def unpack(_: None) -> Tensor:
        raise RuntimeError("activations were counted but not kept, so there is no backward pass")

    training = model.training
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, unpack), autocast(images.device, dtype):
        model(images)
    model.train(training)
    return sum(size for storage, size in kept.items() if storage not in own)


def step_peak_bytes(model: nn.Module, images: Float[Tensor, "b c h w"], dtype: torch.dtype) -> int:
    """Measure the peak memory of tensors in a training step with AdamW on a GPU, by torch's allocator.

    Weights, gradients, the optimizer's state and the batch are included, other models on the GPU are not. The model is
    trained by it.
    """
    labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
    own = sum(_get_storages(chain(model.parameters(), model.buffers(), [images, labels])).values())
    before = torch.cuda.memory_allocated(images.device)
    torch.cuda.reset_peak_memory_stats(images.device)
    training, optimizer = model.training, torch.optim.AdamW(model.parameters(), fused=True)
    model.train()
    for _ in range(STEPS):
        optimizer.zero_grad()
        with autocast(images.device, dtype):
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
    model.train(training).zero_grad()
    return own + torch.cuda.max_memory_allocated(images.device) - before


def run_if_memory_allows(task: Callable[[], T]) -> T | None:
    """Run a task and return its result; None if it needs more memory than is free."""
    try:
        return task()
    except RuntimeError as error:
        if not any(text in str(error) for text in OUT_OF_MEMORY):
            raise
    gc.collect()
    torch.cuda.empty_cache()  # has no effect without a GPU
    return None


def _get_storages(tensors: Iterable[Tensor]) -> dict[StorageWeakRef, int]:
    """Return the storages of tensors, each once, and their bytes."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {StorageWeakRef(storage): storage.nbytes() for storage in storages}
