"""Patched models under torch.compile, torch.export, gradient checkpointing and bf16 autocast."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import smallvit
from smallvit.plugins.patch import unsupported_reason
from smallvit.utils.hardware import choose_dtype

from .sweep import each, sweep
from .zoo import ZOO, build, images

COMPILED = {
    "vit differential": "paper",
    "vit relpos": "preserve",
    "vit sam": "paper",
    "deit distilled": "preserve",
    "cait": "paper",
    "pit": "paper",
    "pit distilled": "preserve",
    "swin": "paper",
    "swin v2": "paper",
    "eva-02": "paper",
    "convit": "preserve",
    "nest": "paper",
    "levit": "paper",
    "botnet": "paper",
}
"""One model for each way through the plugins, and how it is patched."""
EXPORTED = ("vit", "eva-02", "cait", "pit", "swin", "convit")
NO_CHECKPOINTING = {"coat", "convit", "crossvit", "pit", "pit distilled", "twins pcpvt", "twins svt"}
"""Models whose timm class refuses gradient checkpointing."""


def patched(name: str, init: str = "paper") -> nn.Module:
    model = build(name)
    torch.manual_seed(0)
    plugins = {plugin: True for plugin in ("spt", "lsa") if unsupported_reason(model, plugin) is None}
    if not plugins:
        pytest.skip("no plugin can change this model")
    return smallvit.patch(model, **plugins, init=init)


def unless_timm_fails_too(name: str, act: Callable[[nn.Module], None], model: nn.Module) -> None:
    """Act on a patched model; where that fails and the plain model fails as well, skip."""
    try:
        act(model)
    except Exception:
        try:
            act(build(name))
        except Exception as error:
            pytest.skip(f"timm's own {name} fails too: {error}")
        raise


def gradients(model: nn.Module, name: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    output = model(images(name))
    sum(logits.square().sum() for logits in (output if isinstance(output, tuple) else (output,))).backward()
    return {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        size = expected.abs().max().item()
        torch.testing.assert_close(
            ours[key], expected, rtol=1e-4, atol=1e-5 * size + 1e-6, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.slow
@sweep(COMPILED)
def test_patched_models_compile_to_one_graph_with_the_same_output_and_gradients(name: str) -> None:
    model, twin = patched(name, COMPILED[name]), patched(name, COMPILED[name])
    torch._dynamo.reset()
    compiled = {}

    def compile_and_run(candidate: nn.Module) -> None:
        run = torch.compile(candidate, fullgraph=True, backend="aot_eager")
        compiled["logits"] = run(images(name))
        compiled["logits"].square().sum().backward()

    unless_timm_fails_too(name, compile_and_run, model)
    expected = twin(images(name))
    torch.testing.assert_close(compiled["logits"], expected, rtol=1e-5, atol=1e-5)
    expected.square().sum().backward()
    assert_same(
        {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None},
        {key: parameter.grad for key, parameter in twin.named_parameters() if parameter.grad is not None},
    )


@pytest.mark.slow
@sweep(EXPORTED)
@each(["paper", "preserve"], "init")
@torch.no_grad()
def test_patched_models_export(name: str, init: str) -> None:
    model = patched(name, init)
    exported = torch.export.export(model, (images(name),)).module()
    other = torch.randn_like(images(name))
    torch.testing.assert_close(exported(other), model(other), rtol=1e-5, atol=1e-5)


@sweep(ZOO)
def test_gradient_checkpointing_gives_the_same_gradients(name: str) -> None:
    model = patched(name).train()
    if name in NO_CHECKPOINTING:
        with pytest.raises(AssertionError, match="not supported"):
            model.set_grad_checkpointing(True)
        return
    expected = gradients(patched(name).train(), name)
    model.set_grad_checkpointing(True)
    assert_same(gradients(model, name), expected)


@sweep(ZOO)
@each(["paper", "preserve"], "init")
@torch.no_grad()
def test_bf16_autocast_stays_as_near_to_fp32_as_in_the_plain_model(name: str, init: str) -> None:
    """Without oneDNN where this CPU's gets a convolution wrong."""
    errors, img_size = [], images(name).shape[-1]
    for model in (build(name), patched(name, init)):
        exact = model(images(name))
        sound = choose_dtype(torch.device("cpu"), "auto", model, 3, img_size) == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16), torch.backends.mkldnn.flags(enabled=sound):
            low = model(images(name))
        assert low.isfinite().all()
        errors.append((low.float() - exact).abs().max() / exact.abs().max())
    assert errors[1] < 0.02 + 3 * errors[0]


@pytest.mark.slow
@sweep(COMPILED)
def test_gradients_under_bf16_autocast_are_finite_and_reach_as_far(name: str) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        ours = gradients(patched(name).train(), name)
    assert ours.keys() == gradients(patched(name).train(), name).keys()
    assert all(gradient.isfinite().all() for gradient in ours.values())
