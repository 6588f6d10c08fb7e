"""Test that exported models have the logits of the original in other programs."""

from __future__ import annotations

import base64
import functools
import json
import shlex
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import numpy as np
import onnxruntime
import pytest
import timm
import torch
import yaml
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass

import smallvit as package
from smallvit import datasets
from smallvit.cli import main
from smallvit.cli.parser import options_parser
from smallvit.cli.parser import parse as parse_arguments
from smallvit.config.config import Config, format_train_command, option_names
from smallvit.config.options import DataConfig
from smallvit.evaluation.predictor import Predictor, load_predictor
from smallvit.evaluation.stats import accuracy_interval
from smallvit.export import export as exporting
from smallvit.export import timm_folder, verify
from smallvit.export.export import FOLDER_FILES
from smallvit.models import checkpoint, factory
from smallvit.models.factory import create_model, prepare_for_inference
from smallvit.models.weights_info import WeightsInfo
from smallvit.utils.errors import InputError

Command = Callable[..., tuple[int, str, str]]
CPU = {"device": "cpu", "amp": "off"}
QUICK = ["--epochs", "1", "--batch-size", "32", "--aug", "none", "--device", "cpu", "--amp", "off"]
NAMES = tuple("abcde")
BOTH = {"plugins": {"spt": True, "lsa": True}}


@pytest.fixture(scope="module")
def run(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the shared run, a ViT with SPT and LSA on the digits."""
    return shutil.copytree(trained_run, tmp_path_factory.mktemp("runs") / "digits-run")


@pytest.fixture(scope="module")
def exports(run: Path) -> Path:
    """Export the run as folders into its own folder."""
    for form in ("timm", "hub"):
        assert main(["export", str(run), "--format", form]) == 0
    return run / "export"


@pytest.fixture(scope="module")
def images(run: Path) -> Tensor:
    """Return 200 normalized test images of the digits."""
    test = datasets.create_dataset(DataConfig(data="digits")).test
    return load_predictor(str(run), "export", **CPU).normalize(test.pixels[:200])


def tiny(arch: str, *, truncated: bool = False, img_size: int = 16, in_chans: int = 3, **options: object) -> Predictor:
    """Build the predictor of an untrained model; `truncated` keeps one block of each kind in a stage."""
    torch.manual_seed(0)
    spec = {"arch": arch, "img_size": img_size, "in_chans": in_chans, "num_classes": len(NAMES), **options}
    model = create_model(**spec)
    for module in (model, *getattr(model, "layers", ()), *getattr(model, "transformers", ())):
        if truncated and hasattr(module, "blocks"):
            module.blocks = module.blocks[: 2 if arch == "swin" else 1]
    spec["patch_size"] = factory.default_patch_size(arch, img_size, fit=options.get("fit", True))
    half = (0.5,) * in_chans
    card = WeightsInfo(name=arch, option="export", path=None, spec=spec, class_names=NAMES, mean=half, std=half)
    return Predictor(
        info=card,
        model=prepare_for_inference(model, torch.device("cpu"), torch.float32),
        img_size=img_size,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


def assert_same(logits: Tensor | np.ndarray, expected: Tensor) -> None:
    torch.testing.assert_close(torch.as_tensor(logits), expected, atol=1e-4, rtol=0)
    assert torch.equal(torch.as_tensor(logits).argmax(1), expected.argmax(1))


@torch.no_grad()
def predict(run: Path, images: Tensor) -> Tensor:
    return package.load_model(run)(images)


def preprocessing(model: nn.Module) -> dict:
    """Return timm's preprocessing of a model, with lists for tuples."""
    return json.loads(json.dumps(timm.data.resolve_model_data_config(model)))


@pytest.mark.slow
def test_onnxruntime_reproduces_the_run(run: Path, images: Tensor) -> None:
    assert main(["export", str(run), "--format", "onnx"]) == 0
    session = onnxruntime.InferenceSession(run / "export" / "digits-run.onnx")
    expected = predict(run, images)
    for batch in (1, 7, 200):
        assert_same(session.run(["logits"], {"images": images[:batch].numpy()})[0], expected[:batch])
    metadata = session.get_modelmeta().custom_metadata_map
    info = load_predictor(str(run), "export", **CPU).info
    assert json.loads(metadata["class_names"]) == list("0123456789")
    assert (json.loads(metadata["mean"]), json.loads(metadata["std"])) == (list(info.mean), list(info.std))
    assert (metadata["img_size"], metadata["in_chans"]) == ("8", "1")
    assert "(pixels / 255 - mean) / std" in metadata["preprocessing"]


@pytest.mark.slow
def test_torch_export_reproduces_the_run(run: Path, images: Tensor) -> None:
    assert main(["export", str(run), "--format", "pt2"]) == 0
    extra = {"metadata.json": ""}
    program = torch.export.load(run / "export" / "digits-run.pt2", extra_files=extra).module()
    expected = predict(run, images)
    for batch in (1, 200):
        assert_same(program(images[:batch]).detach(), expected[:batch])
    assert json.loads(json.loads(extra["metadata.json"])["class_names"]) == list("0123456789")


@pytest.mark.slow
def test_small_models_are_exported_to_onnx_and_torch_export(tmp_path: Path) -> None:
    model = tiny("vit", truncated=True, **BOTH)
    exporting.write_onnx(model, tmp_path / "model.onnx")  # verifies the logits
    exporting.write_pt2(model, tmp_path / "model.pt2")
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "model.pt2"}


@pytest.mark.parametrize("form", ["timm", "hub"])
def test_timm_loads_the_folder(exports: Path, run: Path, images: Tensor, form: str) -> None:
    model = timm.create_model(f"local-dir:{exports / form}", pretrained=True).eval()
    with torch.no_grad():
        assert_same(model(images), predict(run, images))
    assert preprocessing(model) == preprocessing(package.load_model(run))
    assert list(model.pretrained_cfg["label_names"]) == list("0123456789")
    assert {file.name for file in (exports / form).iterdir()} | {"README.md"} == set(FOLDER_FILES)


def test_smallvit_loads_the_exported_weights(exports: Path, run: Path, images: Tensor) -> None:
    path = exports / "timm" / "model.safetensors"
    with torch.no_grad():
        assert torch.equal(package.load_model(path)(images), predict(run, images))
    assert load_predictor(str(path), "predict", **CPU).class_names == tuple("0123456789")


def test_timm_adapts_a_folder_to_other_classes_and_sizes(exports: Path) -> None:
    name = f"local-dir:{exports / 'timm'}"
    model, trained = timm.create_model(name, pretrained=True, num_classes=4), timm.create_model(name, pretrained=True)
    assert model(torch.zeros(1, 1, 8, 8)).shape == (1, 4)
    assert torch.equal(model.blocks[0].attn.qkv.weight, trained.blocks[0].attn.qkv.weight)
    assert timm.create_model(name, pretrained=True, img_size=12)(torch.zeros(1, 1, 12, 12)).shape == (1, 10)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("vit", BOTH),
        ("cait", {"plugins": {"lsa": True}}),
        ("pit", {"plugins": {"lsa": True}}),
        ("swin", {}),
        ("t2t", {"plugins": {"spt": True}}),
        ("vit", {"dist_token": True, "dist_average": "probabilities"}),
        ("resnet20", {}),
        ("test_resnet", {}),
    ],
)
def test_onnxruntime_runs_every_family(arch: str, options: dict, tmp_path: Path) -> None:
    exporting.write_onnx(tiny(arch, truncated=True, **options), tmp_path / "model.onnx")  # verifies the logits
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert session.run(None, {"images": np.zeros((3, 3, 16, 16), np.float32)})[0].shape == (3, 5)


def write_without_file(model: Predictor, folder: Path) -> None:
    """Write the timm folder of a model that has no weights file."""
    folder.mkdir()
    info = WeightsInfo(**vars(model.info) | {"class_names": None})
    timm_folder.write_folder(Predictor(**vars(model) | {"info": info}), folder)  # verifies the logits


@pytest.mark.parametrize("archs", [("vit",), pytest.param(("cait", "pit", "swin", "t2t"), marks=pytest.mark.slow)])
def test_timm_loads_every_family(archs: tuple[str, ...], tmp_path: Path) -> None:
    for arch in archs:
        for number, options in enumerate(({}, BOTH)):
            model, folder = tiny(arch, img_size=32, **options), tmp_path / f"{arch}-{number}"
            write_without_file(model, folder)
            images = torch.randn(3, 3, 32, 32)
            loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
            with torch.no_grad():
                assert torch.equal(loaded(images), model.model(images)), folder.name
            assert json.loads((folder / "config.json").read_text())["architecture"] == "smallvit_model"


@pytest.mark.slow
def test_timm_needs_smallvit_only_for_models_it_cannot_build(tmp_path: Path) -> None:
    models: list[tuple[str, dict, bool]] = [
        ("deit_tiny_patch16_224", {}, True),
        ("swin_tiny_patch4_window7_224", {"img_size": 32}, True),
        ("test_vit", {"in_chans": 1}, True),
        ("test_vit", {"plugins": {"lsa": True}}, False),
        ("test_vit", {"dist_token": True}, False),
        ("resnet18", {"img_size": 64}, False),
        ("resnet18", {"img_size": 64, "fit": False}, True),
        ("test_efficientnet", {"img_size": 160}, True),
        ("resnet20", {}, False),
    ]
    for number, (arch, options, is_timm) in enumerate(models):
        model, folder = tiny(arch, **{"img_size": 32} | options), tmp_path / str(number)
        write_without_file(model, folder)
        assert timm_folder.is_timm_model(model.info.spec) == is_timm, (arch, options)
        architecture = json.loads((folder / "config.json").read_text())["architecture"]
        assert architecture == (arch if is_timm else "smallvit_model")
        adapted = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=3).eval()
        assert adapted(torch.zeros(1, model.in_chans, model.img_size, model.img_size)).shape == (1, 3)


@pytest.mark.slow
def test_export_at_another_image_size(run: Path, smallvit: Command, tmp_path: Path) -> None:
    for form, out in (("timm", tmp_path / "timm"), ("pt2", tmp_path / "model.pt2")):
        assert smallvit("export", run, "--format", form, "--img-size", "12", "--out", out)[0] == 0
    images = torch.randn(2, 1, 12, 12)
    expected = load_predictor(str(run), "export", img_size=12, **CPU).predict_logits(images)
    with torch.no_grad():
        assert_same(timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()(images), expected)
        assert_same(package.load_model(tmp_path / "timm" / "model.safetensors")(images), expected)
    assert_same(torch.export.load(tmp_path / "model.pt2").module()(images).detach(), expected)


def front_and_body(page: str) -> tuple[dict, str]:
    _, front, body = page.split("---\n", 2)
    return yaml.safe_load(front), body


def test_card_has_the_results_of_the_run(exports: Path, run: Path) -> None:
    front, body = front_and_body((exports / "hub" / "README.md").read_text())
    summary = json.loads((run / "summary.json").read_text())
    assert front["library_name"] == "timm"
    assert "license" not in front
    (result,) = front["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == round(summary["test_top1"], 2)
    correct = round(summary["test_top1"] * summary["test_images"] / 100)
    low, high = accuracy_interval(correct, summary["test_images"])[0]
    for text in (
        f"| top-1 accuracy | {summary['test_top1']:.2f} % |",
        f"| 95 % interval | {low:.2f} to {high:.2f} % |",
        f"| parameters | {summary['parameters']:,} |",
        "smallvit train --arch vit --spt --lsa",
        "--epochs 2 --batch-size 32",
        f"{summary['images_seen']:,} images seen",
        "CC BY 4.0",
        "seed 0",
        "2112.13492",
        "import smallvit.models.timm_registry",
    ):
        assert text in body
    assert str(run.parent) not in body


def test_card_snippet_runs(
    exports: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    page = (exports / "hub" / "README.md").read_text()
    snippet = page.split("```python\n")[1].split("```")[0].replace("hf-hub:OWNER/NAME", f"local-dir:{exports / 'hub'}")
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    exec(snippet, {})
    name, probability = capsys.readouterr().out.split()
    assert name in "0123456789"
    assert 0.1 < float(probability) <= 1


@pytest.mark.slow
def test_card_uses_evaluation_results_of_the_same_weights(run: Path, tmp_path: Path, smallvit: Command) -> None:
    file = run / "eval" / "test" / "metrics.json"
    assert smallvit("eval", run, "--device", "cpu", "--amp", "off")[0] == 0
    metrics = json.loads(file.read_text())
    low, high = metrics["interval"]
    texts = f"{low:.2f} to {high:.2f} %", f"| calibration error (ECE) | {metrics['ece']:.2f} % |"
    for changed, used in (({}, True), ({"weights_sha256": "0" * 64}, False), ({"split": "val"}, False)):
        file.write_text(json.dumps(metrics | changed))
        out = tmp_path / f"card-{len(list(tmp_path.iterdir()))}"
        assert smallvit("export", run, "--format", "hub", "--out", out, "--license", "cc-by-4.0")[0] == 0
        front, body = front_and_body((out / "README.md").read_text())
        assert front["license"] == "cc-by-4.0"
        assert texts[0] in body or not used
        assert (texts[1] in body) == used
        assert ("calibrated was not measured" in body) != used
    shutil.rmtree(run / "eval")


def test_local_paths_are_not_exported(image_folder: Path, tmp_path: Path, smallvit: Command) -> None:
    arguments = ["--arch", "resnet20", "--img-size", "16", *QUICK]
    assert smallvit("train", "--data", image_folder, *arguments, "--out", tmp_path / "own")[0] == 0
    assert smallvit("export", tmp_path / "own", "--format", "hub")[0] == 0
    texts = [file.read_bytes() for file in (tmp_path / "own" / "export" / "hub").iterdir()]
    assert len(texts) == 4
    assert all(str(tmp_path).encode() not in text for text in texts)
    assert b"--data images" in b"".join(texts)


def test_earlier_exports_are_replaced_with_overwrite_only(run: Path, tmp_path: Path, smallvit: Command) -> None:
    out = tmp_path / "folder"
    export = functools.partial(smallvit, "export", run, "--format", "timm", "--out", out)
    assert export()[0] == 0
    code, _, err = export()
    assert code == 2
    assert "--overwrite" in err
    assert export("--overwrite")[0] == 0
    (out / "thesis.tex").write_text("years of work")
    (out / "README.md").write_text("of an earlier export")
    assert export("--overwrite")[0] == 0
    assert {file.name for file in out.iterdir()} == {"thesis.tex", "preprocess.py", "config.json", "model.safetensors"}


@pytest.mark.parametrize("form", [pytest.param("pt2", marks=pytest.mark.slow), "timm"])
def test_interruption_leaves_earlier_exports(
    run: Path, tmp_path: Path, smallvit: Command, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "verify_logits", interrupt)
    monkeypatch.setattr(timm_folder, "verify_logits", interrupt)
    out = tmp_path / ("model.pt2" if form == "pt2" else "folder")
    export = functools.partial(smallvit, "export", run, "--format", form, "--out", out)
    assert export()[0] == 130
    assert list(tmp_path.iterdir()) == []
    if form == "timm":
        out.mkdir()
        (out / "config.json").write_text("before")
        assert export("--overwrite")[0] == 130
        assert (out / "config.json").read_text() == "before"
        assert list(tmp_path.iterdir()) == [out]


@pytest.mark.slow
def test_different_logits_are_an_error_and_leave_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("resnet20")
    real = torch.export.export
    monkeypatch.setattr(
        torch.export, "export", lambda _, *a, **k: real(create_model(**model.info.spec).eval(), *a, **k)
    )
    with pytest.raises(InputError, match=r"the logits in torch\.export differ from the model's by up to"):
        exporting.write_pt2(model, tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


def test_tolerance_is_relative_to_logits_above_one() -> None:
    model = tiny("vit")
    for scale, is_equal in ((1e-3, False), (1.0, False), (100.0, True)):
        with torch.no_grad():
            model.model.head.weight.zero_()
            model.model.head.bias.copy_(torch.tensor([1.0, -0.5, 0.2, 0.0, 0.0]) * scale)
        error = torch.tensor([0.0, 0.0, 0.0, 5e-4, 0.0])  # in a logit of 0
        with (
            nullcontext() if is_equal else pytest.raises(InputError, match=r"differ from the model's by up to 0\.0005")
        ):
            verify.verify_logits(model, lambda images, error=error: model.predict_logits(images) + error, "test")


def test_nan_and_other_shapes_are_errors() -> None:
    with pytest.raises(InputError, match="by up to nan"):
        verify.verify_logits(tiny("vit"), lambda x: x.new_full((len(x), 5), torch.nan), "test")
    with pytest.raises(InputError, match="test returns logits of shape"):
        verify.verify_logits(tiny("vit"), lambda x: x[:1, 0, :1, :5], "test")


def test_run_with_markup_in_its_name(run: Path, tmp_path: Path, smallvit: Command) -> None:
    named = tmp_path / "run [/b] :cat:"
    shutil.copytree(run, named, ignore=shutil.ignore_patterns("export"))
    assert smallvit("export", named, "--format", "timm")[0] == 0


def test_card_command_reproduces_the_run() -> None:
    options = {"arch": "vit", "spt": True, "lsa": True, "spt_norm": False, "data": "/home/me/-mine", "out": "here"}
    config = Config.build(**options)
    line = format_train_command(config, option_names("resumable", "launch"), keep_folders=False)
    assert line == "smallvit train --arch vit --spt --no-spt-norm --lsa --data=-mine"
    again = parse_arguments(options_parser("smallvit train", ""), shlex.split(line)[2:])
    assert Config.build(**again).to_dict() == Config.build(**options | {"data": "-mine", "out": None}).to_dict()


def test_missing_onnx_packages_are_a_one_line_error(
    run: Path, smallvit: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "find_spec", lambda name: None if name == "onnxscript" else name)
    code, _, err = smallvit("export", run, "--format", "onnx", "--overwrite")
    assert (code, err) == (2, "smallvit: --format onnx needs onnxscript: pip install 'smallvit[onnx]'\n")


BAD_INPUT = [
    (["RUN"], "the value is missing"),
    (["RUN", "--format", "tflite"], "invalid choice"),
    (["RUN", "--format", "timm", "--push", "me/mine"], "--push has no effect with --format timm"),
    (["RUN", "--format", "hub", "--private"], "--private has no effect without --push"),
    (["RUN", "--format", "hub", "--license", "My own"], "expected a license identifier"),
    (["RUN", "--format", "pt2", "--out", "model.pt"], "expected a name that ends in .pt2"),
    (["RUN", "--format", "pt2", "--out", "none/model.pt2"], "no such folder"),
    (["RUN", "--format", "timm", "--arch", "vit", "--out", "OUT"], "--arch"),
    (["WEIGHTS", "--format", "pt2"], "not a run folder, so there is no default output path; add --out"),
    (["WEIGHTS", "--format", "hub", "--out", "OUT"], "card"),
    (["runs/none", "--format", "timm", "--out", "OUT"], "export runs/none: no such file or folder"),
]


def test_bad_input_is_a_one_line_error(run: Path, smallvit: Command, tmp_path: Path) -> None:
    paths, failures = {"RUN": run, "WEIGHTS": run / "best.safetensors", "OUT": tmp_path / "out"}, []
    for arguments, message in BAD_INPUT:
        code, out, err = smallvit("export", *[paths.get(argument, argument) for argument in arguments])
        if (code, out, len(err.splitlines())) != (2, "", 1) or message not in err or list(tmp_path.iterdir()):
            failures.append(f"{arguments}: {err}")
    assert not failures, "\n".join(failures)


class Hub(BaseHTTPRequestHandler):
    """The requests of the Hub that an upload of small files needs."""

    files: dict[str, bytes]
    status = 200

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            sent = [line["value"] for line in lines if line["key"] == "file"]
            Hub.files |= {each["path"]: base64.b64decode(each["content"]) for each in sent}
        names = [file["path"] for file in json.loads(body).get("files", [])] if "/preupload/" in self.path else []
        response = {
            "url": f"{self.server.url}/me/mine",
            "files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names],
            "commitUrl": f"{self.server.url}/me/mine/commit/0",
            "commitOid": "0",
            "errors": [],
            "warnings": [],
        }
        self.send_response(Hub.status)
        self.end_headers()
        self.wfile.write(json.dumps(response).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """Serve a Hub on this machine, with a token."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.files, Hub.status = {}, 200
    api = functools.partial(huggingface_hub.HfApi, endpoint=server.url, token="hf_mine")
    monkeypatch.setattr(huggingface_hub, "HfApi", api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_mine")
    yield Hub
    server.shutdown()
    server.server_close()


def test_folder_is_uploaded_to_the_hub(run: Path, tmp_path: Path, smallvit: Command, hub: type[Hub]) -> None:
    out = tmp_path / "out"
    code, printed, _ = smallvit("export", run, "--format", "hub", "--out", out, "--push", "me/mine")
    assert code == 0
    assert printed.splitlines()[-1].endswith("/me/mine")
    assert hub.files == {file.name: file.read_bytes() for file in out.iterdir()}
    assert b"hf-hub:me/mine" in hub.files["README.md"]


@pytest.mark.parametrize(
    ("repository", "status", "message"),
    [("me/mine", 403, "403"), ("a/b/c", 200, "Repo id must")],
)
def test_hub_errors_keep_the_folder(
    run: Path, tmp_path: Path, smallvit: Command, hub: type[Hub], repository: str, status: int, message: str
) -> None:
    hub.status, out = status, tmp_path / "out"
    code, _, err = smallvit("export", run, "--format", "hub", "--out", out, "--push", repository)
    assert code == 2
    assert err.splitlines()[-1] == f"smallvit: --push {repository}: {err.split(': ', 2)[2].strip()}"
    assert message in err
    assert (out / "model.safetensors").exists()


def test_missing_hub_token_is_a_one_line_error(
    run: Path, tmp_path: Path, smallvit: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    out = tmp_path / "out"
    code, _, err = smallvit("export", run, "--format", "hub", "--out", out, "--push", "me/mine")
    message = f"not logged in; run hf auth login, or set HF_TOKEN (the export is kept in {out})"
    assert (code, err) == (2, f"smallvit: --push me/mine: {message}\n")
    assert {file.name for file in out.iterdir()} == set(FOLDER_FILES)


def test_unreachable_hub_is_a_one_line_error(
    run: Path, tmp_path: Path, smallvit: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = functools.partial(huggingface_hub.HfApi, endpoint="http://127.0.0.1:9", token="hf_mine")
    monkeypatch.setattr(huggingface_hub, "HfApi", api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_mine")
    code, _, err = smallvit("export", run, "--format", "hub", "--out", tmp_path / "out", "--push", "me/mine")
    assert code == 2
    assert "--push me/mine: " in err.splitlines()[-1]


def test_weights_of_another_program_are_exported_to_timm(tmp_path: Path, smallvit: Command) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=5).eval()
    save_file(checkpoint.snapshot(model), tmp_path / "theirs.safetensors")
    arguments = ["--arch", "test_vit", "--format", "timm", "--out", tmp_path / "out"]
    assert smallvit("export", tmp_path / "theirs.safetensors", *arguments)[0] == 0
    images = torch.randn(2, *model.pretrained_cfg["input_size"])
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    with torch.no_grad():
        assert_same(loaded(images), model(images))
    assert preprocessing(loaded) == preprocessing(model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "plugins"),
    [("vit", ("spt", "lsa")), ("cait", ("spt", "lsa")), ("pit", ("lsa",)), ("swin", ("lsa",)), ("t2t", ("lsa",))],
)
def test_programs_move_to_another_device_whole(tmp_path: Path, arch: str, plugins: tuple[str, ...]) -> None:
    """Check that no constant stays on the CPU: torch refuses tensors of two devices, also of the device meta."""
    model = create_model(arch, img_size=32, num_classes=10, plugins=dict.fromkeys(plugins, True)).eval()
    spec = {"arch": arch, "img_size": 32, "in_chans": 3, "num_classes": 10}
    info = WeightsInfo(name=arch, option="export", path=None, spec=spec, class_names=(), mean=(0.5,), std=(0.5,))
    predictor = Predictor(info=info, model=model, img_size=32, device=torch.device("cpu"), dtype=torch.float32)
    exporting.write_pt2(predictor, tmp_path / "model.pt2")
    program = move_to_device_pass(torch.export.load(tmp_path / "model.pt2"), "meta")
    assert program.module()(torch.empty(3, 3, 32, 32, device="meta")).shape == (3, 10)
