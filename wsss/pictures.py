"""Pictures of what the stages made. `report.py` finds the runs, and hands over folders and arrays."""
from string import Template

import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import pil_to_tensor, resize, to_pil_image

import bnr
from wsss.data import read_image, square
from wsss.masks import overlay, palette, read_mask
from wsss.seeds import hard_threshold, read_seeds
from wsss.stage import STAGES

MAPS = {"plain": "plain CAM", "eigen": "Eigen-CAM", "refined": "refined CAM"}
FONT = ImageFont.load_default(size=13)
LINE = 20  # pixels of a line of text
GAP = 6  # pixels between panels


def heat(photo, classes, maps):
    """The photo, darkened, with each class map in its class's colour.

    photo: uint8 (3, H, W), classes: (k,), maps: (k, H, W) in [0, 1]  ->  uint8 (3, H, W)
    """
    grey = 0.35 * photo.float().mean(0, keepdim=True).expand(3, -1, -1)
    if not len(classes):
        return grey.byte()
    value, winner = torch.from_numpy(maps).max(0)
    colour = torch.from_numpy(palette())[torch.from_numpy(classes)[winner]].permute(2, 0, 1).float()
    return (grey * (1 - value) + colour * value).clamp(0, 255).byte()


def glow(photo, values):
    """The photo, darkened, under a map in black (its lowest value), red, yellow, white (its highest).

    photo: uint8 (3, H, W), values: (h, w)  ->  uint8 (3, H, W)
    """
    values = resize(values[None].float(), photo.shape[1:], antialias=True)[0]
    values = (values - values.min()) / (values.max() - values.min()).clamp(min=1e-12)
    colours = torch.stack([3 * values, 3 * values - 1, 3 * values - 2]).clamp(0, 1)
    return (0.3 * photo.float().mean(0) + 0.7 * 255 * colours).clamp(0, 255).byte()


def sheet(rows, height):
    """Rows of panels, (title, uint8 (3, H, W) or None), in one picture. height: of a panel, pixels  ->  PIL RGB"""
    pen, widths, placed = ImageDraw.Draw(Image.new("RGB", (1, 1))), [0] * max(map(len, rows)), []
    for y, row in enumerate(rows):
        for n, (title, picture) in enumerate(row):
            if picture is not None:
                H, W = picture.shape[1:]
                factor = min(height / H, 2 * height / W)  # at most twice as wide as high
                size = max(1, round(factor * W)), max(1, round(factor * H))
                picture = to_pil_image(picture).resize(size, Image.BICUBIC)
            widths[n] = max(widths[n], picture.width if picture else 0, round(pen.textlength(title, FONT)) + 4)
            placed.append((n, GAP + y * (LINE + height + GAP), title, picture))
    total = Image.new("RGB", (sum(widths) + GAP * (1 + len(widths)), GAP + len(rows) * (LINE + height + GAP)), "white")
    pen = ImageDraw.Draw(total)
    for n, y, title, picture in placed:
        x = sum(widths[:n]) + GAP * (1 + n)
        pen.text((x, y), title, "black", FONT)
        if picture:
            total.paste(picture, (x, y + LINE))
    return total


def stages_of(dataset, name, out, kinds=("refined",), threshold=0.4):
    """What a run made of one photo. kinds: of MAPS, "refined" last; threshold: of the seed

    ->  {title: uint8 (3, H, W), or None where a stage has not run}, {title: label uint8 (H, W), or None}
    """
    photo, path = pil_to_tensor(read_image(dataset.image(name))), out / "cams" / f"{name}.npz"
    cams, seed = dict.fromkeys(MAPS[kind] for kind in kinds), None
    for kind in kinds if path.is_file() else ():
        classes, maps = read_seeds(path, kind, photo.shape[1:])
        cams[MAPS[kind]], seed = heat(photo, classes, maps), hard_threshold(classes, maps, threshold)

    def read(path, remedy=""):
        return read_mask(path, dataset.num_classes, photo.shape[1:], remedy) if path.is_file() else None

    labels = {"ground truth": read(dataset.mask(name)), f"seed at {threshold:.2f}": seed}
    for title, stage in (("pseudo label", "pseudo_labels"), ("segmentation", "segmentation")):
        labels[title] = read(out / stage / f"{name}.png", f': delete it and run "make {STAGES[stage][1]}"')
    drawn = {title: None if label is None else overlay(photo, label) for title, label in labels.items()}
    return {"photo": photo, "ground truth": drawn.pop("ground truth"), **cams, **drawn}, labels


PAGE = Template("""<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>$name</title>
<style>
body { font: 16px/1.4 sans-serif; margin: 1em auto; max-width: 75em; padding: 0 1em }
td, th { padding: 0 1em 0 0; text-align: left } .stale { color: #b00 }
figure { margin: 1em 0 } img { height: auto; max-width: 100% } span { padding: 0 .4em; color: #fff; background: #000 }
</style>
<h1>$name</h1>
<table><tr><th>stage<th>split<th>N<th>threshold<th>mIoU %</tr>
$rows</table>
<p>$legend
$sections</html>
""")
FIGURE = Template("""<figure><figcaption>$title</figcaption>
<img src="$source" alt="" width="$width" height="$height" loading="lazy"></figure>
""")


@torch.inference_mode()
def look(model, image, crop, scales, device, amp):
    """A PIL photo through the classifier: M and M* at some scales of the crop; attention is the mean of A*'s columns.

    ->  {"probability": (K,), "plain" and "refined": list of (K, h, w), one a scale, "attention": (h, w)}
    """
    photos = [square(side)(image)[None].to(device) for side in bnr.sides(crop, scales)]
    maps = bnr.multi_scale(model, photos, None, ("plain", "refined"), device, amp)
    cam, z, qks = bnr.forward(model, square(crop)(image)[None].to(device))
    attn = bnr.sum_over_blocks([bnr.mean_over_heads(bnr.attention(q, k)) for q, k in qks])  # (1, N, N)
    return {**{kind: [scale[0] for scale in scales] for kind, scales in maps.items()},
            "probability": z[0].sigmoid().cpu(), "attention": attn[0].mean(0).view(cam.shape[2:]).cpu()}
