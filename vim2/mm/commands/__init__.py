"""What the console command runs as `vim2 mm train`, `test` and `predict`."""

from .drawing import predict
from .testing import test
from .training import train

__all__ = ["predict", "test", "train"]
