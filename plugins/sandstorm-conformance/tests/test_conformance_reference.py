"""The reference provider passes every clause, each clause has one test, and the page of the clauses is current."""

from __future__ import annotations

from pathlib import Path

import pytest
from trio.testing import MockClock

from sandstorm.testing import ReferenceProvider, reference_traits
from sandstorm_conformance import CLAUSES, Dialect, Program, ProviderConformance, document


class ToyDialect(Dialect):
    """Programs in the language of the reference provider."""

    def _toy(self, text, **files):
        return Program(("run", "program"), {"program": text.encode(), **files})

    def emit(self, stdout, line):
        return self._toy(f"read emitted\nerr {line}", emitted=stdout)

    def echo(self):
        return self._toy("cat")

    def exits(self, code):
        return self._toy(f"exit {code}")

    def dies(self, number):
        return self._toy(f"signal {number}")

    def floods(self, count):
        return self._toy(f"flood {count}")

    def swaps(self):
        return self._toy("read state\nwrite state again", state=b"first")

    def leaves_child(self, path, seconds):
        return self._toy(f"sleep {seconds}\nwrite {path} x\nsleep 60")


@pytest.mark.parametrize("lag", [0.0, 3.0])
class TestReference(ProviderConformance):
    dialect = ToyDialect()

    def new_clock(self):
        return MockClock(autojump_threshold=0)

    @pytest.fixture
    def provider(self, lag):
        return ReferenceProvider(traits=reference_traits(find_lag=lag))


def test_each_clause_has_one_test():
    """No clause is without a test, no test of the suite without a clause, and none has two."""
    tests = [value for name, value in vars(ProviderConformance).items() if name.startswith("test_")]
    assert sorted(test.clause.id for test in tests) == sorted(clause.id for clause in CLAUSES)


def test_the_page_is_current():
    """The page of the clauses is what the registry says."""
    assert (Path(__file__).parents[3] / "docs" / "conformance.md").read_text() == document()
