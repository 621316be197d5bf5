"""Pictures, a gallery, figures and tables of what the stages made. Nothing here is part of the method.

    python -m wsss.report show PHOTO ...   the classifier on any photo: CAMs, attention, hard label  -> OUT/show.png
    python -m wsss.report show             all stages of some photos of the run                      -> OUT/show.png
    python -m wsss.report gallery          table of results, all stages of every photo        -> OUT/report/index.html
    python -m wsss.report figures          Figures 1, 3, 4, 5 of the paper from runs at hand         -> OUT/figures/
    python -m wsss.report tables           Tables 1-5, ours beside the paper's                       -> OUT/tables.md

Tables and figures are of the runs OUT/rows/ROW-seedN of `make results`. `pictures.py` draws.
"""
import io
import itertools
import math
from html import escape
from pathlib import Path
from urllib.parse import quote

import numpy as np
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

import bnr
from wsss.cli import Commands
from wsss.data import VOC_CLASSES, DataSet, read_image
from wsss.evaluate import THRESHOLDS, confusion, iou, outcome, read_results
from wsss.masks import VOID, overlay, palette
from wsss.pictures import FIGURE, MAPS, PAGE, glow, heat, look, sheet, stages_of
from wsss.presets import defaults, whole
from wsss.seeds import combine_scales, hard_threshold
from wsss.stage import STAGES, FlagError, InputError, find_record, note_if_older, require_same, write, write_lines

PROBABLE = 0.5  # classes of a higher probability are drawn
THRESHOLD = 0.4  # of the seeds, where none was scored
ROWS = {  # of Table 5: name, line in Figure 4
    "transcam": ("TransCAM (baseline)", "black"), "no-noise": ("without noise", "tab:red"),
    "noise-x1": ("noise × 1 (BNR)", "tab:blue"), "noise-x2": ("noise × 2", "tab:green")}
METHODS = {"TransCAM": "transcam", "BNR": "noise-x1"}
TABLES = (  # title; columns of the paper; method, row, stage, the paper's mIoU %
    ("Table 1. Seeds and pseudo labels, mIoU %", ("VOC train", "COCO train"), (
        ("TransCAM", "transcam", "refined seeds", 64.9, 46.2), ("BNR", "noise-x1", "refined seeds", 66.2, 47.4),
        ("TransCAM + PSA", "transcam", "pseudo labels", 70.2, 48.7),
        ("BNR + PSA", "noise-x1", "pseudo labels", 71.3, 50.6))),
    ("Tables 3 and 4. Segmenter, mIoU %", ("VOC val", "VOC test", "COCO val"), (
        ("TransCAM", "transcam", "segmenter", 69.3, 69.6, 45.7), ("BNR", "noise-x1", "segmenter", 70.5, 71.1, 45.9))),
    ("Table 5. Seeds by the noise in the loss, mIoU %", ("VOC train",), tuple(
        (ROWS[row][0], row, "refined seeds", paper) for row, paper in zip(ROWS, (64.9, 62.4, 66.2, 65.3)))))
TABLE_2 = (  # the paper's IoU % of background and VOC's classes, then the mean: TransCAM on val, test; BNR on val, test
    "91.3 81.9 35.4 84.7 67.6 67.9 87.5 80.5 86.5 31.4 73.9 52.5 84.0 74.9 74.6 79.0 44.7 84.1 47.0 78.4 46.6 69.3",
    "91.2 82.2 36.2 89.8 57.8 65.1 85.7 81.5 84.2 28.3 77.4 55.9 82.1 80.0 78.9 76.5 48.0 84.7 57.2 72.7 45.8 69.6",
    "91.6 85.3 35.8 87.1 70.5 72.2 87.0 82.8 87.7 32.5 77.2 52.6 84.0 75.9 74.7 81.1 50.9 85.1 48.4 76.5 42.1 70.5",
    "91.6 85.0 36.1 89.7 58.9 67.9 86.1 82.8 86.8 30.6 81.0 60.5 82.6 81.3 79.7 79.4 56.9 85.5 59.3 71.2 41.1 71.1")


def seed_threshold(args):
    """The best of the run's seeds, where `make eval` has scored them."""
    rows = (read_results(args.out) or {"rows": []})["rows"]
    return next((row["best"] for row in rows if row["stage"] == "refined seeds" and "best" in row), THRESHOLD)


def open_run(args, dataset):
    """-> folder of a run, kinds of its class maps, threshold of the seeds; InputError where other data made it"""
    record = require_same(args.out, "cams", args.preset, dataset)
    for name in STAGES:
        if find_record(args.out, name):
            note_if_older(args.out, name)
    kinds = [kind for kind in MAPS if kind == "refined" or record["settings"].get(kind)]
    return args.out, kinds, seed_threshold(args)


def chosen(args, dataset, split):
    """--ids, else the first ones of a list."""
    return [dataset.find_id(name, "--ids") for name in args.ids or ()] or dataset.ids(split)[:args.first]


def save(path, image, **how):
    write(path, lambda file: image.save(file, **how or {"format": "PNG"}))


def show_photos(args):
    """A row a photo: its attention map, CAMs and hard label of its probable classes, or of --classes."""
    model, network = bnr.load_classifier(args.out, args.device)
    names, record = network["classes"], find_record(args.out, "cams")
    if unknown := [name for name in args.classes or () if name not in names]:
        raise FlagError(f"--classes {unknown[0]}: the classifier knows {' '.join(names)}")
    scales = record["settings"]["scales"] if record else defaults("bnr cams", args.preset)["scales"]
    threshold, rows = seed_threshold(args), []
    for path in args.photos:
        image = read_image(path)
        photo, view = pil_to_tensor(image), look(model, image, network["crop"], scales, args.device, args.amp)
        drawn = args.classes or [name for name, p in zip(names, view["probability"]) if p > PROBABLE]
        classes = np.array([1 + names.index(name) for name in drawn], np.int64)
        plain, refined = (combine_scales([scale[classes - 1] for scale in view[kind]], photo.shape[1:]).numpy()
                          for kind in ("plain", "refined"))
        title = ", ".join(f"{name} {view['probability'][names.index(name)]:.2f}" for name in drawn)
        print(f"{path}: {title or f'no class over {PROBABLE}, --classes NAME draws one all the same'}")
        rows.append([
            (f"{path.name}: {title}", photo), ("attention map", glow(photo, view["attention"])),
            ("plain CAM", heat(photo, classes, plain)), ("refined CAM", heat(photo, classes, refined)),
            (f"hard label at {threshold:.2f}", overlay(photo, hard_threshold(classes, refined, threshold)))])
    return rows


def show(args):
    """Draw what the classifier sees in any PHOTO; without one, all stages of some photos of the run -> OUT/show.png"""
    if args.photos:
        rows = show_photos(args)
    else:
        dataset = DataSet(args.data)
        run = open_run(args, dataset)
        ids = chosen(args, dataset, "train" if dataset.list_file("train") else "train_aug")
        rows = [list(stages_of(dataset, name, *run)[0].items()) for name in ids]
    save(args.out / "show.png", sheet(rows, args.height))
    print(args.out / "show.png")


def gallery(args):
    """Write a page of results and of every photo of val and train, the worst IoU first -> OUT/report/index.html"""
    dataset, folder, sections = DataSet(args.data), args.out / "report", []
    run = open_run(args, dataset)
    label_of_train = "pseudo label" if find_record(args.out, "pseudo_labels") else f"seed at {run[-1]:.2f}"
    train = "train" if dataset.list_file("train") else "train_aug"
    for split, title in (("val", "segmentation"), (train, label_of_train)):
        drawn = []
        for name in tqdm(dataset.ids(split, required=False), desc=f"gallery, {split}"):
            panels, labels = stages_of(dataset, name, *run)
            strip, score = sheet([list(panels.items())], args.height), math.nan
            save(folder / split / f"{name}.jpg", strip, format="JPEG", quality=80)
            if labels["ground truth"] is not None and labels[title] is not None:
                each = iou(confusion(labels["ground truth"], labels[title], VOID))
                score = each[~np.isnan(each)].mean() if not np.isnan(each).all() else math.nan
            shown = escape(name) + (": not scored" if math.isnan(score) else f": {100 * score:.1f} %")
            drawn.append((2 if math.isnan(score) else score, FIGURE.substitute(
                title=shown, source=f"{split}/{quote(name)}.jpg", width=strip.width, height=strip.height)))
        sections.append(f"<h2>{split}: {len(drawn)} photos, by the IoU of the {title}</h2>\n" if drawn else "")
        sections += [figure for _, figure in sorted(drawn, key=lambda pair: pair[0])]
    legend = [f'<span style="background: rgb{tuple(colour)}">{escape(name)}</span>'
              for name, colour in zip(dataset.classes, palette()[1:].tolist())]
    rows = []
    for row in (read_results(args.out) or {"rows": []})["rows"]:
        cells = row["stage"], row["split"], row["n"], row.get("threshold", "-"), outcome(row)
        rows.append(f"<tr{' class=stale' * ('stale' in row)}>" + "".join(f"<td>{escape(str(cell))}" for cell in cells))
    page = PAGE.substitute(
        name=escape(f"{dataset.root.resolve().name}: {args.out}"), legend="\n".join(legend),
        sections="".join(sections), rows="\n".join(rows) or "<tr><td>not scored: make eval")
    write(folder / "index.html", lambda file: file.write(page.encode(errors="replace")))
    print(folder / "index.html")


def run_of(args, dataset, row, name):
    """Folder of a run of Table 5; InputError naming the command that makes the stage."""
    folder = args.out / "rows" / f"{row}-seed{args.random_seeds[0]}"
    if not find_record(folder, name):
        raise InputError(f'no {STAGES[name][0]} in {folder}: make results ROWS={row} SEEDS={args.random_seeds[0]}')
    require_same(folder, name, args.preset, dataset)
    return folder


def read_runs(args):
    """{(row, random seed): results.json} of OUT/rows/ROW-seedN; InputError where other settings made one of them."""
    runs, known = {}, {}
    for row, seed in itertools.product(ROWS, args.random_seeds):
        if not (results := read_results(args.out / "rows" / f"{row}-seed{seed}")):
            continue
        runs[row, seed] = results
        for stage, settings in results["settings"].items():
            for flag, value in settings.items():
                if flag not in ("loss", "noise", "seed") and known.setdefault((stage, flag), value) != value:
                    runs_have = f"{value} in {row}-seed{seed}, {known[stage, flag]} in other runs"
                    raise InputError(f"{stage} has {flag} {runs_have}: these do not belong in one table")
    if not runs:
        raise InputError(f'no results of these SEEDS in {args.out / "rows"}: run "make results", or take SEEDS=...')
    return runs


def scores_of(runs, row, stage):
    """The rows of results.json of a stage that was scored, one a run."""
    entries = [entry for key, results in runs.items() if key[0] == row for entry in results["rows"]]
    return [entry for entry in entries if entry["stage"] == stage and "miou" in entry]


def mean_and_deviation(values, digits=2):
    """Over runs, n - 1, as text; nan is the IoU of a class that is absent."""
    there = [value for value in values if not np.isnan(value)]
    if len(there) < 2:
        return f"{there[0]:.{digits}f} (1 run)" if there else "absent" if values else "not run"
    return f"{np.mean(there):.{digits}f} ± {np.std(there, ddof=1):.{digits}f} ({len(there)} runs)"


def markdown(title, head, rows):
    """-> lines of a table"""
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (head, *rows)]
    return [f"**{title}**", "", lines[0], "|---" * len(head) + "|", *lines[1:], ""]


def tables(args):
    """Print Tables 1-5 as Markdown, with mean and deviation over the runs at hand -> OUT/tables.md"""
    runs = read_runs(args)
    first = next(iter(runs.values()))
    ours = {row["stage"]: f"ours, {first['data']} {row['split']}, N = {row['n']}" for row in first["rows"]}
    text = [f"# Results: {first['data']}", "", "Written by `make tables`.", ""]
    for title, columns, lines in TABLES:
        text += markdown(title, ["", *(f"paper, {column}" for column in columns), ours[lines[0][2]]], [
            [method, *paper, mean_and_deviation([score["miou"] for score in scores_of(runs, row, stage)])]
            for method, row, stage, *paper in lines])
    paper = dict(zip(["background", *VOC_CLASSES, "mIoU"], zip(*(line.split() for line in TABLE_2))))
    columns, lines = [f"{method}: paper, VOC {split}" for method in METHODS for split in ("val", "test")], []
    for n, label in enumerate([*first["classes"], "mIoU"]):
        each = [[[*(100 * value for value in score["iou"]), score["miou"]][n] for score in
                 scores_of(runs, row, "segmenter")] for row in METHODS.values()]
        lines.append([label, *paper.get(label, "----"), *(mean_and_deviation(values, 1) for values in each)])
    text += markdown("Table 2. Segmenter, IoU % of each class",
                     ["class", *columns, *(f"{method}: {ours['segmenter']}" for method in METHODS)], lines)
    devices = " and ".join(sorted({device for one in runs.values() for device in one["devices"]}))
    used = ", ".join(sorted({precision for one in runs.values() for precision in one["precision"].values()}))
    text.append(f"Ours: mean ± deviation (n - 1) over runs with other random seeds, on {devices}, in {used}.")
    text += [f"Note: {row}-seed{seed}, {entry['stage']}: {entry[key]}." for (row, seed), one in runs.items()
             for entry in one["rows"] for key in ("missing", "trained_on", "stale") if key in entry]
    text += [f"Doubtful: {row}-seed{seed}: {line}." for (row, seed), one in runs.items() for line in one["doubts"]]
    print("\n".join(text))
    write_lines(args.out / "tables.md", text)


def strips(args, dataset, split, methods, stage, panel):
    """Image, ground truth; Figure 1: the refined CAMs of TransCAM and of BNR, Figure 3: BNR's segmentation of val."""
    folders = {method: run_of(args, dataset, METHODS[method], stage) for method in methods}
    rows = []
    for name in chosen(args, dataset, split):
        panels = {method: stages_of(dataset, name, folder)[0] for method, folder in folders.items()}
        first = [(title, panels["BNR"][title]) for title in ("photo", "ground truth")]
        rows.append(first + [(method, panels[method][panel]) for method in methods])
    return sheet(rows, args.height)


def curves(args, dataset):
    """Figure 4: mIoU of the seeds over the hard threshold, mean over the runs at hand, with the best points."""
    runs = read_runs(args)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError('matplotlib is missing: "make figures" installs it') from None
    figure = Figure(figsize=(6, 4), layout="constrained", dpi=150)
    axes = figure.subplots()
    for row, (title, colour) in ROWS.items():
        if not (scores := scores_of(runs, row, "refined seeds")):
            continue
        curve = np.mean([score["curve"] for score in scores], axis=0)
        best = int(curve.argmax())
        axes.plot(THRESHOLDS, curve, color=colour, label=f"{title}: {curve[best]:.1f} at {THRESHOLDS[best]:.2f}")
        axes.plot(THRESHOLDS[best], curve[best], "o", color=colour)
    axes.set(xlabel="hard threshold", ylabel="mIoU %", title=f"Seeds of {dataset.root.resolve().name}, train")
    axes.legend()
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return Image.open(file)


def attention_maps(args, dataset):
    """Figure 5: image, and the attention maps of TransCAM and of BNR, the mean of each column of A*."""
    models, rows = {}, []
    for method, row in METHODS.items():
        models[method] = bnr.load_classifier(run_of(args, dataset, row, "classifier"), args.device)
    for name in chosen(args, dataset, "train"):
        image = read_image(dataset.image(name))
        rows.append([("image", photo := pil_to_tensor(image))])
        for method, (model, network) in models.items():
            view = look(model, image, network["crop"], (), args.device, args.amp)
            rows[-1].append((method, glow(photo, view["attention"])))
    return sheet(rows, args.height)


def figures(args):
    """Draw Figures 1, 3, 4, 5 of the paper from the runs at hand -> OUT/figures/; what a figure lacks is named."""
    dataset, drawn = DataSet(args.data), 0
    for number, draw, *how in (
            (1, strips, "train", METHODS, "cams", MAPS["refined"]),
            (3, strips, "val", ["BNR"], "segmentation", "segmentation"), (4, curves), (5, attention_maps)):
        try:
            save(path := args.out / "figures" / f"figure_{number}.png", draw(args, dataset, *how))
            print(path)
            drawn += 1
        except InputError as error:
            print(f"figure_{number} is not drawn: {error}")
    if not drawn:
        raise InputError(f"none of the figures could be drawn from {args.out}")


def main():
    commands = Commands(__doc__, "report")
    one = commands.add(show, "draw the classifier on any photo, or all stages of a run")
    one.add_argument("photos", type=Path, nargs="*", metavar="PHOTO", help="any photos (default: photos of the run)")
    one.add_argument("--classes", nargs="+", metavar="NAME", help="classes to draw (default: of probability over 0.5)")
    page = commands.add(gallery, "write a page of results and of every photo", computes=False)
    draw = commands.add(figures, "draw the paper's figures from the runs at hand")
    table = commands.add(tables, "print Tables 1-5, ours beside the paper's", computes=False)
    for parser in (one, page, draw):
        parser.add_argument("--height", type=whole(16, 4096), default=120, help="of a panel, pixels")
    for parser in (one, draw):
        parser.add_argument("--ids", nargs="+", help="photos of the data set (default: the first of the list)")
        parser.add_argument("--first", type=whole(1), default=4, help="only so many of the list")
    for parser in (draw, table):
        parser.add_argument("--random-seeds", type=whole(0), nargs="+", default=[0, 1, 2],
                            help="of the runs; figures 1, 3 and 5 are of the first")
    commands.run()


if __name__ == "__main__":
    main()
