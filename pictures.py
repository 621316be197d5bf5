"""The pictures of `report.py`: the classifier on any photo, a run's stages side by side, Figures 1, 3, 5 of the paper.

    python report.py show, figures    -> OUT/show.png, OUT/figures/
"""

import stage  # before torch: from here on Ctrl-C is one line
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import pil_to_tensor, resize, to_pil_image

import bnr
import data
import engine
from conformer import STRIDE
from evaluate import confusion, iou, read_results
from seeds import combine_scales, hard_threshold, read_seeds
from stage import FlagError, InputError

PROBABLE = 0.5  # from this probability on a class counts as found
THRESHOLD = 0.4  # of the seeds, where none was scored
SCALES = (0.5, 1.0, 1.5)  # of the crop, where the run exported no seeds
FONT = ImageFont.load_default(size=13)
MAPS = {"plain": "plain CAM", "eigen": "Eigen-CAM", "refined": "refined CAM"}
SHEETS = {"cams": "train", "affinity_labels": "train", "pseudo_labels": "train", "segmentation": "val"}
EACH = 8  # photos of a kind on a contact sheet
LINE = 20  # pixels of a line of text


# ---------------------------------------------------------------- runs

def run_of(args, row, name):
    """Folder of a run of Table 5, --out itself where it is one; InputError naming the command that makes the stage."""
    folder = args.out / "rows" / f"{row}-seed{args.seeds[0]}"
    if stage.find_record(folder, name):
        return folder
    record = stage.find_record(args.out, "classifier")
    kind = (record["settings"]["loss"], record["settings"]["noise"]) if record else None
    if stage.find_record(args.out, name) and kind == ("transcam" if row == "transcam" else "bnr", 1.0):
        return args.out
    raise InputError(f'no {stage.STAGES[name][0]} in {folder}: run "{how_to_run(args, row)}"')


def how_to_run(args, row):
    return f"python results.py --data {args.data} --out {args.out} --rows {row} --seeds {args.seeds[0]}"


def seed_threshold(out, given):
    """The flag's, else the best of the run's scored seeds."""
    if given is not None:
        return given
    rows = (read_results(out) or {"rows": []})["rows"]
    best = [row["best"] for row in rows if row["stage"] == "refined seeds" and "best" in row]
    return best[0] if best else THRESHOLD


# ---------------------------------------------------------------- drawing

def heat(photo, classes, maps):
    """The photo, darkened, with each class map in its class's colour.

    photo: uint8 (3, H, W), classes: (k,), maps: (k, H, W) in [0, 1]  ->  uint8 (3, H, W)
    """
    grey = 0.35 * photo.float().mean(0, keepdim=True).expand(3, -1, -1)
    if not len(classes):
        return grey.byte()
    value, winner = torch.from_numpy(maps).max(0)
    colour = torch.from_numpy(data.palette())[torch.from_numpy(classes)[winner]].permute(2, 0, 1).float()
    return (grey * (1 - value) + colour * value).clamp(0, 255).byte()


def glow(photo, values):
    """The photo, darkened, under a map in black, red, yellow, white, its least black and its most white.

    photo: uint8 (3, H, W), values: (h, w)  ->  uint8 (3, H, W)
    """
    values = resize(values[None].float(), photo.shape[1:], antialias=True)[0]
    values = (values - values.min()) / (values.max() - values.min()).clamp(min=1e-12)
    colours = torch.stack([3 * values, 3 * values - 1, 3 * values - 2]).clamp(0, 1)
    return (0.3 * photo.float().mean(0) + 0.7 * 255 * colours).clamp(0, 255).byte()


def read_photo(path):
    """-> uint8 (3, H, W)"""
    return pil_to_tensor(data.read_image(path))


def labelled(photo, path, num_classes):
    """The photo under an index PNG, or None where a stage has not run or not on this photo."""
    return data.overlay(photo, data.read_mask(path, num_classes)) if path.is_file() else None


def write_name(pen, x, y, text, number):
    """A class's name on the class's colour, black or white as it reads better. -> where it ends"""
    colour = tuple(data.palette()[number].tolist())
    end = x + round(pen.textlength(text, FONT)) + 8
    pen.rectangle([x, y, end, y + 17], colour)
    pen.text((x + 4, y), text, "white" if np.dot(colour, (0.3, 0.59, 0.11)) < 140 else "black", FONT)
    return end


def sheet(rows, height, names=()):
    """Rows of panels in one picture. A panel: (title, picture or None) and maybe the number of the class in the title.

    height: of a picture, pixels; names: (number, name) of the classes told below  ->  PIL RGB
    """
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    widths = [0] * max(map(len, rows))
    for row in rows:
        for n, (title, picture, *_) in enumerate(row):
            wide = round(height * picture.shape[2] / picture.shape[1]) if picture is not None else 0
            widths[n] = max(widths[n], wide, round(pen.textlength(title, FONT)) + 10)
    lines = [LINE if any(panel[0] for panel in row) else 0 for row in rows]
    size = sum(widths) + 6 * len(widths) + 6, sum(lines) + (height + 6) * len(rows) + (LINE + 10 if names else 4)
    total = Image.new("RGB", size, "white")
    pen, y = ImageDraw.Draw(total), 4
    for row, line in zip(rows, lines):
        x = 6
        for n, (title, picture, *number) in enumerate(row):
            if number:
                write_name(pen, x, y, title, *number)
            else:
                pen.text((x, y), title, "black", FONT)
            if picture is not None:
                wide = round(height * picture.shape[2] / picture.shape[1])
                picture = to_pil_image(picture).resize((wide, height), Image.Resampling.BICUBIC)
                total.paste(picture, (x, y + line))
            x += widths[n] + 6
        y += line + height + 6
    x = 6
    for number, name in names:
        x = 6 + write_name(pen, x, y + 4, name, number)
    return total


def save(path, image):
    stage.write(path, lambda file: image.save(file, format="PNG"))
    print(path)


# ---------------------------------------------------------------- show

def show(args):
    """Draw what the classifier sees in any PHOTO; without one, all stages of some photos of the run -> OUT/show.png"""
    if args.photos:
        image = sheet(photo_rows(args), args.height)
    else:
        dataset = data.DataSet(args.data)
        stage.read_record(args.out, "cams")
        stage.note_stale(args.out)
        ids = args.ids or (dataset.ids("train", required=False) or dataset.ids("train_aug"))[:args.first]
        threshold = seed_threshold(args.out, args.threshold)
        panels = [stages_of(dataset, args.out, name, threshold) for name in ids]
        image = sheet(with_titles(panels), args.height, names_of(dataset, ids))
    save(args.out / "show.png", image)


def with_titles(panels):
    """One {title: picture} a row -> the rows of `sheet`, titles in the first"""
    return [[(title if n == 0 else "", picture) for title, picture in row.items()] for n, row in enumerate(panels)]


def names_of(dataset, ids):
    """(number, name) of the classes of these photos."""
    present = dataset.labels(ids).any(0)
    return [(n, name) for n, name in enumerate(dataset.classes, start=1) if present[n - 1]]


def stages_of(dataset, out, name, threshold):
    """{title: picture} of one photo of a run."""
    photo, path, num_classes = read_photo(dataset.image(name)), out / "cams" / f"{name}.npz", dataset.num_classes
    settings = (stage.find_record(out, "cams") or {"settings": {}})["settings"]
    cams = {title: None for kind, title in MAPS.items() if kind != "eigen" or settings.get("eigen")}
    seed = None
    if path.is_file():
        classes, maps = read_seeds(path)
        seed = data.overlay(photo, hard_threshold(classes, maps, threshold))
        for kind, title in MAPS.items():
            if kind == "refined" or settings.get(kind):
                cams[title] = heat(photo, *read_seeds(path, kind))
    return {"photo": photo, "ground truth": labelled(photo, dataset.mask(name), num_classes), **cams,
            f"seed at {threshold:.2f}": seed,
            "pseudo label": labelled(photo, out / "pseudo_labels" / f"{name}.png", num_classes),
            "segmentation": labelled(photo, out / "segmentation" / f"{name}.png", num_classes)}


def photo_rows(args):
    """A row a class found or asked for: photo, plain CAM, refined CAM; then the photo's attention map, hard label."""
    path = args.weights or args.out / "classifier.pth"
    model, network, names = read_classifier(path, args)
    unknown = [name for name in args.classes or () if name not in names]
    if unknown:
        raise FlagError(f"--classes {unknown[0]}: {path} knows {' '.join(names)}")
    threshold, rows = seed_threshold(args.out, args.threshold), []
    record = stage.find_record(args.out, "cams") if not args.weights else None
    scales = record["settings"]["scales"] if record else SCALES
    for source in args.photos:
        image = data.read_image(source)
        photo, found = pil_to_tensor(image), look(model, image, network["crop"], scales, args.device, args.amp)
        classes = (found["probability"] > PROBABLE).nonzero()[:, 0].numpy() + 1
        if args.classes:
            classes = np.array([names.index(name) + 1 for name in args.classes])
        maps = {kind: combine_scales([scale[classes - 1] for scale in found[kind]], photo.shape[1:]).numpy()
                for kind in ("plain", "refined")}
        label = data.overlay(photo, hard_threshold(classes, maps["refined"], threshold))
        whole = [("attention map", glow(photo, found["attention"])), (f"hard label at {threshold:.2f}", label)]
        told = [f"{names[number - 1]} {found['probability'][number - 1]:.2f}" for number in classes]
        print(f"{source}: {', '.join(told) or f'no class over {PROBABLE}, --classes NAME draws one all the same'}")
        for n, number in enumerate(classes.tolist()):
            own = [(f"{kind} CAM: {told[n]}", heat(photo, classes[n:n + 1], maps[kind][n:n + 1]), number)
                   for kind in ("plain", "refined")]
            rows.append([(source.name, photo), *own, *whole] if n == 0 else [("", None), *own])
        if not len(classes):
            rows.append([(source.name, photo), ("no class found", None), ("", None), *whole])
    return rows


def read_classifier(path, args):
    """-> the network, {"crop", ...}, names of its K classes: the file's, else the data set's"""
    hint = ': run "make train", or name one by --weights'
    state, network = engine.read_trained(path, hint, {"arch": "small", "crop": 512})
    names = network.get("classes") or data.DataSet(args.data).classes
    return bnr.build_classifier(state, network, 1 + len(names), path, args.device), network, names


@torch.inference_mode()
def look(model, image, crop, scales, device, amp):
    """A photo through the classifier.

    ->  {"probability": (K,), "plain" and "refined": list of (K, h, w), one a scale, "attention": (h, w)}
    The attention map is the mean of each column of A*: what all places together take from that one.
    """
    photos = [data.square(side)(image)[None].to(device) for side in bnr.sides(crop, scales)]
    maps = bnr.multi_scale(model, photos, None, ("plain", "refined"), device, amp)
    attn, cam, z = attention_of(model, image, crop, device)
    found = {kind: [scale[0] for scale in found] for kind, found in maps.items()}
    return {**found, "probability": z.sigmoid(), "attention": attn.mean(0).view(cam.shape[1:])}


@torch.inference_mode()
def attention_of(model, image, crop, device):
    """-> A* (N, N), M (K, h, w), z (K,) of a photo at the size of the crop"""
    cam, z, qks = bnr.forward(model, data.square(crop)(image)[None].to(device))
    attn = bnr.sum_over_blocks([bnr.mean_over_heads(bnr.attention(q, k)) for q, k in qks])
    return attn[0].cpu(), cam[0].cpu(), z[0].cpu()


# ---------------------------------------------------------------- contact sheets

def sheets(args):
    """The 8 best, middle and worst photos of each stage by mean IoU, ground truth above -> OUT/sheets/STAGE.png"""
    dataset, threshold = data.DataSet(args.data), seed_threshold(args.out, args.threshold)
    stages = [(name, split) for name, split in SHEETS.items() if stage.find_record(args.out, name)]
    if not stages:
        raise InputError(f'nothing to draw in {args.out}: run "make cams"')
    stage.note_stale(args.out)
    for name, split in stages:
        labels, score, count = {}, {}, dataset.num_classes
        for photo in dataset.ids(split, required=False):
            path = args.out / name / f"{photo}{'.npz' if name == 'cams' else '.png'}"
            if not (path.is_file() and dataset.mask(photo).is_file()):
                continue
            if name == "cams":
                labels[photo] = hard_threshold(*read_seeds(path), threshold)
            else:
                labels[photo] = data.read_mask(path, count)
            mask = data.read_mask(dataset.mask(photo), count, labels[photo].shape)
            matrix = confusion(mask, labels[photo], count)
            if matrix.any():  # affinity labels may leave a whole photo unlabelled
                score[photo] = 100 * np.nanmean(iou(matrix))
        if not score:
            print(f"{name}: not drawn, as no photo of {split} has both a label and a mask")
            continue
        ranked = sorted(score, key=score.get, reverse=True)
        middle, rows = max(0, len(ranked) - EACH) // 2, []
        for what, photos in (("best", ranked[:EACH]), ("middle", ranked[middle:middle + EACH]),
                             ("worst", ranked[-EACH:])):
            images = {photo: read_photo(dataset.image(photo)) for photo in photos}
            rows.append([(f"{what}: {score[photo]:.0f} %", labelled(image, dataset.mask(photo), count))
                         for photo, image in images.items()])
            rows.append([("", data.overlay(image, labels[photo])) for photo, image in images.items()])
        save(args.out / "sheets" / f"{name}.png", sheet(rows, args.height, names_of(dataset, ranked)))


# ---------------------------------------------------------------- figures

def with_masks(args, dataset, split):
    """Those of --ids that are in this list, or its first ones; with a mask."""
    names = [name for name in dataset.ids(split) if dataset.mask(name).is_file()]
    return [name for name in args.ids or () if name in names] or names[:args.first]


def figure_1(args, dataset):
    """Image, ground truth, and the refined CAMs of TransCAM and of BNR."""
    folders = {"TransCAM": run_of(args, "transcam", "cams"), "BNR": run_of(args, "noise-x1", "cams")}
    panels, ids = [], with_masks(args, dataset, "train")
    for name in ids:
        photo = read_photo(dataset.image(name))
        panels.append({"image": photo, "ground truth": labelled(photo, dataset.mask(name), dataset.num_classes)})
        for title, folder in folders.items():
            panels[-1][title] = heat(photo, *read_seeds(folder / "cams" / f"{name}.npz"))
    return sheet(with_titles(panels), args.height, names_of(dataset, ids))


def figure_3(args, dataset):
    """Image, ground truth, and BNR's segmentation of val."""
    folder, panels, ids = run_of(args, "noise-x1", "segmentation"), [], with_masks(args, dataset, "val")
    for name in ids:
        photo = read_photo(dataset.image(name))
        panels.append({"image": photo, "ground truth": labelled(photo, dataset.mask(name), dataset.num_classes),
                       "BNR": labelled(photo, folder / "segmentation" / f"{name}.png", dataset.num_classes)})
    return sheet(with_titles(panels), args.height, names_of(dataset, ids))


def figure_5(args, dataset):
    """Attention maps of baseline and ours: the column of A* of one place, and the mean column of all places on objects.

    M* = A* M: a place's column says where its value in M goes. In the titles: how much of that stays on objects.
    """
    models = {}
    for title, row in (("TransCAM", "transcam"), ("BNR", "noise-x1")):
        models[title] = read_classifier(run_of(args, row, "classifier") / "classifier.pth", args)[:2]
    rows = []
    for name in with_masks(args, dataset, "train"):
        image, panels = data.read_image(dataset.image(name)), {}
        photo, side = pil_to_tensor(image), models["BNR"][1]["crop"] // STRIDE
        objects, place = places_of(dataset, name, side, args.place)
        for title, (model, network) in models.items():
            attn = attention_of(model, image, network["crop"], args.device)[0]
            for what, columns in (("place", attn[:, place]), ("objects", attn[:, objects].mean(1))):
                stays = 100 * columns[objects].sum() / columns.sum()
                panels[title, what] = (f"{title}, {what}: {stays:.0f} %", glow(photo, columns.view(side, side)))
        order = [(title, what) for what in ("place", "objects") for title in models]
        rows.append([("image and place", marked(image, place, side)), *(panels[key] for key in order)])
    return sheet(rows, args.height)


def places_of(dataset, name, side, wanted):
    """Which of the side x side places lie on objects, and the one to look at: `wanted`, else nearest to their middle.

    wanted: shares of width and height, or None  ->  bool (N,), int
    """
    mask = torch.from_numpy(data.read_mask(dataset.mask(name), dataset.num_classes))
    mask = ((mask > 0) & (mask != data.VOID)).float()[None]
    objects = resize(mask, [side, side], antialias=True).flatten() >= 0.5
    if wanted:
        column, row = (min(side - 1, int(share * side)) for share in wanted)
        return objects, row * side + column
    if not objects.any():
        raise InputError(f"no object of {name} fills half of one place: choose other photos by --ids")
    spots = torch.stack([objects.nonzero()[:, 0] // side, objects.nonzero()[:, 0] % side], dim=1).float()
    nearest = (spots - spots.mean(0)).square().sum(1).argmin()
    return objects, int(objects.nonzero()[nearest, 0])


def marked(image, place, side):
    """The photo with a ring around one of its side x side places. PIL  ->  uint8 (3, H, W)"""
    image = image.copy()
    x, y = (place % side + 0.5) / side * image.width, (place // side + 0.5) / side * image.height
    radius = max(image.size) / 30
    ring = [x - radius, y - radius, x + radius, y + radius]
    ImageDraw.Draw(image).ellipse(ring, None, "red", max(2, round(radius / 3)))
    return pil_to_tensor(image)
