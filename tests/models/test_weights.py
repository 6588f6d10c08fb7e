"""Test loading trained weights by name, and their metadata."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

import smallvit
import smallvit as smallvit_package
from smallvit import InputError
from smallvit.config.model import ModelConfig
from smallvit.models import checkpoint, weights_info
from smallvit.models import weights as trained
from smallvit.models.weights_info import FORMAT
from smallvit.runs.run import Run
from smallvit.utils import files

SPEC = {"arch": "vit", "img_size": 8, "in_chans": 3, "num_classes": 2, "patch_size": 2}
SPEC["plugins"] = {"spt": {}, "lsa": {}}
DATA = {"name": "x", "class_names": ["a", "b"], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
MODEL = ModelConfig().spec
TINY = "test_vit.r160_in1k"
"""timm's smallest model with pretrained weights, 1.5 MB."""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a run folder with random weights."""
    folder = tmp_path / "run"
    folder.mkdir()
    model = smallvit.create_model(**SPEC)
    checkpoint.save_weights(folder / Run.BEST, checkpoint.snapshot(model), {"model": SPEC, "data": DATA, "epoch": 1})
    (folder / Run.CONFIG).write_text(json.dumps(smallvit.Config.build(spt=True, lsa=True, epochs=7).to_dict()))
    return folder


def refused(name: object, option: str = "--teacher") -> str:
    """Return the error message of a name."""
    with pytest.raises(InputError) as caught:
        trained.load_trained_model(weights_info.read_weights_info(str(name), option))
    line = str(caught.value)
    assert line.startswith(f"{option} {name}: ")
    assert len(line.splitlines()) == 1
    return line


def same_weights(one: torch.nn.Module, other: dict[str, torch.Tensor]) -> bool:
    state = one.state_dict()
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in other)


def test_info_of_a_run(run: Path) -> None:
    info = weights_info.read_weights_info(str(run), "--init")
    assert (info.name, info.path, info.spec) == (str(run), run / "best.safetensors", SPEC)
    assert (info.class_names, info.data) == (("a", "b"), "x")
    assert (info.mean, info.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert info.training_data is None


def test_info_of_a_file_equals_that_of_its_folder(run: Path) -> None:
    folder, file = (weights_info.read_weights_info(str(path), "--init") for path in (run, run / "best.safetensors"))
    assert replace(folder, name=file.name) == file


def test_load_trained_model(run: Path) -> None:
    model = trained.load_trained_model(weights_info.read_weights_info(str(run), "--init"))
    assert same_weights(model, load_file(run / "best.safetensors"))
    assert not model.training


def test_info_is_read_without_torch(run: Path) -> None:
    check = (
        f"import sys; from smallvit.models import weights_info; weights_info.read_weights_info({str(run)!r}, 'x')\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_header_and_shapes_equal_safetensors(run: Path) -> None:
    path = run / "best.safetensors"
    with safe_open(path, "pt") as file:
        expected = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        assert files.read_safetensors(path)[0] == file.metadata()
    assert weights_info.read_shapes(path) == expected


def test_files_of_other_programs_name_no_model(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2, 3)}, tmp_path / "plain.safetensors")
    info = weights_info.read_weights_info(str(tmp_path / "plain.safetensors"), "--init")
    assert (info.spec, info.class_names, info.data, info.mean, info.training_data) == (None,) * 5
    assert "does not name its model" in refused(tmp_path / "plain.safetensors")


def damages() -> dict[str, Callable[[bytes], bytes]]:
    return {
        "empty": lambda content: b"",
        "a few bytes": lambda content: content[:7],
        "header alone": lambda content: content[:8],
        "cut in the header": lambda content: content[:100],
        "cut in the weights": lambda content: content[:-1],
        "too long": lambda content: content + b"\0",
        "endless header": lambda content: b"\xff" * 8 + content[8:],
        "no JSON": lambda content: content[:8] + b"?" + content[9:],
        "a list": lambda content: (2).to_bytes(8, "little") + b"[]",
        "no paths_by_name": lambda content: (8).to_bytes(8, "little") + b'{"x":{}}',
        "odd paths_by_name": lambda content: (24).to_bytes(8, "little") + b'{"x":{"data_offsets":1}}',
        "deep": lambda content: (90_000).to_bytes(8, "little") + b"[" * 90_000,
        "HTML": lambda content: b"<!DOCTYPE html>" * 100,
    }


def test_damaged_files_get_one_line(run: Path) -> None:
    path = run / "best.safetensors"
    content = path.read_bytes()
    for damage in damages().values():
        path.write_bytes(damage(content))
        assert "best.safetensors is damaged or not a safetensors file" in refused(run)


def test_invalid_metadata_gets_one_line(run: Path) -> None:
    entries = ["{", "[]", "3", "{}", '{"model": 1, "data": 2}', json.dumps({"model": SPEC, "data": {"name": "x"}})]
    entries.append(json.dumps({"format": FORMAT, "model": SPEC | {"img_size": "large"}, "data": DATA}))
    for entry in entries:
        save_file({"x": torch.zeros(1)}, run / "best.safetensors", {"smallvit": entry})
        assert "does not describe a model" in refused(run)


def test_weights_that_do_not_fit_their_metadata_get_one_line(run: Path) -> None:
    save_file(
        {"x": torch.zeros(1)}, run / Run.BEST, {"smallvit": json.dumps({"format": FORMAT, "model": SPEC, "data": DATA})}
    )
    assert "do not fit" in refused(run)


def test_folders_without_weights_get_one_line(run: Path) -> None:
    (run / Run.BEST).unlink()
    assert "has not finished its first epoch" in refused(run)
    (run / Run.CONFIG).unlink()
    assert "not a run folder" in refused(run)


def test_pickled_files_are_not_opened(tmp_path: Path) -> None:
    for name in ("model.pth", "model.pt", "pytorch_model.bin"):
        torch.save({"x": torch.zeros(1)}, tmp_path / name)
        assert "only .safetensors files are read" in refused(tmp_path / name)


def test_other_files_and_exported_folders_get_one_line(run: Path, tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(b"x")
    assert "not a weights file; expected a run folder, a .safetensors file" in refused(tmp_path / "cat.png")
    (run / Run.BEST).rename(run / "model.safetensors")
    assert f"an exported folder; give the file in it, {run / 'model.safetensors'}" in refused(run)


def test_unknown_names_get_one_line() -> None:
    cases = [
        ("runs/of/another/folder", "no such file or folder"),
        ("weights.safetensors", "no such file or folder"),
        ("deit_tiny_patch16_242", "did you mean 'deit_tiny_patch16_224'?"),
        ("deit_tiny_patch16_242:pretrained", "did you mean 'deit_tiny_patch16_224'?"),
        ("deit_tiny_patch16_224.nonsense", "no pretrained weights by this name"),
        ("coatnet_0_224", "did you mean 'coatnet_0_rw_224'?"),
        ("gcvit_tiny", "not published as safetensors"),
        ("x" * 5000, "no such file, folder or timm model"),
    ]
    for name, message in cases:
        assert message in refused(name)


def test_paths_and_timm_models(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parent)
    assert files.absolute_name("run") == os.path.realpath(run)
    assert files.absolute_name("deit_tiny_patch16_224:pretrained") == "deit_tiny_patch16_224:pretrained"
    (run.parent / "resnet18").mkdir()
    assert "not a run folder" in refused("resnet18")


def test_info_of_timm_weights() -> None:
    info = weights_info.read_weights_info("deit_tiny_patch16_224:pretrained", "--init")
    assert info == replace(weights_info.read_weights_info("deit_tiny_patch16_224.fb_in1k", "--init"), name=info.name)
    assert info.spec | {"fit": False} == info.spec
    assert (info.spec["arch"], info.spec["img_size"], info.spec["num_classes"]) == ("deit_tiny_patch16_224", 224, 1000)
    assert (info.mean, info.data, info.path) == (timm.data.IMAGENET_DEFAULT_MEAN, "imagenet", None)
    assert info.class_names[207] == "n02099601"  # golden retriever
    assert (
        smallvit.create_model(**info.spec).state_dict().keys() == timm.create_model(info.timm_name).state_dict().keys()
    )


def test_timm_models_without_classes() -> None:
    info = weights_info.read_weights_info("vit_small_patch14_dinov2", "--init")
    assert (info.spec["num_classes"], info.class_names, info.data) == (0, None, None)


@pytest.mark.parametrize("arch", ["test_vit", "test_vit.r160_in1k"])
@pytest.mark.parametrize("classes", [0, 7, 1000])
def test_files_of_other_programs_hold_timm_models(tmp_path: Path, arch: str, classes: int) -> None:
    model = timm.create_model("test_vit", num_classes=classes)
    save_file(model.state_dict(), tmp_path / "plain.safetensors")
    info = trained.describe_file(weights_info.read_weights_info(str(tmp_path / "plain.safetensors"), "--init"), arch)
    assert info.spec["num_classes"] == classes
    assert (info.class_names, info.data) == (None, None)
    assert same_weights(trained.load_trained_model(info), model.state_dict())


def test_prefixes_of_wrapped_models_are_removed(
    run: Path, tmp_path: Path, smallvit: Callable[..., tuple[int, str, str]]
) -> None:
    """Test DataParallel, torch.compile, and both in either order; with our metadata, and without."""
    timms, plain = timm.create_model("test_vit", num_classes=3), tmp_path / "timm.safetensors"
    ours, metadata = checkpoint.load_weights(run / Run.BEST)
    Image.new("RGB", (160, 160)).save(tmp_path / "black.png")
    for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."):
        save_file({prefix + name: value for name, value in timms.state_dict().items()}, plain)
        info = trained.describe_file(weights_info.read_weights_info(str(plain), "--init"), "test_vit")
        assert info.spec["num_classes"] == 3
        assert same_weights(trained.load_trained_model(info), timms.state_dict())
        code, out, err = smallvit("predict", plain, tmp_path / "black.png", "--arch", "test_vit", "--format", "jsonl")
        assert (code, err, len(json.loads(out)["classes"])) == (0, "", 3)
        wrapped = {prefix + name: value for name, value in ours.items()}
        save_file(wrapped, tmp_path / "bare.safetensors")
        info = trained.identify_weights(
            weights_info.read_weights_info(str(tmp_path / "bare.safetensors"), "--init"), MODEL | SPEC
        )
        assert same_weights(trained.load_trained_model(info), ours)
        checkpoint.save_weights(run / Run.BEST, wrapped, metadata)
        assert same_weights(smallvit_package.load_model(run), ours)
        assert same_weights(trained.load_trained_model(weights_info.read_weights_info(str(run), "--teacher")), ours)


def test_the_first_mismatched_key_is_named(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "plain.safetensors"
    state = timm.create_model("test_vit", num_classes=3).state_dict()
    save_file({f"encoder.{name}": value for name, value in state.items()}, file)
    with pytest.raises(InputError, match=r"does not fit test_vit\S* \(Error\(s\) .* Missing key\(s\).*cls_token.*\)$"):
        trained.load_trained_model(
            trained.describe_file(weights_info.read_weights_info(str(file), "--init"), "test_vit")
        )
    ours, metadata = checkpoint.load_weights(run / Run.BEST)
    name = "blocks.0.mlp.fc1.bias"
    for weights, said in (
        (ours | {name: torch.zeros(3)}, rf"{name} has shape \(3,\), the model's has \(\d+,\)"),
        ({key: value for key, value in ours.items() if key != name}, f"{name} is missing"),
        (ours | {"odd": torch.zeros(3)}, "the model has no odd"),
    ):
        save_file(weights, file)
        with pytest.raises(InputError, match=rf"\({said}\)"):
            trained.load_trained_model(
                trained.identify_weights(weights_info.read_weights_info(str(file), "--init"), MODEL | SPEC)
            )
        checkpoint.save_weights(run / Run.BEST, weights, metadata)
        with pytest.raises(InputError, match=rf"\({said}\)"):
            smallvit_package.load_model(run)


def test_files_of_other_architectures_get_one_line(tmp_path: Path) -> None:
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "plain.safetensors")
    bare = weights_info.read_weights_info(str(tmp_path / "plain.safetensors"), "--init")
    with pytest.raises(InputError, match=r"plain\.safetensors does not fit test_resnet"):
        trained.load_trained_model(trained.describe_file(bare, "test_resnet"))
    for arch, message in (("vit", "not --arch vit"), ("test_vti", "did you mean"), ("test_vit.x", "no such weights")):
        with pytest.raises(InputError, match=message):
            trained.describe_file(bare, arch)


@pytest.mark.parametrize(
    ("arch", "arguments"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32, "embed_dim": 24, "depth": 2}),
        ("deit_tiny_distilled_patch16_224", {"img_size": 32, "embed_dim": 24, "depth": 2}),
        ("cait_xxs24_224", {"img_size": 32, "depth": 2}),
        ("swin_tiny_patch4_window7_224", {"img_size": 32, "depths": (1, 1), "num_heads": (3, 6), "window_size": 4}),
        ("resnet10t", {}),
        ("mobilenetv3_small_050", {}),
        ("convnext_atto", {}),
    ],
)
def test_features_equal_timm_without_a_classifier(arch: str, arguments: dict[str, object]) -> None:
    model, images = timm.create_model(arch, num_classes=5, **arguments).eval(), torch.randn(2, 3, 32, 32)
    result = trained.extract_features(model, images)
    model.reset_classifier(0)
    torch.testing.assert_close(result, model(images))


class Maps(torch.nn.Module):
    """A model whose head pools nothing."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten()[: torch.Size(self.shape).numel()].reshape(self.shape)

    def forward_head(self, result: torch.Tensor, pre_logits: bool) -> torch.Tensor:
        return result


def test_unpooled_features_are_averaged() -> None:
    images = torch.randn(2, 3, 8, 8)
    tokens, maps = (trained.extract_features(Maps(shape), images) for shape in ((2, 4, 5), (2, 5, 2, 2)))
    torch.testing.assert_close(tokens, images.flatten()[:40].reshape(2, 4, 5).mean(1))
    torch.testing.assert_close(maps, images.flatten()[:40].reshape(2, 5, 4).mean(2))


class Hub(BaseHTTPRequestHandler):
    """The part of the Hugging Face hub that a download asks, for the repository of one model."""

    def respond(self, *, body: bool) -> None:
        server, (_, owner, repository, *rest) = self.server, self.path.split("/")
        server.requests.append((self.command, self.path, self.headers.get("Range")))
        if f"{owner}/{repository}" != f"timm/{TINY}":
            return self.head(404, X_Error_Code="RepoNotFound", Content_Length=0)
        if server.content is None or rest != ["resolve", "main", "model.safetensors"]:
            return self.head(404, X_Error_Code="EntryNotFound", X_Repo_Commit="c" * 40, Content_Length=0)
        content, size = server.content, len(server.content)
        start = int(self.headers["Range"][6:-1]) if self.headers.get("Range") else 0
        extra = {"Content_Range": f"bytes {start}-{size - 1}/{size}"} if start else {}
        tag = hashlib.sha256(content).hexdigest()
        self.head(206 if start else 200, ETag=f'"{tag}"', X_Repo_Commit="c" * 40, Content_Length=size - start, **extra)
        if body:
            end = server.ends.pop(0) if server.ends else size
            self.wfile.write(content[start:end])
            self.close_connection = end < size
        return None

    def head(self, code: int, **headers: object) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def do_GET(self) -> None:
        self.respond(body=True)

    def do_HEAD(self) -> None:
        self.respond(body=False)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return {name: torch.randn_like(value) for name, value in timm.create_model(TINY).state_dict().items()}


def reach(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set what HF_ENDPOINT sets, for a client that has read it already."""
    constants = huggingface_hub.constants
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)


@pytest.fixture
def hub(
    weights: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ThreadingHTTPServer]:
    """Serve as the hub, for this process; `ends` are the bytes after which the first responses break off."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.requests, server.ends, server.content = [], [], save(weights)
    server.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    reach(server.address, monkeypatch)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("SMALLVIT_OFFLINE", raising=False)
    yield server
    server.shutdown()
    server.server_close()


def bodies(hub: ThreadingHTTPServer) -> list[str | None]:
    """Return the requested ranges of weights."""
    return [
        requested for command, path, requested in hub.requests if command == "GET" and path.endswith(".safetensors")
    ]


@pytest.mark.slow
def test_weights_are_downloaded_from_the_mirror_in_hf_endpoint(
    hub: ThreadingHTTPServer, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    block = 2**16
    hub.ends = [3 * block + 1]
    script = (
        "import sys; from huggingface_hub import constants; from safetensors.torch import save_file\n"
        f"from smallvit.models import weights, weights_info; constants.DOWNLOAD_CHUNK_SIZE = {block}\n"
        f"save_file(weights.load_trained_model(weights_info.read_weights_info({TINY!r}, '--init'))"
        ".state_dict(), sys.argv[1])"
    )
    paths_by_name = {"HF_ENDPOINT": hub.address, "HF_HUB_CACHE": str(tmp_path / "cache")}
    arguments = [sys.executable, "-c", script, tmp_path / "out.safetensors"]
    done = subprocess.run(arguments, env=os.environ | paths_by_name, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(result[name], weights[name]) for name in weights)
    assert bodies(hub) == [None, f"bytes={3 * block}-"]  # what was interrupted is resumed
    assert "model.safetensors" in done.stderr  # the bar


def test_weights_are_downloaded_once(hub: ThreadingHTTPServer, weights: dict[str, torch.Tensor]) -> None:
    for name in ("test_vit", f"{TINY}:pretrained"):
        assert same_weights(trained.load_trained_model(weights_info.read_weights_info(name, "--init")), weights)
    assert bodies(hub) == [None]


def test_offline_uses_the_cache_only(
    hub: ThreadingHTTPServer, weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMALLVIT_OFFLINE", "1")
    assert "SMALLVIT_OFFLINE is set" in refused(TINY)
    assert hub.requests == []
    monkeypatch.setenv("SMALLVIT_OFFLINE", "0")
    trained.load_trained_model(weights_info.read_weights_info(TINY, "--init"))
    monkeypatch.setenv("SMALLVIT_OFFLINE", "1")
    asked = len(hub.requests)
    assert same_weights(trained.load_trained_model(weights_info.read_weights_info(TINY, "--init")), weights)
    assert len(hub.requests) == asked


def test_truncated_downloads_are_repeated(
    hub: ThreadingHTTPServer, weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.ends = [1000] * 20
    assert "cannot be downloaded" in refused(TINY)
    hub.ends = []
    assert same_weights(trained.load_trained_model(weights_info.read_weights_info(TINY, "--init")), weights)


def test_missing_files_at_the_hub_get_one_line(hub: ThreadingHTTPServer) -> None:
    hub.content = None
    for name, reason in (("test_vit", "no such file"), ("test_resnet", "no such repository")):
        line = refused(name)
        assert reason in line
        assert f"set HF_ENDPOINT to a mirror, or give a downloaded .safetensors file with --arch {name}" in line
    assert not any(".bin" in path for _, path, _ in hub.requests)


def test_an_unreachable_hub_gets_one_line(hub: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    reach("http://127.0.0.1:9", monkeypatch)
    assert "the server does not respond, and they are not cached" in refused(TINY)


def test_weights_of_another_model_at_the_hub_get_one_line(hub: ThreadingHTTPServer) -> None:
    hub.content = save({"x": torch.zeros(3)})
    assert f"does not fit {TINY}" in refused(TINY)
