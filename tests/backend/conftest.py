"""The fixtures of the registry's loading tests, and of those that drive the compiled library by hand."""

from stub_libraries import build, clean_settings, compiler, package, use

from .native_cases import native, variants

__all__ = ["build", "clean_settings", "compiler", "native", "package", "use", "variants"]
