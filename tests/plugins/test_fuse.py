"""Test models fused for inference against the models that they are copied from."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import smallvit
from smallvit.plugins.lsa_layer import Locality
from smallvit.plugins.patch import UnsupportedModelError
from smallvit.plugins.spt_layer import ShiftedPatchTokenization

from .zoo import ZOO, build
from .zoo import images as zoo_images

PAPER = [f"{arch}+spt+lsa" for arch in ("vit", "deit_tiny_patch16_224", "cait", "pit", "swin", "t2t")]
COMBINED = ["vit+stem+lsa+ffn+xsa", "pit+spt+lsa+ffn+xsa", "swin+spt+lsa+ffn", "t2t+spt+lsa+xsa", "vit+spt+lsa+binary"]


def trained(model: nn.Module) -> nn.Module:
    """Give temperatures, norms and biases values as of training."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "temperature" in name:
                parameter.mul_(0.5 + torch.rand_like(parameter))
            elif parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def vit(arch: str = "vit+spt+lsa") -> nn.Module:
    torch.manual_seed(0)
    return trained(smallvit.create_model(arch, img_size=32, num_classes=10))


def images() -> Tensor:
    """Return images of noise, of one gray, of one color and of low contrast."""
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return torch.stack([x[0], x[1] * 0 + 2.1, x[2, :, :1, :1].expand(-1, 32, 32), 0.004 * x[3] - 1.8])


@torch.no_grad()
def assert_same_logits(fused: nn.Module, model: nn.Module, x: Tensor) -> None:
    expected = model(x)
    torch.testing.assert_close(fused(x), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.slow
def test_fused_models_compute_the_same_logits_from_less() -> None:
    for arch in PAPER + COMBINED:
        model = vit(arch)
        state = copy.deepcopy(model.state_dict())
        fused = smallvit.fuse(model)
        assert_same_logits(fused, model, images())
        assert_same_logits(fused, model, images()[:1])  # with the bias that it keeps
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        if "binary" not in arch:
            layers = [each for each in fused.modules() if isinstance(each, Locality)]
            assert layers
            assert all(each.temperature is None for each in layers)
        tokenizations = [each for each in fused.modules() if isinstance(each, ShiftedPatchTokenization)]
        assert all(each.proj is None and not list(each.parameters()) for each in tokenizations)
        assert bool(tokenizations) == ("spt" in arch and "t2t" not in arch)


@pytest.mark.slow
def test_every_class_of_timms_can_be_fused() -> None:
    patched = 0
    for name in ZOO:
        for plugins in ({"spt": True}, {"lsa": True}, {"lsa": True, "init": "preserve"}):
            torch.manual_seed(0)
            try:
                model = trained(smallvit.patch(build(name), **plugins))
            except UnsupportedModelError:
                continue
            smallvit.set_lsa_strength(model, 0.5)
            assert_same_logits(smallvit.fuse(model), model, zoo_images(name))
            patched += 1
    assert patched > 100


def test_variants_of_the_plugins_are_fused() -> None:
    for spt in (smallvit.SPTConfig(norm=False), smallvit.SPTConfig(directions="all", shift=0.3)):
        for lsa in (smallvit.LSAConfig(temperature="layer"), smallvit.LSAConfig(temperature="fixed")):
            torch.manual_seed(0)
            model = smallvit.create_model("vit", img_size=32, num_classes=10, plugins={"spt": spt, "lsa": lsa})
            assert_same_logits(smallvit.fuse(trained(model)), model, images())


def test_layers_whose_weights_may_not_be_read_are_called() -> None:
    model, seen = vit(), []
    for layer in (model.patch_embed.proj.proj, model.blocks[0].attn.qkv):
        layer.register_forward_hook(lambda layer, *_: seen.append(type(layer)))
    fused = smallvit.fuse(model)
    with torch.no_grad():
        fused(images())
    assert seen == [nn.Linear, nn.Linear]
    assert_same_logits(fused, model, images())


def test_fused_models_survive_copies_devices_sizes_and_gradients_of_images() -> None:
    model = vit()
    fused, x = smallvit.fuse(model), images()
    with torch.inference_mode():
        expected = fused(x)
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), smallvit.fuse(fused)):
        assert torch.equal(twin(x), expected)
    assert_same_logits(copy.deepcopy(fused).double(), copy.deepcopy(model).double(), x[:1].double())
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(fused(x)[:1].sum(), x)
    (other,) = torch.autograd.grad(model(x)[:1].sum(), x)
    torch.testing.assert_close(gradient[:1], other[:1], rtol=1e-3, atol=1e-5)
    larger = torch.randn(2, 3, 48, 48)
    assert_same_logits(smallvit.set_input_size(fused, 48), smallvit.set_input_size(model, 48), larger)


def test_fused_models_are_for_inference_only() -> None:
    model = vit()
    fused = smallvit.fuse(model.train())
    assert (model.training, fused.training) == (True, False)
    assert not any(each.requires_grad for each in fused.parameters())
    assert fused.eval() is fused
    with pytest.raises(RuntimeError, match="this VisionTransformer is fused for inference; train the model that fuse"):
        fused.train()
    with pytest.raises(ValueError, match=r"cannot unpatch this VisionTransformer: .*: it is fused for inference"):
        smallvit.unpatch(fused)
    with pytest.raises(RuntimeError, match=r"patch_embed\.proj"):
        model.load_state_dict(fused.state_dict())
    with torch.no_grad():
        model.eval().head.bias.add_(1)
        assert not torch.allclose(fused(images()), model(images()))


@pytest.mark.slow
def test_fused_models_are_exported_with_fewer_operations() -> None:
    model, x = vit(), images()
    model.blocks = model.blocks[:2]
    fused, dynamic = smallvit.fuse(model), ({0: torch.export.Dim("batch")},)
    with torch.no_grad():
        expected = fused(x)
    counts = []
    for each in (fused, model):
        program = torch.export.export(each, (x,), dynamic_shapes=dynamic)
        torch.testing.assert_close(program.module()(x[:1]), expected[:1], rtol=0, atol=1e-4)
        counts.append(sum(node.op == "call_function" for node in program.graph.nodes))
    assert counts[0] < counts[1] - 2 * 5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(fused, (x[:2],), dynamo=True, verbose=False, dynamic_shapes=dynamic)
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=0, atol=1e-4)
