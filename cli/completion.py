"""Run `smallvit completion`: print a script that completes commands in a shell."""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import Literal, get_args, get_origin

from smallvit.cli import VERBS
from smallvit.cli.parser import Parser
from smallvit.utils.errors import InputError, suggest

DESCRIPTION = """\
Print a script that completes smallvit's verbs, options, values, models and
files in a shell.

  DIR=~/.local/share/bash-completion/completions
  smallvit completion bash > $DIR/smallvit
  smallvit completion zsh > ~/.zfunc/_smallvit

bash: the folder belongs to the package bash-completion, which loads the file
on demand (create it with mkdir -p). Without the package, put the file anywhere
and `source` it in ~/.bashrc.
zsh: any folder of $fpath, set before compinit in ~/.zshrc:

  fpath=(~/.zfunc $fpath)
  autoload -Uz compinit && compinit

Completion works in new shells. The script contains the names of timm's models
and optimizers: print it again after an update.
"""
SHELLS = ("bash", "zsh")
PATHS = ("RUN", "DIR", "FILE", "FOLDER", "IMAGE", "PATH")
"""Names, in help texts, of arguments that are files or folders."""
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
"""Shell functions that complete names of models, and of data sets or files."""


def parser() -> Parser:
    """Return the argument parser."""
    parser = Parser("smallvit completion", DESCRIPTION)
    parser.add_argument("shell", metavar="SHELL", help=f"Shell: {', '.join(SHELLS)}.")
    return parser


def main(argv: list[str]) -> int:
    """Print the script."""
    shell = parser().parse_args(argv).shell
    if shell not in SHELLS:
        raise InputError(f"smallvit completion {shell}: expected one of {', '.join(SHELLS)}{suggest(shell, SHELLS)}")
    print(render_script(shell))
    return 0


def render_script(shell: str) -> str:
    """Return the completion script of a shell."""
    import shtab
    import timm
    from timm.optim import list_optimizers

    from smallvit.cli.list import ARCHS, TABLES
    from smallvit.config.config import option_types
    from smallvit.config.options import LOGGERS, REGULARIZATION
    from smallvit.config.recipes import RECIPES
    from smallvit.datasets.catalog import DATASETS

    recipes, values = list(RECIPES), {"what": list(TABLES), "shell": list(SHELLS), "log": list(LOGGERS)}
    values |= {name: list(get_args(kind)) for name, (_, kind) in option_types().items() if get_origin(kind) is Literal}
    values |= {"regularization": ["auto", *REGULARIZATION]}
    values |= {"recipe": recipes, "common": recipes, "opt": list_optimizers(), "device": ["auto", "cpu", "cuda", "mps"]}
    root = argparse.ArgumentParser("smallvit", description="Vision Transformers that learn from small image sets.")
    root.add_argument("-V", "--version", action="store_true", help="print the version")
    verbs = root.add_subparsers(
        dest="verb",
        parser_class=lambda prog, **_: import_module(f"smallvit.cli.{prog.split()[-1]}").parser(),
    )
    for verb, summary in VERBS.items():
        for action in verbs.add_parser(verb, help=summary)._actions:
            metavar = action.metavar if isinstance(action.metavar, str) else ""
            if action.nargs == 0 or action.choices:
                continue
            if metavar.startswith("{"):
                action.choices = metavar.strip("{}").split(",")
            elif action.dest in values:
                action.choices = values[action.dest]
            elif action.dest == "arch" or metavar == "ROW":
                action.complete = dict.fromkeys(SHELLS, "_smallvit_models")
            elif action.dest == "data":
                action.complete = dict.fromkeys(SHELLS, "_smallvit_data_files")
            elif action.dest in PATH_OPTIONS or metavar.partition(".")[0] in PATHS:
                action.complete = shtab.FILE
    names = {"models": " ".join([*ARCHS, *timm.list_models()]), "data": " ".join(DATASETS)}
    return shtab.complete(root, shell, preamble={shell: PREAMBLES[shell].format(**names)})
