"""Index masks: read, checked against photos and labels, written, drawn over a photo."""
import contextlib
import functools

import numpy as np
import torch
from PIL import Image
from torchvision.utils import draw_segmentation_masks

from wsss.stage import InputError, require, write

VOID = 255  # mask value that never counts


@functools.lru_cache
def note(line):
    """Print a line once, however often it is called."""
    print(line, flush=True)


@functools.lru_cache
def palette():
    """PASCAL VOC's colours. -> uint8 (256, 3)"""
    index, colours = np.arange(256), np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= (((index >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    return colours


def refuse_renumbered(path, values, colours):
    """InputError where the indices in use have colours that VOC's palette gives to others.

    Palettes that are grey, or not VOC's, say nothing. colours: list of r, g, b, r, ...
    """
    if colours == palette().ravel().tolist()[:len(colours)]:
        return
    index = {tuple(colour): n for n, colour in enumerate(palette().tolist())}
    used = {n: tuple(colours[3 * n:3 * n + 3]) for n in np.unique(values).tolist()}
    is_voc = all(colour in index for colour in used.values()) and any(len(set(colour)) > 1 for colour in used.values())
    for n, colour in used.items():
        if is_voc and n != index[colour] > 0:  # black fills unused places
            raise InputError(f"{path}: index {n} has VOC's colour of {index[colour]}: keep its palette, or save as RGB")


def read_mask(path, num_classes=None, size=None, remedy=""):
    """An index PNG -> uint8 (H, W). Colours of PASCAL VOC's palette become their index, with a line saying so.

    num_classes: values must lie below it, or be VOID; size: (H, W) that the mask must have; remedy: ends its errors
    """
    require([path], "masks")
    try:
        mask = Image.open(path)
        mode, values, colours = mask.mode, np.array(mask), mask.getpalette()
    except Exception as error:  # Pillow raises many kinds
        raise InputError(f"cannot read {path}: {error}{remedy}") from None
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
        raise InputError(f"{path} has value {worst}, but there are {num_classes} classes with background{remedy}")
    if size and values.shape != tuple(size):
        (h, w), (H, W) = values.shape, size
        turned = ": sides swapped, as where a photo is turned by its EXIF entry and the mask is not"
        raise InputError(f"{path} is {w}x{h}, its photo {W}x{H}" + turned * ((h, w) == (W, H)) + remedy)
    return values.astype(np.uint8)


def write_mask(path, mask):
    """uint8 (H, W) -> index PNG with PASCAL VOC's palette."""
    image = Image.fromarray(mask.astype(np.uint8))
    image.putpalette(palette().tobytes())
    write(path, lambda file: image.save(file, format="PNG"))


def write_made(make, path, *given):
    """The mask `make(*given)`: what a worker does for a photo."""
    write_mask(path, make(*given))


def overlay(photo, mask, strength=0.75):
    """The photo with each class in its colour. photo: uint8 (3, H, W), mask: uint8 (H, W)  ->  uint8 (3, H, W)"""
    named = [c for c in np.unique(mask).tolist() if 0 < c < VOID]
    if not named:
        return photo
    chosen = torch.stack([torch.from_numpy(mask == c) for c in named])
    return draw_segmentation_masks(photo, chosen, strength, [tuple(palette()[c].tolist()) for c in named])


def classes_in(path, num_classes, size=None):
    """The classes in a mask, of (H, W) where that is given. -> bool (S,)"""
    return np.bincount(read_mask(path, num_classes, size).ravel(), minlength=256)[:num_classes] > 0


def contradictions(dataset, names, presence):
    """How the masks of these photos contradict their image labels, a line each; that a few differ is normal.

    presence: (n, S), `classes_in` of each photo's mask
    """
    if not names:
        return []
    shown, labels = np.stack(presence)[:, 1:], None
    with contextlib.suppress(InputError):  # scores of masks alone need no labels
        labels = dataset.labels(names).numpy() > 0
    if not shown.any() and (labels is None or labels.any()):
        return [f"none of {len(names)} masks shows a class: they hold 0 (background) and {VOID} (void) alone, where "
                f"classes are 1 to {dataset.num_classes - 1}"]
    if labels is None:
        return []
    lines, agreed, count = [], labels & shown, labels.sum(0)
    for n, name in enumerate(dataset.classes):
        if count[n] and not agreed[:, n].any():
            where = "only in masks of photos without that label" if shown[:, n].any() else "in none of the masks"
            lines.append(f"{name}: labelled in {count[n]} photos, {where}")
    without = labels.any(1) & ~agreed.any(1)
    if without.sum() > labels.any(1).sum() / 2:
        first = names[int(without.argmax())]
        lines.append(f"{without.sum()} of {labels.any(1).sum()} masks show none of their photo's labels, first {first}")
    return lines
