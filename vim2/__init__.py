"""vim2: MambaMixer (arXiv 2403.19888) in PyTorch. Importing it registers the ViM2 models with timm."""

from .tsm2 import TSM2, TSM2Config
from .vim2 import ViM2

__version__ = "0.1.0"

__all__ = ["TSM2", "TSM2Config", "ViM2", "__version__"]
