"""Stands for hypothesis on a machine without it: property tests are skipped, and the other tests of their files run (tests/conftest.py)."""

import pytest


def given(*_: object, **__: object) -> pytest.MarkDecorator:
    return pytest.mark.skip(reason="needs hypothesis")


def settings(*_: object, **__: object):
    return lambda test: test


class Anything:
    """All strategies, or one; a health check. Nothing is drawn from them."""

    def __getattr__(self, name: str) -> "Anything":
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *_: object, **__: object) -> "Anything":
        return self

    def __or__(self, _: object) -> "Anything":
        return self


HealthCheck = strategies = assume = example = note = Anything()
