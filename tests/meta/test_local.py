"""The local provider passes the conformance suite, with real programs."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest

from sandstorm_conformance import ProviderConformance
from sandstorm_provider_local import LocalProvider


class TestLocal(ProviderConformance):
    @pytest.fixture
    def provider(self):
        state = Path(tempfile.mkdtemp(prefix="sandstorm-test-"))
        state.chmod(0o711)
        yield LocalProvider(state_dir=str(state), warn=False)
        shutil.rmtree(state)
