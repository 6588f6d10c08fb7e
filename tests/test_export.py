"""Exporting: what other programs load answers as the model does."""

from __future__ import annotations

import base64
import functools
import json
import shlex
import shutil
import threading
from collections.abc import Callable, Iterator
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

import smallvit as package
from smallvit import checkpoint, commands, datasets, models
from smallvit.cli import main
from smallvit.cli.options import parse_options
from smallvit.config import Config
from smallvit.exports import exported, exporting, graphs, model_card, timm_folder
from smallvit.judgement.chance import accuracy_interval
from smallvit.models import create_model
from smallvit.options import DataConfig
from smallvit.ready import Ready, ready, settled
from smallvit.trained import Card

Command = Callable[..., tuple[int, str, str]]
CPU = {"device": "cpu", "amp": "off"}
QUICK = ["--epochs", "3", "--batch-size", "32", "--aug", "none", "--device", "cpu", "--amp", "off"]
NAMES = tuple("abcde")
BOTH = {"spt": True, "lsa": True}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the digits, with SPT and LSA."""
    folder = tmp_path_factory.mktemp("runs") / "digits-run"
    assert main(["train", "--arch", "vit", "--spt", "--lsa", *QUICK, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def exports(run: Path) -> Path:
    """The run in every form, in its own folder."""
    for form in ("onnx", "pt2", "timm", "hub"):
        assert main(["export", str(run), "--format", form]) == 0
    return run / "export"


@pytest.fixture(scope="module")
def images(run: Path) -> Tensor:
    """200 test images of the digits, normalised."""
    test = datasets.load(DataConfig(data="digits")).test
    return ready(str(run), "export", **CPU).normalised(test.pixels[:200])


def tiny(arch: str, *, truncated: bool = False, img_size: int = 16, in_chans: int = 3, **options: object) -> Ready:
    """An untrained model that is ready to answer; where `truncated`, of no more blocks a stage than there are kinds."""
    torch.manual_seed(0)
    spec = {"arch": arch, "img_size": img_size, "in_chans": in_chans, "num_classes": len(NAMES), **options}
    model = create_model(**spec)
    for module in (model, *getattr(model, "layers", ()), *getattr(model, "transformers", ())):
        if truncated and hasattr(module, "blocks"):
            module.blocks = module.blocks[: 2 if arch == "swin" else 1]
    spec["patch_size"] = models.patch_for(arch, img_size, fit=options.get("fit", True))
    half = (0.5,) * in_chans
    card = Card(name=arch, option="export", path=None, spec=spec, class_names=NAMES, mean=half, std=half)
    return Ready(
        card=card,
        model=settled(model, torch.device("cpu"), torch.float32),
        img_size=img_size,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


def assert_same(found: Tensor | np.ndarray, expected: Tensor) -> None:
    torch.testing.assert_close(torch.as_tensor(found), expected, atol=1e-4, rtol=0)
    assert torch.equal(torch.as_tensor(found).argmax(1), expected.argmax(1))


@torch.no_grad()
def logits(run: Path, images: Tensor) -> Tensor:
    return package.load(run)(images)


def preprocessing(model: nn.Module) -> dict:
    """What timm makes of a model's configuration; JSON knows no tuples."""
    return json.loads(json.dumps(timm.data.resolve_model_data_config(model)))


def test_onnxruntime_answers_as_the_run(exports: Path, run: Path, images: Tensor) -> None:
    session = onnxruntime.InferenceSession(exports / "digits-run.onnx")
    expected = logits(run, images)
    for batch in (1, 7, 200):
        assert_same(session.run(["logits"], {"images": images[:batch].numpy()})[0], expected[:batch])
    told = session.get_modelmeta().custom_metadata_map
    card = ready(str(run), "export", **CPU).card
    assert json.loads(told["class_names"]) == list("0123456789")
    assert (json.loads(told["mean"]), json.loads(told["std"])) == (list(card.mean), list(card.std))
    assert (told["img_size"], told["in_chans"]) == ("8", "1")
    assert "(pixels / 255 - mean) / std" in told["preprocessing"]


def test_torch_runs_the_exported_program(exports: Path, run: Path, images: Tensor) -> None:
    extra = {"metadata.json": ""}
    program = torch.export.load(exports / "digits-run.pt2", extra_files=extra).module()
    expected = logits(run, images)
    for batch in (1, 200):
        assert_same(program(images[:batch]).detach(), expected[:batch])
    assert json.loads(json.loads(extra["metadata.json"])["class_names"]) == list("0123456789")


@pytest.mark.parametrize("form", ["timm", "hub"])
def test_timm_loads_the_folder(exports: Path, run: Path, images: Tensor, form: str) -> None:
    model = timm.create_model(f"local-dir:{exports / form}", pretrained=True).eval()
    with torch.no_grad():
        assert_same(model(images), logits(run, images))
    assert preprocessing(model) == preprocessing(package.load(run))
    assert list(model.pretrained_cfg["label_names"]) == list("0123456789")
    assert {file.name for file in (exports / form).iterdir()} - {"README.md"} == {"config.json", "model.safetensors"}


def test_exported_weights_are_a_run_for_smallvit(exports: Path, run: Path, images: Tensor) -> None:
    path = exports / "timm" / "model.safetensors"
    with torch.no_grad():
        assert torch.equal(package.load(path)(images), logits(run, images))
    assert ready(str(path), "predict", **CPU).class_names == tuple("0123456789")


def test_timm_fits_a_folder_to_other_classes_and_sizes(exports: Path) -> None:
    name = f"local-dir:{exports / 'timm'}"
    model, trained = timm.create_model(name, pretrained=True, num_classes=4), timm.create_model(name, pretrained=True)
    assert model(torch.zeros(1, 1, 8, 8)).shape == (1, 4)
    assert torch.equal(model.blocks[0].attn.qkv.weight, trained.blocks[0].attn.qkv.weight)
    assert timm.create_model(name, pretrained=True, img_size=12)(torch.zeros(1, 1, 12, 12)).shape == (1, 10)


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("vit", BOTH),
        ("cait", {"lsa": True}),
        ("pit", {"lsa": True}),
        ("swin", {}),
        ("t2t", {"spt": True}),
        ("vit", {"dist_token": True, "dist_average": "probabilities"}),
        ("resnet20", {}),
        ("test_resnet", {}),
    ],
)
def test_every_family_runs_in_onnxruntime(arch: str, options: dict, tmp_path: Path) -> None:
    graphs.write_onnx(tiny(arch, truncated=True, **options), tmp_path / "model.onnx")  # which compares
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert session.run(None, {"images": np.zeros((3, 3, 16, 16), np.float32)})[0].shape == (3, 5)


@pytest.mark.parametrize("options", [{}, BOTH])
@pytest.mark.parametrize("arch", ["vit", "cait", "pit", "swin", "t2t"])
def test_timm_loads_every_family(arch: str, options: dict, tmp_path: Path) -> None:
    model = tiny(arch, img_size=32, **options)
    bare = Ready(**vars(model) | {"card": Card(**vars(model.card) | {"class_names": None})})  # of no file
    timm_folder.write(bare, tmp_path)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(
            timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(images), model.model(images)
        )
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == "smallvit_model"


@pytest.mark.parametrize(
    ("arch", "options", "alone"),
    [
        ("deit_tiny_patch16_224", {}, True),
        ("swin_tiny_patch4_window7_224", {"img_size": 32}, True),
        ("test_vit", {"in_chans": 1}, True),
        ("test_vit", {"lsa": True}, False),
        ("test_vit", {"dist_token": True}, False),
        ("resnet18", {"img_size": 64}, False),
        ("resnet18", {"img_size": 64, "fit": False}, True),
        ("test_efficientnet", {"img_size": 160}, True),
        ("resnet20", {}, False),
    ],
)
def test_timm_needs_smallvit_only_where_it_does_not_know_the_model(
    arch: str, options: dict, alone: bool, tmp_path: Path
) -> None:
    model = tiny(arch, **{"img_size": 32} | options)
    bare = Ready(**vars(model) | {"card": Card(**vars(model.card) | {"class_names": None})})
    timm_folder.write(bare, tmp_path)  # which compares
    assert timm_folder.is_timms(model.card.spec) == alone
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == (arch if alone else "smallvit_model")
    heads = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3).eval()
    assert heads(torch.zeros(1, model.in_chans, model.img_size, model.img_size)).shape == (1, 3)


def test_another_size_is_exported_too(run: Path, smallvit: Command, tmp_path: Path) -> None:
    for form, out in (("timm", tmp_path / "timm"), ("pt2", tmp_path / "model.pt2")):
        assert smallvit("export", run, "--format", form, "--img-size", "12", "--out", out)[0] == 0
    images = torch.randn(2, 1, 12, 12)
    expected = ready(str(run), "export", img_size=12, **CPU).logits(images)
    with torch.no_grad():
        assert_same(timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()(images), expected)
        assert_same(package.load(tmp_path / "timm" / "model.safetensors")(images), expected)
    assert_same(torch.export.load(tmp_path / "model.pt2").module()(images).detach(), expected)


def front_and_body(page: str) -> tuple[dict, str]:
    _, front, body = page.split("---\n", 2)
    return yaml.safe_load(front), body


def test_the_card_says_what_the_run_says(exports: Path, run: Path) -> None:
    front, body = front_and_body((exports / "hub" / "README.md").read_text())
    summary = json.loads((run / "summary.json").read_text())
    assert front["library_name"] == "timm"
    assert "license" not in front
    (result,) = front["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == round(summary["test_top1"], 2)
    correct = round(summary["test_top1"] * summary["test_images"] / 100)
    low, high = accuracy_interval(correct, summary["test_images"])[0]
    for told in (
        f"| top-1 accuracy | {summary['test_top1']:.2f} % |",
        f"| 95 % interval | {low:.2f} to {high:.2f} % |",
        f"| parameters | {summary['parameters']:,} |",
        "smallvit train --arch vit --spt --lsa",
        "--epochs 3 --batch-size 32",
        f"{summary['images_seen']:,} images seen",
        "CC BY 4.0",
        "seed 0",
        "2112.13492",
        "import smallvit.registry",
    ):
        assert told in body
    assert str(run.parent) not in body


def test_the_cards_snippet_runs(
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


def test_the_card_takes_what_eval_found_of_these_weights(run: Path, tmp_path: Path, smallvit: Command) -> None:
    file = run / "eval" / "test" / "metrics.json"
    assert smallvit("eval", run, "--device", "cpu", "--amp", "off")[0] == 0
    found = json.loads(file.read_text())
    low, high = found["interval"]
    told = f"{low:.2f} to {high:.2f} %", f"| calibration error (ECE) | {found['ece']:.2f} % |"
    for changed, used in (({}, True), ({"weights_sha256": "0" * 64}, False), ({"split": "val"}, False)):
        file.write_text(json.dumps(found | changed))
        out = tmp_path / f"card-{len(list(tmp_path.iterdir()))}"
        assert smallvit("export", run, "--format", "hub", "--out", out, "--license", "cc-by-4.0")[0] == 0
        front, body = front_and_body((out / "README.md").read_text())
        assert front["license"] == "cc-by-4.0"
        assert told[0] in body or not used
        assert (told[1] in body) == used
        assert ("calibrated was not measured" in body) != used
    shutil.rmtree(run / "eval")


def test_no_folder_of_this_machine_is_told(image_folder: Path, tmp_path: Path, smallvit: Command) -> None:
    arguments = ["--arch", "resnet20", "--img-size", "16", *QUICK, "--epochs", "1"]
    assert smallvit("train", "--data", image_folder, *arguments, "--out", tmp_path / "own")[0] == 0
    assert smallvit("export", tmp_path / "own", "--format", "hub")[0] == 0
    texts = [file.read_bytes() for file in (tmp_path / "own" / "export" / "hub").iterdir()]
    assert len(texts) == 3
    assert all(str(tmp_path).encode() not in text for text in texts)
    assert b"--data images" in b"".join(texts)


def test_what_is_there_is_replaced_only_when_asked(run: Path, tmp_path: Path, smallvit: Command) -> None:
    out = tmp_path / "folder"
    export = functools.partial(smallvit, "export", run, "--format", "timm", "--out", out)
    assert export()[0] == 0
    code, _, err = export()
    assert code == 2
    assert "exists already; choose another name, or --overwrite" in err
    assert export("--overwrite")[0] == 0
    (out / "thesis.tex").write_text("years of work")
    code, _, err = export("--overwrite")
    assert code == 2
    assert "holds thesis.tex, which is not of an export" in err
    assert (out / "thesis.tex").exists()


@pytest.mark.parametrize("form", ["pt2", "timm"])
def test_an_interruption_leaves_what_was_there(
    run: Path, tmp_path: Path, smallvit: Command, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(graphs, "require_same", interrupt)
    monkeypatch.setattr(timm_folder, "require_same", interrupt)
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


def test_a_model_that_answers_otherwise_gets_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("resnet20")
    real = torch.export.export
    monkeypatch.setattr(
        torch.export, "export", lambda _, *a, **k: real(create_model(**model.card.spec).eval(), *a, **k)
    )
    with pytest.raises(package.errors.InputError, match="answers otherwise than the model: logits differ by up to"):
        graphs.write_pt2(model, tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("scale", "same"), [(1e-3, False), (1.0, False), (100.0, True)])
def test_the_tolerance_grows_with_the_largest_logit_and_does_not_shrink_below_one(scale: float, same: bool) -> None:
    model = tiny("vit")
    with torch.no_grad():
        model.model.head.weight.zero_()
        model.model.head.bias.copy_(torch.tensor([1.0, -0.5, 0.2, 0.0, 0.0]) * scale)
    almost = torch.tensor([0.0, 0.0, 0.0, 5e-4, 0.0])  # where the logit is none
    check = functools.partial(exported.require_same, model, lambda images: model.logits(images) + almost, "it")
    if same:
        check()
    else:
        with pytest.raises(package.errors.InputError, match=r"logits differ by up to 0\.0005"):
            check()


@pytest.mark.parametrize(
    ("answer", "message"),
    [(lambda x: x.new_full((len(x), 5), torch.nan), "differ by up to nan"), (lambda x: x[:1, 0, :1, :5], "it gives")],
)
def test_no_numbers_and_other_shapes_are_other_answers(answer: Callable, message: str) -> None:
    with pytest.raises(package.errors.InputError, match=message):
        exported.require_same(tiny("vit"), answer, "it")


def test_a_run_may_be_named_anything(run: Path, tmp_path: Path, smallvit: Command) -> None:
    named = tmp_path / "run [/b] :cat:"
    shutil.copytree(run, named, ignore=shutil.ignore_patterns("export"))
    assert smallvit("export", named, "--format", "timm")[0] == 0


def test_the_cards_command_repeats_the_run_on_another_machine() -> None:
    options = {"arch": "vit", "spt": True, "lsa": True, "spt_norm": False, "data": "/home/me/-mine", "out": "here"}
    config = Config.build(**options)
    line = commands.training(config, model_card.APART, in_place=False)
    assert line == "smallvit train --arch vit --spt --lsa --no-spt-norm --data=-mine"
    again = parse_options(shlex.split(line)[2:], "smallvit train", "")
    assert Config.build(**again).options() == Config.build(**options | {"data": "-mine", "out": None}).options()


def test_without_the_packages_one_line_says_what_to_install(
    run: Path, smallvit: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "find_spec", lambda name: None if name == "onnxscript" else name)
    code, _, err = smallvit("export", run, "--format", "onnx")
    assert (code, err) == (2, "smallvit: --format onnx needs onnxscript: pip install 'smallvit[onnx]'\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN"], "required: --format"),
        (["RUN", "--format", "tflite"], "invalid choice"),
        (["RUN", "--format", "timm", "--push", "me/mine"], "--push is of no use with --format timm"),
        (["RUN", "--format", "hub", "--private"], "--private is of no use without --push"),
        (["RUN", "--format", "hub", "--license", "My own"], "expected an identifier"),
        (["RUN", "--format", "pt2", "--out", "model.pt"], "expected a name that ends in .pt2"),
        (["RUN", "--format", "pt2", "--out", "none/model.pt2"], "no such folder"),
        (["RUN", "--format", "timm", "--arch", "vit", "--out", "OUT"], "leave --arch out"),
        (["WEIGHTS", "--format", "pt2"], "not a run's folder, so nothing says where to; give --out"),
        (["WEIGHTS", "--format", "hub", "--out", "OUT"], "writes a card of a finished run"),
        (["runs/none", "--format", "timm", "--out", "OUT"], "export runs/none: no such file or folder"),
    ],
)
def test_bad_input_gets_one_line(
    run: Path, smallvit: Command, tmp_path: Path, arguments: list[str], message: str
) -> None:
    places = {"RUN": run, "WEIGHTS": run / "best.safetensors", "OUT": tmp_path / "out"}
    code, out, err = smallvit("export", *[places.get(argument, argument) for argument in arguments])
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as takes a few files."""

    files: dict[str, bytes]
    status = 200

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            sent = [line["value"] for line in lines if line["key"] == "file"]
            Hub.files |= {each["path"]: base64.b64decode(each["content"]) for each in sent}
        names = [file["path"] for file in json.loads(body).get("files", [])] if "/preupload/" in self.path else []
        answer = {
            "url": f"{self.server.url}/me/mine",
            "files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names],
            "commitUrl": f"{self.server.url}/me/mine/commit/0",
            "commitOid": "0",
            "errors": [],
            "warnings": [],
        }
        self.send_response(Hub.status)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A hub of this machine, at which somebody is logged in."""
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


def test_the_folder_is_sent_to_the_hub(run: Path, tmp_path: Path, smallvit: Command, hub: type[Hub]) -> None:
    out = tmp_path / "out"
    code, printed, _ = smallvit("export", run, "--format", "hub", "--out", out, "--push", "me/mine")
    assert code == 0
    assert printed.splitlines()[-1].endswith("/me/mine")
    assert hub.files == {file.name: file.read_bytes() for file in out.iterdir()}
    assert b"hf-hub:me/mine" in hub.files["README.md"]


@pytest.mark.parametrize(
    ("repository", "status", "message"),
    [("me/mine", 403, "the token may not write there"), ("a/b/c", 200, "expected OWNER/NAME")],
)
def test_what_the_hub_refuses_is_told_and_the_folder_stays(
    run: Path, tmp_path: Path, smallvit: Command, hub: type[Hub], repository: str, status: int, message: str
) -> None:
    hub.status, out = status, tmp_path / "out"
    code, _, err = smallvit("export", run, "--format", "hub", "--out", out, "--push", repository)
    assert code == 2
    assert err.splitlines()[-1] == f"smallvit: --push {repository}: {err.split(': ', 2)[2].strip()}"
    assert message in err
    assert (out / "model.safetensors").exists()


def test_nobody_logged_in_is_told(
    run: Path, tmp_path: Path, smallvit: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    out = tmp_path / "out"
    code, _, err = smallvit("export", run, "--format", "hub", "--out", out, "--push", "me/mine")
    told = f"nobody is logged in; run hf auth login, or set HF_TOKEN (what was exported stays in {out})"
    assert (code, err) == (2, f"smallvit: --push me/mine: {told}\n")
    assert {file.name for file in out.iterdir()} == exporting.OURS


def test_a_hub_out_of_reach_is_told(
    run: Path, tmp_path: Path, smallvit: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = functools.partial(huggingface_hub.HfApi, endpoint="http://127.0.0.1:9", token="hf_mine")
    monkeypatch.setattr(huggingface_hub, "HfApi", api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_mine")
    code, _, err = smallvit("export", run, "--format", "hub", "--out", tmp_path / "out", "--push", "me/mine")
    assert code == 2
    assert "--push me/mine: no answer from the Hub" in err.splitlines()[-1]


def test_weights_of_another_program_go_to_timm(tmp_path: Path, smallvit: Command) -> None:
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
