"""`--plan`: what a run would take, before anything is loaded."""

import argparse

from prime.errors import InputError


def show(stage: str, args: argparse.Namespace) -> None:
    """Print the plan of a stage, named by its script."""
    raise InputError("--plan is being rewritten")
