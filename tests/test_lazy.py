"""Public names that are listed in a stub: all exist, and are what they are called there."""

import importlib

import pytest

import flowsim
from flowsim.diagnostics.margins import margin
from flowsim.lazy import attach


@pytest.mark.parametrize(
    "package", ["flowsim", "flowsim.diagnostics", "flowsim.diagnostics.theorems", "flowsim.plots"]
)
def test_every_listed_name_is_found(package):
    imported, listed, names = attach(package)
    assert names == listed() == sorted(set(names)) != []
    for name in names:
        assert imported(name) is getattr(importlib.import_module(package), name) is not None


def test_names_are_objects_modules_or_renamed():
    assert flowsim.diagnostics.margin is margin
    assert flowsim.clocks.lam is flowsim.lam
    assert flowsim.identities.__name__ != "flowsim.identities"


def test_what_is_not_listed_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"'flowsim\.diagnostics' has no attribute 'nothing'"):
        attach("flowsim.diagnostics")[0]("nothing")
