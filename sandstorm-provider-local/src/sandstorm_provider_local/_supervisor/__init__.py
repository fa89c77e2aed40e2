"""The process that owns one box: its life, its programs and their output, its ports; it outlives the router that made it.

It runs as `sys.executable -I -S -c …` with the standard library only, and imports nothing that takes long: every box has one.
Towards routers it listens on the socket `sock` in the directory of the box; `_requests` answers them. Inside, `_agent` has
orders carried out. All messages are those of `_inside/_wire.py`.
"""

from __future__ import annotations

from sandstorm_provider_local._supervisor._spawn import Sandbox


def main(fd: int) -> None:
    """Makes the box that the file `fd` describes, serves its routers and returns when nothing of it is left."""
    # The sandbox starts first: the rest is imported while it does.
    sandbox = Sandbox.from_file(fd)
    from sandstorm_provider_local._supervisor._box import Box

    try:
        box = Box(sandbox)
    except BaseException as error:
        sandbox.abandon(error)
        raise
    box.run()
