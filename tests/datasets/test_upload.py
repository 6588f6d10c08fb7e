"""Test that a structure's arrays arrive on the device unchanged, in one copy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from smallvit.datasets.upload import upload


@dataclass(frozen=True)
class Leaf:
    array: np.ndarray
    name: str


def tree() -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    numbers = rng.integers(-(2**62), 2**62, (3, 5))
    return (
        Leaf(rng.random(3) < 0.5, "flags"),
        {"empty": np.zeros((0, 2, 3), dtype=np.float32), "turned": numbers.T},
        (rng.random((2, 3)), numbers[1:].astype(np.int32), rng.random(7).astype(np.float32)),
        torch.ones(2),
        5,
    )


def test_arrays_keep_their_values_shapes_and_types() -> None:
    (flags, named, numbers, *others), (leaf, names, arrays, *given) = upload(tree(), torch.device("cpu")), tree()
    assert flags.name == "flags"
    assert named.keys() == names.keys()
    for ours, array in zip(
        (flags.array, *named.values(), *numbers), (leaf.array, *names.values(), *arrays), strict=True
    ):
        assert ours.dtype == torch.from_numpy(array).dtype
        np.testing.assert_array_equal(ours.numpy(), array)
    assert torch.equal(others[0], given[0])
    assert others[1] == given[1]


class Copies(TorchDispatchMode):
    """Count copies to other devices."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default:
            self.count += args[0].device != result.device
        return result


def test_all_arrays_travel_in_one_copy() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), Copies() as copies:
        moved = upload(tree(), torch.device("cuda", 0))
    assert copies.count == 1
    assert moved[0].array.device.type == moved[2][1].device.type == "cuda"
    assert moved[1]["turned"].shape == (5, 3)
