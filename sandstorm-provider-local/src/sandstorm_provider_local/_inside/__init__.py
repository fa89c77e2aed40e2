"""What runs inside of the sandbox: standard library only, its source is bound into it."""
