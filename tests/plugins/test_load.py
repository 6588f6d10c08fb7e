"""Weights of the plain model in a patched one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import smallvit
from smallvit.plugins.patch import unsupported_reason

from .sweep import each, sweep
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
every_model = sweep(NAMES)
both_ways = each(["paper", "preserve"], "init")


def patched(name: str, init: str, seed: int = 0) -> nn.Module:
    model = build(name, seed)
    return smallvit.patch(model, spt=unsupported_reason(model, "spt") is None, lsa=True, init=init)


@torch.no_grad()
def logits(model: nn.Module, name: str) -> Tensor:
    return model(images(name))


@every_model
@both_ways
def test_load_base_state_dict_reports_missing_and_unexpected_keys(name: str, init: str) -> None:
    base = build(name, seed=1)
    model = patched(name, init)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = smallvit.load_base_state_dict(model, base.state_dict())
    own, plain = list(model.state_dict()), base.state_dict()
    assert report.missing_keys == [key for key in own if key not in plain or before[key].shape != plain[key].shape]
    assert set(report.unexpected_keys) == {
        key for key in plain if key not in own or before[key].shape != plain[key].shape
    }
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key] if key in report.missing_keys else plain[key])
    assert not any(parameter.grad_fn for parameter in model.parameters())


@every_model
@both_ways
def test_unpatching_after_loading_gives_the_base_model_bit_by_bit(name: str, init: str) -> None:
    base, model = build(name, seed=1), patched(name, init)
    smallvit.load_base_state_dict(model, base.state_dict())
    smallvit.unpatch(model)
    assert list(model.state_dict()) == list(base.state_dict())
    assert torch.equal(logits(model, name), logits(base, name))


@every_model
def test_preserve_computes_the_loaded_model(name: str) -> None:
    base, model = build(name, seed=1), patched(name, "preserve")
    smallvit.load_base_state_dict(model, base.state_dict())
    expected = logits(base, name)
    torch.testing.assert_close(logits(model, name), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_load_base_state_dict_into_unpatched_model() -> None:
    model, base = build("vit"), build("vit", seed=1)
    report = smallvit.load_base_state_dict(model, base.state_dict())
    assert report == ([], [])
    assert torch.equal(logits(model, "vit"), logits(base, "vit"))


@both_ways
@each(["vit", "swin"], "name")
def test_weights_that_do_not_fit_are_refused_and_change_nothing(name: str, init: str) -> None:
    model, base = patched(name, init), build(name, seed=1).state_dict()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    kernel = "patch_embed.proj.weight"
    wrong = {
        "head.*weight is missing, and 1 more": {
            key: value for key, value in base.items() if not key.startswith("head")
        },
        f"{kernel} is missing$": {key: value for key, value in base.items() if key != kernel},
        "the model has no extra.weight$": base | {"extra.weight": torch.zeros(2)},
        f"{kernel} has shape (2, 3), the model's has .*[0-9])$": base | {kernel: torch.zeros(2, 3)},
        "the model has no": model.state_dict() | base,
    }
    for said, weights in wrong.items():
        with pytest.raises(ValueError, match=said.replace("(", r"\(").replace(")", r"\)")):
            smallvit.load_base_state_dict(model, weights)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(logits(smallvit.unpatch(model), name), logits(build(name), name))


PREFIXES = ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "_orig_mod.module._orig_mod.")


def test_load_wrapped_models_and_checkpoint_entries() -> None:
    base, wrong = build("vit", seed=1), build("vit", seed=2).state_dict()
    plain = base.state_dict()
    wrapped = [{prefix + name: value for name, value in plain.items()} for prefix in PREFIXES]
    wrapped += [nn.DataParallel(base).state_dict(), torch.compile(base).state_dict()]
    wrapped += [torch.compile(nn.DataParallel(base)).state_dict(), nn.DataParallel(torch.compile(base)).state_dict()]
    wrapped += [{name: plain, "epoch": 3} for name in ("state_dict", "model", "state_dict_ema", "model_ema")]
    wrapped += [{"state_dict": wrong, "state_dict_ema": wrapped[0]}]
    for weights in wrapped:
        model = patched("vit", "paper")
        report = smallvit.load_base_state_dict(model, weights)
        loaded = {name: value for name, value in model.state_dict().items() if name not in report.missing_keys}
        assert loaded
        assert all(torch.equal(value, plain[name]) for name, value in loaded.items())


def test_the_first_key_that_does_not_fit_is_named() -> None:
    plain = build("vit").state_dict()
    weights = {f"encoder.{name}": value for name, value in plain.items()}
    expected = f"cls_token is missing, the model has no encoder.cls_token, and {2 * len(plain) - 2} more"
    with pytest.raises(ValueError, match=expected):
        smallvit.load_base_state_dict(build("vit", seed=1), weights)
    with pytest.raises(ValueError, match="cls_token is missing, the model has no weights"):
        smallvit.load_base_state_dict(build("vit", seed=1), {"weights": plain})
