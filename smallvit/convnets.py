"""The residual networks for CIFAR: the small CNNs that transformers are measured against.

    x ← ReLU(S(x) + BN(W₂ ∗ ReLU(BN(W₁ ∗ x))))

in three stages of n blocks, 16, 32 and 64 channels wide, each stage but the first at half the resolution of the one
before. A 3×3 convolution stands before them, the mean over all pixels and a linear layer behind: 6n + 2 layers. Where
a stage begins, the shortcut S takes every second pixel and gives the new channels zeros (option A: no parameters);
elsewhere it is x. Source: He et al. 2016, "Deep Residual Learning for Image Recognition", arXiv:1512.03385,
section 4.2.

Differs from the paper: stochastic depth, if wanted, and the linear layer begins as torch's do.

Axes: b batch, c d channels, h w image, i j its map after a layer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import DropPath, create_classifier
from timm.models import checkpoint_seq
from torch import Tensor, nn

CIFAR_RESNETS = {f"resnet{depth}": depth for depth in (20, 32, 44, 56, 110)}
"""Their names and depths; timm has none of these names."""
WIDTHS = (16, 32, 64)


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)


class ZeroPaddedShortcut(nn.Module):
    """Every `stride`-th pixel of (b, c, h, w), with zeros in the new channels: (b, d, ⌈h/stride⌉, ⌈w/stride⌉)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels, self.stride = out_channels - in_channels, stride

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions with batch norm beside a shortcut: (b, c, h, w) to (b, d, ⌈h/stride⌉, ⌈w/stride⌉)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, drop_path: float) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels)
        self.conv2, self.bn2 = conv3x3(out_channels, out_channels), nn.BatchNorm2d(out_channels)
        same = in_channels == out_channels and stride == 1
        self.shortcut = nn.Identity() if same else ZeroPaddedShortcut(in_channels, out_channels, stride)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(self.shortcut(x) + self.drop_path(y))


class CIFARResNet(nn.Module):
    """A ResNet for CIFAR with the attributes and methods of timm's models; takes images of any size.

    `depth` counts the layers with weights, 6n + 2. `drop_path_rate` is the last block's, the first has 0.

    Raises:
        ValueError: there is no n for `depth`.
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
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth {depth}: expected 6n + 2, such as 20 or 56")
        self.in_chans, self.num_classes, self.grad_checkpointing = in_chans, num_classes, False
        self.num_features = self.head_hidden_size = WIDTHS[-1]
        count = depth // 6
        rates = torch.linspace(0, drop_path_rate, 3 * count, device="cpu").tolist()
        self.conv1, self.bn1 = conv3x3(in_chans, WIDTHS[0]), nn.BatchNorm2d(WIDTHS[0])
        self.layer1 = stage(WIDTHS[0], WIDTHS[0], 1, rates[:count])
        self.layer2 = stage(WIDTHS[0], WIDTHS[1], 2, rates[count : 2 * count])
        self.layer3 = stage(WIDTHS[1], WIDTHS[2], 2, rates[2 * count :])
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=global_pool)
        self.init_weights()

    def init_weights(self) -> None:
        """Convolutions from He's normal distribution, by the values that a weight gives to."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that no weight decay should act on: none beside norms and biases."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of the parameters' names, from the stem to the head; blocks, or with `coarse` stages."""
        return {"stem": r"^conv1|^bn1", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether activations are computed again in the backward pass instead of kept."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh last layer for `num_classes`; 0 for none. `global_pool` is avg, max, avgmax, catavgmax, or '' (a map)
        without a last layer."""
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        pool, head = create_classifier(self.num_features, num_classes, pool_type=pool_type)
        like = self.conv1.weight
        self.num_classes, self.global_pool = num_classes, pool.train(self.training)
        self.fc = head.to(like.device, like.dtype).train(self.training)

    def forward_features(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        """The map behind the last stage, a quarter of the image's side."""
        x = F.relu(self.bn1(self.conv1(x)))
        for layers in (self.layer1, self.layer2, self.layer3):
            x = checkpoint_seq(layers, x) if self.grad_checkpointing else layers(x)
        return x

    def forward_head(self, x: Float[Tensor, "b d i j"], pre_logits: bool = False) -> Tensor:
        """Logits (b, num_classes) of a map, or with `pre_logits` its pooled values (b, d)."""
        x = self.global_pool(x)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes"]:
        return self.forward_head(self.forward_features(x))


def stage(in_channels: int, out_channels: int, stride: int, drop_paths: list[float]) -> nn.Sequential:
    """Blocks of one width, one for each rate of stochastic depth; the first has the stride."""
    first, *rest = drop_paths
    blocks = [ResidualBlock(out_channels, out_channels, 1, rate) for rate in rest]
    return nn.Sequential(ResidualBlock(in_channels, out_channels, stride, first), *blocks)
