"""Fixtures of whole runs."""

from tests.runs import model, workplace

__all__ = ["model", "workplace"]
