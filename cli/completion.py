"""`smallvit completion`: what makes a shell complete verbs, options and their values."""

from __future__ import annotations

import argparse
from importlib import import_module

from smallvit.cli import VERBS
from smallvit.cli.options import Parser
from smallvit.errors import InputError, nearest

DESCRIPTION = """\
Print a script that makes a shell complete smallvit's verbs, options, values, models and files.

  smallvit completion bash > ~/.local/share/bash-completion/completions/smallvit
  smallvit completion zsh > ~/.zfunc/_smallvit

bash: the folder is that of the package bash-completion, which reads the file when it is first needed (mkdir -p it).
Without the package, put the file anywhere and `source` it in ~/.bashrc.
zsh: any folder of $fpath, set before compinit in ~/.zshrc:

  fpath=(~/.zfunc $fpath)
  autoload -Uz compinit && compinit

A new shell completes. The script holds the names of timm's models and optimisers: print it anew after an update.
"""
SHELLS = ("bash", "zsh")
PATHS = ("RUN", "DIR", "FILE", "FOLDER", "IMAGE", "PATH")
"""What arguments are called that take files or folders."""
PATH_OPTIONS = ("config", "data_dir", "init", "name", "out", "resume", "teacher")

PREAMBLES = {
    "bash": """\
_smallvit_models() {{ compgen -W "{models}" -- "$1"; }}
_smallvit_data_files() {{ compgen -W "{data}" -- "$1"; compgen -f -- "$1"; }}
""",
    "zsh": """\
_smallvit_models() {{ compadd "$@" -- {models} }}
_smallvit_data_files() {{ _alternative 'names:data set:({data})' 'files:folder or zip file:_files' }}
""",
}
"""Functions of each shell that complete what is long, or more than one thing."""
MODELS, DATA = (dict.fromkeys(SHELLS, name) for name in ("_smallvit_models", "_smallvit_data_files"))


def parser() -> Parser:
    """The arguments."""
    parser = Parser("smallvit completion", DESCRIPTION)
    parser.add_argument("shell", metavar="SHELL", help=", ".join(SHELLS))
    return parser


def main(argv: list[str]) -> int:
    """Print the script."""
    shell = parser().parse_args(argv).shell
    if shell not in SHELLS:
        raise InputError(f"smallvit completion {shell}: expected one of {', '.join(SHELLS)}{nearest(shell, SHELLS)}")
    print(script(shell))
    return 0


def script(shell: str) -> str:
    """The completion script of a shell."""
    import shtab
    import timm

    from smallvit.cli.list import ARCHS
    from smallvit.options import DATA_NAMES

    names = {"models": " ".join([*ARCHS, *timm.list_models()]), "data": " ".join(DATA_NAMES)}
    return shtab.complete(tree(), shell, preamble={shell: PREAMBLES[shell].format(**names)})


def tree() -> argparse.ArgumentParser:
    """All verbs in one parser, every argument with what completes it."""
    root = argparse.ArgumentParser("smallvit", description="Vision Transformers that learn from small image sets.")
    root.add_argument("-V", "--version", action="store_true", help="print the version")
    verbs = root.add_subparsers(dest="verb", parser_class=lambda **given: _verb(given["prog"].split()[-1]))
    values = _values()
    for verb, summary in VERBS.items():
        for action in verbs.add_parser(verb, help=summary)._actions:
            _complete(action, values)
    return root


def _verb(name: str) -> Parser:
    return import_module(f"smallvit.cli.{name}").parser()


def _values() -> dict[str, list[str]]:
    """What arguments take that are no choices to the parser, by their names in it."""
    from timm.optim import list_optimizers

    from smallvit.cli.list import TABLES
    from smallvit.options import LOGGERS
    from smallvit.recipes import RECIPES

    return {
        "recipe": list(RECIPES),
        "common": list(RECIPES),
        "what": list(TABLES),
        "shell": list(SHELLS),
        "log": list(LOGGERS),
        "opt": list_optimizers(),
        "device": ["auto", "cpu", "cuda", "mps"],
    }


def _complete(action: argparse.Action, values: dict[str, list[str]]) -> None:
    """Tell shtab what completes an argument."""
    import shtab

    metavar = action.metavar if isinstance(action.metavar, str) else ""
    if action.nargs == 0 or action.choices:
        return
    if metavar.startswith("{"):
        action.choices = metavar.strip("{}").split(",")
    elif action.dest in values:
        action.choices = values[action.dest]
    elif action.dest == "arch" or metavar == "ROW":
        action.complete = MODELS
    elif action.dest == "data":
        action.complete = DATA
    elif action.dest in PATH_OPTIONS or metavar.partition(".")[0] in PATHS:
        action.complete = shtab.FILE
