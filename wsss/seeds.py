"""Seeds: class maps scaled to [0, 1], thresholded (Sec. 3.4 of the paper), and the file that they are kept in."""
import numpy as np
import torch
import torch.nn.functional as F

from wsss.stage import InputError, write


def normalise(cams, eps=1e-5):
    """Scale each class map to [0, 1] (Sec. 3.4; the exact form is TransCAM's).

    cams: (K, H, W), non-negative  ->  (K, H, W)
    """
    low, high = cams.amin((1, 2), keepdim=True), cams.amax((1, 2), keepdim=True)
    cams = torch.where(cams < low + eps, 0, cams)
    return ((cams - low - eps) / (high - low + eps)).clamp(min=0)


def hard_threshold(classes, cams, threshold):
    """Class of the largest map where it reaches `threshold`, else background (Sec. 3.4).

    classes: (k,), cams: (k, H, W) in [0, 1]  ->  uint8 (H, W)
    """
    if not len(classes):
        return np.zeros(cams.shape[1:], np.uint8)
    return np.where(cams.max(0) >= np.float32(threshold), classes[cams.argmax(0)], 0).astype(np.uint8)


def eigen_cam(features, cams):
    """Eigen-CAM (Muhammad & Yeasin 2020): the features' first right singular vector, its sign that of the class maps.

    features: (C, h, w), cams: (k, h, w) of the photo's labels  ->  (h, w)
    """
    _, _, vectors = torch.linalg.svd(features.flatten(1), full_matrices=False)
    first = vectors[0]
    agrees = ((first - first.mean()) * cams.sum(0).flatten()).sum() >= 0
    return (first if agrees else -first).view(features.shape[1:])


def combine_scales(maps, size):
    """Sum of class maps of several scales, resized to the photo, negatives cut, scaled to [0, 1] (Sec. 4.2).

    maps: list of (K, h, w)  ->  (K, H, W), size = (H, W)
    """
    if not len(maps[0]):
        return torch.zeros(0, *size)
    resized = [F.interpolate(m[None], size, mode="bilinear", align_corners=False)[0] for m in maps]
    return normalise(torch.stack(resized).sum(0).clamp(min=0))


def write_seeds(path, classes, size, maps):
    """An .npz of `classes` (int64, 1..K), `size` (H, W) and the maps: {name: list of (k, h, w), one a scale}.

    The low-resolution sums hold everything: resizing and summing are linear, and `read_seeds` does them.
    """
    arrays = {f"{name}_{n}": m for name, scales in maps.items() for n, m in enumerate(scales)}
    write(path, lambda file: np.savez(file, classes=np.asarray(classes), size=np.asarray(size), **arrays))


def read_seeds(path, name="refined", photo_size=None):
    """-> classes (k,) int64 in 1..K, maps float32 (k, H, W) in [0, 1]

    name: "refined" (M*), "plain" (M), or "eigen" (Eigen-CAM where the plain CAM's largest class is this one).
    photo_size: (H, W) that they must have
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            maps = [torch.from_numpy(file[f"{name}_{n}"]) for n in range(len(file.files)) if f"{name}_{n}" in file]
            classes, cams = file["classes"], combine_scales(maps, tuple(file["size"].tolist())).numpy()
        maps_needed = 1 if name == "eigen" else classes.size
        is_sound = classes.dtype.kind == "i" and classes.ndim == 1 and (classes > 0).all() and np.isfinite(cams).all()
        if not is_sound or len(cams) != maps_needed:
            raise ValueError
    except Exception:  # numpy raises many kinds
        raise InputError(f'{path} is damaged or lacks {name} seeds: delete it and run "make cams"') from None
    if photo_size and cams.shape[1:] != tuple(photo_size):
        raise InputError(f'{path} is of a photo of another size: delete it and run "make cams"')
    if name == "eigen" and len(classes):
        winner = read_seeds(path, "plain")[1].argmax(0)
        cams = np.stack([np.where(winner == k, cams[0], 0) for k in range(len(classes))])
    return classes, cams
