"""Run a test over many values as one item, or over many models as a default and a slow item."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import pytest

Test = Callable[..., None]
REPRESENTATIVE = ("vit", "deit distilled", "cait", "pit", "swin", "swin v2", "beit", "mvit v2")
"""Names of models, and of their attention layers, that run by default."""


def each(items: Iterable[Any], *names: str) -> Callable[[Test], Test]:
    """Run a test for each item, passed as the named arguments, and report all failures together."""

    def decorate(test: Test) -> Test:
        return _loop(test, names, lambda: items, {})

    return decorate


def sweep(items: Iterable[Any], *names: str, quick: Iterable[str] = REPRESENTATIVE) -> Callable[[Test], Any]:
    """Run a test for representative models by default, and for the rest if slow tests run.

    Args:
        items: names of models, or tuples whose first element is a name.
        names: arguments of the test that an item fills, by default the first ones.
        quick: names that run by default.
    """
    items, quick = list(items), set(quick)
    batches = {"representative": [item for item in items if _name(item) in quick]}
    batches["rest"] = [item for item in items if _name(item) not in quick]
    marks = {"representative": (), "rest": (pytest.mark.slow,)}

    def decorate(test: Test) -> Any:
        count = len(items[0]) if isinstance(items[0], tuple) else 1
        swept = names or tuple(inspect.signature(test).parameters)[:count]
        run = _loop(test, swept, lambda batch: batches[batch], {"batch": None})
        return pytest.mark.parametrize(
            "batch", [pytest.param(key, id=key, marks=marks[key]) for key, batch in batches.items() if batch]
        )(run)

    return decorate


def _name(item: Any) -> Any:
    return item[0] if isinstance(item, tuple) else item


def _loop(test: Test, names: tuple[str, ...], items: Callable[..., Iterable[Any]], added: dict[str, Any]) -> Test:
    """Return a test without the named arguments, which runs the given one for every item."""

    @functools.wraps(test)
    def run(**fixed: Any) -> None:
        failures = []
        for item in items(**{name: fixed.pop(name) for name in added}):
            values = dict(zip(names, item if len(names) > 1 else (item,), strict=True))
            try:
                test(**values, **fixed)
            except pytest.skip.Exception:
                continue
            except Exception as error:
                failures.append(f"{item}: {type(error).__name__}: {error}")
        assert not failures, "\n".join(failures)

    parameters = [each for name, each in inspect.signature(test).parameters.items() if name not in names]
    parameters += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in added]
    run.__signature__ = inspect.Signature(parameters)
    del run.__wrapped__
    return run
