"""The numbers of the house hold; `measures` says what each of them counts."""

import pytest

from tests.house import measures
from tests.house.zeros import PACKAGE, mirror_of, modules


def test_there_are_no_more_tokens_than_allowed():
    assert measures.tokens() <= measures.TOKENS


def test_a_line_holds_little():
    assert measures.density(measures.SOURCES) <= measures.DENSITY


def test_rooms_know_few_others():
    assert len(measures.arrows()) <= measures.ARROWS


def test_no_module_imports_itself_by_way_of_others():
    assert measures.circle() == []


@pytest.mark.parametrize("over", measures.LISTS, ids=lambda over: over.__name__)
def test_nothing_is_over_its_limit(over):
    assert over() == []


@pytest.mark.parametrize("path", list(modules()), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_has_mirror_of_its_name(path):
    assert mirror_of(path).exists()
