"""Pictures of what the stages made, and a page of them. `report.py` finds the runs, and hands over folders and arrays.

    python -m wsss.report show|gallery|figures    -> OUT/show.png, OUT/report/, OUT/figures/
"""
from html import escape
from string import Template

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import pil_to_tensor, resize, to_pil_image

import bnr
from wsss.evaluate import confusion, iou
from wsss.images import VOID, overlay, palette, read_image, read_mask, square
from wsss.seeds import hard_threshold, read_seeds
from wsss.stage import STAGES, InputError, write

MAPS = {"plain": "plain CAM", "eigen": "Eigen-CAM", "refined": "refined CAM"}
FONT = ImageFont.load_default(size=13)
LINE = 20  # pixels of a line of text
GAP = 6  # pixels between panels


# ---------------------------------------------------------------- one panel

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
    """The photo, darkened, under a map in black, red, yellow, white, its least black and its most white.

    photo: uint8 (3, H, W), values: (h, w)  ->  uint8 (3, H, W)
    """
    values = resize(values[None].float(), photo.shape[1:], antialias=True)[0]
    values = (values - values.min()) / (values.max() - values.min()).clamp(min=1e-12)
    colours = torch.stack([3 * values, 3 * values - 1, 3 * values - 2]).clamp(0, 1)
    return (0.3 * photo.float().mean(0) + 0.7 * 255 * colours).clamp(0, 255).byte()


def read_label(path, photo, num_classes, target=None):
    """An index PNG of the photo's size, or None where there is none. target: what makes a wrong one again"""
    try:
        return read_mask(path, num_classes, photo.shape[1:]) if path.is_file() else None
    except InputError as error:
        raise InputError(str(error) + (f': delete it and run "make {target}"' if target else "")) from None


# ---------------------------------------------------------------- many panels, and their page

def fitted(picture, height):
    """uint8 (3, H, W)  ->  PIL of this height, at most twice as wide"""
    _, H, W = picture.shape
    factor = min(height / H, 2 * height / W)
    return to_pil_image(picture).resize((max(1, round(factor * W)), max(1, round(factor * H))), Image.BICUBIC)


def sheet(rows, height):
    """Rows of panels, (title, uint8 (3, H, W) or None), in one picture. height: of a panel, pixels  ->  PIL RGB"""
    pen, widths = ImageDraw.Draw(Image.new("RGB", (1, 1))), [0] * max(map(len, rows))
    rows = [[(title, None if picture is None else fitted(picture, height)) for title, picture in row] for row in rows]
    for row in rows:
        for n, (title, picture) in enumerate(row):
            widths[n] = max(widths[n], picture.width if picture else 0, round(pen.textlength(title, FONT)) + 4)
    down = LINE + height + GAP  # from a row to the next
    total = Image.new("RGB", (sum(widths) + GAP * (1 + len(widths)), down * len(rows) + GAP), "white")
    pen = ImageDraw.Draw(total)
    for y, row in zip(range(GAP, total.height, down), rows):
        x = GAP
        for (title, picture), width in zip(row, widths):
            pen.text((x, y), title, "black", FONT)
            if picture:
                total.paste(picture, (x, y + LINE))
            x += width + GAP
    return total


def stages_of(name, photo_path, mask_path, out, num_classes, kinds, threshold):
    """What a run made of one photo. kinds: of MAPS, "refined" last; threshold: of the seed

    ->  {title: uint8 (3, H, W), or None where a stage has not run}, {title: label uint8 (H, W), or None}
    """
    photo, path = pil_to_tensor(read_image(photo_path)), out / "cams" / f"{name}.npz"
    cams, seed = dict.fromkeys(MAPS[kind] for kind in kinds), None
    for kind in kinds if path.is_file() else ():
        classes, maps = read_seeds(path, kind)
        (h, w), (H, W) = maps.shape[1:], photo.shape[1:]
        if (h, w) != (H, W):
            raise InputError(f'{path} is {w}x{h}, its photo {W}x{H}: delete it and run "make cams"')
        cams[MAPS[kind]], seed = heat(photo, classes, maps), hard_threshold(classes, maps, threshold)
    labels = {"ground truth": read_label(mask_path, photo, num_classes), f"seed at {threshold:.2f}": seed}
    for title, folder in (("pseudo label", "pseudo_labels"), ("segmentation", "segmentation")):
        labels[title] = read_label(out / folder / f"{name}.png", photo, num_classes, STAGES[folder][1])
    drawn = {title: None if label is None else overlay(photo, label) for title, label in labels.items()}
    return {"photo": photo, "ground truth": drawn.pop("ground truth"), **cams, **drawn}, labels


def draw_strip(to, height, scored, *photo):
    """Write the strip of one photo. photo: of `stages_of`  ->  IoU of the label `scored` or None, (width, height)"""
    panels, labels = stages_of(*photo)
    image, truth = sheet([list(panels.items())], height), labels["ground truth"]
    write(to, lambda file: image.save(file, format="JPEG", quality=80))
    if truth is None or labels[scored] is None:
        return None, image.size
    each = iou(confusion(truth, labels[scored], VOID))
    return (None if np.isnan(each).all() else float(np.nanmean(each))), image.size


PAGE = Template("""<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>$name</title>
<style>
body { font: 16px/1.4 sans-serif; margin: 1em auto; max-width: 75em; padding: 0 1em }
td, th { padding: 0 1em 0 0; text-align: left } .stale { color: #b00 }
figure { margin: 1em 0 } img { height: auto; max-width: 100% } span { padding: 0 .4em; color: #fff; background: #000 }
</style>
<h1>$name</h1>
<table><tr><th>stage<th>split<th>N<th>threshold<th>%<th></tr>
$rows</table>
<p>$legend
$sections</html>
""")


def table_row(row):
    """A row of results.json as HTML."""
    value = row.get("miou") if row.get("map") is None else 100 * row["map"]
    shown = row["note"] if value is None else f"{value:.2f} {'mIoU' if row.get('map') is None else 'mAP'}"
    notes = "; ".join(row[key] for key in ("missing", "seen", "stale") if key in row)
    cells = row["stage"], row["split"], row["n"], row.get("threshold", "-"), shown, notes
    return f"<tr{' class=stale' * ('stale' in row)}>" + "".join(f"<td>{escape(str(cell))}" for cell in cells) + "\n"


# ---------------------------------------------------------------- the classifier on one photo

@torch.inference_mode()
def look(model, image, crop, scales, device, amp):
    """A PIL photo through the classifier: M and M* at some scales of the crop, the rest at the crop's size.

    ->  {"probability": (K,), "plain" and "refined": list of (K, h, w), one a scale, "attention": (h, w)}
    The attention map is the mean of each column of A*: what all places together take from that one.
    """
    photos = [square(side)(image)[None].to(device) for side in bnr.sides(crop, scales)]
    maps = bnr.multi_scale(model, photos, None, ("plain", "refined"), device, amp)
    cam, z, qks = bnr.forward(model, square(crop)(image)[None].to(device))
    attn = bnr.sum_over_blocks([bnr.mean_over_heads(bnr.attention(q, k)) for q, k in qks])  # (1, N, N)
    return {**{kind: [scale[0] for scale in scales] for kind, scales in maps.items()},
            "probability": z[0].sigmoid().cpu(), "attention": attn[0].mean(0).view(cam.shape[2:]).cpu()}
