"""Run a test for many cases as one item that reports all failures."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import pytest


def sweep(names: str | tuple[str, ...], cases: Iterable[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that calls a test for each case, like `pytest.mark.parametrize` but as one item.

    Each case has its own `tmp_path` and `monkeypatch`; other fixtures are shared.
    """
    names = tuple(name.strip() for name in names.split(",")) if isinstance(names, str) else names
    cases = list(cases)

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        def run(**fixtures: Any) -> None:
            failures = []
            for number, case in enumerate(cases):
                values = dict(zip(names, case if len(names) > 1 else (case,), strict=True))
                with ExitStack() as stack:
                    own = fixtures | values
                    if "tmp_path" in fixtures:
                        own["tmp_path"] = fixtures["tmp_path"] / f"case{number}"
                        own["tmp_path"].mkdir()
                    if "monkeypatch" in fixtures:
                        own["monkeypatch"] = stack.enter_context(fixtures["monkeypatch"].context())
                    try:
                        test(**own)
                    except (Exception, pytest.fail.Exception) as error:
                        failures.append(f"{values}: {type(error).__name__}: {error}")
            assert not failures, "\n".join(failures)

        parameters = [each for each in inspect.signature(test).parameters.values() if each.name not in names]
        run.__signature__ = inspect.Signature(parameters)
        run.__name__, run.__doc__, run.__module__ = test.__name__, test.__doc__, test.__module__
        return run

    return decorate
