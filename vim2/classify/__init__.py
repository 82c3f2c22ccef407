"""Training, validation and prediction on images, with timm's parts and option names. docs/training.md is the guide."""

from ..command.errors import UserError
from .conversion import convert
from .prediction import predict
from .training import train
from .validation import validate

__all__ = ["UserError", "convert", "predict", "train", "validate"]
