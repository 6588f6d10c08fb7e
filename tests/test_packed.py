"""One-bit weights packed eight to a byte: equal to the last bit, in a model, in a file and for every verb."""

from __future__ import annotations

import copy
import json
import math
import pickle
import shutil
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
from smallvit.checkpoint import load_weights, save_weights
from smallvit.cli import main
from smallvit.errors import InputError
from smallvit.exports import exported, graphs, packed
from smallvit.models import create_model
from smallvit.plugins import BinaryConfig, pack, unpatch
from smallvit.plugins.binary import BinaryConv2d, BinaryLinear, BinaryShortcutConv2d, BinaryShortcutLinear
from smallvit.plugins.binary_packed import Packed, packed_layers
from smallvit.ready import Ready, ready, settled
from smallvit.trained import Card, card

Command = Callable[..., tuple[int, str, str]]
CPU = {"device": "cpu", "amp": "off"}
ON_CPU = ["--device", "cpu", "--amp", "off"]
QUICK = ["--epochs", "1", "--batch-size", "64", "--aug", "none", *ON_CPU]
NAMES = tuple("abcde")
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear, 16 inputs": lambda: adopted(BinaryLinear, nn.Linear(16, 5)),
    "linear, 13 inputs": lambda: adopted(BinaryLinear, nn.Linear(13, 5, bias=False)),
    "linear, 7 inputs": lambda: adopted(BinaryLinear, nn.Linear(7, 3)),
    "shortcut, 9 to 18": lambda: adopted(BinaryShortcutLinear, BinaryShortcutLinear.adapted(9, 18)),
    "convolution, 3 channels": lambda: adopted(BinaryConv2d, nn.Conv2d(3, 6, 2)),
    "convolution, 5 channels of 3 × 1": lambda: adopted(BinaryConv2d, nn.Conv2d(5, 4, (3, 1), padding=(1, 0))),
    "convolution, 2 groups": lambda: adopted(BinaryConv2d, nn.Conv2d(6, 4, 3, groups=2)),
    "merging": lambda: adopted(BinaryShortcutConv2d, BinaryShortcutConv2d.adapted(3, 6, 2, 2)),
}
MODELS = {
    "binaryvit_tiny": ("binaryvit_tiny", {}),
    "without activations": ("binaryvit_tiny", {"binary_activations": False, "binary_attention": False}),
    "vit + lsa": ("vit", {"lsa": True, "binary": True}),
    "bare": ("vit", {"binary": True, "binary_shortcut": False}),
    "swin": ("swin", {"binary": True, "binary_attention": False}),
}
layers = pytest.mark.parametrize("name", LAYERS)


def adopted(kind: type[BinaryLinear | BinaryConv2d], layer: nn.Module) -> nn.Module:
    kind.adopt(layer, BinaryConfig())
    return layer


def drawn(name: str) -> tuple[nn.Module, Tensor]:
    """A layer, and what it takes."""
    torch.manual_seed(0)
    layer = LAYERS[name]().eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(3, layer.in_channels, 6, 6) if isinstance(layer, nn.Conv2d) else torch.randn(3, layer.in_features)
    return layer, x


def model_of(name: str, img_size: int = 16) -> nn.Module:
    """A model whose norms have seen something."""
    torch.manual_seed(0)
    arch, options = MODELS[name]
    model = create_model(arch, img_size=img_size, num_classes=len(NAMES), **options)
    model(torch.randn(8, 3, img_size, img_size))
    return model.eval()


def tiny(name: str) -> Ready:
    """An untrained model of no file, with a block a stage."""
    model, (arch, options) = model_of(name), MODELS[name]
    for module in (model, *getattr(model, "stages", ())):
        if hasattr(module, "blocks"):
            module.blocks = module.blocks[:1]
    spec = {"arch": arch, "img_size": 16, "in_chans": 3, "num_classes": len(NAMES), **options}
    told = Card(name=arch, option="export", path=None, spec=spec, class_names=NAMES, mean=(0.5,) * 3, std=(0.5,) * 3)
    device, dtype = torch.device("cpu"), torch.float32
    return Ready(card=told, model=settled(model, device, dtype), img_size=16, device=device, dtype=dtype)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BinaryViT's run on the digits."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    assert main(["train", "--arch", "binaryvit_tiny", *QUICK, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def file(run: Path) -> Path:
    """The same, packed."""
    assert main(["export", str(run), "--format", "packed"]) == 0
    return run / "export" / "digits.packed.safetensors"


@layers
def test_bits_are_those_that_numpy_packs(name: str) -> None:
    layer, _ = drawn(name)
    weight = layer.weight.detach().double().flatten(1).numpy()
    sign = weight >= (weight.mean(axis=1, keepdims=True) if isinstance(layer, nn.Linear) else 0)
    pack(layer)
    assert layer.bits.dtype == torch.uint8
    assert np.array_equal(layer.bits.numpy(), np.packbits(sign, axis=1))
    np.testing.assert_allclose(layer.scale.numpy(), np.abs(weight).mean(axis=1), rtol=1e-6)


@layers
@pytest.mark.parametrize("autocast", [False, True])
def test_a_packed_layer_gives_the_same_bits(name: str, autocast: bool) -> None:
    layer, x = drawn(name)
    other = pack(copy.deepcopy(layer))
    context = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    with torch.no_grad(), context:
        assert torch.equal(other.scaled_signs(), layer.scaled_signs())
        assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_packed_model_gives_the_same_bits(name: str, autocast: bool) -> None:
    model, images = model_of(name), torch.randn(3, 3, 16, 16)
    other = pack(copy.deepcopy(model))
    assert packed_layers(other)
    context = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    with torch.no_grad(), context:
        assert torch.equal(other(images), model(images))


def test_copies_pickles_and_states_are_the_same_model() -> None:
    model, images = pack(model_of("binaryvit_tiny")), torch.randn(2, 3, 16, 16)
    fresh = pack(create_model("binaryvit_tiny", img_size=16, num_classes=len(NAMES)).eval())
    fresh.load_state_dict(model.state_dict())
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh, pack(copy.deepcopy(model))]
    with torch.no_grad():
        expected = model(images)
        assert all(torch.equal(each(images), expected) for each in copies)


@layers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_precision_of_a_packed_layer_changes_its_scale_alone(name: str, dtype: torch.dtype) -> None:
    layer, x = drawn(name)
    bits, weight = pack(layer).bits.clone(), layer.weight
    layer.to(dtype)
    assert torch.equal(layer.bits, bits)
    assert torch.equal(layer.weight, weight.to(dtype))
    assert layer(x.to(dtype)).dtype == dtype


def test_a_model_packed_in_bfloat16_gives_the_same_bits() -> None:
    model, images = model_of("binaryvit_tiny").to(torch.bfloat16), torch.randn(2, 3, 16, 16, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(pack(copy.deepcopy(model))(images), model(images))


def test_weights_that_are_packed_get_no_gradients_and_the_others_do() -> None:
    model = pack(model_of("binaryvit_tiny"))
    images = torch.randn(2, 3, 16, 16, requires_grad=True)
    model(images).sum().backward()
    assert images.grad.abs().max() > 0
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    own = {id(parameter) for parameter in model.parameters()}
    assert all(id(each) not in own for layer in packed_layers(model) for each in (layer.bits, layer.scale))


@pytest.mark.parametrize("name", ["shortcut, 9 to 18", "merging"])
def test_a_packed_layer_compiles_to_one_graph(name: str) -> None:
    layer, x = drawn(name)
    with torch.no_grad():
        compiled = torch.compile(pack(layer), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x))
    torch.compiler.reset()


def test_there_is_no_way_back() -> None:
    layer = pack(drawn("linear, 13 inputs")[0])
    with pytest.raises(ValueError, match="this PackedLinear has no float weights to go back to"):
        layer.release()
    with pytest.raises(ValueError, match="no float weights to go back to"):
        unpatch(pack(model_of("bare")))


@pytest.mark.parametrize(("arch", "options"), [("vit", {}), ("binaryvit_tiny", {"binary_weights": False})])
def test_where_no_weight_has_one_bit_nothing_is_packed(arch: str, options: dict) -> None:
    model = create_model(arch, img_size=16, num_classes=2, **options)
    with pytest.raises(ValueError, match="no layers with one-bit weights, so there is nothing to pack"):
        pack(model)


@pytest.mark.parametrize("arch", ["binaryvit_tiny", "binaryvit"])
def test_weights_are_twenty_times_smaller_at_32_pixels(arch: str) -> None:
    model = create_model(arch, img_size=32, num_classes=100)
    names = {
        f"{name}.weight" for name, layer in pack(copy.deepcopy(model)).named_modules() if isinstance(layer, Packed)
    }
    floats = sum(value.nbytes for name, value in model.state_dict().items() if name in names)
    bits = [value for name, value in model.state_dict().items() if name in names]
    assert floats / sum(len(each) * (4 + math.ceil(each[0].numel() / 8)) for each in bits) > 20


def test_the_file_holds_bits_scales_and_all_else_as_it_was(run: Path, file: Path) -> None:
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


def test_the_sizes_said_are_those_of_the_files(run: Path, smallvit: Command, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    code, said, _ = smallvit("export", run, "--format", "packed", "--out", out)
    assert code == 0
    path, weights, whole = said.splitlines()
    before, after = load_file(run / "best.safetensors"), load_file(out)
    floats = sum(value.nbytes for name, value in before.items() if name not in after)
    bits = sum(value.nbytes for name, value in after.items() if name not in before)
    assert path == str(out)
    assert f"{bits:,} bytes instead of {floats:,}, {floats / bits:.1f} times smaller" in weights
    assert f"whole file: {out.stat().st_size:,} bytes" in whole


def test_every_verb_answers_as_of_the_run(run: Path, file: Path, smallvit: Command, tmp_path: Path) -> None:
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 255, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    said = [smallvit("predict", each, tmp_path, *ON_CPU, "--format", "jsonl") for each in (run, file)]
    assert said[0][0] == 0
    assert said[0] == said[1]
    metrics = []
    for each in (run, file):
        out = tmp_path / each.name
        assert smallvit("eval", each, "--data", "digits", "--out", out, *ON_CPU)[0] == 0
        metrics.append(json.loads((out / "metrics.json").read_text()))
    assert metrics[0]["loss"] == metrics[1]["loss"]
    images = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(package.load(file)(images), package.load(run)(images))
    assert smallvit("attend", file, "--data", "digits", "--out", tmp_path / "attend", *ON_CPU)[0] == 0


def test_a_packed_file_teaches_but_is_not_trained_further(file: Path, smallvit: Command, tmp_path: Path) -> None:
    train = ["train", "--arch", "vit", *QUICK]
    teacher = ["--distill", "soft", "--teacher", file, "--out", tmp_path / "student"]
    assert smallvit(*train, *teacher)[0] == 0
    code, _, err = smallvit("train", *QUICK, "--init", file, "--out", tmp_path / "other")
    told = "each of its weights is packed to a bit, and training needs them whole; give the run itself"
    assert (code, err) == (2, f"smallvit: --init {file}: {told}\n")


def cut(file: Path, path: Path) -> None:
    path.write_bytes(file.read_bytes()[:-100])


def without_a_layer(file: Path, path: Path) -> None:
    tensors, metadata = load_weights(file)
    save_weights(path, dict(list(tensors.items())[:-1]), metadata)


def not_said(file: Path, path: Path) -> None:
    tensors, metadata = load_weights(file)
    save_weights(path, tensors, metadata | {"packed": False})


def of_another_model(file: Path, path: Path) -> None:
    tensors, metadata = load_weights(file)
    save_weights(path, tensors, metadata | {"model": metadata["model"] | {"arch": "vit", "pool_branches": True}})


def without_metadata(file: Path, path: Path) -> None:
    save_file(load_file(file), path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut, "damaged or no safetensors file"),
        (without_a_layer, "weights and metadata do not fit"),
        (not_said, "weights and metadata do not fit"),
        (of_another_model, "weights and metadata do not fit (this VisionTransformer has no layers with one-bit"),
        (without_metadata, "another program's file"),
    ],
)
def test_a_spoilt_file_is_one_line(
    file: Path, smallvit: Command, tmp_path: Path, spoil: Callable[[Path, Path], None], message: str
) -> None:
    spoil(file, tmp_path / "spoilt.safetensors")
    code, out, err = smallvit("predict", tmp_path / "spoilt.safetensors", tmp_path, *ON_CPU)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert message in err


def test_what_is_not_packed_is_not_replaced(run: Path, file: Path, smallvit: Command, tmp_path: Path) -> None:
    own = tmp_path / "best.safetensors"
    shutil.copy(run / "best.safetensors", own)
    code, _, err = smallvit("export", run, "--format", "packed", "--out", own, "--overwrite")
    assert (code, err) == (2, f"smallvit: --out {own}: not a packed file; choose another name\n")
    assert own.read_bytes() == (run / "best.safetensors").read_bytes()
    before = file.read_bytes()
    assert smallvit("export", run, "--format", "packed", "--overwrite")[0] == 0
    assert file.read_bytes() == before  # equal weights, equal bytes


def test_packing_what_is_packed_changes_nothing(file: Path, smallvit: Command, tmp_path: Path) -> None:
    assert smallvit("export", file, "--format", "packed", "--out", tmp_path / "again.safetensors")[0] == 0
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["FILE", "--format", "timm", "--out", "OUT"], "its weights are packed, which timm cannot load"),
        (["FILE", "--format", "hub", "--out", "OUT"], "writes a card of a finished run"),
        (["RUN", "--format", "packed", "--out", "OUT"], "expected a name that ends in .safetensors"),
    ],
)
def test_what_cannot_be_exported_is_one_line(
    run: Path, file: Path, smallvit: Command, tmp_path: Path, arguments: list[str], message: str
) -> None:
    places = {"RUN": run, "FILE": file, "OUT": tmp_path / "out"}
    code, out, err = smallvit("export", *[places.get(argument, argument) for argument in arguments])
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_a_run_in_full_precision_has_nothing_to_pack(smallvit: Command, tmp_path: Path) -> None:
    assert smallvit("train", "--arch", "vit", *QUICK, "--out", tmp_path / "plain")[0] == 0
    code, out, err = smallvit("export", tmp_path / "plain", "--format", "packed", "--out", tmp_path / "a.safetensors")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "no layers with one-bit weights, so there is nothing to pack; give another --format" in err
    assert [each.name for each in tmp_path.iterdir()] == ["plain"]


@pytest.mark.parametrize(("name", "packs"), [("binaryvit_tiny", True), ("vit + lsa", False)])
def test_onnxruntime_answers_as_one_bit_models(name: str, packs: bool, tmp_path: Path) -> None:
    model, images = tiny(name), torch.randn(3, 3, 16, 16)
    expected = model.logits(images)
    graphs.write_onnx(replace(model, model=pack(model.model)) if packs else model, tmp_path / "model.onnx")
    (found,) = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(["logits"], {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("name", "packs"), [("binaryvit_tiny", False), ("vit + lsa", True)])
def test_torch_runs_the_programs_of_one_bit_models(name: str, packs: bool, tmp_path: Path) -> None:
    model, images = tiny(name), torch.randn(3, 3, 16, 16)
    expected = model.logits(images)
    graphs.write_pt2(replace(model, model=pack(model.model)) if packs else model, tmp_path / "model.pt2")
    found = torch.export.load(tmp_path / "model.pt2").module()(images).detach()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_where_answers_jump_some_images_may_have_another() -> None:
    model, plain = tiny("binaryvit_tiny"), tiny("without activations")
    assert exported.has_jumps(model.model)
    assert not exported.has_jumps(plain.model)

    def wrong(of: Ready, images: Tensor, rows: slice) -> Tensor:
        answers = of.logits(images).clone()
        answers[rows] += 1
        return answers

    exported.require_same(model, lambda images: wrong(model, images, slice(5, 8)), "it")
    for of, rows in ((model, slice(None)), (model, slice(1, None)), (plain, slice(4, 5))):
        with pytest.raises(InputError, match="it answers otherwise than the model: logits differ by up to 1"):
            exported.require_same(of, lambda images, of=of, rows=rows: wrong(of, images, rows), "it")
    with pytest.raises(InputError, match="logits differ by up to 1"):
        exported.require_same(model, lambda images: wrong(model, images, slice(4, 5)), "it", tolerance=0)


def test_the_card_says_that_weights_are_packed(run: Path, file: Path) -> None:
    assert card(str(file), "--init").packed
    assert not card(str(run), "--init").packed
    assert packed.sizes(ready(str(file), "export", **CPU).model, file.stat().st_size).startswith("weights of ")
