"""One self-contained HTML page of a run: results, curves, training loss, and its photos with every stage's labels.

    python report.py page    all stages' files -> OUT/report.html

A room of its own, as `report.py` would grow past what one can hold in the head, and as it belongs with `report.html`:
here is gathered and scored, there laid out. Nothing comes from a network, and a name of the user stays text.
"""
import base64
import io
import json
import math
import time
from pathlib import Path

import stage  # before torch: from here on Ctrl-C is one line
import numpy as np
import torch
from PIL import Image

import data
import engine
from evaluate import POOL_FROM, THRESHOLDS, confusion, iou, read_results
from seeds import hard_threshold, read_seeds

TEMPLATE = Path(__file__).with_name("report.html")
LAYERS = {"photo": "photo", "truth": "ground truth", "cam": "refined CAM", "eigen": "Eigen-CAM", "seed": "seed",
          "pseudo": "pseudo label", "segmentation": "segmentation"}
FOLDERS = {"pseudo": "pseudo_labels", "segmentation": "segmentation"}
LOOKED_AT = 2000  # photos of a split that are scored at most, evenly from its list
WORST = 20  # of these are always on the page
POINTS = 400  # of a curve at most
NO_LOSS = {"stage", "id", "step", "steps", "lr", "images_s", "gb", "precision"}  # the rest of a line of log.jsonl are


def embedded(image, **how):
    """A picture -> data URI"""
    file = io.BytesIO()
    image.save(file, format="WEBP", **how)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def label_layer(mask, size):
    """Colours of the classes, background transparent, void a veil. mask: uint8 (H, W)  ->  data URI"""
    opacity = np.full(256, 255, np.uint8)
    opacity[0], opacity[data.VOID] = 0, 160
    colours = np.concatenate([data.palette(), opacity[:, None]], axis=1)  # (256, 4)
    colours[data.VOID, :3] = 255
    mask = Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)
    return embedded(Image.fromarray(colours[np.asarray(mask)]), lossless=True)


def cam_layer(classes, maps, size):
    """The largest class map in its class's colour, a dark veil where it is 0. (k,), (k, H, W)  ->  data URI"""
    value, winner = (found.numpy() for found in torch.from_numpy(maps).max(0))
    colours = data.palette()[classes[winner]] * value[..., None]  # (H, W, 3)
    opacity = 255 * (0.65 + 0.35 * value)
    layer = Image.fromarray(np.dstack([colours, opacity]).astype(np.uint8))
    return embedded(layer.resize(size, Image.Resampling.BICUBIC), quality=60, alpha_quality=60)


def score(matrix):
    """Mean IoU of one photo's classes, and its most frequent error as [class, taken for, share of the pixels]."""
    errors = matrix * (1 - np.eye(len(matrix), dtype=np.int64))
    true, taken_for = (int(index) for index in np.unravel_index(errors.argmax(), errors.shape))
    share = float(errors.max() / matrix.sum())
    return {"iou": float(np.nanmean(iou(matrix))), "wrong": [true, taken_for, share] if share else None}


def draw_photo(name, photo_path, mask_path, out, classes, num_classes, eigen, threshold, side):
    """-> one photo of the page, and the confusion matrix of each of its layers"""
    photo = data.read_image(photo_path)
    factor = min(1, side / max(photo.size))
    size = [max(1, round(factor * length)) for length in photo.size]
    layers, labels, found, matrices = {}, {}, {}, {}
    mask = data.read_mask(mask_path, num_classes) if mask_path.is_file() else None
    if mask is not None:
        labels["truth"] = mask
    path = out / "cams" / f"{name}.npz"
    if path.is_file():
        own, maps = read_seeds(path)
        labels["seed"] = hard_threshold(own, maps, threshold)
        if len(own):
            layers["cam"], found["cam"] = cam_layer(own, maps, size), own.tolist()
        if len(own) and eigen:
            layers["eigen"], found["eigen"] = cam_layer(*read_seeds(path, "eigen"), size), own.tolist()
    for layer, folder in FOLDERS.items():
        path = out / folder / f"{name}.png"
        if path.is_file():
            labels[layer] = data.read_mask(path, num_classes)
    for layer, label in labels.items():
        layers[layer] = label_layer(label, size)
        found[layer] = [number for number in np.unique(label).tolist() if 0 < number < num_classes]
        if layer != "truth" and mask is not None:
            matrices[layer] = confusion(mask, label, num_classes)
    scores = {layer: score(matrix) for layer, matrix in matrices.items() if matrix.any()}
    picture = embedded(photo.resize(size, Image.Resampling.BICUBIC), quality=70)
    return {"name": name, "size": size, "classes": classes, "photo": picture, "layers": layers, "found": found,
            "scores": scores}, matrices


def thinned(values, most):
    """Every n-th, so that there are at most so many."""
    return values[::max(1, math.ceil(len(values) / most))]


def gather(dataset, split, out, threshold, count, side, workers):
    """The photos of a split: all, or the worst and an even choice of the others. -> split, {layer: matrix of all}"""
    names = dataset.ids(split, required=False)
    looked_at = thinned(names, LOOKED_AT)
    labels = [(row.nonzero()[:, 0] + 1).tolist() for row in dataset.labels(looked_at)]
    record = stage.find_record(out, "cams")
    eigen = bool(record and record["settings"].get("eigen"))
    jobs = [(name, dataset.image(name), dataset.mask(name), out, own, dataset.num_classes, eigen, threshold, side)
            for name, own in zip(looked_at, labels)]
    photos, total = [], {}
    workers = workers if len(jobs) >= POOL_FROM else 0
    for photo, matrices in engine.in_processes(draw_photo, jobs, workers, len(jobs), f"page, {split}"):
        photos.append(photo)
        for layer, matrix in matrices.items():
            total[layer] = total.get(layer, 0) + matrix
    last = next((layer for layer in reversed(LAYERS) if layer in total), None)
    photos.sort(key=lambda photo: photo["scores"].get(last, {}).get("iou", 2))
    if len(photos) > count:
        worst, others = photos[:min(WORST, count)], photos[WORST:]
        chosen = np.linspace(0, len(others) - 1, max(0, count - len(worst)), dtype=int)
        photos = worst + [others[n] for n in chosen]
    layers = [layer for layer in LAYERS if any(layer in photo["layers"] for photo in photos)]
    return {"n": len(names), "looked_at": len(looked_at), "layers": layers, "photos": photos}, total


def confusions(totals, classes, first=4):
    """Table of the most frequent errors. totals: {split: {layer: (S, S)}}"""
    rows = []
    for split, matrices in totals.items():
        for layer, matrix in matrices.items():
            errors = matrix * (1 - np.eye(len(matrix), dtype=np.int64))
            for index in errors.ravel().argsort()[::-1][:first]:
                true, taken_for = divmod(int(index), len(matrix))
                shares = [100 * errors[true, taken_for] / max(1, total) for total in (matrix.sum(), matrix[true].sum())]
                if shares[0]:
                    shares = [f"{share:.2f}" for share in shares]
                    rows.append([split, LAYERS[layer], classes[true], classes[taken_for], *shares])
    head = ["split", "stage", "class", "taken for", "% of all pixels", "% of the class"]
    return {"title": "Most frequent errors", "head": head, "rows": rows, "note": "Of the photos below, void left out."}


def read_log(path):
    """OUT/log.jsonl, one JSON object a line, the last maybe half written. -> {stage: the lines of its newest run}"""
    found = {}
    for line in stage.read_lines(path) if path.is_file() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        known = found.setdefault(entry["stage"], {})
        if known and next(iter(known.values())).get("id") != entry.get("id"):
            known.clear()  # the training was begun anew
        known[entry["step"]] = entry  # a step that was made again counts once
    return {name: [entries[step] for step in sorted(entries)] for name, entries in found.items()}


def loss_charts(log):
    """A chart a training: its loss and the loss's terms over the steps."""
    charts = []
    for name, entries in log.items():
        entries = thinned(entries, POINTS)
        terms = [term for term in entries[0] if term not in NO_LOSS]
        if len(terms) == 2:  # the loss is its only term
            terms = ["loss"]
        series = []
        for term in terms:
            series.append({"name": term, "points": [[entry["step"], round(entry[term], 5)] for entry in entries]})
        charts.append({"title": f"Training loss: {stage.STAGES[name][0]}", "x": "step", "y": "loss", "series": series})
    return charts


def line(name, points):
    """A line of a chart, and its best point."""
    return {"name": name, "points": points, "best": max(points, key=lambda point: point[1])}


def watched_charts(record):
    """mIoU of plain and refined CAM on a few training photos, epoch by epoch, from the classifier's record."""
    series = []
    for name, key in (("plain CAM", "plain"), ("refined CAM", "refined")):
        watched = record.get("watched", {}).items()
        points = [[int(step), round(found[key], 3)] for step, found in watched if found.get(key) is not None]
        if points:
            series.append(line(name, sorted(points)))
    title = "While training: a sample of train at one scale"
    return [{"title": title, "x": "step", "y": "mIoU %", "series": series}] if series else []


def threshold_charts(curves):
    """curves: {name: mIoU % at evaluate.THRESHOLDS}"""
    series = []
    for name, curve in curves.items():
        series.append(line(name, [[round(float(t), 2), round(value, 3)] for t, value in zip(THRESHOLDS, curve)]))
    title = "Seeds: mIoU over the hard threshold"
    return [{"title": title, "x": "hard threshold", "y": "mIoU %", "series": series}] if series else []


def result_tables(results):
    """Of OUT/results.json: the numbers on top, the table of the stages, IoU of each class."""
    numbers, rows, scored = [], [], []
    for row in results["rows"]:
        value = row.get("miou") if row.get("map") is None else 100 * row["map"]
        kind = "mAP" if row.get("map") is not None else "mIoU"
        note = "; ".join(row[key] for key in ("note", "missing", "stale") if key in row and row[key] != kind)
        shown = f"{value:.2f}" if value is not None else "not scored"
        how = row.get("threshold", "-"), row.get("crf", "-")
        rows.append([row["stage"], row["split"], row["n"], *how, kind, shown, note])
        if value is not None and row["stage"] not in ("random maps", "background"):
            stale = f"; {row['stale']}" if "stale" in row else ""
            numbers.append([row["stage"], shown, f"{kind} %, {row['split']}, N = {row['n']}{stale}"])
        if "iou" in row:
            scored.append(row)
    tables = [{"title": "Stages", "head": ["stage", "split", "N", "threshold", "CRF", "", "%", ""], "rows": rows,
               "note": "Thresholds marked (best) were chosen by looking at the masks."}]
    if scored:
        rows = []
        for n, name in enumerate(results["classes"]):
            values = [row["iou"][n] for row in scored]
            rows.append([name, *("absent" if np.isnan(value) else f"{100 * value:.1f}" for value in values)])
        head = ["class", *(row["stage"] for row in scored)]
        tables.append({"title": "IoU % of each class", "head": head, "rows": rows})
    return numbers, tables


def render(value):
    """The template with its data: as JSON in which nothing can end the script element."""
    template = stage.read_text(TEMPLATE)
    return template.replace(">DATA<", ">" + json.dumps(value, allow_nan=False).replace("<", "\\u003c") + "<")


def write_page(dataset, out, tables, curves, threshold, count, side, workers):
    """tables, curves: those of the rows over seeds, beside the run's own -> OUT/report.html"""
    splits, totals = {}, {}
    stage.note_stale(out)
    for split in ("val", "train" if dataset.ids("train", required=False) else "train_aug"):
        found, matrices = gather(dataset, split, out, threshold, count, side, workers)
        if found["photos"]:
            splits[split], totals[split] = found, matrices
    results = read_results(out) or {"rows": [], "classes": []}
    numbers, own = result_tables(results) if results["rows"] else ([], [])
    records = {}
    for name in stage.STAGES:
        for ending in (".json", ".part.json"):  # a stage that is at work replaces the finished one
            if record := stage.read_record_file(out / f"{name}{ending}"):
                records[name] = record
    own_curves = {row["stage"]: row["curve"] for row in results["rows"] if "curve" in row}
    classes = ["background", *dataset.classes]
    errors = confusions(totals, classes)
    counts = [f"{found['n']} {split}" for split, found in splits.items()]
    facts = [str(out), f"{len(dataset.classes)} classes", *counts, f"seeds at the threshold {threshold:.2f}",
             *results.get("devices", []), *sorted(set(results.get("precision", {}).values())),
             time.strftime("%Y-%m-%d %H:%M")]
    charts = (threshold_charts(own_curves | curves) + watched_charts(records.get("classifier", {}))
              + loss_charts(read_log(out / "log.jsonl")))
    value = {
        "name": dataset.root.resolve().name, "facts": facts, "numbers": numbers, "charts": charts, "splits": splits,
        "tables": own[:1] + ([errors] if errors["rows"] else []) + own[1:] + tables, "layers": LAYERS,
        "settings": {name: record["settings"] for name, record in records.items()},
        "classes": [[name, "#%02x%02x%02x" % tuple(colour)] for name, colour in zip(classes, data.palette().tolist())]}
    path = out / "report.html"
    stage.write(path, lambda file: file.write(render(value).encode()))
    count = sum(len(found["photos"]) for found in splits.values())
    print(f"{count} photos, {path.stat().st_size / 1e6:.1f} MB -> {path}")
