"""What holds for every test of the workspace."""

from __future__ import annotations

import signal

# A shell starts what it runs in the background with Ctrl-C ignored, and every child would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
