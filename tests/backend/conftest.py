"""The fixtures of the registry's loading tests."""

from stub_libraries import build, clean_settings, compiler, package, use

__all__ = ["build", "clean_settings", "compiler", "package", "use"]
