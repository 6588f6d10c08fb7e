"""Choose device, precision and compilation, scale losses, and describe the hardware."""

from __future__ import annotations

import logging
import math
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import psutil
import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import smallvit
from smallvit.utils.cores import free_group_memory, local_processes
from smallvit.utils.errors import DivergedError, InputError, TrainingError, first_line, warn
from smallvit.utils.sizes import ImageSize, height_width

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}
"""Dtypes of autocast, by their names in --amp."""


def pick_device(name: str) -> torch.device:
    """Return the device that --device names.

    Raises:
        InputError: No such device on this machine.
    """
    if name == "auto":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one line says more
            available = torch.accelerator.is_available()
        if available:
            return torch.accelerator.current_accelerator()
        warn_of_old_driver()
        return torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except Exception:  # each backend has its own
        have = ["cpu", *[f"cuda:{i}" for i in range(torch.cuda.device_count())]]
        raise InputError(f"--device {name}: this machine has {', '.join(have)}") from None
    return device


@cache
def warn_of_old_driver() -> None:
    """Warn if the machine has an NVIDIA GPU whose driver is too old for this build of torch."""
    if torch.version.cuda is None:
        return
    try:
        torch.cuda.init()
    except Exception as error:  # also without a GPU
        if "driver" in str(error) and "too old" in str(error):
            warn(
                f"the NVIDIA driver is too old for torch {torch.__version__}, so the CPU is used: update the driver, "
                "or install a torch for an older CUDA (https://pytorch.org/get-started)"
            )


def device_type(name: str) -> str:
    """Return the type of the device that --device names, such as cpu or cuda, without using it.

    Raises:
        InputError: No such type of device.
    """
    try:
        return (pick_device(name) if name == "auto" else torch.device(name)).type
    except RuntimeError:
        return pick_device(name).type


def list_gpus(name: str) -> list[str]:
    """Return the GPUs among which --device leaves the choice, as CUDA_VISIBLE_DEVICES names them, without using one."""
    if name not in ("auto", "cuda"):
        return []
    named = [each.strip() for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each.strip()]
    return (named or [str(index) for index in range(torch.cuda.device_count())])[: torch.cuda.device_count()]


def pick_dtype(device: torch.device, amp: str) -> torch.dtype:
    """Return the dtype of autocast that --amp names; for auto the best that the device supports natively.

    This is bfloat16 (on CPUs only if it is faster), else float16 on CUDA GPUs (before Ampere), else float32. Elsewhere,
    such as on Apple's GPUs, mixed precision has not been measured.

    Raises:
        InputError: bf16 on a GPU that emulates it, which is slower than fp32.
    """
    native = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if amp == "bf16" and not native:
        raise InputError("--amp bf16: this GPU has no bfloat16 and emulates it slowly; give --amp fp16 or off")
    if amp != "auto":
        return DTYPES[amp]
    if device.type == "cuda":
        return torch.bfloat16 if native else torch.float16
    if device.type == "cpu":
        return torch.bfloat16 if cpu_has_fast_bf16() else torch.float32
    return torch.float32


@cache
def cpu_has_fast_bf16() -> bool:
    """Return whether the CPU multiplies bfloat16 natively, and faster than float32 (timed in about 30 ms).

    Intel CPUs with AVX-512's bf16 instructions but without AMX are slower in bfloat16.
    """
    capabilities = torch.cpu.get_capabilities()
    if not (capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)):
        return False
    seconds = dict.fromkeys((torch.float32, torch.bfloat16), math.inf)
    for _ in range(6):  # by turns; the first is a warm-up
        for dtype in seconds:
            x, weight = torch.ones(512, 256, dtype=dtype), torch.ones(512, 256, dtype=dtype)
            start = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - start)
    return seconds[torch.bfloat16] < seconds[torch.float32]


def precision_name(device: torch.device, dtype: torch.dtype) -> str:
    """Return the name of the precision of matrix products: bf16, fp16, tf32 or fp32."""
    if dtype == torch.float32:
        return "tf32" if has_tf32(device) else "fp32"
    return amp_name(dtype)


def amp_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype in --amp."""
    return next(name for name, each in DTYPES.items() if each == dtype)


def allow_tf32(allowed: bool) -> None:
    """Allow or forbid TF32 in this process, in matrix products and in cuDNN's convolutions (--tf32)."""
    torch.backends.cudnn.allow_tf32 = allowed


def has_tf32(device: torch.device) -> bool:
    """Return whether float32 products are computed in TF32: on NVIDIA's GPUs since Ampere, unless it is forbidden."""
    if device.type != "cuda" or torch.version.cuda is None or not torch.backends.cudnn.allow_tf32:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


@contextmanager
def tf32(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Compute float32 matrix products in TF32 where the device has it; the setting is restored at the end."""
    before = torch.get_float32_matmul_precision()
    if dtype != torch.float32 or before != "highest" or not has_tf32(device):
        yield
        return
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def autocast(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Compute a forward pass in mixed precision, or in TF32 if `dtype` is float32 and the device has it."""
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32), tf32(device, dtype):
        yield


@contextmanager
def explain_out_of_memory(batch_size: int, img_size: ImageSize) -> Iterator[None]:
    """Turn out-of-memory errors into a one-line error that names remedies.

    Raises:
        TrainingError: A step needs more memory than there is.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(
            f"out of memory in steps of {batch_size} images of {img_size} pixels: try --grad-accum-steps 2 (or 4, 8: "
            "the same result), --grad-checkpointing, a smaller --batch-size, or --amp bf16"
        ) from None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a device's memory is exhausted."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


class PeakMemory:
    """Measure the most memory in use by training and by evaluation, which GPUs count apart.

    On a CPU the process has one peak, which is counted as training's.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._training = 0
        self.evaluation: int | None = None
        """Bytes in use by evaluation; None before the first one, and on CPUs."""

    @property
    def training(self) -> int:
        """Bytes in use by everything else so far."""
        return max(self._training, peak_memory_bytes(self.device))

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Count what is allocated within the context as evaluation's."""
        if self.device.type != "cuda":
            yield
            return
        self._training = self.training
        torch.cuda.reset_peak_memory_stats(self.device)
        try:
            yield
        finally:
            self.evaluation = max(self.evaluation or 0, peak_memory_bytes(self.device))
            torch.cuda.reset_peak_memory_stats(self.device)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory in use so far: a GPU's allocations, or on a CPU the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        memory = psutil.Process().memory_info()
        return getattr(memory, "peak_wset", memory.rss)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class AsyncScalar:
    """Read a number from the device one call late instead of waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self.event = torch.Event(device) if device.type == "cuda" else None
        self.number = torch.zeros((), pin_memory=self.event is not None)
        self.pending = False

    def exchange(self, value: Tensor) -> float | None:
        """Store a value for the next call; return the one stored before, if it has arrived."""
        if self.pending and self.event is not None and not self.event.query():
            return None
        before = self.number.item() if self.pending else None
        self.number.copy_(value, non_blocking=True)
        if self.event is not None:
            self.event.record()
        self.pending = True
        return before


def describe_hardware(device: torch.device) -> str:
    """Return the name of the GPU, or of the processor with its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with suppress(OSError):  # Linux only
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":")[1].strip() for line in lines if "model name" in line), name)
    return f"{name}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Return the versions of the packages that affect results."""
    return {
        "smallvit": smallvit.__version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
    }


def git_revision() -> str | None:
    """Return the commit of the checkout that this package runs from, with '-dirty' if changed; None without one."""
    package = Path(__file__).resolve().parent

    def git(*arguments: str) -> Any:
        return subprocess.run(
            ["git", "-C", str(package), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # installed copies are not in the repository
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


T = TypeVar("T")
MIN_FLOPS = {"cpu": 4e14, "gpu": 1e16}
"""Floating-point operations of a run from which compiling costs less time than it saves: on CPUs per thread, measured
(results/train_step.txt); on GPUs not yet."""
COMPILATION_NOTES = {
    "off": "",
    "on": ", compiled at the first step",
    "graphs": ", compiled to CUDA graphs at the first steps",
}
MODES = {"on": "default", "graphs": "reduce-overhead"}


def choose_compilation(
    mode: Literal["auto", "on", "graphs", "off"], device: torch.device, macs: int, views: int
) -> str:
    """Return on, graphs or off for a run.

    Args:
        macs: Multiply-accumulates of a forward pass.
        views: Images that the run sees.

    Raises:
        InputError: CUDA graphs without CUDA.
    """
    if mode == "graphs" and device.type != "cuda":
        raise InputError(f"--compile graphs: {device} has no CUDA graphs; give --compile on")
    if mode != "auto":
        return mode
    work = 6 * macs * views  # a multiply-accumulate is two operations, the backward pass twice the forward
    least = MIN_FLOPS["cpu"] * torch.get_num_threads() if device.type == "cpu" else MIN_FLOPS["gpu"]
    return "on" if work >= least else "off"


class Compilation:
    """Compile the models of a run, or run them uncompiled where compiling fails."""

    def __init__(self, how: str, *, required: bool) -> None:
        self.how = how
        """on, graphs or off."""
        self.required = required
        """Whether compiling was requested, and not chosen by auto."""
        self.pending = how != "off"
        """Whether the first step has not been taken yet."""

    def wrap(self, model: nn.Module) -> Callable[..., Any]:
        """Return a function that calls the model, compiled unless `how` is off."""
        if self.how == "off":
            return model
        fast = compiled(model, self.how)
        return lambda *inputs: (model if self.how == "off" else fast)(*inputs)

    def first_step(self, step: Callable[[], T], model: nn.Module, interrupted: Callable[[], object]) -> tuple[T, str]:
        """Take the first step; if it fails, take it again uncompiled. Return its result and the reason for the failure.

        The reason is empty without a failure. A step that fails uncompiled too raises its own error.

        Raises:
            InputError: compiling was requested and fails.
        """
        buffers = [buffer.clone() for buffer in model.buffers()]
        reason = ""
        try:
            result = step()
        except (torch.OutOfMemoryError, dist.DistError):
            raise
        except Exception as error:  # the compilers raise errors of many classes
            if interrupted():  # a terminal's Ctrl-C ends the compilers, too
                raise
            how, self.how, reason = self.how, "off", _reason(error)
            with torch.no_grad():
                for buffer, before in zip(model.buffers(), buffers, strict=True):
                    buffer.copy_(before)
        if reason:  # outside of the handler, which keeps the failed step's memory
            result = step()
            if self.required:
                raise InputError(f"--compile {how}: this model cannot be compiled here ({reason}); give --compile off")
        self.pending = False
        return result, reason


def _reason(error: BaseException) -> str:
    """Return the innermost cause of a compilation error in one line."""
    while (cause := getattr(error, "inner_exception", None) or error.__cause__) is not None:
        error = cause
    return f"{type(error).__name__}: {first_line(error)}"


def compiled(model: nn.Module, how: str) -> nn.Module:
    """Return the model, compiled in one of `MODES` unless `how` is off."""
    for noisy in ("torch.utils.cpp_extension", "torch._logging._internal"):  # they warn without CUDA or a profile
        logging.getLogger(noisy).setLevel(logging.ERROR)
    return model if how == "off" else torch.compile(model, mode=MODES[how], dynamic=False)  # one or two shapes


def is_convolutional(model: nn.Module) -> bool:
    """Return whether most weights belong to 2D convolutions, which are faster in channels_last format."""
    convolutions = (layer for layer in model.modules() if isinstance(layer, nn.Conv2d))
    inside = sum(parameter.numel() for layer in convolutions for parameter in layer.parameters(recurse=False))
    return 2 * inside > sum(parameter.numel() for parameter in model.parameters())


def tune_convolutions(model: nn.Module, device: torch.device) -> None:
    """Let cuDNN time its algorithms for each shape of a convolutional network, and use the fastest; not for others."""
    torch.backends.cudnn.benchmark = device.type == "cuda" and is_convolutional(model)


TOLERANCE = 0.1
"""Largest error of a correct convolution, relative to its largest value; rounding gives 0.004."""
LEAST_SCALE = 2.0**-14
"""Scale of the loss below which training stops: thirty steps in a row were skipped."""


class LossScaler(torch.amp.GradScaler):
    """Scale the loss of fp16 training, so that small gradients do not vanish; in other precisions, do nothing.

    A step whose gradients are not finite is skipped and counted, and the scale is halved. After 2000 steps without one
    it is doubled.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(device.type, enabled=dtype == torch.float16)
        self.last_scale = self.get_scale()
        self.skipped = 0
        """Steps skipped so far."""

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Update the weights unless a gradient is not finite, and the scale. Return whether weights were updated.

        Raises:
            DivergedError: gradients are not finite at any scale.
        """
        super().step(optimizer)
        self.update()
        before, self.last_scale = self.last_scale, self.get_scale()
        if self.last_scale >= before:
            return True
        self.skipped += 1
        if self.last_scale < LEAST_SCALE:
            raise DivergedError(
                "the gradients overflow fp16 at every scale of the loss: try --amp off, a lower --lr, or --clip-grad 1"
            )
        return False

    def state_dict(self) -> dict[str, float]:
        """Return the state of the scaler as numbers; empty if the loss is not scaled."""
        return super().state_dict() | {"skipped": self.skipped} if self.is_enabled() else {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore what `state_dict` returned; do nothing if that is empty."""
        if self.is_enabled() and state:
            super().load_state_dict(state)
            self.last_scale, self.skipped = self.get_scale(), state["skipped"]


def choose_dtype(device: torch.device, amp: str, model: nn.Module, in_chans: int, img_size: ImageSize) -> torch.dtype:
    """Return the precision to compute in: on CPUs fp32 if half precision computes one of the convolutions incorrectly.

    Two faults of oneDNN are known (PyTorch 2.15). Parts of the weight gradient of a strided convolution over a map of
    one pixel are uninitialized memory (3 × 3, stride 2), as in CNNs whose images are smaller than their stride. And
    CPUs with AMX give wrong results for large kernels, such as 8 × 8 of 8 channels. So each of the model's convolutions
    is tested.

    Raises:
        InputError: --amp requests bf16 or fp16.
    """
    dtype = pick_dtype(device, amp)
    if device.type != "cpu" or dtype == torch.float32:
        return dtype
    training = model.training
    with torch.no_grad(), _ConvolutionTest(dtype) as test:
        model.eval()(torch.zeros(1, in_chans, *height_width(img_size)))
    model.train(training)
    if not test.passed and amp != "auto":
        raise InputError(
            f"--amp {amp}: this CPU computes {type(model).__name__} incorrectly at {img_size} pixels; remove it"
        )
    return dtype if test.passed else torch.float32


class _ConvolutionTest(TorchDispatchMode):
    """Test whether all convolutions in its context are correct in half precision."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.passed = dtype, True

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.convolution.default:
            x, weight, _, *others = args
            options = tuple(tuple(each) if isinstance(each, list) else each for each in others)
            self.passed = self.passed and _is_correct(self.dtype, x.shape, weight.shape, options)
        return function(*args, **(kwargs or {}))


@cache
def _is_correct(dtype: torch.dtype, x_shape: torch.Size, weight_shape: torch.Size, options: tuple[Any, ...]) -> bool:
    """Return whether half precision gives the outputs and gradients of fp32; `options` starts with the stride."""
    if x_shape[2:].numel() == 1 and max(options[0]) > 1 and max(weight_shape[2:]) > 1:
        return False  # uninitialized memory may be right by chance
    noise = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=noise).to(dtype) for shape in (x_shape, weight_shape))
    x /= 16  # exact; sums over large maps stay within fp16
    low, exact = (_convolve(x.to(kind), weight.to(kind), options) for kind in (dtype, torch.float32))
    return all((a - b).abs().max() < TOLERANCE * b.abs().max() for a, b in zip(low, exact, strict=True))


def _convolve(x: Tensor, weight: Tensor, options: tuple[Any, ...]) -> list[Tensor]:
    """Return a convolution and the gradients of half the sum of its squares, in fp32."""
    y = torch.ops.aten.convolution(x, weight, None, *options)
    dx, dw, _ = torch.ops.aten.convolution_backward(y, x, weight, None, *options, [True, True, False])
    return [each.float() for each in (y, dx, dw)]


COPIES = 2.5
"""Peak memory of loading and splitting images, in multiples of their size (2.3 measured)."""


def free_memory() -> int:
    """Return the free memory of the machine or container, in bytes."""
    free = int(min(psutil.virtual_memory().available, free_group_memory()))
    return free // local_processes()  # each of torchrun's processes holds all images


def require_memory(count: int, channels: int, size: ImageSize, remedy: str = "choose a smaller --img-size") -> None:
    """Check that `count` images fit into memory while they are loaded and split.

    Raises:
        InputError: They do not.
    """
    needed, available = COPIES * count * channels * math.prod(height_width(size)), free_memory()
    if needed > available:
        raise InputError(
            f"{count:,} images of {size} px need {needed / 2**30:.1f} GiB of memory, "
            f"{available / 2**30:.1f} GiB are free: {remedy}"
        )


def batch_size(device: torch.device) -> int:
    """Return the batch size of evaluation; on CPUs it follows from the cache size."""
    return 128 if device.type == "cpu" else 1024
