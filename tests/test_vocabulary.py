"""Check names, docstrings, comments, messages and documentation for words that the field does not use.

Run `python tests/test_vocabulary.py [PATH ...]` to list what is left, with a count per package.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FOLDERS = ("smallvit", "plugins", "datasets", "cli", "tests", "benchmarks", "results", "docs")
SUFFIXES = {".py", ".md", ".jinja", ".yml", ".toml", ".ipynb"}
SKIPPED = {
    "tests/test_vocabulary.py": "lists the words themselves",
    "RESULTS.md": "made from results/, whose texts are checked",
}

EVERYWHERE = {
    r"judg(e|es|ed|ing|e?ments?)": "evaluate, evaluation",
    r"verdicts?": "results",
    r"evidence": "results, artifacts",
    r"learnt": "learned",
    r"anew": "again",
    r"beside": "next to, in addition to",
    r"told": "reported",
    r"answers?": "logits, outputs",
    r"wanted": "targets, expected",
    r"openness": "LSA strength",
    r"glimpses?": "AsyncScalar",
    r"dossiers?": "RunSummary",
    r"keepers?": "Checkpointer",
    r"(be)?gin(s|ning)? with trained|begins? with": "start from",
    r"go(es)? on|going on|went on": "resume, continue",
    r"(as|what|where|how|which) (it|they) (is|are|was|were)(?= *([.,:;)\"']|$))": "unchanged (or name the state)",
    r"of (its|their) own": "own, separate",
    r"(is|are) of no use": "has no effect",
    r"leave (it|them) out": "remove it",
    r"at hand": "available",
    r"do it again": "Reproduce",
    r"where (it|they|both|models?) looks?": "Attention",
    r"read with care": "Limitations",
    r"(plugin[_-])?init[ =\"']+exact": 'init="preserve"',
    r"spt_exact|SPTExact": "spt_layer",
    # British spelling
    r"(de|re|un)?(normal|optim|initial|regular|general|visual|summar|quant|binar|serial|organ|real|recogn|equal)"
    r"is(e|es|ed|er|ers|ing|ation|ations)": "-ize",
    r"(maxim|minim|random|parallel|categor|memor|token|local|standard|synchron|special|character|util|penal)"
    r"is(e|es|ed|er|ers|ing|ation|ations)": "-ize",
    r"(un)?colour(s|ed|ing|less)?": "color",
    r"gr[e]y(s|scale|scales)?": "gray",
    r"behaviours?": "behavior",
    r"neighbours?": "neighbor",
    r"favour(s|ed|ite)?": "favor",
    r"cent(re|res|red|ring)": "center",
    r"licence(s|d)?": "license",
    r"catalogues?": "catalog",
    r"artefacts?": "artifact",
    r"label(led|ling)|model(led|ling)|cancel(led|ling)": "one l",
    r"analys(e|es|ed|ing)(?!\w)": "analyze",
    r"whilst|amongst|towards": "while, among, toward",
}
"""Patterns that are replaced in names and in prose, with the field's term."""

NAMES = {
    r"found": "outputs, or the thing itself",
    r"still": "frozen",
    r"places?": "sites, indices",
    r"taken": "applied",
    r"cases?": "results, artifacts",
    r"ready": "Predictor",
    r"sight": "AttentionAnalysis",
    r"standings?": "AggregatedRun",
    r"contests?": "Grid",
    r"wish(es)?": "StepAction",
}
"""Words that are replaced in names only: in a sentence they are ordinary English ("a file was found")."""

CLASSES = {"Card": "WeightsInfo", "Ready": "Predictor"}
"""Whole class names, since the word is fine as a part of others (`ModelCard`)."""

# fmt: off
OPENERS = {
    "what", "where", "how", "which", "whether", "when", "who", "why", "the", "a", "an", "all", "every",
    "each", "one", "no", "two", "its", "this", "these", "that", "those", "it", "in", "if", "for", "with",
    "as", "of", "on", "by", "from", "not",
}
# fmt: on
"""First words of a docstring that is no imperative sentence."""

TEXT = re.compile(rf"(?<![a-zA-Z])(?:{'|'.join(EVERYWHERE)})(?![a-zA-Z])", re.IGNORECASE)
NAME = re.compile("|".join(EVERYWHERE | NAMES))
"""All patterns at once, which is faster than one after the other."""

ALLOWED = {
    ("tests/*", "name", "case"): "parameters of a test",
    ("tests/*", "name", "cases"): "parameters of a test",
    ("plugins/binary.py", "text", "towards"): "title of a paper",
    ("docs/citations.md", "text", "towards"): "title of a paper",
}
"""Path pattern, kind and word that are allowed, with the reason."""


class Finding(NamedTuple):
    """A word that should be replaced."""

    path: str
    line: int
    kind: str
    word: str
    instead: str
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.kind} {self.word!r} -> {self.instead}   | {self.text.strip()[:100]}"


def split_words(name: str) -> list[str]:
    """Split an identifier into lower-case words: `bestEpoch_of` gives best, epoch, of."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+", name)]


def bound_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and name of everything that a module defines or binds."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.alias) and node.asname:
            yield node.lineno, node.asname


def prose(path: Path, text: str) -> Iterator[tuple[int, str]]:
    """Yield line and text of the comments and strings of a module, or the lines of another file."""
    if path.suffix != ".py":
        yield from enumerate(text.splitlines(), 1)
        return
    middle = getattr(tokenize, "FSTRING_MIDDLE", None)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING) or (middle is not None and token.type == middle):
            for offset, line in enumerate(token.string.splitlines()):
                yield token.start[0] + offset, line


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str, str]]:
    """Yield line, kind and text of the docstrings of a module and of its functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef):
            decorators = {ast.unparse(each).split(".")[-1] for each in getattr(node, "decorator_list", ())}
            documented = ast.get_docstring(node)
            if documented and not decorators & {"property", "cached_property"}:
                kind = "module" if isinstance(node, ast.Module) else "function"
                yield getattr(node, "lineno", 1), kind, documented.splitlines()[0]


def check(path: Path) -> list[Finding]:
    """Return the findings in one file."""
    name, text = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
    findings = []
    if path.suffix == ".py":
        tree = ast.parse(text)
        for line, bound in sorted(set(bound_names(tree))):
            words = list(filter(NAME.fullmatch, split_words(bound)))
            findings += [
                Finding(name, line, "name", word, instead, bound)
                for pattern, instead in (EVERYWHERE | NAMES).items()
                for word in words
                if re.fullmatch(pattern, word)
            ]
            if bound in CLASSES:
                findings.append(Finding(name, line, "name", bound, CLASSES[bound], bound))
        for line, kind, first in docstrings(tree):
            opener = re.split(r"\W", first, maxsplit=1)[0]
            if opener.lower() in OPENERS:
                findings.append(
                    Finding(name, line, f"{kind} docstring opens with", opener, "an imperative verb", first)
                )
    for line, sentence in prose(path, text):
        if not TEXT.search(sentence):
            continue
        for pattern, instead in EVERYWHERE.items():
            matches = re.finditer(rf"(?<![a-zA-Z])(?:{pattern})(?![a-zA-Z])", sentence, re.IGNORECASE)
            findings += [Finding(name, line, "text", match[0], instead, sentence) for match in matches]
    return [each for each in findings if not is_allowed(each)]


def is_allowed(finding: Finding) -> bool:
    """Return whether a finding is on the list of exceptions."""
    path, kind, word = finding.path, finding.kind, finding.word.lower()
    return any(fnmatchcase(path, each[0]) and (kind, word) == each[1:] for each in ALLOWED)


def files(*roots: str) -> list[Path]:
    """Return the files to check, below the given folders or below all of them."""
    chosen = [ROOT / root for root in roots] or [
        *(ROOT / folder for folder in FOLDERS),
        *filter(Path.is_file, ROOT.iterdir()),
    ]
    paths = [path for root in chosen for path in ([root] if root.is_file() else sorted(root.rglob("*")))]
    return [
        path
        for path in paths
        if path.is_file() and path.suffix in SUFFIXES and path.relative_to(ROOT).as_posix() not in SKIPPED
    ]


def test_only_standard_terms_are_used() -> None:
    findings = [finding for path in files() for finding in check(path)]
    assert not findings, "\n".join(map(str, findings))


if __name__ == "__main__":
    listed = [finding for path in files(*sys.argv[1:]) for finding in check(path)]
    print(*listed, sep="\n")
    print()
    for package, count in Counter(
        "/".join(each.path.split("/")[:-1][:2]) or each.path for each in listed
    ).most_common():
        print(f"{count:5}  {package}")
    print(f"{len(listed):5}  in all")
