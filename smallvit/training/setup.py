"""Create data, model and optimizer of a run from its configuration."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import timm
import torch
from jaxtyping import Float
from rich.console import Console
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from smallvit import datasets
from smallvit.config.config import Config
from smallvit.config.options import OptimConfig, RunConfig
from smallvit.datasets.augment import Augment
from smallvit.datasets.loader import TrainLoader, create_train_loader, evaluation_batches, rank_slice
from smallvit.datasets.views import ViewMaker
from smallvit.evaluation.evaluate import BatchParts, evaluate_models
from smallvit.evaluation.features import evaluate_features
from smallvit.evaluation.multilabel import DEFAULT_THRESHOLD, evaluate_multilabel
from smallvit.models import factory
from smallvit.plugins.patch import describe
from smallvit.training import optim
from smallvit.training.launch import apply_regularization, resolve
from smallvit.training.limits import COMPILE_SECONDS, SCHEDULE_STEPS, TimeBudget
from smallvit.training.losses import LOSSES, Objective, create_objective
from smallvit.training.optim import InitialWeights
from smallvit.training.token_saving import TokenSaving
from smallvit.utils import distributed, hardware
from smallvit.utils.distributed import World
from smallvit.utils.errors import InputError, flag
from smallvit.utils.hardware import LossScaler, batch_size, choose_dtype
from smallvit.utils.sizes import height_width
from smallvit.utils.terminal import print_indented

if TYPE_CHECKING:
    from smallvit.datasets.dataset import ImageDataset
    from smallvit.profiling.flops import OperationCounts
    from smallvit.training.teacher import GuidedModel, Teacher


FEW_IMAGES = 100
"""Number of validation images below which their accuracy is reported as uncertain."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Data, model, optimizer and everything else that a run trains with."""

    config: Config
    device: torch.device
    dtype: torch.dtype
    """Dtype of matrix products: bfloat16 or float16 in mixed precision."""
    dataset: ImageDataset
    batches: TrainLoader
    spec: dict[str, Any]
    """Arguments of `create_model` that the model was created with."""
    model: nn.Module
    trained: nn.Module
    """What is trained: the model, within the layers that only its training needs (--distill features)."""
    replicated: nn.Module
    """`trained`, with gradients averaged over torchrun's processes."""
    forward: Callable[..., Any]
    """`replicated`, which training calls, compiled if that saves time."""
    compilation: hardware.Compilation
    operations: OperationCounts
    """Operations of one image's forward pass."""
    parameters: int
    frozen_norms: tuple[nn.Module, ...]
    """Frozen batch norms, whose statistics do not change."""
    initial: InitialWeights
    """The weights that the run started from."""
    optimizer: torch.optim.Optimizer
    scaler: LossScaler
    schedule: Scheduler
    average: ModelEmaV3 | None
    """Exponential moving average of the weights."""
    saving: TokenSaving
    """Tokens that training omits at first."""
    teacher: Teacher | None
    """The model to distill from."""
    objective: Objective
    """The loss of labels, and of the teacher's outputs if there is a teacher; or that of views without labels."""
    budget: TimeBudget | None
    """Progress of a run that is limited by --max-time."""
    world: World
    """This process among those of torchrun."""
    parts: BatchParts
    """Parts of evaluation batches that fit into memory."""
    peaks: hardware.PeakMemory
    """The most memory in use by training and by evaluation."""

    @property
    def seen_views(self) -> int:
        """Number of views of an image that a step trains on."""
        return self.batches.augment.count if isinstance(self.batches.augment, ViewMaker) else 1

    def augmentation_epoch(self, epoch: int) -> int:
        """Return the epoch whose augmentations an epoch uses: itself, unless --teacher-views repeats earlier ones."""
        return epoch % (self.config.distill.teacher_views or epoch + 1)

    @property
    def steps(self) -> int:
        """Number of steps of the whole schedule: those of all epochs, or a nominal number with --max-time."""
        return self.config.optim.epochs * len(self.batches) if self.budget is None else SCHEDULE_STEPS

    @property
    def precision(self) -> str:
        """Precision of matrix products: bf16, fp16, tf32 or fp32."""
        return hardware.precision_name(self.device, self.dtype)

    def evaluation_batches(self, split: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Return batches of this process's share of val or test, without augmentation."""
        size = self.eval_batch_size
        return evaluation_batches(self.dataset, split, self.device, size, self.world.rank, self.world.size)

    @property
    def eval_batch_size(self) -> int:
        """Number of images of this process in an evaluation batch."""
        asked = self.config.compute.eval_batch_size
        return batch_size(self.device) if asked == "auto" else int(asked)

    @property
    def eval_model(self) -> nn.Module:
        """The model that is evaluated and saved: the moving average if there is one."""
        return self.model if self.average is None else self.average.module

    def evaluate(self, split: str, **options: Any) -> dict[str, Any] | None:
        """Evaluate `eval_model` as `evaluate_models` does; return None if the split has no images."""
        results = self.evaluate_models(split, [self.eval_model], **options)
        return results[0] if results else None

    def evaluate_models(
        self,
        split: str,
        models: Sequence[nn.Module],
        *,
        flip: bool = False,
        thresholds: Sequence[float] | None = None,
        wrap: Callable[[Iterable[Any]], Iterator[Any]] = iter,
    ) -> list[dict[str, Any]]:
        """Evaluate models in one pass over val or test; return no results if the split has no images.

        Args:
            flip: Average over each image and its mirror image.
            thresholds: Probability of each class from which it is predicted, with several labels an image; by default
                those that fit best.
            wrap: Function that the iterator of batches is passed through.
        """
        if not self.config.pretrain.labels:
            options = {"wrap": wrap, "batch_size": self.eval_batch_size, "parts": self.parts}
            with self.peaks.evaluating():
                return [
                    evaluate_features(model, self.dataset, split, self.device, self.dtype, **options)
                    for model in models
                ]
        if not len(getattr(self.dataset, split)):
            return []
        batches = wrap(self.evaluation_batches(split))
        sets, world = self.dataset.label_sets, self.world
        options = {"flip": flip, "parts": self.parts}
        with self.peaks.evaluating():
            if sets is not None:
                options |= {"thresholds": thresholds, "gather": world.gather}
                return evaluate_multilabel(models, batches, sets, self.device, self.dtype, **options)
            return evaluate_models(models, batches, self.device, self.dtype, total=world.total, **options)

    @property
    def accuracies(self) -> tuple[str, ...]:
        """Metrics in percent of every evaluation, the main one first."""
        if not self.config.pretrain.labels:
            return ("knn_top1",)
        several = self.dataset.label_sets is not None
        return ("map", "macro_f1", "micro_f1") if several else ("top1", "macro_f1", "balanced_accuracy")

    def metadata(self, epoch: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Return the metadata of a weights file with the metrics of its epoch."""
        data = {name: getattr(self.dataset, name) for name in ("name", "class_names", "mean", "std")}
        data["resize"] = self.config.data.resize
        if not self.config.pretrain.labels:
            data["class_names"] = ()
        data["gray_ranges"] = self.dataset.gray_ranges.to_json()
        data["training_data"] = self.dataset.describe_training_data(self.config.data)
        if self.dataset.label_sets is not None:
            default = [DEFAULT_THRESHOLD] * len(self.dataset.class_names)
            data |= {"multi_label": True, "thresholds": metrics["thresholds"] or default}
        name = f"val_{self.accuracies[0]}"
        return {"model": self.spec, "data": data, "epoch": epoch, name: metrics[name]}

    def print_overview(self, console: Console) -> None:
        """Print data, model, initial weights, teacher and device, in a few lines."""
        data, show = self.dataset, partial(print_indented, console)
        sizes = ", ".join(f"{len(getattr(data, split)):,} {split}" for split in ("train", "val", "test"))
        labels = f"{len(data.class_names)} classes, " if len(data.class_names) > 1 else ""
        show(f"data   {data.name}: {labels}{sizes}")
        for note in (*data.notes, *self.warnings()):
            show(f"       {note}")
        arch, patch_size, fit = (self.spec[name] for name in ("arch", "patch_size", "fit"))
        show(f"model  {factory.describe_choice(arch, data.img_size, patch_size, fit=fit)}")
        show(f"       {describe(self.model)}".replace("\n", "\n       "))
        for note in self.initial.notes:
            show(f"init   {note}")
        if isinstance(views := self.batches.augment, ViewMaker):
            show(f"views  {views.describe()}")
        if data.label_sets is not None:
            smoothing = self.config.optim.label_smoothing
            show(f"loss   {self.config.optim.loss}" + (f", label smoothing {smoothing:g}" if smoothing else ""))
        if self.teacher is not None:
            show(f"teacher {self.teacher.describe()}")
        how = hardware.COMPILATION_NOTES[self.config.compute.compile]
        many = f"{self.world.size} processes, each with " if self.world.size > 1 else ""
        show(f"device {many}{self.device}: {hardware.describe_hardware(self.device)}, {self.precision}{how}")

    def warnings(self) -> Iterator[str]:
        """Yield what a user may not expect of the sizes of images, batches and splits, a line each."""
        data, batch = self.dataset, int(self.config.optim.batch_size)
        size = re.search(r"_(\d{3})$", self.spec["arch"])
        pixels = math.prod(height_width(data.img_size))
        if size and int(size[1]) ** 2 > pixels:
            cost = int(size[1]) ** 2 / pixels
            yield (
                f"{self.spec['arch']} is made for {size[1]} pixels and trains at {data.img_size}; "
                f"--img-size {size[1]} takes about {cost:.0f} times as long"
            )
        if data.in_chans not in (1, 3) and self.batches.augment.policies:
            yield f"images have {data.in_chans} channels: changes of saturation and conversions to gray are left out"
        if self.config.init.init is None and timm.models.is_model_pretrained(arch := self.spec["arch"]):
            yield f"timm has pretrained weights for {arch}: --init {arch} --recipe finetune starts from them"
        if len(data.train) < batch:
            yield f"a step has all {len(data.train)} training images, since --batch-size is {batch}"
        if not (data.train.on_disk or data.test.on_disk):
            known = set(data.train.hashes())
            if count := sum(each in known for each in data.test.hashes()):
                yield (
                    f"{count:,} of {len(data.test):,} test images are also in train, pixel by pixel, which raises the "
                    "accuracy; smallvit check lists duplicates"
                )
        if not self.config.pretrain.labels and (len(data.class_names) < 2 or not len(data.val)):
            several = "; it is that of the first --data" if self.config.pretrain.more_data else ""
            yield f"no accuracy of neighbors is shown, since {data.name} has no labeled validation images{several}"
        if data.label_sets is None and self.config.pretrain.labels and 0 < (count := len(data.val)) < FEW_IMAGES:
            points = 100 * 1.96 * math.sqrt(0.25 / count)
            yield (
                f"{count} validation images measure an accuracy to within {points:.0f} points: the best epoch is "
                "partly chance"
            )


def weigh_loss(
    function: Callable[..., Tensor], logits: Float[Tensor, "b k"], targets: Float[Tensor, "b k"], **options: Any
) -> Float[Tensor, ""]:
    """Return the mean over the batch of each image's loss times its weight, which is the sum of its targets.

    Args:
        function: A loss that is the mean over a batch.
        options: The loss's options.
    """
    weights = targets.sum(dim=1)
    shares = targets / weights.clamp(min=torch.finfo(targets.dtype).tiny)[:, None]
    losses = torch.vmap(lambda x, y: function(x[None], y[None], **options))(logits, shares)
    return (weights * losses).mean()


def create_setup(
    config: Config,
    world: World = World(),  # noqa: B008, it is frozen
    *,
    saved: Mapping[str, Any] | None = None,
) -> Setup:
    """Create data, model and optimizer of a run. The model starts from the run's seed or from trained weights.

    Args:
        saved: Progress of a run that is resumed (`weights_info.read_progress`); --init is not read then.

    Raises:
        InputError: The configuration names something that does not exist or does not fit, or images or teacher are
            not those of the resumed run.
    """
    from smallvit.plugins.sdpa import set_fused_attention
    from smallvit.profiling.flops import count_macs_by_layer, count_operations, count_parameters

    config = resolve(config) if config.model.arch is None else apply_regularization(config)  # for a direct call
    device = world.device(hardware.pick_device(config.compute.device))
    hardware.allow_tf32(config.compute.tf32)
    required = config.compute.compile != "auto"

    patient = world.create_patient_group()
    if not world.main:  # the main process downloads, lists, decodes, checks and decides first
        config = config.replace(**world.send({}, patient))
    dataset = _create_dataset(config, world, patient, saved)
    streaming = "on" if dataset.train.on_disk else "off"
    config = _adapt_to_labels(config, dataset)
    model, spec, initial = _create_initial_model(config, dataset, saved)
    counted = count_operations(model, count_macs_by_layer(model, dataset.in_chans, dataset.img_size))
    parameters = count_parameters(model)

    part = {"balanced": config.data.balanced, "rank": world.rank, "world": world.size}
    augment = _augmentation(config, dataset, model)
    batches = create_train_loader(dataset, int(config.optim.batch_size), augment, config.run.seed, device, **part)
    _require_images(config, batches, model, world)
    dtype = choose_dtype(device, config.compute.amp, model, dataset.in_chans, dataset.img_size)
    budget = _create_budget(config, dataset, len(batches))
    work = config.optim.epochs * batches.sampling.views // world.size
    if budget is not None:  # the number of epochs is not known yet
        work = 10**15 if budget.limit >= COMPILE_SECONDS else 0
    how = hardware.choose_compilation(config.compute.compile, device, counted.macs, work)
    compilation = hardware.Compilation(how, required=required)
    teacher = None
    if config.distill.teacher is not None:
        from smallvit.training.teacher import create_teacher

        teacher = create_teacher(config, dataset, device, compilation, batches.sampling.views // world.size)
    _require_same("--teacher", config.distill.teacher, saved, "teacher", teacher and teacher.fingerprint)
    objective = _create_objective(config, dataset, batches, device)
    _require_same("--class-weights", config.optim.class_weights, saved, "class weights", objective.class_weights)
    optim.freeze(model, config.init.frozen, initial.new)
    if world.main:
        world.send({"streaming": streaming, "compile": how, "amp": hardware.amp_name(dtype)}, patient)
        world.wait(patient)

    if getattr(model, "head_dist", None) is not None:
        model.set_distilled_training(config.distill.distill == "token")
    set_fused_attention(model, device.type, dtype)
    saving = TokenSaving(model, config, spec)
    model, average = _move_model(model, config, device, dtype, world)
    trained = model if teacher is None or not teacher.channels else _guide(model, config, dataset, teacher)
    if not config.pretrain.labels:
        from smallvit.training.pretrain import create_pretraining

        trained, objective = create_pretraining(model, config, dataset, world)
    replicated = distributed.replicate(trained, world, device)

    optimizer = optim.create_optimizer(model, config.optim, dtype)
    if trained is not model:
        optimizer.add_param_group({"params": list(trained.projections.parameters())})
    return Setup(
        config=config.replace(data=dataset.source, streaming=streaming, compile=how),
        device=device,
        dtype=dtype,
        dataset=dataset,
        batches=batches,
        spec=spec,
        model=model,
        trained=trained,
        replicated=replicated,
        forward=compilation.wrap(replicated),
        compilation=compilation,
        operations=counted,
        optimizer=optimizer,
        scaler=LossScaler(device, dtype),
        schedule=optim.create_schedule(
            optimizer,
            config.optim,
            SCHEDULE_STEPS if budget else (config.optim.epochs - config.optim.sched_start_epoch) * len(batches),
        ),
        parameters=parameters,
        frozen_norms=optim.find_frozen_norms(model),
        initial=initial,
        average=average,
        saving=saving,
        teacher=teacher,
        objective=objective,
        budget=budget,
        world=world,
        parts=BatchParts(),
        peaks=hardware.PeakMemory(device),
    )


def _create_dataset(config: Config, world: World, patient: Any, saved: Mapping[str, Any] | None) -> ImageDataset:
    """Read the data, after the first process of this machine, whose storage may be its own.

    Args:
        patient: Process group that waits for downloads and preparation.
    """
    first = world.main or not world.local_rank
    if not first:
        world.wait(patient)
    factory.require_known(config.model.arch)  # before images are decoded
    if config.pretrain.labels:
        dataset = datasets.create_dataset(config.data, augment=config.augment)
    else:
        dataset = datasets.create_pool(config.data, config.pretrain.more_data)
    if first and not world.main:
        world.wait(patient)
    _require_same("--data", config.data.data, saved, "images", dataset.fingerprint)
    if config.run.patience is not None and not len(dataset.val):
        raise InputError(f"--patience {config.run.patience}: needs validation images, and --val-fraction is 0")
    return dataset


def _create_initial_model(
    config: Config, dataset: ImageDataset, saved: Mapping[str, Any] | None
) -> tuple[nn.Module, dict[str, Any], InitialWeights]:
    """Return the model at the start of the run, the arguments of `create_model`, and where its weights come from."""
    spec = _spec(config, dataset)
    torch.manual_seed(config.run.seed)
    model = factory.create_model(**spec)
    if saved is not None:
        return model, spec, InitialWeights(fingerprint=saved.get("init"), new=tuple(saved.get("new", ())))
    if (origin := config.init.init) is not None:
        from smallvit.training.adapt import load_initial_weights

        shrink = config.init.shrink
        return model, spec, load_initial_weights(model, spec, origin, dataset, config.data, shrink=shrink)
    _initialize(model, config.init.weight_init)
    return model, spec, InitialWeights()


def _create_objective(config: Config, dataset: ImageDataset, batches: TrainLoader, device: torch.device) -> Objective:
    """Return the loss of labels and of the teacher's outputs."""
    counts = torch.ones(len(dataset.class_names)) if config.data.balanced else dataset.class_counts
    frequencies = (counts / counts.sum()).to(device)
    objective = create_objective(
        config.optim, config.distill, dataset.class_names, frequencies, multi_label=dataset.label_sets is not None
    )
    if batches.weights is None:
        return objective
    loss = replace(objective.loss, function=partial(weigh_loss, objective.loss.function))
    return replace(objective, loss=loss)


def _augmentation(config: Config, dataset: ImageDataset, model: nn.Module) -> Augment | ViewMaker:
    """Return the augmentation of training images, or what makes their views for pretraining."""
    if config.pretrain.labels:
        return Augment.from_config(config.augment, dataset.img_size, dataset.flip, dataset.aug, dataset.policy)
    from smallvit.training.pretrain import local_size

    size = local_size(model, config, dataset.img_size)
    flip = 0.5 * dataset.flip if config.augment.flip is None else config.augment.flip
    return ViewMaker.from_config(config.pretrain, dataset.img_size, flip, size)


def _adapt_to_labels(config: Config, dataset: ImageDataset) -> Config:
    """Return the configuration with the default loss and metric of images with several labels, if the data has such.

    Raises:
        InputError: An option cannot be used with several labels an image, or needs them.
    """
    if not config.pretrain.labels:
        from smallvit.training.pretrain import refuse_labels

        return refuse_labels(config)
    metric, name = config.run.select_by, config.optim.loss
    several = dataset.label_sets is not None
    if metric in (("balanced_accuracy",) if several else ("map", "micro_f1")):
        others = "map, macro_f1, micro_f1" if several else "top1, macro_f1, balanced_accuracy"
        images = "several labels an image" if several else "one label an image"
        raise InputError(f"--select-by {metric}: not for {images}; use {others} or loss")
    if not several:
        return config
    losses = [each for each, loss in LOSSES.items() if loss.multi_label]
    used = {
        "balanced": config.data.balanced,
        "class_weights": config.optim.class_weights,
        "logit_adjustment": config.optim.logit_adjustment,
        "teacher": config.distill.teacher,
    }
    if chosen := [each for each, value in used.items() if value]:
        raise InputError(f"{flag(chosen[0])} cannot be combined with several labels an image; remove it")
    if dataset.train.weights is not None:
        raise InputError(
            f"--data {config.data.data}: weights cannot be combined with several labels; remove the column"
        )
    if metric == RunConfig.select_by:
        config = config.replace(select_by="map")
    if name == OptimConfig.loss:
        return config.replace(loss=losses[0])
    if name not in losses:
        raise InputError(f"--loss {name} cannot be combined with several labels an image; use {' or '.join(losses)}")
    return config


def _create_budget(config: Config, dataset: ImageDataset, epoch_steps: int) -> TimeBudget | None:
    """Return the progress of a run with --max-time; a moving average is evaluated next to its weights."""
    if (seconds := config.optim.max_seconds) is None:
        return None
    val, test = len(dataset.val) * (1 + (config.optim.ema_decay is not None)), len(dataset.test)
    interval = config.optim.val_interval
    return TimeBudget(seconds, epoch_steps, val, test * (1 + config.augment.test_flip), interval)


def _initialize(model: nn.Module, weight_init: str) -> None:
    """Initialize the attention of a new model, if --weight-init asks for it."""
    if weight_init == "default":
        return
    from smallvit.models.initialization import initialize

    try:
        initialize(model, weight_init)
    except TypeError as error:
        raise InputError(f"--weight-init {weight_init}: {error}") from None


def _require_same(
    option: str, given: str | None, saved: Mapping[str, Any] | None, what: str, fingerprint: object
) -> None:
    """Check that images, teacher or class weights have the contents that a resumed run was started with."""
    if saved is not None and saved.get(what.replace(" ", "_")) != fingerprint:
        raise InputError(
            f"{option} {given}: not the {what} that the run was started with: their contents differ; give the path of "
            "the original"
        )


def _move_model(
    model: nn.Module, config: Config, device: torch.device, dtype: torch.dtype, world: World
) -> tuple[nn.Module, ModelEmaV3 | None]:
    """Move the model to its device or shard it; return it and its moving average."""
    compute = config.compute
    if not compute.fsdp:
        model.to(device)
        if hardware.is_convolutional(model):
            model.to(memory_format=torch.channels_last)
    hardware.tune_convolutions(model, device)
    if compute.grad_checkpointing:
        factory.enable_grad_checkpointing(model, config.model.arch)
    if compute.sync_bn or (compute.processes != "1" and world.size > 1):
        model = distributed.convert_sync_bn(model, world, device)
    average = optim.create_average(model, config.optim)
    if compute.fsdp:
        for each in [model] if average is None else [model, average.module]:
            distributed.shard(each, world, device, dtype)
    return model, average


def _guide(model: nn.Module, config: Config, dataset: ImageDataset, teacher: Teacher) -> GuidedModel:
    """Return the model within the layers that compare its feature maps with the teacher's."""
    from smallvit.training.teacher import GuidedModel

    if config.compute.fsdp:
        raise InputError("--fsdp cannot be combined with --distill features; remove one")
    guided = GuidedModel(model, dataset.img_size, dataset.in_chans, config.model.arch, teacher.channels)
    return guided.to(next(model.parameters()).device)


def _spec(config: Config, dataset: ImageDataset) -> dict[str, Any]:
    """Return the arguments of `create_model`."""
    model = config.model
    return model.spec | {
        "arch": factory.resolve_arch(model.arch, dataset.img_size, fit=model.fit),
        "img_size": dataset.img_size,
        "in_chans": dataset.in_chans,
        "num_classes": len(dataset.class_names) if config.pretrain.labels else 0,
        "dist_token": model.dist_token or config.distill.distill == "token",
        "patch_size": model.patch_size or factory.default_patch_size(model.arch, dataset.img_size, fit=model.fit),
    }


def _require_images(config: Config, batches: TrainLoader, model: nn.Module, world: World) -> None:
    """Check that each part of a batch holds an image, or two for batch norm."""
    size, parts = batches.sampling.size, config.optim.grad_accum_steps
    smallest = min(len(range(size)[rank_slice(size, rank, world.size)]) for rank in range(world.size)) // parts
    normed = any(isinstance(module, _BatchNorm) for module in model.modules())
    if smallest < 1 + normed:
        why = f": {config.model.arch} has batch norm, which needs 2 in each" if normed else ""
        raise InputError(
            f"--batch-size {config.optim.batch_size}: steps of {size} images are too few for {parts * world.size} "
            f"parts{why}; give more, or fewer parts (--grad-accum-steps, torchrun's processes)"
        )
