"""The launcher: start-once, tree kill, exact output and detachment over a bounded exec; see `docs/launcher.md`."""

from __future__ import annotations

from sandstorm._launcher._access import BoundedExec, ExecAnswer
from sandstorm._launcher._answer import ImageTools, StartState
from sandstorm._launcher._process import LaunchedProcess
from sandstorm._launcher._starter import Launcher

__all__ = ["BoundedExec", "ExecAnswer", "ImageTools", "LaunchedProcess", "Launcher", "StartState"]
