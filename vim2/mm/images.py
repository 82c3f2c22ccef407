"""Images in MMEngine's pipelines whose pixels are more than 8 bits."""

import contextlib
import io

from mmcv.transforms import LoadImageFromFile
from mmengine import fileio
from mmengine.registry import TRANSFORMS
from PIL import Image

from ..command.images import to_8_bits

__all__ = []


@TRANSFORMS.register_module(name="LoadImageFromFile", force=True)
class _LoadImageFromFile(LoadImageFromFile):
    """mmcv's, which by Pillow would cut everything above 255 off, and by OpenCV does not say why it refuses floats."""

    def transform(self, results: dict) -> dict | None:
        by_pillow = self.imdecode_backend == "pillow" and self.color_type != "unchanged"
        if by_pillow and not self.ignore_empty:
            self._check(results["img_path"], "by imdecode_backend='pillow', take OpenCV, which is the default")
        try:
            return super().transform(results)
        except AssertionError:  # OpenCV has read nothing
            with contextlib.suppress(OSError, Image.DecompressionBombError):  # nor can Pillow
                self._check(results["img_path"])
            raise

    def _check(self, path: str, remedy: str = "") -> None:
        """Raise a ValueError for floats and 32-bit integers, and with a `remedy` for 16 bits as well."""
        with Image.open(io.BytesIO(fileio.get(path, backend_args=self.backend_args))) as image:
            if image.mode[0] in "FI":
                to_8_bits(image, "L")
                if remedy:
                    raise ValueError(f"has 16 bits a pixel, which are not read {remedy}")
