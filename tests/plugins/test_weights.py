"""Weights of the plain model in a patched one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import smallvit
from smallvit.plugins.patching import why_not

from .zoo import build, images

NAMES = (
    "vit",
    "deit distilled",
    "cait",
    "pit distilled",
    "swin",
    "swin v2",
    "swin v2 cr",
    "pvt v2",
    "levit",
    "naflexvit",
)
every_model = pytest.mark.parametrize("name", NAMES)
both_ways = pytest.mark.parametrize("init", ["paper", "exact"])


def patched(name: str, init: str, seed: int = 0) -> nn.Module:
    model = build(name, seed)
    return smallvit.patch(model, spt=why_not(model, "spt") is None, lsa=True, init=init)


@torch.no_grad()
def logits(model: nn.Module, name: str) -> Tensor:
    return model(images(name))


@every_model
@both_ways
def test_base_weights_load_and_exactly_the_new_names_are_reported(name: str, init: str) -> None:
    base = build(name, seed=1)
    model = patched(name, init)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = smallvit.load_base(model, base.state_dict())
    own, plain = list(model.state_dict()), base.state_dict()
    assert list(report.new) == [key for key in own if key not in plain or before[key].shape != plain[key].shape]
    assert set(report.unused) == {key for key in plain if key not in own or before[key].shape != plain[key].shape}
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key] if key in report.new else plain[key])
    assert all(key in str(report) for key in report.new + report.unused)
    assert not any(parameter.grad_fn for parameter in model.parameters())


@every_model
@both_ways
def test_unpatching_after_loading_gives_the_base_model_bit_by_bit(name: str, init: str) -> None:
    base, model = build(name, seed=1), patched(name, init)
    smallvit.load_base(model, base.state_dict())
    smallvit.unpatch(model)
    assert list(model.state_dict()) == list(base.state_dict())
    assert torch.equal(logits(model, name), logits(base, name))


@every_model
def test_a_model_patched_exactly_computes_what_the_loaded_weights_do(name: str) -> None:
    base, model = build(name, seed=1), patched(name, "exact")
    smallvit.load_base(model, base.state_dict())
    expected = logits(base, name)
    torch.testing.assert_close(logits(model, name), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_a_plain_model_takes_its_own_weights_and_reports_nothing() -> None:
    model, base = build("vit"), build("vit", seed=1)
    report = smallvit.load_base(model, base.state_dict())
    assert report.new == report.unused == ()
    assert torch.equal(logits(model, "vit"), logits(base, "vit"))


@both_ways
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_weights_that_do_not_fit_are_refused_and_change_nothing(name: str, init: str) -> None:
    model, base = patched(name, init), build(name, seed=1).state_dict()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    kernel = "patch_embed.proj.weight"
    wrong = {
        "the weights lack head": {key: value for key, value in base.items() if not key.startswith("head")},
        f"the weights lack {kernel}": {key: value for key, value in base.items() if key != kernel},
        "the weights hold extra.weight": base | {"extra.weight": torch.zeros(2)},
        f"{kernel} has shape (2, 3) in the weights": base | {kernel: torch.zeros(2, 3)},
        "the weights hold": model.state_dict() | base,
    }
    for said, weights in wrong.items():
        with pytest.raises(ValueError, match=said.replace("(", r"\(").replace(")", r"\)")):
            smallvit.load_base(model, weights)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(logits(smallvit.unpatch(model), name), logits(build(name), name))
