"""Check how devices are chosen, and the warning about a driver that is too old."""

from __future__ import annotations

import pytest
import torch

from smallvit import InputError
from smallvit.utils import hardware

OLD = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by downloading "
    "and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx"
)
"""Message of torch 2.14."""


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    hardware.warn_of_old_driver.cache_clear()
    return monkeypatch


@pytest.mark.parametrize(
    ("message", "warned"), [(OLD, True), ("Found no NVIDIA driver on your system.", False), (None, False)]
)
def test_a_driver_that_is_too_old_is_one_warning(
    without_gpu: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], message: str | None, warned: bool
) -> None:
    def init() -> None:
        if message is not None:
            raise RuntimeError(message)

    without_gpu.setattr(torch.cuda, "init", init)
    for _ in range(2):
        assert hardware.pick_device("auto") == torch.device("cpu")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == warned
    assert all(line.startswith("smallvit: warning: the NVIDIA driver is too old for torch") for line in lines)
    hardware.warn_of_old_driver.cache_clear()


def test_builds_without_cuda_say_nothing(without_gpu: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    without_gpu.setattr(torch.version, "cuda", None)
    without_gpu.setattr(torch.cuda, "init", lambda: pytest.fail("not called"))
    hardware.pick_device("auto")
    assert capsys.readouterr().err == ""


def test_types_of_devices_are_known_without_using_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: pytest.fail("takes memory of the device"))
    assert [hardware.device_type(name) for name in ("cpu", "cuda", "cuda:3")] == ["cpu", "cuda", "cuda"]
    monkeypatch.undo()
    with pytest.raises(InputError, match="--device tpu9: this machine has cpu"):
        hardware.device_type("tpu9")


def test_gpus_are_listed_by_the_names_that_children_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert hardware.list_gpus("auto") == hardware.list_gpus("cuda") == ["0", "1"]
    assert hardware.list_gpus("cuda:1") == hardware.list_gpus("cpu") == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, GPU-8932f937,7")
    assert hardware.list_gpus("cuda") == ["5", "GPU-8932f937"]
