"""Test the configuration tree and the flags made from it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from smallvit.cli.parser import field_docs, options_parser
from smallvit.cli.parser import parse as parse_arguments
from smallvit.config.config import Config, option_types
from smallvit.utils.errors import InputError


def parse(*arguments: str) -> Config:
    return Config.build(**parse_arguments(options_parser("smallvit train", ""), list(arguments)))


def test_flat_options_and_json_describe_the_whole_tree() -> None:
    config = Config.build(arch="deit_tiny_patch16_224", spt=True, lr=0.1, epochs=3, clip_grad=1)
    assert Config.build(**json.loads(json.dumps(config.to_dict()))) == config
    assert config.optim.lr == 0.1
    assert config.replace(lr=0.2).optim.lr == 0.2
    assert Config.build() == Config()


def test_option_names_are_unique_and_every_field_is_documented() -> None:
    fields = [field.name for group in dataclasses.fields(Config) for field in dataclasses.fields(group.default_factory)]
    assert sorted(fields) == sorted(set(fields)) == sorted(option_types())
    for group in dataclasses.fields(Config):
        sentences = field_docs(group.default_factory)
        for field in dataclasses.fields(group.default_factory):
            assert sentences[field.name].endswith("."), field.name


def test_flags_set_the_fields_of_their_name() -> None:
    config = parse("--arch", "vit", "--spt", "--lsa", "--data", "d", "--lr", "1e-2", "--img-size=48", "--aug", "basic")
    assert config == Config.build(arch="vit", spt=True, lsa=True, data="d", lr=1e-2, img_size=48, aug="basic")
    assert parse("--no-spt") == parse() == Config()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "-3"], "--epochs -3: expected at least 1"),
        (["--epochs", "x"], "--epochs x: expected a whole number"),
        (["--epochs"], "--epochs N: the value is missing. Passes over the training images."),
        (["--epoch", "3"], "--epoch: no such option (did you mean '--epochs'?)"),
        (["--aug", "basci"], "(did you mean 'basic'?)"),
        (["--lr", "0"], "--lr 0.0: expected above 0"),
        (["--lr", "nan"], "--lr nan"),
        (["--lr", "inf"], "--lr inf"),
        (["--lr", "1e-7"], "--min-lr 1e-06: expected between 0 and --lr 1e-07"),
        (["--drop-path", "1"], "--drop-path 1.0"),
        (["--val-fraction", "1"], "--val-fraction 1.0"),
        (["--train-fraction", "0"], "--train-fraction 0.0"),
        (["--aug-repeats", "0"], "--aug-repeats 0: expected at least 1"),
        (["--crop-scale", "0"], "--crop-scale 0.0"),
        (["--workers", "-1"], "--workers -1"),
        (["--dropout", "1"], "--dropout 1.0"),
        (["--flip", "2"], "--flip 2.0: expected at least 0 and at most 1"),
        (["--img-size", "0"], "--img-size 0"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--spt", "--spt-shift", "0"], "--spt-shift 0.0: expected a fraction of the patch"),
        (["--spt-directions", "digonal"], "(did you mean 'diagonal'?)"),
        (["--lsa", "--lsa-temperature", "fixed", "--no-lsa-mask"], "without a mask changes nothing"),
        (["--plugin-warmup-ratio", "1.5"], "--plugin-warmup-ratio 1.5: expected at least 0 and at most 1"),
        (["--overwrite"], "--overwrite needs --out"),
        (["--resume", "a", "--out", "b"], "--resume RUN continues in RUN"),
        (["stray"], "unknown argument 'stray'"),
    ],
)
def test_bad_values_are_refused_in_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(*arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epoch": 3}, "unknown option 'epoch' (did you mean 'epochs'?)"),
        ({"epochs": "3"}, "--epochs '3': expected int"),
        ({"epochs": True}, "--epochs True: expected int"),
        ({"spt": 1}, "--spt 1: expected bool"),
        ({"img_size": 3.5}, "--img-size 3.5: expected pixels, e.g. 64, or height x width"),
        ({"amp": "fp8"}, "expected one of auto, bf16, fp16, off"),
    ],
)
def test_wrong_types_are_refused(options: dict, message: str) -> None:
    with pytest.raises(InputError) as caught:
        Config.build(**options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"log": ","}, "--log ',': expected some of tensorboard"),
        ({"log": "tensorboard,wandv"}, "--log wandv: expected one of tensorboard, wandb"),
        ({"checkpoint_minutes": math.inf}, "--checkpoint-minutes inf: expected a finite number"),
        ({"checkpoint_minutes": math.nan}, "--checkpoint-minutes nan"),
        ({"auto_resume": True}, "--auto-resume needs --out DIR"),
        ({"keep": -1}, "--keep -1: expected at least 0"),
        ({"fsdp": True, "sync_bn": True}, "cannot be combined"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        Config.build(**options)


def test_loggers_are_named_once_each() -> None:
    assert Config.build(log="wandb, tensorboard,,wandb").run.loggers == ("wandb", "tensorboard")


def test_configurations_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().optim.lr = 1.0  # type: ignore[misc]


def test_paths_and_numpy_scalars_become_plain_values() -> None:
    config = Config.build(
        data=Path("photos"),
        out=Path("runs") / "x",
        epochs=np.int64(3),
        lr=np.float32(0.5),
        weight_decay=np.int32(0),
        spt=np.bool_(True),
        arch=np.str_("vit"),
        img_size=torch.tensor(32),
    )
    assert config == Config.build(
        data="photos", out="runs/x", epochs=3, lr=0.5, weight_decay=0.0, spt=True, arch="vit", img_size=32
    )
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()
    for options in ({"epochs": np.float64(3)}, {"epochs": Path("3")}, {"spt": np.int64(1)}, {"lr": np.zeros(1)}):
        with pytest.raises(InputError):
            Config.build(**options)


@pytest.mark.parametrize("name", ["data", "out", "init"])
def test_names_that_are_not_utf8_are_refused_at_once(name: str) -> None:
    with pytest.raises(InputError, match=r"--\w+ 'caf\\udce9': expected a name in UTF-8"):
        Config.build(**{name: os.fsdecode(b"caf\xe9")})
