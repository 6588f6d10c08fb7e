"""Find the option that is meant by another tool's name for it, or by a misspelled one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches

OTHER_NAMES = {
    "RUN, without a flag": ("checkpoint", "ckpt", "ckpt_path", "model", "weights"),
    "arch": ("a", "model", "model_name"),
    "init=NAME": ("finetune", "initial_checkpoint", "model_name_or_path", "pretrained", "pretrained_path", "weights"),
    "data": ("data_path", "data_root", "data_set", "dataset", "dataset_name"),
    "img_size": ("image_size", "imgsz", "input_size"),
    "resize": ("crop_mode",),
    "in_chans": ("channels", "input_channels", "num_channels"),
    "workers": ("dataloader_num_workers", "j", "num_workers"),
    "train_fraction": ("fraction",),
    "val_fraction": ("train_val_split", "validation_split"),
    "aug=none": ("no_aug",),
    "auto_augment": ("aa",),
    "flip": ("fliplr", "hflip"),
    "random_erasing": ("erasing", "random_erase", "reprob"),
    "mixup": ("mixup_alpha",),
    "cutmix": ("cutmix_alpha",),
    "aug_repeats": ("ra_reps",),
    "epochs": ("max_epochs", "num_epochs", "num_train_epochs"),
    "batch_size": ("b", "batch"),
    "batch_size, over all devices": ("per_device_train_batch_size",),
    "eval_batch_size": ("per_device_eval_batch_size", "validation_batch_size"),
    "grad_accum_steps, the parts of a batch": ("accum_iter", "accumulate_grad_batches", "gradient_accumulation_steps"),
    "loss=bce": ("bce_loss",),
    "loss=focal": ("focal_loss",),
    "class_weights": ("class_weight",),
    "select_by": ("eval_metric", "metric_for_best_model"),
    "patience": ("early_stopping_patience",),
    "opt": ("optim", "optimizer"),
    "lr": ("learning_rate", "lr0"),
    "min_lr": ("lr_min",),
    "sched": ("lr_scheduler", "lr_scheduler_type", "scheduler"),
    "warmup_ratio, a share of the steps": ("lr_warmup_epochs", "warmup_epochs", "warmup_steps"),
    "ema_decay": ("model_ema", "model_ema_decay"),
    "weight_decay": ("wd",),
    "dropout": ("drop", "drop_rate"),
    "drop_path": ("drop_path_rate",),
    "label_smoothing": ("label_smoothing_factor", "smoothing"),
    "clip_grad": ("clip_grad_norm", "grad_clip", "gradient_clip_val", "max_grad_norm"),
    "teacher": ("teacher_model",),
    "distill": ("distillation_type",),
    "distill_weight": ("distillation_alpha",),
    "distill_temperature": ("distillation_tau",),
    "device": ("accelerator",),
    "device=cpu": ("cpu", "no_cuda", "use_cpu"),
    "device=cuda": ("cuda",),
    "device=cuda:N": ("gpu",),
    "device, with torchrun for several": ("devices", "gpus", "num_gpus"),
    "amp": ("amp_dtype", "mixed_precision", "precision"),
    "amp=bf16": ("bf16",),
    "amp=fp16": ("fp16", "half"),
    "compile=on": ("torch_compile", "torchcompile"),
    "grad_checkpointing": ("gradient_checkpointing",),
    "out": ("experiment", "name", "outdir", "out_dir", "output", "output_dir", "project", "save_dir", "work_dir"),
    "overwrite": ("exist_ok", "overwrite_output_dir"),
    "resume": ("ckpt_path", "resume_from", "resume_from_checkpoint"),
    "log": ("report_to",),
    "log=wandb": ("log_wandb", "wandb"),
    "top": ("top_k", "topk"),
    "classes": ("num_classes",),
}
"""Options and what to know about them, by the names they have in the training scripts of timm, torchvision, PyTorch's
examples, DeiT and MAE, and in the Hugging Face Trainer, Lightning and Ultralytics."""
ALIKE = 0.83
"""Least similarity of a misspelled name, which excludes --flipud for --flip and --lrf for --lr."""


def suggest_option(name: str, shown: Mapping[str, str]) -> str:
    """Return "; smallvit calls it ..." or " (did you mean ...?)" for an unknown option; empty if nothing is close.

    Args:
        name: The option, with or without dashes.
        shown: What to write for each option that exists.
    """
    name = name.lstrip("-").replace("-", "_")
    for target in (name, *(target for target, names in OTHER_NAMES.items() if name in names)):
        option = re.split("[=,]", target)[0]
        if option in shown:
            return f"; smallvit calls it {shown[option]}{target.removeprefix(option)}"
    alike = max(ALIKE, 1 - 1.25 / max(len(name), 1))  # at most two letters more, less, or one replaced
    matches = get_close_matches(name, [each for each in shown if each[0] == name[:1]], n=1, cutoff=alike)
    return f" (did you mean {shown[matches[0]]!r}?)" if matches else ""
