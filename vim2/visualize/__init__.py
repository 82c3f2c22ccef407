"""Pictures of what a ViM2 has learned and of what it does with an image. docs/training.md is the guide."""

from ..command.errors import UserError
from .command import visualize
from .page import demo

__all__ = ["UserError", "demo", "visualize"]
