"""The configuration tree and the flags made from it."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import pytest

from smallvit.cli.options import field_sentences, parse_options
from smallvit.config import Config, option_homes
from smallvit.errors import InputError


def parse(*arguments: str) -> Config:
    return Config.build(**parse_options(list(arguments), "smallvit train", ""))


def test_flat_options_and_json_describe_the_whole_tree() -> None:
    config = Config.build(arch="deit_tiny_patch16_224", spt=True, lr=0.1, epochs=3, clip_grad=1)
    assert Config.build(**json.loads(json.dumps(config.options()))) == config
    assert config.optim.lr == 0.1
    assert config.replace(lr=0.2).optim.lr == 0.2
    assert Config.build() == Config()


def test_option_names_are_unique_and_every_field_is_documented() -> None:
    fields = [field.name for group in dataclasses.fields(Config) for field in dataclasses.fields(group.default_factory)]
    assert sorted(fields) == sorted(set(fields)) == sorted(option_homes())
    for group in dataclasses.fields(Config):
        sentences = field_sentences(group.default_factory)
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
        (["--epochs", "x"], "--epochs: invalid int value: 'x'"),
        (["--epochs"], "--epochs: expected one argument"),
        (["--epoch", "3"], "unknown argument '--epoch' (did you mean '--epochs'?)"),
        (["--aug", "basci"], "(did you mean 'basic'?)"),
        (["--lr", "0"], "--lr 0.0: expected a learning rate above 0"),
        (["--lr", "nan"], "--lr nan"),
        (["--lr", "inf"], "--lr inf"),
        (["--lr", "1e-7"], "--min-lr 1e-06: expected between 0 and --lr 1e-07"),
        (["--drop-path", "1"], "--drop-path 1.0"),
        (["--val-fraction", "1"], "--val-fraction 1.0"),
        (["--train-fraction", "0"], "--train-fraction 0.0"),
        (["--repeats", "0"], "--repeats 0: expected at least 1"),
        (["--crop-scale", "0"], "--crop-scale 0.0"),
        (["--workers", "-1"], "--workers -1"),
        (["--dropout", "1"], "--dropout 1.0"),
        (["--flip", "2"], "--flip 2.0: expected a probability"),
        (["--img-size", "0"], "--img-size 0"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--spt-shift", "0"], "--spt-shift 0.0: expected a share of the patch"),
        (["--spt-directions", "digonal"], "(did you mean 'diagonal'?)"),
        (["--lsa", "--lsa-temperature", "fixed", "--no-lsa-mask"], "would leave nothing of LSA"),
        (["--no-lsa-mask"], "--no-lsa-mask is of no use without --lsa"),
        (["--lsa", "--spt-shift", "0.25"], "--spt-shift is of no use without --spt"),
        (["--plugin-init", "exact"], "--plugin-init exact is of no use without --spt or --lsa"),
        (["--diagonal-until", "1.5"], "--diagonal-until 1.5: expected a share from 0 to 1"),
        (["--overwrite"], "--overwrite needs --out"),
        (["--resume", "a", "--out", "b"], "--resume RUN goes on in RUN itself"),
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
        ({"img_size": 3.5}, "--img-size 3.5: expected int or nothing"),
        ({"amp": "fp16"}, "expected one of auto, bf16, off"),
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
        ({"checkpoint_minutes": math.inf}, "--checkpoint-minutes inf: expected more than 0 minutes"),
        ({"checkpoint_minutes": math.nan}, "--checkpoint-minutes nan"),
        ({"auto_resume": True}, "--auto-resume needs --out DIR"),
        ({"keep": -1}, "--keep -1: expected 0 or more"),
        ({"fsdp": True, "sync_bn": True}, "do not go together"),
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
