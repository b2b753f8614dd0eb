"""Pictures that image-to-video starts from: any file that Pillow reads, as upright RGB of 8 bits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from xattn_video_pipelines.common.errors import UserError, one_line

if TYPE_CHECKING:
    from PIL.Image import Image

# Pillow's modes whose conversion to RGB shows the picture. What is left is refused: LAB has no conversion, for example.
_PLAIN = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV")
_TRANSPARENT = ("LA", "La", "PA", "RGBA", "RGBa")
# Formats whose whole numbers have 16 bits, also where an older Pillow reads them into 32.
_SIXTEEN_BITS = ("PNG", "PPM")


def load_picture(path: Path) -> Image:
    """A picture as RGB of 8 bits a channel, turned as its camera says; what is transparent is white.

    16-bit grey is scaled from 0 to 65535, and float grey from 0 to 1.

    Raises:
        UserError: the file is damaged, too large for Pillow, or of a kind whose range cannot be told, which is named.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            sixteen = opened.mode.startswith("I;16") or (opened.mode == "I" and opened.format in _SIXTEEN_BITS)
            # Upright: photographs of phones say beside their pixels how they are to be turned.
            picture = ImageOps.exif_transpose(opened)
            if sixteen:
                return _from_grey(np.asarray(picture, dtype=np.float64) / 65535)
            if picture.mode == "F":
                grey = np.asarray(picture, dtype=np.float64)
                # Written so that a NaN fails too.
                if not (grey.min() >= 0 and grey.max() <= 1):
                    raise UserError(
                        f"{path}: a float picture (mode F) must have values in [0, 1], "
                        f"got {grey.min():g} to {grey.max():g}; save it with 8 or 16 bits"
                    )
                return _from_grey(grey)
            if picture.mode in _TRANSPARENT or "transparency" in picture.info:
                seen = picture.convert("RGBA")
                return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")
            if picture.mode not in _PLAIN:
                raise UserError(f"{path}: pictures of the mode {picture.mode} cannot be shown as RGB; save it as RGB")
            return picture.convert("RGB")
    except UserError:
        raise
    # Pillow's decoders raise these for damage, depending on the format.
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: damaged image: {one_line(error)}") from None


def _from_grey(grey: np.ndarray) -> Image:
    """RGB of grey levels `[H, W]` in [0, 1]."""
    from PIL import Image

    return Image.fromarray(np.rint(grey * 255).astype(np.uint8)).convert("RGB")
