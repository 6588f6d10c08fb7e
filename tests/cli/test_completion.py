"""Test the completion scripts in the shells."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from smallvit.cli import VERBS
from smallvit.cli.completion import render_script

Command = Callable[..., tuple[int, str, str]]
ASK = 'source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_smallvit; printf "%s\\n" "${COMPREPLY[@]}"'


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    path = tmp_path_factory.mktemp("completion") / "smallvit"
    path.write_text(render_script("bash"))
    return path


def complete(path: Path, *words: str, folder: Path | None = None) -> set[str]:
    """Return the completions of the last word in bash."""
    asked = ["bash", "-c", ASK, str(path), "smallvit", *words]
    done = subprocess.run(asked, capture_output=True, text=True, check=True, cwd=folder)
    return set(done.stdout.split())


@pytest.mark.slow
def test_bash_completes_verbs_options_and_values(bash_script: Path) -> None:
    expected = {
        "comp": {"compare", "completion"},
        "train --spt-d": {"--spt-directions"},
        "train --no-sp": {"--no-spt", "--no-spt-norm"},
        "train --spt --sched co": {"cosine", "constant"},
        "train --recipe dei": {"deit", "deit3"},
        "train --aug augreg-l": {"augreg-light1", "augreg-light2"},
        "train --opt lamb": {"lamb", "lambc", "lambw", "lambcw", "lambcd"},
        "train --data cifar100": {"cifar100", "cifar100-coarse"},
        "train --arch vit9": {"vit96"},
        "compare --arch deit_tiny_p": {"deit_tiny_patch16_224"},
        "profile vit deit_tiny_p": {"deit_tiny_patch16_224"},
        "list pl": {"plugins"},
        "completion z": {"zsh"},
    }
    failures = []
    for line, names in expected.items():
        *_, last = words = line.split()
        completions = complete(bash_script, *words)
        if not names <= completions or not all(name.startswith(last) for name in completions):
            failures.append(f"{line}: {sorted(completions)}")
    assert not failures, "\n".join(failures)


@pytest.mark.slow
def test_bash_completes_every_verb(bash_script: Path) -> None:
    assert complete(bash_script, "") == set(VERBS)


@pytest.mark.slow
def test_bash_completes_runs_and_folders(bash_script: Path, tmp_path: Path) -> None:
    (tmp_path / "my-run").mkdir()
    for line in ("watch", "eval", "attend run", "report", "train --init", "train --resume", "train --data"):
        assert complete(bash_script, *line.split(), "my", folder=tmp_path) == {"my-run"}, line


@pytest.mark.slow
def test_bash_sources_the_script_without_output(bash_script: Path) -> None:
    done = subprocess.run(["bash", "-u", "-c", f"source {bash_script}"], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
def test_zsh_parses_the_script(tmp_path: Path) -> None:
    (tmp_path / "_smallvit").write_text(render_script("zsh"))
    assert subprocess.run(["zsh", "-n", tmp_path / "_smallvit"], check=False).returncode == 0


def test_zsh_script_names_every_verb_and_model(smallvit: Command) -> None:
    code, out, _ = smallvit("completion", "zsh")
    assert code == 0
    assert out.startswith("#compdef smallvit\n")
    assert all(f"    {verb}:" in out for verb in VERBS)
    assert "deit_tiny_patch16_224" in out


def test_unknown_shell_is_a_one_line_error(smallvit: Command) -> None:
    code, out, err = smallvit("completion", "bsh")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "expected one of bash, zsh (did you mean 'bash'?)" in err
