"""The completion scripts, in the shells that they are for."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from smallvit.cli import VERBS
from smallvit.cli.completion import script

Command = Callable[..., tuple[int, str, str]]
ASK = 'source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_smallvit; printf "%s\\n" "${COMPREPLY[@]}"'


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    path = tmp_path_factory.mktemp("completion") / "smallvit"
    path.write_text(script("bash"))
    return path


def completed(path: Path, *words: str, folder: Path | None = None) -> set[str]:
    """What bash offers for the last of the words."""
    asked = ["bash", "-c", ASK, str(path), "smallvit", *words]
    done = subprocess.run(asked, capture_output=True, text=True, check=True, cwd=folder)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["comp"], {"compare", "completion"}),
        (["train", "--spt-d"], {"--spt-directions"}),
        (["train", "--no-sp"], {"--no-spt", "--no-spt-norm"}),
        (["train", "--spt", "--sched", "co"], {"cosine", "constant"}),
        (["train", "--recipe", "dei"], {"deit", "deit3"}),
        (["train", "--opt", "lamb"], {"lamb", "lambc", "lambw", "lambcw", "lambcd"}),
        (["train", "--data", "cifar100"], {"cifar100", "cifar100-coarse"}),
        (["train", "--arch", "vit9"], {"vit96"}),
        (["compare", "--arch", "deit_tiny_p"], {"deit_tiny_patch16_224"}),
        (["profile", "vit", "deit_tiny_p"], {"deit_tiny_patch16_224"}),
        (["list", "pl"], {"plugins"}),
        (["completion", "z"], {"zsh"}),
    ],
    ids=lambda value: " ".join(sorted(value) if isinstance(value, set) else value),
)
def test_bash_completes_verbs_options_and_values(bash_script: Path, words: list[str], offered: set[str]) -> None:
    found = completed(bash_script, *words)
    assert offered <= found
    assert all(name.startswith(words[-1]) for name in found)


def test_bash_offers_every_verb(bash_script: Path) -> None:
    assert completed(bash_script, "") == set(VERBS)


@pytest.mark.parametrize(
    "words",
    [
        ["watch"],
        ["eval"],
        ["attend", "run"],
        ["report"],
        ["train", "--init"],
        ["train", "--resume"],
        ["train", "--data"],
    ],
)
def test_bash_completes_runs_and_folders(bash_script: Path, tmp_path: Path, words: list[str]) -> None:
    (tmp_path / "my-run").mkdir()
    assert completed(bash_script, *words, "my", folder=tmp_path) == {"my-run"}


def test_bash_reads_the_printed_script_without_a_word(bash_script: Path) -> None:
    done = subprocess.run(["bash", "-u", "-c", f"source {bash_script}"], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
def test_zsh_reads_its_script(tmp_path: Path) -> None:
    (tmp_path / "_smallvit").write_text(script("zsh"))
    assert subprocess.run(["zsh", "-n", tmp_path / "_smallvit"], check=False).returncode == 0


def test_scripts_for_zsh_name_every_verb_and_model(smallvit: Command) -> None:
    code, out, _ = smallvit("completion", "zsh")
    assert code == 0
    assert out.startswith("#compdef smallvit\n")
    assert all(f"    {verb}:" in out for verb in VERBS)
    assert "deit_tiny_patch16_224" in out


def test_another_shell_is_refused_in_one_line(smallvit: Command) -> None:
    code, out, err = smallvit("completion", "bsh")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "expected one of bash, zsh (did you mean 'bash'?)" in err
