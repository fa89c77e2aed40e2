"""What this provider allows at most: figures that offers, settings and sessions share."""

from __future__ import annotations

LONGEST_LIFE = 7 * 86400.0
"""Seconds that a sandbox may live from now; what is wanted for longer is made again from a snapshot."""
ENVIRONMENTS_DISK = 10240
"""MiB that all prepared environments may take, where the settings say nothing else."""
IMAGE_DISK = 10240
"""MiB that one image may take, unpacked, likewise."""
