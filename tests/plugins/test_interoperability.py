"""Patched models among torch's other tools: data-parallel training, export, ONNX, compilation."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import smallvit
from smallvit.models.architectures import LEE2021
from smallvit.models.factory import create_model

from .sweep import each, sweep

INITS = ["paper", "preserve"]


def patched(arch: str, init: str = "paper") -> nn.Module:
    torch.manual_seed(0)
    model = create_model(arch, img_size=32, num_classes=5, drop_path_rate=0)
    for module in (model, *getattr(model, "layers", ()), *getattr(model, "transformers", ())):
        if hasattr(module, "blocks"):
            module.blocks = module.blocks[:2]  # as many as there are kinds: the rest repeat them
    return smallvit.patch(model, spt=not (arch == "t2t" and init == "preserve"), lsa=True, init=init)


@pytest.fixture(scope="module")
def _one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
@each(INITS, "init")
@pytest.mark.slow
@sweep(LEE2021, quick=LEE2021)
def test_data_parallel_training_finds_no_unused_parameters(arch: str, init: str) -> None:
    model = DistributedDataParallel(patched(arch, init))
    for _ in range(2):  # the second step fails if the first left a parameter without a gradient
        nn.functional.cross_entropy(model(torch.randn(2, 3, 32, 32)), torch.tensor([1, 2])).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@each(INITS, "init")
@pytest.mark.slow
@sweep(LEE2021, quick=LEE2021)
def test_exported_programs_compute_the_same(arch: str, init: str) -> None:
    model, image = patched(arch, init).eval(), torch.randn(2, 3, 32, 32)
    program = torch.export.export(model, (image,))
    torch.testing.assert_close(program.module()(image), model(image), rtol=1e-5, atol=1e-5)


@each(INITS, "init")
@pytest.mark.slow
@sweep(LEE2021, quick=LEE2021)
def test_onnxruntime_computes_the_same_for_any_batch(arch: str, init: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = patched(arch, init).eval()
    program = torch.onnx.export(
        model,
        (torch.randn(2, 3, 32, 32),),
        dynamo=True,
        verbose=False,
        dynamic_shapes={"x": {0: torch.export.Dim("batch", min=1, max=64)}},
    )
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue())
    for batch in (2, 3):
        images = torch.randn(batch, 3, 32, 32)
        (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(logits, model(images).numpy(), rtol=1e-4, atol=1e-5)


@each(INITS, "init")
@pytest.mark.slow
@sweep(LEE2021, quick=LEE2021)
def test_models_compile_to_one_graph_forward_and_backward(arch: str, init: str) -> None:
    model, image = patched(arch, init), torch.randn(2, 3, 32, 32)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(image), model(image), rtol=1e-4, atol=1e-5)
    compiled(image).sum().backward()
    model(image).sum().backward()
    for mine, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-4 * theirs.grad.abs().max().item())
    torch.compiler.reset()
