"""Test that batched Muon computes what timm's Muon computes in the same precision."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from timm.optim import create_optimizer_v2
from timm.optim import muon as timm_muon
from torch import Tensor, nn

from smallvit.config.config import Config
from smallvit.training import muon
from smallvit.training.muon import BatchedMuon
from smallvit.training.optim import create_optimizer


class Net(nn.Module):
    """Three matrices of one shape, a wide one and its transpose's shape, convolutions, and parameters left to AdamW."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.same = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.wide, self.tall, self.unused = nn.Linear(24, 8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.pos_embed = nn.Parameter(torch.zeros(1, 4, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.conv(x)).flatten(2).mT + self.pos_embed
        for layer in self.same:
            x = layer(x).tanh()
        return self.wide(self.tall(x).tanh())


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4) -> None:
    generator = torch.Generator().manual_seed(0)
    for number in range(steps):
        optimizer.param_groups[0]["lr"] = 0.02 / (1 + number)
        x = torch.randn(2, 3, 6, 6, generator=generator)
        optimizer.zero_grad()
        (net(x) ** 2).mean().backward()
        optimizer.step()


@pytest.mark.parametrize("opt", ["muon", "nmuon", "adamuon", "nadamuon"])
def test_steps_and_state_equal_timms(opt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scale, _ = timm_muon.get_adamuon_lr_scale((8, 3, 3, 3), "match_rms_adamw")
    if "ada" in opt and scale != pytest.approx(0.2 * 216**0.5):
        pytest.skip("this version of timm scales AdaMuon's update of a convolution by its last two sizes")
    in_fp32 = functools.partial(timm_muon.zeropower_via_newtonschulz, dtype=torch.float32)
    monkeypatch.setattr(timm_muon, "zeropower_via_newtonschulz", in_fp32)
    torch.manual_seed(0)
    ours = Net()
    theirs = copy.deepcopy(ours)
    optimizer = create_optimizer(ours, Config.build(opt=opt, lr=0.02, weight_decay=0.1).optim)
    expected = create_optimizer_v2(theirs, opt, lr=0.02, weight_decay=0.1)
    assert isinstance(optimizer, BatchedMuon)
    assert optimizer.defaults == expected.defaults  # those of groups that are added later
    train(ours, optimizer)
    train(theirs, expected)
    for (name, parameter), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(parameter, other, atol=2e-5, rtol=1e-4, msg=name)
    state, expected_state = optimizer.state_dict(), expected.state_dict()
    assert state["param_groups"] == expected_state["param_groups"]
    assert {i: set(each) for i, each in state["state"].items()} == {
        i: set(each) for i, each in expected_state["state"].items()
    }
    assert all(parameter.grad is not None for name, parameter in ours.named_parameters() if "unused" not in name)


def test_matrices_of_a_shape_and_of_its_transpose_take_one_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    stacked: list[tuple[int, ...]] = []

    def record(updates: Tensor, *arguments: object, **options: object) -> Tensor:
        stacked.append(tuple(updates.shape))
        return timm_muon.zeropower_via_newtonschulz(updates, *arguments, **options)

    monkeypatch.setattr(muon, "zeropower_via_newtonschulz", record)
    net = Net()
    train(net, create_optimizer(net, Config.build(opt="muon", lr=0.02, weight_decay=0.0).optim), steps=1)
    assert sorted(stacked) == [(1, 8, 27), (2, 8, 24), (3, 8, 8)]


def test_updates_point_along_the_polar_factor_of_the_gradient_in_every_precision() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = nn.Parameter(torch.zeros(16, 32))
        weight.grad = 4e-7 * torch.randn(
            16, 32, generator=torch.Generator().manual_seed(0)
        )  # momentum makes it smaller
        options = Config.build(opt="muon", lr=1.0, weight_decay=0.0).optim
        create_optimizer(nn.ParameterList([weight]), options, dtype).step()
        update = -weight.detach() / (0.2 * 32**0.5)
        assert (torch.linalg.svdvals(update) - 1).abs().max() < 0.35  # the coefficients trade exactness for speed
        u, _, v = torch.linalg.svd(weight.grad, full_matrices=False)
        assert torch.cosine_similarity(update.flatten(), (u @ v).flatten(), dim=0) > 0.95, dtype
