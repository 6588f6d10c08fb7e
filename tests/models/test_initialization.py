"""Test mimetic and impulse initialization by what the first attention maps and products are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import smallvit
from smallvit import Config, load_model
from smallvit.models.initialization import TAPS, impulse_qk, mimetic_qk
from smallvit.training.adapt import select_weights
from smallvit.training.setup import create_setup

Command = Callable[..., tuple[int, str, str]]


def split(attention: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Return projections (heads, dim, width) to queries, keys and values."""
    return attention.qkv.weight.unflatten(0, (3, attention.num_heads, -1)).transpose(2, 3).unbind(0)


def patch_positions(model: nn.Module) -> Tensor:
    return F.layer_norm(model.pos_embed[0, 1:], model.pos_embed.shape[-1:])


@pytest.mark.parametrize("pos_embed", ["learned", "sincos"])
@pytest.mark.parametrize("lsa", [False, True])
def test_impulse_heads_attend_to_one_neighbor_each(pos_embed: str, lsa: bool) -> None:
    torch.manual_seed(0)
    spec = "vit+lsa" if lsa else "vit"
    model = smallvit.create_model(spec, img_size=32, num_classes=5, pos_embed=pos_embed)
    smallvit.initialize(model, "impulse")
    positions, (rows, columns) = patch_positions(model), model.patch_embed.grid_size
    taps = TAPS[1:] if lsa else TAPS
    inner = [(i, j) for i in range(1, rows - 1) for j in range(1, columns - 1)]
    ranks = []
    for block in model.blocks:
        q, k, _ = split(block.attn)
        for head in range(block.attn.num_heads):
            scores = positions @ q[head] @ k[head].T @ positions.T
            down, right = taps[head % len(taps)] // 3 - 1, taps[head % len(taps)] % 3 - 1
            expected = torch.tensor([(i + down) * columns + j + right for i, j in inner])
            chosen = scores[[i * columns + j for i, j in inner]]
            ranks.append((chosen > chosen.gather(1, expected[:, None])).sum(dim=1).float().mean())
    assert torch.stack(ranks).mean() < 6  # of 64 tokens, with 16 of 64 dimensions left; by chance 31.5


def test_impulse_is_exact_where_nothing_is_truncated() -> None:
    torch.manual_seed(0)
    positions = torch.randn(16, 48)
    q, k = impulse_qk(positions, (4, 4), heads=9, width=48)
    normed = F.layer_norm(positions, (48,))
    for head, tap in enumerate(TAPS):
        scores = normed @ q[head] @ k[head].T @ normed.T
        for row in range(4):
            for column in range(4):
                i, j = row + tap // 3 - 1, column + tap % 3 - 1
                if 0 <= i < 4 and 0 <= j < 4:
                    assert scores[row * 4 + column].argmax() == i * 4 + j
    torch.testing.assert_close(q.flatten(1).norm(dim=1), torch.full((9,), 7.0))


def test_mimetic_products_are_near_multiples_of_the_identity() -> None:
    torch.manual_seed(0)
    q, k = mimetic_qk(64, heads=2, width=64)
    product = q[0] @ k[0].T
    assert product.diagonal().mean().item() == pytest.approx(0.7, abs=0.05)
    assert (product - 0.7 * torch.eye(64)).std().item() == pytest.approx(0.7 / 8, rel=0.1)
    model = smallvit.create_model("vit96", img_size=32, num_classes=5)
    smallvit.initialize(model, "mimetic")
    attention = model.blocks[0].attn
    values = attention.qkv.weight[192:].T @ attention.proj.weight.T  # x Wvᵀ Wprojᵀ
    assert values.diagonal().mean().item() == pytest.approx(-0.4, abs=0.05)
    assert (values + 0.4 * torch.eye(96)).std().item() == pytest.approx(0.4 / 96**0.5, rel=0.1)


def test_lsa_keeps_its_queries_and_keys_in_mimetic_initialization() -> None:
    torch.manual_seed(0)
    model = smallvit.create_model("vit96+lsa", img_size=32, num_classes=5)
    before = model.blocks[0].attn.qkv.weight.detach().clone()
    smallvit.initialize(model, "mimetic")
    after = model.blocks[0].attn.qkv.weight
    assert torch.equal(after[:192], before[:192])
    assert not torch.equal(after[192:], before[192:])


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["vit", "deit_tiny_patch16_224", "cait", "pit", "cait+lsa", "pit+spt+lsa"])
@pytest.mark.parametrize("weight_init", ["mimetic", "impulse"])
def test_models_compute_finite_outputs(arch: str, weight_init: str) -> None:
    torch.manual_seed(0)
    model = smallvit.create_model(arch, img_size=32, num_classes=5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    smallvit.initialize(model, weight_init)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert all("attn" in name or name == "pos_embed" for name in changed)
    assert any("attn.proj.weight" in name for name in changed)
    assert model(torch.randn(2, 3, 32, 32)).isfinite().all()


def test_models_without_position_embeddings_are_refused(smallvit: Command) -> None:
    code, _, err = smallvit("train", "--arch", "swin", "--img-size", 32, "--weight-init", "impulse")
    assert (code, err.count("\n")) == (2, 1)
    assert "--weight-init impulse: " in err
    code, _, err = smallvit("train", "--arch", "vit", "--weight-init", "mimetic", "--init", "missing")
    assert code == 2
    assert "contradicts --init" in err


def test_selected_weights_are_evenly_spaced() -> None:
    large = {
        "w": torch.arange(48.0).view(8, 6),
        "b": torch.arange(5.0),
        "other": torch.zeros(2),
        "small": torch.ones(1),
    }
    selected = select_weights(large, {"w": (4, 3), "b": (3,), "new": (2,), "small": (4,)})
    assert selected.keys() == {"w", "b"}
    assert selected["w"].tolist() == [[12.0 * i + 2 * j for j in range(3)] for i in range(4)]
    assert selected["b"].tolist() == [0.0, 2.0, 4.0]


def test_a_model_of_the_same_size_starts_from_all_weights(smallvit: Command, trained_run: Path, tmp_path: Path) -> None:
    config = Config.build(
        init=str(trained_run), shrink=True, arch="vit96", spt=True, lsa=True, img_size=8, patch_size=2
    )
    model = create_setup(config).model
    source = load_model(trained_run)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, source.state_dict()[name])
    code, _, err = smallvit("train", "--shrink", "--out", tmp_path / "run")
    assert code == 2
    assert "--shrink needs --init" in err
