"""vim2: MambaMixer (arXiv 2403.19888) in PyTorch. Importing it registers the ViM2 models with timm."""

from .vim2 import ViM2

__version__ = "0.1.0"

__all__ = ["ViM2", "__version__"]
