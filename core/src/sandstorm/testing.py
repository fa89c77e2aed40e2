"""Providers for tests, without any vendor: plain objects that need no test framework.

`ReferenceProvider` obeys the whole contract in memory, on trio's clock, so that a `MockClock` drives it; its `vendor`
says what really happened on the other side. `ChaosProvider` wraps any provider and fails as a script says.

>>> from sandstorm.testing import ChaosProvider, Fault, ReferenceProvider
>>> provider = ChaosProvider(ReferenceProvider(), [Fault(step="create", kind="ambiguous", committed=True)])

The reference provider cannot run Python. It interprets a toy language, line by line::

    out TEXT          TEXT and a newline to stdout; so does  print('TEXT')
    err TEXT          TEXT and a newline to stderr
    sleep SECONDS     waits
    cat               what is left of stdin to stdout
    write PATH TEXT   a file with exactly TEXT
    read PATH         the file's bytes to stdout
    env NAME          the variable and a newline to stdout
    exit N            ends with code N
    signal N          ends as if by signal N
    hog               ends as if out of memory
    flood BYTES       so many bytes to stdout

Empty lines and lines that begin with `#` do nothing, and a program that ends has code 0. A command means the file that
its second word names, where there is one, and else a single line: `("python3", "main.py")`, `("out", "hello")`.
"""

from __future__ import annotations

from collections.abc import Iterable

from sandstorm._testing._chaos import KINDS, STEPS, ChaosProvider, Fault, Injected
from sandstorm._testing._reference import REFERENCE_RATES, ReferenceProvider, reference_traits
from sandstorm._testing._vendor import Call, Charge, Vendor
from sandstorm.provider import Provider, hookimpl


class ProvidersPlugin:
    """A plugin that registers provider objects. `name` is the plugin's."""

    def __init__(self, name: str, providers: tuple[Provider, ...]) -> None:
        self.name = name
        self._providers = providers

    @hookimpl
    def sandstorm_providers(self) -> Iterable[Provider]:
        """The provider objects."""
        return self._providers


def plugin_for(*providers: Provider, name: str = "testing") -> ProvidersPlugin:
    """A plugin object that registers these providers."""
    return ProvidersPlugin(name, providers)


__all__ = [
    "KINDS",
    "REFERENCE_RATES",
    "STEPS",
    "Call",
    "ChaosProvider",
    "Charge",
    "Fault",
    "Injected",
    "ProvidersPlugin",
    "ReferenceProvider",
    "Vendor",
    "plugin_for",
    "reference_traits",
]
