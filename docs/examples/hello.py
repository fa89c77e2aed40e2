"""A first program: what `make hello` runs in a sandbox."""

import platform

print("Hello from a sandbox.")
print("Python", platform.python_version(), "on", platform.system())
