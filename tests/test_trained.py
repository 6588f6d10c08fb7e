"""Trained weights by name: what they say about themselves, and what is refused."""

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
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

import smallvit
from smallvit import InputError, checkpoint, datasets, headers, pretrained, trained
from smallvit.options import DataConfig
from smallvit.runs import Run

SPEC = {"arch": "vit", "img_size": 8, "in_chans": 3, "num_classes": 2, "patch_size": 2, "spt": True, "lsa": True}
DATA = {"name": "x", "class_names": ["a", "b"], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
TINY = "test_vit.r160_in1k"
"""timm's smallest model with pretrained weights, 1.5 MB."""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with weights that nobody trained."""
    folder = tmp_path / "run"
    folder.mkdir()
    model = smallvit.create_model(**SPEC)
    checkpoint.save_weights(folder / Run.BEST, checkpoint.snapshot(model), {"model": SPEC, "data": DATA, "epoch": 1})
    (folder / Run.CONFIG).write_text(json.dumps(smallvit.Config.build(spt=True, lsa=True, epochs=7).options()))
    return folder


def refused(name: object, option: str = "--teacher") -> str:
    """The one line that a name gets."""
    with pytest.raises(InputError) as caught:
        trained.load(trained.card(str(name), option))
    line = str(caught.value)
    assert line.startswith(f"{option} {name}: ")
    assert len(line.splitlines()) == 1
    return line


def same_weights(one: torch.nn.Module, other: dict[str, torch.Tensor]) -> bool:
    state = one.state_dict()
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in other)


def test_a_run_says_what_it_holds(run: Path) -> None:
    card = trained.card(str(run), "--init")
    assert (card.name, card.path, card.spec) == (str(run), run / "best.safetensors", SPEC)
    assert (card.class_names, card.data) == (("a", "b"), "x")
    assert (card.mean, card.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert card.test is None


def test_a_weights_file_says_the_same_as_its_folder(run: Path) -> None:
    folder, file = (trained.card(str(path), "--init") for path in (run, run / "best.safetensors"))
    assert replace(folder, name=file.name) == file


def test_the_model_comes_as_it_was_saved(run: Path) -> None:
    model = trained.load(trained.card(str(run), "--init"))
    assert same_weights(model, load_file(run / "best.safetensors"))
    assert not model.training


def test_files_are_described_without_torch(run: Path) -> None:
    check = (
        f"import sys; from smallvit import trained; trained.card({str(run)!r}, 'x')\nsys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_the_header_is_the_one_that_safetensors_reads(run: Path) -> None:
    path = run / "best.safetensors"
    with safe_open(path, "pt") as file:
        expected = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        assert headers.header(path)["__metadata__"] == file.metadata()
    assert headers.shapes(path) == expected


def test_another_programs_file_does_not_say_what_it_is_of(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2, 3)}, tmp_path / "plain.safetensors")
    card = trained.card(str(tmp_path / "plain.safetensors"), "--init")
    assert (card.spec, card.class_names, card.data, card.mean, card.test) == (None,) * 5
    assert "does not say what model it holds" in refused(tmp_path / "plain.safetensors")


def spoilt() -> dict[str, Callable[[bytes], bytes]]:
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
        "no places": lambda content: (8).to_bytes(8, "little") + b'{"x":{}}',
        "odd places": lambda content: (24).to_bytes(8, "little") + b'{"x":{"data_offsets":1}}',
        "deep": lambda content: (90_000).to_bytes(8, "little") + b"[" * 90_000,
        "HTML": lambda content: b"<!DOCTYPE html>" * 100,
    }


@pytest.mark.parametrize("case", spoilt())
def test_damaged_files_get_one_line(run: Path, case: str) -> None:
    path = run / "best.safetensors"
    path.write_bytes(spoilt()[case](path.read_bytes()))
    assert "best.safetensors is damaged or no safetensors file" in refused(run)


@pytest.mark.parametrize(
    "entry",
    [
        "{",
        "[]",
        "3",
        "{}",
        '{"model": 1, "data": 2}',
        json.dumps({"model": SPEC, "data": {"name": "x"}}),
        json.dumps({"format": 2, "model": SPEC | {"img_size": "large"}, "data": DATA}),
    ],
)
def test_metadata_of_another_form_get_one_line(run: Path, entry: str) -> None:
    save_file({"x": torch.zeros(1)}, run / "best.safetensors", {"smallvit": entry})
    assert "does not describe a model" in refused(run)


def test_weights_that_do_not_fit_their_metadata_get_one_line(run: Path) -> None:
    save_file(
        {"x": torch.zeros(1)}, run / Run.BEST, {"smallvit": json.dumps({"format": 2, "model": SPEC, "data": DATA})}
    )
    assert "do not fit" in refused(run)


def test_a_folder_that_is_no_run_and_a_run_without_weights_are_told_apart(run: Path) -> None:
    (run / Run.BEST).unlink()
    assert "has not finished its first epoch" in refused(run)
    (run / Run.CONFIG).unlink()
    assert "not the folder of a run" in refused(run)


@pytest.mark.parametrize("name", ["model.pth", "model.pt", "pytorch_model.bin"])
def test_files_that_can_run_code_are_not_opened(tmp_path: Path, name: str) -> None:
    torch.save({"x": torch.zeros(1)}, tmp_path / name)
    assert "only .safetensors files are read" in refused(tmp_path / name)


def test_files_that_are_no_weights_and_exported_folders_are_told_apart(run: Path, tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(b"x")
    assert "no weights; expected a run's folder, a .safetensors file" in refused(tmp_path / "cat.png")
    (run / Run.BEST).rename(run / "model.safetensors")
    assert f"an exported folder; give the file in it, {run / 'model.safetensors'}" in refused(run)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("runs/of/another/folder", "no such file or folder"),
        ("weights.safetensors", "no such file or folder"),
        ("deit_tiny_patch16_242", "did you mean 'deit_tiny_patch16_224'?"),
        ("deit_tiny_patch16_242:pretrained", "did you mean 'deit_tiny_patch16_224'?"),
        ("deit_tiny_patch16_224.nonsense", "no pretrained weights by this name"),
        ("coatnet_0_224", "did you mean 'coatnet_0_rw_224'?"),
        ("gcvit_tiny", "not published as safetensors"),
        ("x" * 5000, "no such file, folder or model of timm's"),
    ],
)
def test_names_that_stand_for_nothing_get_one_line(name: str, message: str) -> None:
    assert message in refused(name)


def test_paths_are_told_from_timm_models_and_made_absolute(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parent)
    assert trained.absolute("run") == os.path.realpath(run)
    assert trained.absolute("deit_tiny_patch16_224:pretrained") == "deit_tiny_patch16_224:pretrained"
    (run.parent / "resnet18").mkdir()
    assert "not the folder of a run" in refused("resnet18")


def test_timms_weights_are_described_as_timm_does() -> None:
    card = trained.card("deit_tiny_patch16_224:pretrained", "--init")
    assert card == replace(trained.card("deit_tiny_patch16_224.fb_in1k", "--init"), name=card.name)
    assert card.spec | {"fit": False} == card.spec
    assert (card.spec["arch"], card.spec["img_size"], card.spec["num_classes"]) == ("deit_tiny_patch16_224", 224, 1000)
    assert (card.mean, card.data, card.path) == (timm.data.IMAGENET_DEFAULT_MEAN, "imagenet", None)
    assert card.class_names[207] == "n02099601"  # golden retriever
    assert smallvit.create_model(**card.spec).state_dict().keys() == timm.create_model(card.tagged).state_dict().keys()


def test_models_without_classes_know_none() -> None:
    card = trained.card("vit_small_patch14_dinov2", "--init")
    assert (card.spec["num_classes"], card.class_names, card.data) == (0, None, None)


@pytest.mark.parametrize("arch", ["test_vit", "test_vit.r160_in1k"])
@pytest.mark.parametrize("classes", [0, 7, 1000])
def test_another_programs_file_is_one_of_timms_models_by_its_architecture(
    tmp_path: Path, arch: str, classes: int
) -> None:
    model = timm.create_model("test_vit", num_classes=classes)
    save_file(model.state_dict(), tmp_path / "plain.safetensors")
    card = pretrained.of_file(trained.card(str(tmp_path / "plain.safetensors"), "--init"), arch)
    assert card.spec["num_classes"] == classes
    assert (card.class_names, card.data) == (None, None)
    assert same_weights(trained.load(card), model.state_dict())


def test_a_file_of_another_architecture_gets_one_line(tmp_path: Path) -> None:
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "plain.safetensors")
    bare = trained.card(str(tmp_path / "plain.safetensors"), "--init")
    with pytest.raises(InputError, match=r"plain\.safetensors does not fit test_resnet"):
        trained.load(pretrained.of_file(bare, "test_resnet"))
    for arch, message in (("vit", "not --arch vit"), ("test_vti", "did you mean"), ("test_vit.x", "no such weights")):
        with pytest.raises(InputError, match=message):
            pretrained.of_file(bare, arch)


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
def test_features_are_what_timm_gives_without_a_classifier(arch: str, arguments: dict[str, object]) -> None:
    model, images = timm.create_model(arch, num_classes=5, **arguments).eval(), torch.randn(2, 3, 32, 32)
    found = trained.features(model, images)
    model.reset_classifier(0)
    torch.testing.assert_close(found, model(images))


class Maps(torch.nn.Module):
    """A model whose head pools nothing."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten()[: torch.Size(self.shape).numel()].reshape(self.shape)

    def forward_head(self, found: torch.Tensor, pre_logits: bool) -> torch.Tensor:
        return found


def test_what_a_head_leaves_unpooled_is_averaged() -> None:
    images = torch.randn(2, 3, 8, 8)
    tokens, maps = (trained.features(Maps(shape), images) for shape in ((2, 4, 5), (2, 5, 2, 2)))
    torch.testing.assert_close(tokens, images.flatten()[:40].reshape(2, 4, 5).mean(1))
    torch.testing.assert_close(maps, images.flatten()[:40].reshape(2, 5, 4).mean(2))


def test_images_of_the_test_that_weights_may_have_learnt_are_refused() -> None:
    dataset, config = datasets.load(DataConfig()), DataConfig()
    card = trained.Card(name="x", option="--teacher", path=None, test=trained.held_out(dataset, config))
    trained.require_same_test(card, dataset, config)
    for changed in (DataConfig(split_seed=1), DataConfig(test_fraction=0.5)):
        with pytest.raises(InputError, match="images of the test may be among those that it learnt"):
            trained.require_same_test(card, dataset, changed)
        trained.require_same_test(card, replace(dataset, source="others"), changed)
        trained.require_same_test(card, replace(dataset, drew_test=False), changed)
        trained.require_same_test(replace(card, test=None), dataset, changed)


def test_data_is_known_by_what_it_holds_as_well_as_by_where_it_lies() -> None:
    dataset, config, changed = replace(datasets.load(DataConfig()), content="x"), DataConfig(), DataConfig(split_seed=1)
    card = trained.Card(name="x", option="--init", path=None, test=trained.held_out(dataset, config))
    with pytest.raises(InputError, match="are not those that it was trained with"):
        trained.require_unchanged(card, replace(dataset, content="y"), config)
    trained.require_unchanged(card, dataset, config)
    trained.require_unchanged(card, replace(dataset, content="y", drew_test=False), config)
    with pytest.raises(InputError, match="give the same here"):
        trained.require_same_test(card, replace(dataset, source="a copy"), changed)
    trained.require_same_test(card, replace(dataset, source="others", content="y"), changed)
    old = replace(card, test={name: value for name, value in card.test.items() if name != "content"})
    trained.require_unchanged(old, replace(dataset, content="y"), config)
    trained.require_same_test(old, replace(dataset, source="a copy"), changed)
    with pytest.raises(InputError, match="give the same here"):
        trained.require_same_test(old, dataset, changed)


def test_weights_that_do_not_say_what_they_learnt_are_known_by_the_name_of_their_data() -> None:
    dataset = datasets.load(DataConfig())
    card = trained.Card(name="x", option="eval", path=None, data="digits")
    assert trained.has_learnt_from(card, dataset)
    assert not trained.has_learnt_from(card, replace(dataset, source="/photos/digits"))
    assert not trained.has_learnt_from(replace(card, data=None), dataset)


class Hub(BaseHTTPRequestHandler):
    """The part of the Hugging Face hub that a download asks, for the repository of one model."""

    def answer(self, *, body: bool) -> None:
        server, (_, owner, repository, *rest) = self.server, self.path.split("/")
        server.requests.append((self.command, self.path, self.headers.get("Range")))
        if f"{owner}/{repository}" != f"timm/{TINY}":
            return self.head(404, X_Error_Code="RepoNotFound", Content_Length=0)
        if server.content is None or rest != ["resolve", "main", "model.safetensors"]:
            return self.head(404, X_Error_Code="EntryNotFound", X_Repo_Commit="c" * 40, Content_Length=0)
        content, size = server.content, len(server.content)
        start = int(self.headers["Range"][6:-1]) if self.headers.get("Range") else 0
        place = {"Content_Range": f"bytes {start}-{size - 1}/{size}"} if start else {}
        tag = hashlib.sha256(content).hexdigest()
        self.head(206 if start else 200, ETag=f'"{tag}"', X_Repo_Commit="c" * 40, Content_Length=size - start, **place)
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
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return {name: torch.randn_like(value) for name, value in timm.create_model(TINY).state_dict().items()}


def reach(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT does, for a client that has read it already."""
    constants = huggingface_hub.constants
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)


@pytest.fixture
def hub(
    weights: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ThreadingHTTPServer]:
    """A server that plays the hub, for this process; `ends` are the bytes after which the first answers break off."""
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
    """The ranges of weights asked for."""
    return [wanted for command, path, wanted in hub.requests if command == "GET" and path.endswith(".safetensors")]


def test_weights_come_from_the_mirror_that_the_environment_names(
    hub: ThreadingHTTPServer, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    block = 2**16
    hub.ends = [3 * block + 1]
    script = (
        "import sys; from huggingface_hub import constants; from safetensors.torch import save_file\n"
        f"from smallvit import trained; constants.DOWNLOAD_CHUNK_SIZE = {block}\n"
        f"save_file(trained.load(trained.card({TINY!r}, '--init')).state_dict(), sys.argv[1])"
    )
    places = {"HF_ENDPOINT": hub.address, "HF_HUB_CACHE": str(tmp_path / "cache")}
    arguments = [sys.executable, "-c", script, tmp_path / "out.safetensors"]
    done = subprocess.run(arguments, env=os.environ | places, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert bodies(hub) == [None, f"bytes={3 * block}-"]  # what was interrupted goes on
    assert "model.safetensors" in done.stderr  # the bar


def test_weights_are_downloaded_once(hub: ThreadingHTTPServer, weights: dict[str, torch.Tensor]) -> None:
    for name in ("test_vit", f"{TINY}:pretrained"):
        assert same_weights(trained.load(trained.card(name, "--init")), weights)
    assert bodies(hub) == [None]


def test_offline_nothing_is_asked_of_the_network(
    hub: ThreadingHTTPServer, weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMALLVIT_OFFLINE", "1")
    assert "offline, as SMALLVIT_OFFLINE says" in refused(TINY)
    assert hub.requests == []
    monkeypatch.setenv("SMALLVIT_OFFLINE", "0")
    trained.load(trained.card(TINY, "--init"))
    monkeypatch.setenv("SMALLVIT_OFFLINE", "1")
    asked = len(hub.requests)
    assert same_weights(trained.load(trained.card(TINY, "--init")), weights)
    assert len(hub.requests) == asked


def test_a_file_that_arrives_short_is_refused_and_asked_for_anew(
    hub: ThreadingHTTPServer, weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.ends = [1000] * 20
    assert "cannot be had" in refused(TINY)
    hub.ends = []
    assert same_weights(trained.load(trained.card(TINY, "--init")), weights)


def test_what_the_hub_does_not_have_gets_one_line_with_ways_out(hub: ThreadingHTTPServer) -> None:
    hub.content = None
    for name, reason in (("test_vit", "no such file there"), ("test_resnet", "no such repository there")):
        line = refused(name)
        assert reason in line
        assert f"name a mirror by HF_ENDPOINT, or give the downloaded file.safetensors with --arch {name}" in line
    assert not any(".bin" in path for _, path, _ in hub.requests)


def test_a_hub_that_cannot_be_reached_gets_one_line(hub: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    reach("http://127.0.0.1:9", monkeypatch)
    assert "no answer from there, and not downloaded before" in refused(TINY)


def test_weights_of_another_model_at_the_hub_get_one_line(hub: ThreadingHTTPServer) -> None:
    hub.content = save({"x": torch.zeros(3)})
    assert f"does not fit {TINY}" in refused(TINY)
