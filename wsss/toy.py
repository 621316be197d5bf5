"""Pictures of the toy set: animals of one fur from head to tail, told apart by marks, before five scenes."""
import numpy as np
from PIL import Image, ImageDraw, ImageFilter

COATS = {  # colour of half of a class's animals
    "cat": (250, 180, 110), "rabbit": (250, 244, 240), "cow": (244, 228, 224), "bear": (214, 150, 96),
    "lion": (246, 200, 84)}
TOY_CLASSES = tuple(COATS)
FURS = ((214, 166, 124), (236, 220, 196), (198, 198, 206), (226, 184, 172), (190, 164, 144))  # of all the others
WHITE, INK, PINK, GOLD, RUST = (255, 252, 245), (44, 34, 38), (246, 142, 160), (250, 200, 60), (176, 62, 30)
ORANGE, LIME, ROSE, BROWN, CREAM = (236, 100, 20), (186, 236, 40), (240, 104, 140), (110, 62, 44), (252, 236, 204)
PLUM = (98, 44, 124)
# What tells a class: marks behind the head, on the face, on the tips of tail and legs, each with its mirror image.
# (0, 0) is the centre of head (radius 20) or tip. Four numbers are an oval (centre, radii), a list of points is a
# polygon, None stands for the colour of the fur.
MANE = [((21 * np.sin(a), -21 * np.cos(a), 8, 8), (GOLD, RUST)[n % 2]) for n, a in enumerate(np.linspace(0, np.pi, 9))]
MARKS = {
    "cat": ([([(-22, -1), (-23, -40), (0, -17)], ORANGE), ([(-18, -8), (-19, -31), (-5, -17)], INK)],
            [((9, -3, 9, 9), INK), ((9, -3, 7.5, 7.5), LIME), ((9, -3, 2, 7), INK), ([(-4, 5), (4, 5), (0, 10)], PINK),
             ([(4, 9), (32, 3), (32, 6)], WHITE), ([(4, 10), (31, 14), (30, 17)], WHITE)],
            [((0, 0, 10, 10), ORANGE), ((0, -1, 10, 3), INK)]),
    "rabbit": ([((9, -31, 8, 20), WHITE), ((9, -30, 4.5, 16), PINK)],
               [((7, 8, 9, 8), WHITE), ([(-3, 11), (3, 11), (3, 20), (-3, 20)], WHITE), ((8, -5, 3.5, 4.5), INK),
                ((9, -6.5, 1.3, 1.3), WHITE), ((0, 3, 4, 3), PINK)],
               [((5, 4, 7, 7), WHITE), ((5, -4, 7, 7), WHITE)]),
    "cow": ([((24, -4, 9, 6), None), ([(6, -16), (17, -21), (19, -36), (29, -26), (25, -13), (14, -8)], BROWN)],
            [((0, 10, 19, 11), ROSE), ((7, 10, 3, 4), BROWN), ((8, -7, 5, 5), WHITE), ((8, -6.5, 3.3, 3.6), INK)],
            [((0, -2, 8, 13), BROWN)]),
    "bear": ([((16, -16, 11, 11), PLUM), ((16, -16, 5, 5), CREAM)],
             [((9, -4, 8, 9), PLUM), ((8.5, -4, 3, 3), WHITE), ((0, 10, 12, 10), CREAM), ((0, 6, 5.5, 4), PLUM)],
             [((0, 0, 10, 10), PLUM)]),
    "lion": (MANE,
             [((8, -5, 3.5, 4.5), INK), ((9, -6.5, 1.3, 1.3), WHITE), ((5, 9, 6, 5), GOLD), ((0, 5, 6, 4), RUST)],
             [((5, 5, 5, 5), GOLD), ((5, -5, 5, 5), RUST), ((0, 0, 5, 5), RUST)])}
# In the order of the classes at home there: colours of the far half (top, bottom) and of the ground (far, near), then
# the things there, the far ones first: count, whether in the far half, shape, half width, half height, colours.
SCENES = {
    "room": ((120, 128, 178), (140, 146, 190), (124, 72, 92), (92, 52, 72), []),
    "meadow": ((140, 200, 240), (206, 232, 240), (150, 204, 92), (74, 146, 66), [
        (600, False, "blade", 0, 16, ((62, 134, 58), (62, 134, 58), (172, 218, 104))),
        (26, False, "flower", 8, 7, ((255, 252, 245), (240, 90, 90), (250, 214, 70), (190, 120, 220)))]),
    "river": ((150, 204, 120), (100, 172, 100), (104, 190, 218), (36, 106, 168), [
        (24, True, "oval", 30, 16, ((60, 136, 84), (80, 156, 88), (50, 120, 80))),
        (90, False, "wave", 18, 7, ((176, 226, 240),)),
        (8, False, "oval", 18, 7, ((66, 160, 100), (86, 176, 104)))]),
    "forest": ((28, 66, 62), (58, 110, 82), (84, 128, 66), (44, 84, 54), [
        (14, True, "trunk", 12, 0, ((72, 54, 60), (92, 70, 70))),
        (30, True, "oval", 30, 20, ((40, 92, 68), (52, 108, 70))),
        (200, False, "blade", 0, 16, ((116, 164, 78),)),
        (9, False, "flower", 11, 8, ((214, 62, 54),))]),
    "dunes": ((116, 196, 216), (196, 230, 224), (180, 106, 92), (132, 68, 70), [
        (8, False, "wave", 240, 40, ((112, 54, 58),)),
        (70, False, "oval", 6, 4, ((150, 104, 96), (116, 120, 80), (196, 140, 124)))])}


def oval(draw, x, y, rx, ry, fill):
    """Fill the ellipse with this centre and these radii (in pixels)."""
    draw.ellipse([int(round(v)) for v in (x - rx, y - ry, x + rx, y + ry)], fill=fill)


def paint_fur(rng, size, coat):
    """A square of fur, a base colour with patches, stripes or speckles of a second one, and the base colour."""
    first, second = rng.permutation(len(FURS))[:2]
    base = coat if rng.rand() < 0.5 else FURS[first]
    blend = tuple((a + 2 * b) // 3 for a, b in zip(base, FURS[second]))
    fur, pattern = Image.new("RGB", (size, size), base), rng.choice(["patches", "stripes", "speckles"])
    draw = ImageDraw.Draw(fur)
    if pattern == "stripes":
        for x in range(0, size, 30):
            line = [(x + int(rng.randint(-6, 7)), y) for y in range(0, size + 1, 40)]
            draw.line(line, blend, int(rng.randint(7, 13)))
    else:
        count, low, high = (16, 20, 42) if pattern == "patches" else (170, 4, 8)
        for _ in range(count):
            oval(draw, *rng.randint(0, size, 2), *rng.randint(low, high, 2), blend)
    return fur, base


def paste_part(layer, fur, box, light=1.0, corner=None):
    """Paste the fur of a round-cornered box (an oval without `corner`), lit from above, with a dark rim."""
    x0, y0, x1, y1 = box
    shade = light * np.linspace(1.08, 0.88, y1 - y0)[:, None, None]
    part = Image.fromarray(np.minimum(np.asarray(fur.crop(box)) * shade, 255).astype(np.uint8))
    mask, edge = Image.new("L", part.size), (0, 0, x1 - x0 - 1, y1 - y0 - 1)
    for image, fill, rim in ((mask, 255, 255), (part, None, (112, 82, 74))):
        draw = ImageDraw.Draw(image)
        if corner:
            draw.rounded_rectangle(edge, corner, fill, rim, 2)
        else:
            draw.ellipse(edge, fill, rim, 2)
    layer.paste(part, (x0, y0), mask)


def draw_marks(draw, marks, colour, cx, cy, unit=3.3):
    """Marks of a class, and their mirror images, around the centre of head or tip; the unit in pixels."""
    for shape, fill in marks:
        for side in (-unit, unit):
            if isinstance(shape, list):
                draw.polygon([(int(cx + side * x), int(cy + unit * y)) for x, y in shape], fill or colour)
            else:
                x, y, rx, ry = shape
                oval(draw, cx + side * x, cy + unit * y, unit * rx, unit * ry, fill or colour)


def draw_animal(rng, name, extent):
    """An RGBA layer, cropped to the animal, whose longer side is `extent` pixels."""
    fur, colour = paint_fur(rng, 390, COATS[name])
    layer = Image.new("RGBA", fur.size, (*colour, 0))
    draw = ImageDraw.Draw(layer)
    behind, on_face, on_tips = MARKS[name]
    draw.line([(272, 240), (306, 214), (320, 188)], colour, 24, joint="curve")  # the tail
    draw_marks(draw, on_tips, colour, 320, 182)
    for x, foot, light in ((148, 342, 0.88), (222, 342, 0.88), (116, 352, 1.0), (244, 352, 1.0)):  # the near legs last
        paste_part(layer, fur, (x, 256, x + 42, foot), light, 18)
        draw_marks(draw, on_tips, colour, x + 21, foot - 16, 2.4)
    paste_part(layer, fur, (98, 190, 294, 320))
    draw_marks(draw, behind, colour, 112, 180)
    paste_part(layer, fur, (46, 114, 178, 246), 1.04)
    draw_marks(draw, on_face, colour, 112, 180)
    layer = layer.transpose(Image.FLIP_LEFT_RIGHT) if rng.rand() < 0.5 else layer
    layer = layer.rotate(float(rng.uniform(-9, 9)), Image.BILINEAR)
    layer = layer.crop(layer.getchannel("A").getbbox())
    return layer.resize([round(side * extent / max(layer.size)) for side in layer.size], Image.LANCZOS)


def draw_scene(rng, name, width, height):
    """A background, and the row of its horizon, where two gradients of colour meet under the things of the scene."""
    *colours, things = SCENES[name]
    width, height = 2 * width, 2 * height  # drawn at twice the size
    top, bottom, ground, end = np.array(colours, float)
    horizon = int(height * rng.uniform(0.3, 0.5))
    rows = np.concatenate([np.linspace(top, bottom, horizon), np.linspace(ground, end, height - horizon)])
    image = Image.fromarray(np.repeat(rows[:, None], width, axis=1).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    if name == "room":  # a wall of bricks above planks
        for y in range(-4, horizon - 4, 28):
            for x in range(-60 + 30 * (y // 28 % 2), width, 60):
                tone = (top + rng.randint(-14, 15)).astype(int)
                draw.rectangle([x + 2, y + 2, x + 57, min(y + 25, horizon)], tuple(tone.tolist()))
        for y in range(horizon, height, 30):
            x = int(rng.randint(0, width))
            draw.line([(0, y), (x, y), (x, y + 30), (x, y), (width, y)], (64, 36, 52), 4)
    for count, far, shape, w, h, fills in things:
        low, high = (0, horizon) if far else (horizon, height)
        ys = sorted(rng.randint(low, high, count).tolist())  # the farthest first
        xs, ks = rng.randint(0, width, count).tolist(), rng.randint(0, 12, count).tolist()
        for x, y, k in zip(xs, ys, ks):
            box, fill = [x - w, y - h, x + w, y + h], fills[k % len(fills)]
            if shape == "blade":
                draw.line([x, y, x + k - 6, y - h - k + 6], fill, 3)
            elif shape == "wave":
                draw.arc(box, 200, 340, fill, 4)
            elif shape == "trunk":
                draw.rectangle([x - w, 0, x + w, horizon + 3 * k], fill)
            else:
                draw.ellipse(box, fill)
            if shape == "flower":
                oval(draw, x, y, 3, 3, GOLD)
    return image.reduce(2), horizon // 2


def place_animals(rng, shapes, horizon, width, height):
    """Try until nobody hides more than a little of anybody, after each 50 trials with one animal fewer.

    shapes: bool (h, w) of each  ->  boxes (x0, y0, x1, y1), indices from far to near, 1 + the index seen: uint8 (H, W)
    """
    for attempt in range(150):
        boxes = []
        for shape in shapes[:max(1, len(shapes) - attempt // 50)]:
            h, w = shape.shape
            x, y = int(rng.randint(0, width - w + 1)), int(rng.randint(max(0, horizon + 8 - h), height - h + 1))
            boxes.append((x, y, x + w, y + h))
        order = sorted(range(len(boxes)), key=lambda n: boxes[n][3])
        owner = np.zeros((height, width), np.uint8)
        for n in order:
            x0, y0, x1, y1 = boxes[n]
            owner[y0:y1, x0:x1][shapes[n]] = n + 1
        if all((owner == n + 1).sum() >= 0.85 * shapes[n].sum() for n in order):
            break
    return boxes, order, owner


def toy_picture(rng):
    """A picture (RGB) and its mask, uint8 (H, W): 0 background, 1..5 the class, 255 a void border around each."""
    width, height = rng.randint(160, 257, 2).tolist()
    labels = rng.randint(1, 6, rng.choice([1, 2, 3], p=[0.4, 0.4, 0.2])).tolist()
    home = labels[0] - 1 if rng.rand() < 0.3 else rng.randint(5)  # with chance hits, at home in 44 %
    picture, horizon = draw_scene(rng, list(SCENES)[home], width, height)
    largest = (0.9, 0.8, 0.65)[len(labels) - 1] * min(width, height)
    extents = [int(np.clip(largest * rng.uniform(0.7, 1), 80, 160)) for _ in labels]
    layers = [draw_animal(rng, TOY_CLASSES[label - 1], extent) for label, extent in zip(labels, extents)]
    shapes = [np.asarray(layer.getchannel("A")) > 127 for layer in layers]
    boxes, order, owner = place_animals(rng, shapes, horizon, width, height)
    for n in order:
        x0, y0, x1, y1 = boxes[n]
        shadow = Image.new("L", picture.size)
        oval(ImageDraw.Draw(shadow), (x0 + x1) / 2, y1 - 4, (x1 - x0) * 0.44, (y1 - y0) * 0.06, 70)
        picture.paste((24, 24, 40), None, shadow)
        picture.paste(layers[n], (x0, y0), layers[n])
    pixels = np.asarray(picture) * rng.uniform(0.92, 1.06, 3) + rng.normal(0, 2, (height, width, 3))
    mask, owners = np.array([0] + labels, np.uint8)[owner], Image.fromarray(owner)
    highest, lowest = owners.filter(ImageFilter.MaxFilter(3)), owners.filter(ImageFilter.MinFilter(3))
    mask[np.asarray(highest) != np.asarray(lowest)] = 255
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)), mask
