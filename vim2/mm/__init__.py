"""ViM2 in OpenMMLab's libraries. Importing this registers with MMEngine what their configs name:

    custom_imports = dict(imports=["vim2.mm"], allow_failed_imports=False)
    model = dict(backbone=dict(type="ViM2", arch="tiny"))

MMEngine's root registry serves MMDetection, MMSegmentation and MMPreTrain alike. Where mmcv has no compiled operators
(mmcv-lite), torchvision's stand in for them; checkpoints of these libraries load with PyTorch's safe loader; images of
floats, or of 16 bits by Pillow, are refused where they would be cut off; `vim2::mmdet/...` in a config names one that
this package brings. Needs `mmengine`; everything else only when it is used.
"""

import contextlib

from . import configs, loading, operators
from .backbone import ViM2
from .optimizer import ViM2LayerDecayOptimWrapperConstructor

loading.allow_checkpoints()
operators.install()
configs.install()
with contextlib.suppress(ImportError):  # without mmcv there are no pipelines, nor in its versions before 2
    from . import images  # noqa: F401  (it registers what reads them)

__all__ = ["ViM2", "ViM2LayerDecayOptimWrapperConstructor"]
