"""Photos and index masks: read, checked, written, drawn over each other; and what makes tensors of them."""
import functools
import math
import struct
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps
from torchvision.transforms import InterpolationMode, v2
from torchvision.utils import draw_segmentation_masks

from wsss.stage import InputError, write

VOID = 255  # mask value that never counts
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, of RGB in [0, 1]
MEAN_COLOUR = tuple(round(255 * m) for m in MEAN)
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)  # of Pillow


def require(paths, what, remedy=""):
    """Raise InputError unless all files exist."""
    paths = list(map(Path, paths))
    missing = [path for path in paths if not path.is_file()]
    if missing:
        count = f"{len(missing)} of {len(paths)} {what}"
        raise InputError(f"{missing[0].parent} lacks {count}, first {missing[0].name}{remedy}")


# ---------------------------------------------------------------- photos and masks

def read_image(path):
    """An image file of any mode -> PIL RGB, turned as its EXIF entry says."""
    require([path], "photos")
    try:
        image = ImageOps.exif_transpose(Image.open(path))
        if image.mode.startswith("I"):  # 16 bits, which Pillow would cut, not scale
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return image.convert("RGB")
    except UNREADABLE as error:
        raise InputError(f"cannot read {path}: {error}") from None


def header_size(path, is_photo):
    """(H, W) of an image file without reading its pixels; of a photo after the turn that its EXIF entry asks for."""
    try:
        with Image.open(path) as image:
            turned = is_photo and image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
            return image.size if turned else image.size[::-1]
    except UNREADABLE as error:
        raise InputError(f"cannot read {path}: {error}") from None


def other_size(path, size, of_photo):
    """What a message says of a mask's (H, W) that is not its photo's."""
    swapped = size == of_photo[::-1]
    turned = ": sides swapped, as where a photo is turned by its EXIF entry and the mask is not" if swapped else ""
    return f"{path} is {size[1]}x{size[0]}, its photo {of_photo[1]}x{of_photo[0]}{turned}"


def read_mask(path, num_classes=None, size=None):
    """An index PNG -> uint8 (H, W). Colours of PASCAL VOC's palette become their index, with a line saying so.

    num_classes: values must lie below it, or be VOID; size: (H, W) that the mask must have.
    """
    require([path], "masks")
    try:
        mask = Image.open(path)
        mode, values, colours = mask.mode, np.array(mask), mask.getpalette()
    except UNREADABLE as error:
        raise InputError(f"cannot read {path}: {error}") from None
    if mode in ("RGB", "RGBA"):
        note(f"masks in {path.parent} are in colours, read as PASCAL VOC's palette")
        table, code = np.full(1 << 24, -1, np.int16), np.array([1 << 16, 1 << 8, 1])
        table[palette() @ code] = np.arange(256)
        values = table[values[..., :3] @ code]
        if values.min() < 0:
            raise InputError(f"{path} has colours that are not of PASCAL VOC's palette")
    elif mode == "1":
        raise InputError(f"{path} has one bit a pixel: write an index PNG, 0 for background and 1, 2, ... for classes")
    elif mode not in ("P", "L") and not mode.startswith("I") or values.max() > 255:
        raise InputError(f"{path} is not an index PNG (palette or grey, values up to 255) but {mode}")
    if mode == "P":
        refuse_renumbered(path, values, colours)
    if num_classes and (worst := int(values[values != VOID].max(initial=0))) >= num_classes:
        raise InputError(f"{path} has value {worst}, but there are {num_classes} classes with background")
    if size and values.shape != tuple(size):
        raise InputError(other_size(path, values.shape, tuple(size)))
    return values.astype(np.uint8)


def refuse_renumbered(path, values, colours):
    """InputError where the indices in use have colours that VOC's palette gives to others.

    Palettes that are grey, or not VOC's, say nothing. colours: list of r, g, b, r, ...
    """
    used = np.bincount(values.ravel(), minlength=256).nonzero()[0]
    colours = np.array(colours, np.uint8).reshape(-1, 3)
    if used[-1] >= len(colours) or (colours[used] == colours[used][:, :1]).all():
        return
    same = (colours[used][:, None] == palette()).all(2)  # (indices in use, 256)
    wrong = [(n, other) for n, other in zip(used, same.argmax(1)) if other and n != other]  # black fills unused places
    if wrong and same.any(1).all():
        n, other = wrong[0]
        raise InputError(f"{path} was renumbered: index {n} has the colour of index {other} in PASCAL VOC's palette: "
                         "save it without changing its palette, or as RGB, which is read by its colours")


@functools.lru_cache
def note(line):
    """Print a line the first time it is said."""
    print(line, flush=True)


@functools.lru_cache
def palette():
    """PASCAL VOC's colours. -> uint8 (256, 3)"""
    index, colours = np.arange(256), np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= (((index >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    return colours


def write_mask(path, mask):
    """uint8 (H, W) -> index PNG with PASCAL VOC's palette."""
    image = Image.fromarray(mask.astype(np.uint8))
    image.putpalette(palette().tobytes())
    write(path, lambda file: image.save(file, format="PNG"))


def overlay(photo, mask, strength=0.75):
    """The photo with each class in its colour. photo: uint8 (3, H, W), mask: uint8 (H, W)  ->  uint8 (3, H, W)"""
    named = [c for c in np.unique(mask).tolist() if 0 < c < VOID]
    if not named:
        return photo
    chosen = torch.stack([torch.from_numpy(mask == c) for c in named])
    return draw_segmentation_masks(photo, chosen, strength, [tuple(palette()[c].tolist()) for c in named])


# ---------------------------------------------------------------- transforms

def random_long_side(image, low, high):
    """The longer side becomes a random length in [low, high] pixels (Pillow bicubic, antialiased). PIL -> PIL"""
    factor = int(torch.randint(low, high + 1, ())) / max(image.size)
    size = [max(1, round(side * factor)) for side in image.size[::-1]]
    return v2.functional.resize(image, size, InterpolationMode.BICUBIC)


def to_tensor():
    """PIL RGB -> float32 (3, H, W), ImageNet mean and deviation. A mask beside it stays as it is."""
    return v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])


def square(side):
    """PIL photo -> float32 (3, side, side), resized"""
    return v2.Compose([v2.Resize((side, side), InterpolationMode.BICUBIC), to_tensor()])


def jitter_hsv(photo):
    """Random shift of hue by up to 10 of 180, of saturation and value by up to 10 of 255. PIL RGB -> PIL RGB"""
    shift = torch.empty(3).uniform_(-10, 10).numpy() * (256 / 180, 1, 1)  # Pillow's hue has 256 steps
    hsv = np.array(photo.convert("HSV")) + shift
    hsv[..., 0] %= 256
    return Image.fromarray(hsv.clip(0, 255).astype(np.uint8), mode="HSV").convert("RGB")


def scale_like_opencv(image, factor, mode="bicubic"):
    """Both sides times `factor`, as OpenCV's cubic or nearest does it: not antialiased, on the grid of `factor` itself.

    image: float32 (C, H, W)  ->  float32 (C, round(factor H), round(factor W)), at least one pixel each
    """
    height, width = (max(1, round(side * factor)) for side in image.shape[1:])
    more = math.ceil(1 / factor)  # of the border's pixels, so that the grid reaches the rounded size
    padded = F.pad(image[None], (0, more, 0, more), mode="replicate")
    scaled = F.interpolate(padded, scale_factor=factor, mode=mode, recompute_scale_factor=False)
    return scaled[0, :, :height, :width]
