"""The command line. Nothing heavy is imported before a verb runs."""

from dyadlm.cli.app import main

__all__ = ["main"]
