"""Pictures, tables and a page of what the stages made. Nothing here is part of the method.

    python report.py show PHOTO ...    the classifier on any photo: CAMs, attention, hard label   -> OUT/show.png
    python report.py show              all stages of some photos of the run                       -> OUT/show.png
    python report.py sheets            each stage's best, middle and worst photos                 -> OUT/sheets/
    python report.py figures           Figures 1, 3, 4, 5 of the paper from the runs at hand      -> OUT/figures/
    python report.py tables            Tables 1-5, ours beside the paper's; --into FILE writes them there
    python report.py page              one HTML file of results, curves, settings, photos         -> OUT/report.html

Tables and figures are of the runs of `results.py`. `pictures.py` draws; `page.py` and `report.html` make the page.
"""
import io
from pathlib import Path

import stage  # before torch: from here on Ctrl-C is one line
import numpy as np
from PIL import Image

import data
import pictures
from commands import Commands, real, whole
from evaluate import THRESHOLDS, read_results
from page import write_page

ROWS = {  # of Table 5: name, line in Figure 4
    "transcam": ("TransCAM (baseline)", "black"), "no-noise": ("without noise", "tab:red"),
    "noise-x1": ("noise × 1 (BNR)", "tab:blue"), "noise-x2": ("noise × 2", "tab:green"),
    "start": ("before training", "tab:gray")}
SHIFTED = {"TransCAM": "transcam-shifted", "without noise": "no-noise-shifted", "BNR": "noise-x1-shifted",
           "noise × 2": "noise-x2-shifted"}
EXTRA = (*SHIFTED.values(), "true-masks")  # runs beside those of Table 5
NOT_RUN = "not run"
OWN = {"loss", "noise", "seed", "data"}  # settings in which the runs of one table may differ
ONLY_START = {("start", "classifier", "epochs"), ("start", "cams", "eigen")}

# The paper's numbers, %.
TABLE_1 = (  # method, row, stage, mIoU on VOC train and COCO train
    ("TransCAM", "transcam", "refined seeds", 64.9, 46.2), ("BNR", "noise-x1", "refined seeds", 66.2, 47.4),
    ("TransCAM + PSA", "transcam", "pseudo labels", 70.2, 48.7), ("BNR + PSA", "noise-x1", "pseudo labels", 71.3, 50.6))
TABLE_2 = {  # IoU of background and VOC's classes, then the mean, on val and test
    "transcam": (
        "91.3 81.9 35.4 84.7 67.6 67.9 87.5 80.5 86.5 31.4 73.9 52.5 84.0 74.9 74.6 79.0 44.7 84.1 47.0 78.4 46.6 69.3",
        "91.2 82.2 36.2 89.8 57.8 65.1 85.7 81.5 84.2 28.3 77.4 55.9 82.1 80.0 78.9 76.5 48.0 84.7 57.2 72.7 45.8 69.6",
    ),
    "noise-x1": (
        "91.6 85.3 35.8 87.1 70.5 72.2 87.0 82.8 87.7 32.5 77.2 52.6 84.0 75.9 74.7 81.1 50.9 85.1 48.4 76.5 42.1 70.5",
        "91.6 85.0 36.1 89.7 58.9 67.9 86.1 82.8 86.8 30.6 81.0 60.5 82.6 81.3 79.7 79.4 56.9 85.5 59.3 71.2 41.1 71.1",
    ),
}
TABLE_3 = (("TransCAM", "transcam", 69.3, 69.6), ("BNR", "noise-x1", 70.5, 71.1))  # mIoU on VOC val and test
TABLE_4 = (("TransCAM", "transcam", 45.7), ("BNR", "noise-x1", 45.9))  # on COCO val
TABLE_5 = (("transcam", 64.9), ("no-noise", 62.4), ("noise-x1", 66.2), ("noise-x2", 65.3))  # of seeds, on VOC train
MEASURED = (  # columns of the table of all rows: title, stage, key in results.json, factor, digits
    ("mAP, val", "classifier", "map", 100, 2), ("entropy", "classifier", "entropy", 1, 3),
    ("plain CAM", "plain CAM", "miou", 1, 2), ("refined seeds", "refined seeds", "miou", 1, 2),
    ("pseudo labels", "pseudo labels", "miou", 1, 2), ("segmenter, val", "segmenter", "miou", 1, 2))


# ---------------------------------------------------------------- runs of Table 5

def read_runs(out, seeds):
    """{row: {seed: OUT/rows/ROW-seedN/results.json}} of these seeds; InputError where they make no one table."""
    runs = {}
    for row in (*ROWS, *EXTRA):
        for seed in sorted({*seeds, 0} if row == "start" else seeds):
            if found := read_results(out / "rows" / f"{row}-seed{seed}"):
                runs.setdefault(row, {})[seed] = found
                for entry in found["rows"]:
                    if "stale" in entry:
                        print(f"note: {row}-seed{seed}, {entry['stage']}: {entry['stale']}")
    if not runs.keys() & ROWS.keys():
        raise stage.InputError(f'no ROW-seedN/results.json in {out / "rows"}: run "make results"')
    common_settings(runs)
    return runs


def common_settings(runs):
    """{stage: {flag: value}} of the rows of Table 5; InputError where they differ in more than loss, noise and seed."""
    found, places = {}, {}
    for row in ROWS:
        for seed, run in runs.get(row, {}).items():
            for name, flags in run["settings"].items():
                for flag, value in flags.items():
                    if flag in OWN or (row, name, flag) in ONLY_START:
                        continue
                    value = Path(value).name if isinstance(value, str) else value  # a file may lie elsewhere
                    known = found.setdefault(name, {}).setdefault(flag, value)
                    where = places.setdefault((name, flag), f"{row}-seed{seed}")
                    if value != known:
                        raise stage.InputError(f"{name} had --{flag} {value} in {row}-seed{seed}, {known} in {where}: "
                                         "not one table")
    return found


def curves_of(runs):
    """mIoU % of the refined seeds at all thresholds, mean over the seeds at hand. -> {row: (60,)}"""
    found = {}
    for row in ROWS:
        curves = values_of(runs, row, "refined seeds", "curve")
        if curves:
            found[row] = np.mean(curves, axis=0)
    return found


# ---------------------------------------------------------------- tables

def values_of(runs, row, stage_name, key="miou"):
    """What was measured of a stage of a row, one value a seed. -> list"""
    entries = [entry for run in runs.get(row, {}).values() for entry in run["rows"] if entry["stage"] == stage_name]
    return [entry[key] for entry in entries if entry.get(key) is not None]


def mean_and_deviation(values, digits=2):
    """Over seeds, n - 1, as text."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}" if values else NOT_RUN
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


def make_tables(runs, name, seeds):
    """Tables 1-5 and those of all rows. runs: of `read_runs`; name: of the data set

    ->  list of {"title", "head", "rows", "note"?}, all text
    """
    def ours(row, stage_name, has=True):
        return mean_and_deviation(values_of(runs, row, stage_name)) if has else NOT_RUN

    one = next(iter(next(iter(runs.values())).values()))
    is_coco = "coco" in name.lower()
    on = {entry["stage"]: f"ours, {name} {entry['split']}, N = {entry['n']}" for entry in one["rows"]}
    train, val = on["refined seeds"], on["segmenter"]
    shifted = [(method, row) for method, row in SHIFTED.items() if row in runs]

    table_3, table_4 = list(TABLE_3), list(TABLE_4)
    for method, row in shifted:  # the paper has none of these
        (table_4 if is_coco else table_3).append((f"{method}, shifted", row, *[""] * (1 if is_coco else 2)))
    tables = [
        {"title": "Table 1. Seeds and pseudo labels, mIoU %",
         "head": ["method", "paper, VOC train", "paper, COCO train", train],
         "rows": [[method, *paper, ours(row, what)] for method, row, what, *paper in TABLE_1]
         + [[f"{method} + PSA, shifted", "", "", ours(row, "pseudo labels")] for method, row in shifted]},
        table_2(runs, name, one["classes"], shifted),
        {"title": "Table 3. Segmenter on VOC, mIoU %",
         "head": ["method", "paper, val", "paper, test", "ours" if is_coco else val, "ours, test"],
         "rows": [[method, *paper, ours(row, "segmenter", not is_coco), NOT_RUN] for method, row, *paper in table_3]},
        {"title": "Table 4. Segmenter on COCO, mIoU %",
         "head": ["method", "paper, val", val if is_coco else "ours"],
         "rows": [[method, *paper, ours(row, "segmenter", is_coco)] for method, row, *paper in table_4]},
        {"title": "Table 5. Seeds by the noise in the loss, mIoU %", "head": ["loss", "paper, VOC train", train],
         "rows": [[ROWS[row][0], paper, ours(row, "refined seeds")] for row, paper in TABLE_5]},
        table_of_rows(runs, seeds), table_of_differences(runs), table_of_thresholds(runs)]
    return [{**table, "rows": [[str(cell) for cell in line] for line in table["rows"]]} for table in tables]


def table_2(runs, name, classes, shifted):
    """IoU of each class on val, beside the paper's where classes are VOC's. shifted: (method, row) of more columns"""
    is_voc = set(classes[1:]) <= set(data.VOC_CLASSES)
    names, rows = ["background", *data.VOC_CLASSES, "mIoU"], []
    for label in [*classes, "mIoU"]:
        line = [label]
        for row, paper in (*TABLE_2.items(), *((row, ()) for _, row in shifted)):
            own = values_of(runs, row, "segmenter")
            if label != "mIoU":
                own = [100 * each[classes.index(label)] for each in values_of(runs, row, "segmenter", "iou")]
            line += [values.split()[names.index(label)] for values in paper] if is_voc else []
            line.append(mean_and_deviation(own, 1))
        rows.append(line)
    columns = ("paper val", "paper test", f"ours, {name} val") if is_voc else (f"ours, {name} val",)
    note = "The paper's are those of VOC's classes."
    if is_voc:
        note = "The paper's mIoU is over all 21 classes. VOC's test set is scored by its server: not run."
    return {"title": "Table 2. Segmenter, IoU % of each class", "rows": rows, "note": note,
            "head": ["class", *(f"{method}: {column}" for method in ("TransCAM", "BNR") for column in columns),
                     *(f"{method}, shifted: {columns[-1]}" for method, _ in shifted)]}


def table_of_rows(runs, seeds):
    """All that was measured of each row: mean, deviation, the value of each seed; which seeds were not run."""
    lines = []
    for row in [*ROWS, *(row for row in EXTRA if row in runs)]:
        own = runs.get(row, {})
        missing = ", ".join(str(seed) for seed in seeds if seed not in own and row in dict(TABLE_5))
        line = [row, ", ".join(map(str, own)) + f" ({missing} not run)" * bool(missing)]
        for _, stage_name, key, factor, digits in MEASURED:
            values = [factor * value for value in values_of(runs, row, stage_name, key)]
            each = ", ".join(f"{value:.{digits}f}" for value in values)
            line.append(mean_and_deviation(values, digits) + f" ({each})" * (len(values) > 1))
        hours = sum(seconds for run in own.values() for seconds in run["seconds"].values()) / 3600
        lines.append([*line, f"{hours:.2f}" if own else ""])
    if eigen := values_of(runs, "start", "Eigen-CAM"):
        lines.append(["Eigen-CAM of start", "", "", "", "", mean_and_deviation(eigen), "", "", ""])
    for floor in ("random maps", "background"):
        values = [value for row in runs for value in values_of(runs, row, floor)]
        lines.append([floor, "", "", "", "", mean_and_deviation(values[:1]), "", "", ""])
    note = ("mIoU %; mean ± deviation (n - 1) over random seeds here and above. Entropy is that of the attention "
            "after training, 1 is uniform. Hours are what the stages took, also where rows ran side by side.")
    if runs.keys() & SHIFTED.values():
        note += " Shifted: PSA's three thresholds moved so that 0.42 falls on the seeds' best one, chosen by looking."
    if "true-masks" in runs:
        note += " True-masks: the segmenter trained on the masks of train, a ceiling."
    head = ["row", "random seeds", *(column[0] for column in MEASURED), "hours"]
    return {"title": "All rows, each run", "head": head, "rows": lines, "note": note}


def table_of_differences(runs):
    """What each row differs from the baseline of the same seed: mean and deviation over seeds, each seed."""
    lines, baseline = [], runs.get("transcam", {})
    for row in list(dict(TABLE_5))[1:]:
        line, own = [row], runs.get(row, {})
        for _, stage_name, key, factor, digits in MEASURED:
            pairs = [[values_of({row: {seed: run[seed]}}, row, stage_name, key) for run in (own, baseline)]
                     for seed in own if seed in baseline]
            values = [factor * (ours[0] - base[0]) for ours, base in pairs if ours and base]
            each = ", ".join(f"{value:+.{digits}f}" for value in values)
            line.append(mean_and_deviation(values, digits) + f" ({each})" * (len(values) > 1))
        lines.append(line)
    return {"title": "Differences to TransCAM of the same seed", "rows": lines,
            "head": ["row", *(column[0] for column in MEASURED)]}


def table_of_thresholds(runs):
    shown = range(5, len(THRESHOLDS), 10)
    return {"title": "Refined seeds over the hard threshold, mIoU %, mean over runs",
            "head": ["row", *(f"{THRESHOLDS[t]:.2f}" for t in shown)],
            "rows": [[row, *(f"{curve[t]:.2f}" for t in shown)] for row, curve in curves_of(runs).items()]}


def table_of_starts(out):
    """What each warm start, OUT/rows/warm*, came to after each epoch. -> list of one table, or none"""
    lines = []
    for folder in sorted((out / "rows").glob("warm*")):
        for step, found in ((stage.find_record(folder, "classifier") or {}).get("watched") or {}).items():
            values = [None if found["map"] is None else 100 * found["map"], found["plain"], found["refined"],
                      np.mean(found["entropy"]), found["own_rows"], found["object_attention"]]
            lines.append([folder.name, step, *("" if value is None else f"{value:.2f}" for value in values)])
    note = ("mAP: of up to 200 photos. Masks at the crop's size, best threshold. Own rows: 1 where each place attends "
            "to places of its own, 0 where all attend to the same ones. Object attention: share that objects' places "
            "pay to objects' places.")
    head = ["run", "step", "mAP, val", "plain CAM", "refined", "entropy", "own rows", "object attention"]
    title = "Warm start, after each epoch, on a sample of train"
    return [{"title": title, "head": head, "rows": lines, "note": note}] if lines else []


def markdown(table):
    lines = []
    for cells in (table["head"], *table["rows"]):
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |")
    note = ["", table["note"]] if "note" in table else []
    return "\n".join([f"**{table['title']}**", "", lines[0], "|---" * len(table["head"]) + "|", *lines[1:], *note, ""])


def made_by(runs, warm):
    """Machines, precision and settings of the runs as Markdown. warm: record of their warm start, or None"""
    every = [run for seeds in runs.values() for run in seeds.values()]
    devices = sorted({device for run in every for device in run["devices"]})
    precisions = sorted({precision for run in every for precision in run["precision"].values()})
    lines = [f"On {' and '.join(devices)}, in {', '.join(precisions)}. Settings:\n"]
    common = common_settings(runs)
    shown = list(common.items())
    if warm:
        shown.append(("classifier of the warm start", unlike(warm["settings"], common["classifier"])))
    for row in EXTRA:
        for name, flags in next(iter(runs.get(row, {}).values()), {"settings": {}})["settings"].items():
            shown.append((f"{name} of {row}", unlike(flags, common.get(name, {}))))
    for name, flags in shown:
        lines += [f"- `{name}` " + " ".join(f"{flag}={value}" for flag, value in flags.items())] if flags else []
    return "\n".join(lines)


def unlike(flags, common):
    """Those that differ."""
    return {flag: value for flag, value in flags.items() if flag not in OWN and common.get(flag) != value}


def tables(args):
    """Print Tables 1-5 as Markdown, with mean and deviation over the seeds at hand; --into writes them into a file."""
    runs, name = read_runs(args.out, args.seeds), args.data.resolve().name
    warm = stage.find_record(args.out / "rows" / "warm", "classifier")
    every = make_tables(runs, name, args.seeds) + table_of_starts(args.out)
    text = "\n".join([*map(markdown, every), made_by(runs, warm)])
    print(text)
    if args.into:
        begin = f"# Results: {name}\n\nWritten by `make tables`.\n\n"
        stage.write(args.into, lambda file: file.write(f"{begin}{text}\n".encode()))


# ---------------------------------------------------------------- figures, page, results

def figures(args):
    """Draw Figures 1, 3, 4, 5 of the paper from the runs at hand -> OUT/figures/; what a figure lacks is named."""
    dataset, drawn = data.DataSet(args.data), 0
    for draw in (pictures.figure_1, pictures.figure_3, figure_4, pictures.figure_5):
        try:
            pictures.save(args.out / "figures" / f"{draw.__name__}.png", draw(args, dataset))
            drawn += 1
        except stage.InputError as error:
            print(f"{draw.__name__} is not drawn: {error}")
    if not drawn:
        raise stage.InputError(f"none of the figures could be drawn from {args.out}")


def figure_4(args, dataset):
    """mIoU of the seeds over the hard threshold, mean over the seeds at hand, with the best points."""
    curves = curves_of(read_runs(args.out, args.seeds))
    for row in ROWS:
        if row not in curves and row != "start":
            print(f'figure_4 lacks {row}: run "{pictures.how_to_run(args, row)}"')
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise stage.InputError('matplotlib is missing: "make figures" installs it') from None
    figure = Figure(figsize=(6, 4), layout="constrained", dpi=150)
    axes = figure.subplots()
    for row, curve in curves.items():
        best, (title, colour) = int(curve.argmax()), ROWS[row]
        axes.plot(THRESHOLDS, curve, color=colour, label=f"{title}: {curve[best]:.1f} at {THRESHOLDS[best]:.2f}")
        axes.plot(THRESHOLDS[best], curve[best], "o", color=colour)
    axes.set(xlabel="hard threshold", ylabel="mIoU %", title=f"Seeds of {dataset.root.resolve().name}, train")
    axes.grid(alpha=0.3)
    axes.legend()
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return Image.open(file)


def page(args):
    """Make one HTML file of results, curves, training loss, settings, and photos with the labels of every stage."""
    more, curves = [], {}
    top = args.out.parent.parent if args.out.parent.name == "rows" else args.out
    if any((top / "rows").glob("*/results.json")):
        runs = read_runs(top, args.seeds)
        more = make_tables(runs, args.data.resolve().name, args.seeds)
        curves = {f"{row}, mean over seeds": curve.tolist() for row, curve in curves_of(runs).items()}
    threshold = pictures.seed_threshold(args.out, args.threshold)
    write_page(data.DataSet(args.data), args.out, more, curves, threshold, args.photos, args.side, args.workers)


def main():
    commands = Commands(__doc__, {"voc": {}, "coco": {}, "toy": {}, "small": {"amp": True}})
    show = commands.add(pictures.show, "draw the classifier on any photo, or all stages of a run")
    show.add_argument("photos", type=Path, nargs="*", metavar="PHOTO", help="any photos (default: photos of the run)")
    show.add_argument("--weights", type=Path, help="a classifier (default: OUT/classifier.pth)")
    show.add_argument("--classes", nargs="+", metavar="NAME", help="classes to draw (default: of probability over 0.5)")
    contact = commands.add(pictures.sheets, "draw each stage's best, middle and worst photos", card=False)
    draw = commands.add(figures, "draw the paper's figures from the runs at hand")
    draw.add_argument("--place", type=real(0, 1), nargs=2, metavar=("X", "Y"),
                      help="place of Figure 5, shares of width and height (default: the middle of the objects)")
    table = commands.add(tables, "print Tables 1-5, ours beside the paper's", card=False)
    html = commands.add(page, "make one HTML file of a run", card=False)
    html.add_argument("--photos", type=whole(1), default=400, help="of a split at most: the worst 20, and others")
    html.add_argument("--side", type=whole(16, 4096), default=320, help="of a photo's longer side, pixels")
    for parser in (show, contact, draw):
        parser.add_argument("--height", type=whole(16, 4096), default=160, help="of a picture, pixels")
    for parser in (show, draw):
        parser.add_argument("--ids", nargs="+", help="photos of the data set (default: the first of the list)")
        parser.add_argument("--first", type=whole(1), default=4, help="only so many of the list")
    for parser in (show, contact, html):
        parser.add_argument("--threshold", type=real(0, 1),
                            help="of the seeds (default: the best that evaluate.py found, else 0.4)")
    for parser in (draw, table, html):
        parser.add_argument("--seeds", type=whole(0), nargs="+", default=[0, 1, 2], help="random seeds of the runs")
    table.add_argument("--into", type=Path, metavar="FILE", help="write them into it")
    commands.run()


if __name__ == "__main__":
    main()
