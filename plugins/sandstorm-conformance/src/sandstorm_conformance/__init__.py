"""The suite that a provider author subclasses: `ProviderConformance`, with one fixture named `provider`."""

from sandstorm_conformance._clauses import CLAUSES, Clause, clause, document
from sandstorm_conformance._dialect import Dialect, Program
from sandstorm_conformance._suite import ProviderConformance

__all__ = ["CLAUSES", "Clause", "Dialect", "Program", "ProviderConformance", "clause", "document"]
