"""Define the residual networks for CIFAR of He et al. 2016, small CNNs to compare transformers with.

    x ← ReLU(S(x) + BN(W₂ ∗ ReLU(BN(W₁ ∗ x))))

in three stages of n blocks with 16, 32 and 64 channels; the second and third stage halve the resolution. A 3×3
convolution precedes them; global average pooling and a linear layer follow: 6n + 2 layers. At the start of a stage the
shortcut S takes every second pixel and pads the new channels with zeros (option A, no parameters); elsewhere it is x.
Source: "Deep Residual Learning for Image Recognition", arXiv:1512.03385, section 4.2.

Differences from the paper: optional stochastic depth; the linear layer has torch's initialization.

Axes: b batch, c d channels, h w input, i j output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import DropPath, calculate_drop_path_rates, create_classifier
from torch import Tensor, nn

from smallvit.plugins.base import Citation

WIDTHS = (16, 32, 64)
CITATION = Citation(
    "he2015deep",
    "Deep Residual Learning for Image Recognition",
    "He, Kaiming and Zhang, Xiangyu and Ren, Shaoqing and Sun, Jian",
    "1512.03385",
    2015,
)


class CIFARResNet(nn.Module):
    """A ResNet for CIFAR with the attributes and methods of timm's models; accepts images of any size.

    Args:
        depth: Number of layers with weights, 6n + 2.
        drop_path_rate: Stochastic depth of the last block; it grows from 0.
    """

    def __init__(
        self,
        depth: int,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.in_chans, self.num_classes = in_chans, num_classes
        self.num_features = self.head_hidden_size = WIDTHS[-1]
        n = depth // 6
        rates = calculate_drop_path_rates(drop_path_rate, 3 * n)
        self.conv1, self.bn1 = conv3x3(in_chans, WIDTHS[0]), nn.BatchNorm2d(WIDTHS[0])
        self.layer1 = make_stage(WIDTHS[0], WIDTHS[0], 1, rates[:n])
        self.layer2 = make_stage(WIDTHS[0], WIDTHS[1], 2, rates[n : 2 * n])
        self.layer3 = make_stage(WIDTHS[1], WIDTHS[2], 2, rates[2 * n :])
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=global_pool)
        self.init_weights()

    def init_weights(self) -> None:
        """Initialize convolutions from He's normal distribution by fan out."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns of the parameters' names from stem to head, by stage if `coarse`, else by block."""
        return {"stem": r"^conv1|^bn1", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one for `num_classes`, or remove it for 0.

        `global_pool` is avg, max, avgmax, catavgmax, or '' for feature maps without a head; None keeps it.
        """
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        pool, head = create_classifier(self.num_features, num_classes, pool_type=pool_type)
        weight = self.conv1.weight
        self.num_classes, self.global_pool = num_classes, pool.train(self.training)
        self.fc = head.to(weight.device, weight.dtype).train(self.training)

    def forward_features(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        """Return the last feature map, a quarter of the image's side."""
        return self.forward_intermediates(x)[0]

    def forward_intermediates(
        self, x: Float[Tensor, "b c h w"], indices: Sequence[int] | None = None, intermediates_only: bool = False
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the last feature map and those of all stages or some; only the latter with `intermediates_only`."""
        x = F.relu(self.bn1(self.conv1(x)))
        maps = [x := layers(x) for layers in (self.layer1, self.layer2, self.layer3)]
        maps = maps if indices is None else [maps[index] for index in indices]
        return maps if intermediates_only else (x, maps)

    def forward_head(self, x: Float[Tensor, "b d i j"], pre_logits: bool = False) -> Tensor:
        """Return the logits (b, num_classes) of a feature map, or the pooled features (b, d) with `pre_logits`."""
        x = self.global_pool(x)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes"]:
        return self.forward_head(self.forward_features(x))


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions with batch norm plus a shortcut; maps (b, c, h, w) to (b, d, ⌈h/stride⌉, ⌈w/stride⌉)."""

    def __init__(self, in_chans: int, out_chans: int, stride: int, drop_path: float) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(in_chans, out_chans, stride), nn.BatchNorm2d(out_chans)
        self.conv2, self.bn2 = conv3x3(out_chans, out_chans), nn.BatchNorm2d(out_chans)
        same = in_chans == out_chans and stride == 1
        self.shortcut = nn.Identity() if same else ZeroPaddedShortcut(in_chans, out_chans, stride)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(self.shortcut(x) + self.drop_path(y))


class ZeroPaddedShortcut(nn.Module):
    """Subsample pixels and pad channels with zeros; maps (b, c, h, w) to (b, d, ⌈h/stride⌉, ⌈w/stride⌉)."""

    def __init__(self, in_chans: int, out_chans: int, stride: int) -> None:
        super().__init__()
        self.new_chans, self.stride = out_chans - in_chans, stride

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_chans))


def make_stage(in_chans: int, out_chans: int, stride: int, drop_path_rates: list[float]) -> nn.Sequential:
    """Build a stage with one block per stochastic depth rate; the first block has the stride."""
    first, *rest = drop_path_rates
    blocks = [ResidualBlock(out_chans, out_chans, 1, rate) for rate in rest]
    return nn.Sequential(ResidualBlock(in_chans, out_chans, stride, first), *blocks)


def conv3x3(in_chans: int, out_chans: int, stride: int = 1) -> nn.Conv2d:
    """Build a 3×3 convolution without bias."""
    return nn.Conv2d(in_chans, out_chans, 3, stride, padding=1, bias=False)
