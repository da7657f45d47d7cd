"""Backends: one module each, one registration line in registry.py."""

from .base import Backend, BackendReport
from .registry import backend_for, backends, explain, use_backend

__all__ = ["Backend", "BackendReport", "backend_for", "backends", "explain", "use_backend"]
