"""Test that packed one-bit weights are bit-equal to the original, in layers, models, files and verbs."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import smallvit as package
from smallvit.cli import main
from smallvit.evaluation.predictor import Predictor, load_predictor
from smallvit.export import export as exporting
from smallvit.export import verify
from smallvit.models.checkpoint import load_weights, save_weights
from smallvit.models.factory import create_model, prepare_for_inference
from smallvit.models.weights_info import WeightsInfo, read_weights_info
from smallvit.plugins import BinaryConfig
from smallvit.plugins.binary_layers import (
    BinaryConv2d,
    BinaryLinear,
    BinaryNormConv2d,
    BinaryShortcutConv2d,
    BinaryShortcutLinear,
)
from smallvit.plugins.binary_packing import Packed, pack, packed_layers
from smallvit.plugins.patch import unpatch
from smallvit.utils.errors import InputError

pytestmark = pytest.mark.slow

Command = Callable[..., tuple[int, str, str]]
CPU = {"device": "cpu", "amp": "off"}
ON_CPU = ["--device", "cpu", "--amp", "off"]
QUICK = ["--epochs", "1", "--train-fraction", "0.05", "--batch-size", "32", "--aug", "none", *ON_CPU]
NAMES = tuple("abcde")
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear, 16 inputs": lambda: adopt(BinaryLinear, nn.Linear(16, 5)),
    "linear, 13 inputs": lambda: adopt(BinaryLinear, nn.Linear(13, 5, bias=False)),
    "linear, 7 inputs": lambda: adopt(BinaryLinear, nn.Linear(7, 3)),
    "shortcut, 9 to 18": lambda: adopt(BinaryShortcutLinear, BinaryShortcutLinear.adapted(9, 18)),
    "convolution, 3 channels": lambda: adopt(BinaryConv2d, nn.Conv2d(3, 6, 2)),
    "convolution, 5 channels of 3 × 1": lambda: adopt(BinaryConv2d, nn.Conv2d(5, 4, (3, 1), padding=(1, 0))),
    "convolution, 2 groups": lambda: adopt(BinaryConv2d, nn.Conv2d(6, 4, 3, groups=2)),
    "merging": lambda: adopt(BinaryShortcutConv2d, BinaryShortcutConv2d.adapted(3, 6, 2, 2)),
    "merging, no shortcut": lambda: adopt(BinaryNormConv2d, BinaryNormConv2d.adapted(3, 6, 2, 2)),
}
MODELS = {
    "binaryvit_tiny": ("binaryvit_tiny", {}),
    "without activations": ("binaryvit_tiny", {"plugins": {"binary": {"activations": False, "attention": False}}}),
    "vit + lsa": ("vit", {"plugins": {"lsa": True, "binary": True}}),
    "bare": ("vit", {"plugins": {"binary": {"shortcut": False}}}),
    "swin": ("swin", {"plugins": {"binary": {"attention": False}}}),
}


def adopt(kind: type[BinaryLinear | BinaryConv2d], layer: nn.Module) -> nn.Module:
    kind.adopt(layer, BinaryConfig())
    return layer


def random_layer(name: str) -> tuple[nn.Module, Tensor]:
    """Return a layer with random weights, and an input."""
    torch.manual_seed(0)
    layer = LAYERS[name]().eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(3, layer.in_channels, 6, 6) if isinstance(layer, nn.Conv2d) else torch.randn(3, layer.in_features)
    return layer, x


def build_model(name: str, img_size: int = 16) -> nn.Module:
    """Build a model with batch statistics of random images."""
    torch.manual_seed(0)
    arch, options = MODELS[name]
    model = create_model(arch, img_size=img_size, num_classes=len(NAMES), **options)
    model(torch.randn(8, 3, img_size, img_size))
    return model.eval()


def tiny(name: str) -> Predictor:
    """Build the predictor of an untrained model with one block per stage."""
    model, (arch, options) = build_model(name), MODELS[name]
    for module in (model, *getattr(model, "stages", ())):
        if hasattr(module, "blocks"):
            module.blocks = module.blocks[:1]
    spec = {"arch": arch, "img_size": 16, "in_chans": 3, "num_classes": len(NAMES), **options}
    info = WeightsInfo(
        name=arch, option="export", path=None, spec=spec, class_names=NAMES, mean=(0.5,) * 3, std=(0.5,) * 3
    )
    device, dtype = torch.device("cpu"), torch.float32
    return Predictor(
        info=info, model=prepare_for_inference(model, device, dtype), img_size=16, device=device, dtype=dtype
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a BinaryViT on the digits; return its run folder."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    assert main(["train", "--arch", "binaryvit_tiny", *QUICK, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def file(run: Path) -> Path:
    """Export the run as a packed file."""
    assert main(["export", str(run), "--format", "packed"]) == 0
    return run / "export" / "digits.packed.safetensors"


def test_bits_match_numpy_packbits() -> None:
    for name in LAYERS:
        layer, _ = random_layer(name)
        weight = layer.weight.detach().double().flatten(1).numpy()
        sign = weight >= (weight.mean(axis=1, keepdims=True) if isinstance(layer, nn.Linear) else 0)
        pack(layer)
        assert layer.bits.dtype == torch.uint8, name
        assert np.array_equal(layer.bits.numpy(), np.packbits(sign, axis=1)), name
        np.testing.assert_allclose(layer.scale.numpy(), np.abs(weight).mean(axis=1), rtol=1e-6)


@pytest.mark.parametrize("autocast", [False, True])
def test_packed_layers_and_models_are_bit_equal(autocast: bool) -> None:
    context = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    with torch.no_grad(), context:
        for name in LAYERS:
            layer, x = random_layer(name)
            packed_layer = pack(copy.deepcopy(layer))
            assert torch.equal(packed_layer.scaled_signs(), layer.scaled_signs()), name
            assert torch.equal(packed_layer(x), layer(x)), name
        for name in MODELS:
            model, images = build_model(name), torch.randn(3, 3, 16, 16)
            packed_model = pack(copy.deepcopy(model))
            assert packed_layers(packed_model), name
            assert torch.equal(packed_model(images), model(images)), name


def test_copies_pickles_and_state_dicts_are_bit_equal() -> None:
    model, images = pack(build_model("binaryvit_tiny")), torch.randn(2, 3, 16, 16)
    fresh = pack(create_model("binaryvit_tiny", img_size=16, num_classes=len(NAMES)).eval())
    fresh.load_state_dict(model.state_dict())
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh, pack(copy.deepcopy(model))]
    with torch.no_grad():
        expected = model(images)
        assert all(torch.equal(each(images), expected) for each in copies)


def test_dtype_of_a_packed_layer_changes_its_scale_only() -> None:
    for name in LAYERS:
        for dtype in (torch.bfloat16, torch.float64):
            layer, x = random_layer(name)
            bits, weight = pack(layer).bits.clone(), layer.weight
            layer.to(dtype)
            assert torch.equal(layer.bits, bits), name
            assert torch.equal(layer.weight, weight.to(dtype)), name
            assert layer(x.to(dtype)).dtype == dtype


def test_model_packed_in_bfloat16_is_bit_equal() -> None:
    model, images = build_model("binaryvit_tiny").to(torch.bfloat16), torch.randn(2, 3, 16, 16, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(pack(copy.deepcopy(model))(images), model(images))


def test_packed_weights_get_no_gradients() -> None:
    model = pack(build_model("binaryvit_tiny"))
    images = torch.randn(2, 3, 16, 16, requires_grad=True)
    model(images).sum().backward()
    assert images.grad.abs().max() > 0
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    own = {id(parameter) for parameter in model.parameters()}
    assert all(id(each) not in own for layer in packed_layers(model) for each in (layer.bits, layer.scale))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shortcut, 9 to 18", "merging"])
def test_packed_layer_compiles_to_one_graph(name: str) -> None:
    layer, x = random_layer(name)
    with torch.no_grad():
        compiled = torch.compile(pack(layer), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x))
    torch.compiler.reset()


def test_packing_cannot_be_reversed() -> None:
    with pytest.raises(ValueError, match="its weights were packed to bits"):
        unpatch(pack(build_model("bare")))


@pytest.mark.parametrize(
    ("arch", "options"), [("vit", {}), ("binaryvit_tiny", {"plugins": {"binary": {"weights": False}}})]
)
def test_packing_without_one_bit_weights_is_an_error(arch: str, options: dict) -> None:
    model = create_model(arch, img_size=16, num_classes=2, **options)
    with pytest.raises(ValueError, match="no layers with one-bit weights, so there is nothing to pack"):
        pack(model)


@pytest.mark.parametrize("arch", ["binaryvit_tiny", "binaryvit"])
def test_packed_weights_are_twenty_times_smaller(arch: str) -> None:
    model = create_model(arch, img_size=32, num_classes=100)
    names = {
        f"{name}.weight" for name, layer in pack(copy.deepcopy(model)).named_modules() if isinstance(layer, Packed)
    }
    floats = sum(value.nbytes for name, value in model.state_dict().items() if name in names)
    bits = [value for name, value in model.state_dict().items() if name in names]
    assert floats / sum(len(each) * (4 + math.ceil(each[0].numel() / 8)) for each in bits) > 20


def test_file_holds_bits_scales_and_other_weights_unchanged(run: Path, file: Path) -> None:
    before, after = load_weights(run / "best.safetensors"), load_weights(file)
    assert after[1] == before[1] | {"packed": True}
    layers = {name.removesuffix(".bits") for name in after[0] if name.endswith(".bits")}
    gone = {f"{layer}.weight" for layer in layers}
    assert after[0].keys() - before[0].keys() == {f"{layer}.{each}" for layer in layers for each in ("bits", "scale")}
    assert before[0].keys() - after[0].keys() == gone
    assert all(torch.equal(after[0][name], before[0][name]) for name in before[0].keys() - gone)
    for layer in layers:
        weight = before[0][f"{layer}.weight"]
        bits, scale = after[0][f"{layer}.bits"], after[0][f"{layer}.scale"]
        assert (bits.dtype, bits.shape) == (torch.uint8, (len(weight), math.ceil(weight[0].numel() / 8)))
        assert (scale.dtype, scale.shape) == (torch.float32, (len(weight),))


def test_printed_sizes_match_the_files(run: Path, smallvit: Command, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    code, out_text, _ = smallvit("export", run, "--format", "packed", "--out", out)
    assert code == 0
    path, weights, whole = out_text.splitlines()
    before, after = load_file(run / "best.safetensors"), load_file(out)
    floats = sum(value.nbytes for name, value in before.items() if name not in after)
    bits = sum(value.nbytes for name, value in after.items() if name not in before)
    assert path == str(out)
    assert f"{bits:,} bytes instead of {floats:,}, {floats / bits:.1f} times smaller" in weights
    assert f"whole file: {out.stat().st_size:,} bytes" in whole


@pytest.mark.slow
def test_verbs_give_the_results_of_the_run(run: Path, file: Path, smallvit: Command, tmp_path: Path) -> None:
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 255, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    outputs = [smallvit("predict", each, tmp_path, *ON_CPU, "--format", "jsonl") for each in (run, file)]
    assert outputs[0][0] == 0
    assert outputs[0] == outputs[1]
    metrics = []
    for each in (run, file):
        out = tmp_path / each.name
        assert smallvit("eval", each, "--data", "digits", "--out", out, *ON_CPU)[0] == 0
        metrics.append(json.loads((out / "metrics.json").read_text()))
    assert metrics[0]["loss"] == metrics[1]["loss"]
    images = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(package.load_model(file)(images), package.load_model(run)(images))
    assert smallvit("attend", file, "--data", "digits", "--out", tmp_path / "attend", *ON_CPU)[0] == 0


@pytest.mark.slow
def test_packed_file_is_a_teacher_but_no_initial_weights(file: Path, smallvit: Command, tmp_path: Path) -> None:
    train = ["train", "--arch", "vit", *QUICK]
    teacher = ["--distill", "soft", "--teacher", file, "--out", tmp_path / "student"]
    assert smallvit(*train, *teacher)[0] == 0
    code, _, err = smallvit("train", *QUICK, "--init", file, "--out", tmp_path / "other")
    message = "its weights are packed to one bit each and cannot be trained; give the run itself"
    assert (code, err) == (2, f"smallvit: --init {file}: {message}\n")


def truncate(file: Path, path: Path) -> None:
    path.write_bytes(file.read_bytes()[:-100])


def without_a_layer(file: Path, path: Path) -> None:
    tensors, metadata = load_weights(file)
    save_weights(path, dict(list(tensors.items())[:-1]), metadata)


def not_marked(file: Path, path: Path) -> None:
    tensors, metadata = load_weights(file)
    save_weights(path, tensors, metadata | {"packed": False})


def of_another_model(file: Path, path: Path) -> None:
    tensors, metadata = load_weights(file)
    save_weights(path, tensors, metadata | {"model": metadata["model"] | {"arch": "vit", "pool_branches": True}})


def without_metadata(file: Path, path: Path) -> None:
    save_file(load_file(file), path)


def test_damaged_files_are_one_line_errors(file: Path, smallvit: Command, tmp_path: Path) -> None:
    damages = {
        truncate: "damaged",
        without_a_layer: "weights and metadata do not",
        not_marked: "weights and metadata do not",
        of_another_model: "weights and metadata do not",
        without_metadata: "another program",
    }
    for damage, message in damages.items():
        damage(file, tmp_path / "damaged.safetensors")
        code, out, err = smallvit("predict", tmp_path / "damaged.safetensors", tmp_path, *ON_CPU)
        assert (code, out, len(err.splitlines())) == (2, "", 1), damage
        assert message in err, damage


def test_exporting_again_writes_equal_bytes(run: Path, file: Path, smallvit: Command) -> None:
    before = file.read_bytes()
    assert smallvit("export", run, "--format", "packed", "--overwrite")[0] == 0
    assert file.read_bytes() == before


def test_packing_a_packed_file_changes_nothing(file: Path, smallvit: Command, tmp_path: Path) -> None:
    assert smallvit("export", file, "--format", "packed", "--out", tmp_path / "again.safetensors")[0] == 0
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


def test_other_exports_of_packed_files_are_errors(run: Path, file: Path, smallvit: Command, tmp_path: Path) -> None:
    expected = [
        ([file, "--format", "timm", "--out", tmp_path / "out"], "its weights are packed, which timm cannot load"),
        ([file, "--format", "hub", "--out", tmp_path / "out"], "card"),
        ([run, "--format", "packed", "--out", tmp_path / "out"], "expected a name that ends in .safetensors"),
    ]
    for arguments, message in expected:
        code, out, err = smallvit("export", *arguments)
        assert (code, out, len(err.splitlines())) == (2, "", 1)
        assert message in err
        assert list(tmp_path.iterdir()) == []


def test_full_precision_run_cannot_be_packed(trained_run: Path, smallvit: Command, tmp_path: Path) -> None:
    code, out, err = smallvit("export", trained_run, "--format", "packed", "--out", tmp_path / "a.safetensors")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "no layers with one-bit weights" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(("name", "packs"), [("binaryvit_tiny", True), ("vit + lsa", False)])
def test_onnxruntime_reproduces_one_bit_models(name: str, packs: bool, tmp_path: Path) -> None:
    model, images = tiny(name), torch.randn(3, 3, 16, 16)
    expected = model.predict_logits(images)
    exporting.write_onnx(replace(model, model=pack(model.model)) if packs else model, tmp_path / "model.onnx")
    (logits,) = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(["logits"], {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), expected, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "packs"), [("binaryvit_tiny", False), ("vit + lsa", True)])
def test_torch_export_reproduces_one_bit_models(name: str, packs: bool, tmp_path: Path) -> None:
    model, images = tiny(name), torch.randn(3, 3, 16, 16)
    expected = model.predict_logits(images)
    exporting.write_pt2(replace(model, model=pack(model.model)) if packs else model, tmp_path / "model.pt2")
    logits = torch.export.load(tmp_path / "model.pt2").module()(images).detach()
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_binary_activations_need_a_share_of_equal_logits() -> None:
    model, plain = tiny("binaryvit_tiny"), tiny("without activations")
    assert verify.has_binary_activations(model.model)
    assert not verify.has_binary_activations(plain.model)

    def wrong(of: Predictor, images: Tensor, rows: slice) -> Tensor:
        logits = of.predict_logits(images).clone()
        logits[rows] += 1
        return logits

    verify.verify_logits(model, lambda images: wrong(model, images, slice(5, 8)), "it")
    for of, rows in ((model, slice(None)), (model, slice(1, None)), (plain, slice(4, 5))):
        with pytest.raises(InputError, match="the logits in it differ from the model's by up to 1"):
            verify.verify_logits(of, lambda images, of=of, rows=rows: wrong(of, images, rows), "it")
    with pytest.raises(InputError, match="by up to 1"):
        verify.verify_logits(model, lambda images: wrong(model, images, slice(4, 5)), "it", tolerance=0)


def test_weights_info_knows_packed_files(run: Path, file: Path) -> None:
    assert read_weights_info(str(file), "--init").packed
    assert not read_weights_info(str(run), "--init").packed
    assert exporting.describe_size(load_predictor(str(file), "export", **CPU).model, file.stat().st_size).startswith(
        "weights of "
    )
