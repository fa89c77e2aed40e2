"""`python -m sandstorm_cli` is `sandstorm`."""

from __future__ import annotations

from sandstorm_cli._main import main

main()
