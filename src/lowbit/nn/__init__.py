"""Floor 1: where a spec meets a module."""
