"""The Docker provider: runs code in containers, through the API socket of podman or Docker."""

from __future__ import annotations

from sandstorm_provider_docker._plugin import DockerPlugin, Settings
from sandstorm_provider_docker._provider import DockerProvider

__all__ = ["DockerPlugin", "DockerProvider", "Settings"]
