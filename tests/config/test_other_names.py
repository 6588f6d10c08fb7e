"""Test what unknown options are answered with."""

from __future__ import annotations

import re
from importlib import import_module

import pytest

from smallvit.cli import VERBS
from smallvit.config.config import Config
from smallvit.config.other_names import OTHER_NAMES, suggest_option
from smallvit.utils.errors import InputError

WITHOUT_EQUIVALENT = """
aug-splits backend bce-sum bce-target-thresh benchmark bias-weight-decay blr bn-eps bn-momentum box cache cache-dataset
cache-dir callbacks channels-last check-val-every-n-epoch checkpoint checkpoint-hist class-map close-mosaic cls
color-jitter-prob conf cooldown-epochs copy-paste cos-lr crop-pct cutmix-minmax ddp-backend decay-epochs decay-rate
default-root-dir degrees depth deterministic dist-bn dist-url do-eval do-train drop-block drop-connect dummy embed-dim
early-stopping evaluate fast-dev-run flipud fuser gp gaussian-blur-prob grayscale-prob hub-model-id
interpolation iou jsd-loss label-names label-column-name limit-train-batches local-rank log-dir log-interval log-level
logging-dir logging-steps lr-base lr-cycle-decay lr-gamma lr-k-decay lr-noise lr-step-size lr-warmup-decay
lr-warmup-method lrf mask-ratio max-steps mean min-epochs mixup-off-epoch mixup-switch-prob mlp-ratio
model-ema-force-cpu model-ema-steps model-kwargs momentum multi-scale no-prefetcher no-resume-opt norm-weight-decay
num-classes num-heads num-nodes opt-betas opt-eps opt-kwargs overfit-batches patch patience-epochs
pin-mem plots pose print-freq ra-magnitude ra-sampler rank ratio recount recovery-interval
rect remode resplit run-name save save-freq save-images save-json save-period save-steps save-total-limit scale shear
single-cls source split split-bn start-epoch std strategy teacher-path test-only time torchscript
train-interpolation train-split translate transformer-embedding-decay tta unscale-lr val val-check-interval
val-crop-size val-resize-size val-split verbose vflip wandb-project warmup-bias-lr warmup-lr
warmup-momentum weight-decay-end worker-seeding world-size
"""
"""Flags of timm, torchvision, DeiT, MAE, the Hugging Face Trainer, Lightning and Ultralytics without an equivalent."""
MISSPELLED = {
    "--epoch": "--epochs",
    "--ephocs": "--epochs",
    "--label-smothing": "--label-smoothing",
    "--lable-smoothing": "--label-smoothing",
    "--batchsize": "--batch-size",
    "--ptach-size": "--patch-size",
    "--spt-shfit": "--spt-shift",
    "--no-lsa-maks": "--no-lsa-mask",
    "--seeds": "--seed",
}


def shown(verb: str) -> dict[str, str]:
    """Return the flags of a verb by the names of their options."""
    actions = import_module(f"smallvit.cli.{verb}").parser()._actions
    return {flag.lstrip("-").replace("-", "_"): flag for action in actions for flag in action.option_strings}


def test_every_target_is_an_option_and_no_name_is() -> None:
    verbs = {verb: shown(verb) for verb in VERBS}
    for target, names in OTHER_NAMES.items():
        option, value = re.match(r"(\w+)=?([\w:]*)", target).groups()
        assert option == "RUN" or any(option in flags for flags in verbs.values()), target
        if value not in ("", "NAME", "cuda:N"):
            assert Config.build(**{option: value}), target
        assert not {*names} & verbs["train"].keys(), target


def test_names_of_other_tools_lead_to_ours() -> None:
    flags = shown("train")
    for name, ours in {
        "--learning-rate": "--lr",
        "--learning_rate": "--lr",
        "--model": "--arch",
        "--name": "--out",
        "--batch": "--batch-size",
        "-b": "--batch-size",
        "-j": "--workers",
        "--num_train_epochs": "--epochs",
        "--weight_decay": "--weight-decay",
        "--wd": "--weight-decay",
        "--data-path": "--data",
        "--imgsz": "--img-size",
        "--pretrained": "--init=NAME",
        "--fp16": "--amp=fp16",
    }.items():
        assert suggest_option(name, flags) == f"; smallvit calls it {ours}"


def test_no_guess_is_better_than_a_wrong_one() -> None:
    flags = shown("train")
    guesses = {name: hint for name in WITHOUT_EQUIVALENT.split() if (hint := suggest_option(f"--{name}", flags))}
    assert not guesses
    assert not suggest_option("--", flags)
    assert not suggest_option("--learning-rate", shown("list"))  # has none


def test_misspelled_options_are_recognized() -> None:
    flags = shown("train")
    for name, ours in MISSPELLED.items():
        assert suggest_option(name, flags) == f" (did you mean {ours!r}?)"


def test_python_names_the_option_too() -> None:
    with pytest.raises(InputError, match=r"^unknown option 'learning_rate'; smallvit calls it lr$"):
        Config.build(learning_rate=0.1)
