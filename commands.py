"""The command line: types of flags, sub-commands, presets, and what stands around every command.

Every script's `main()` fills a `Commands`; its functions get `args`. What a user can mend ends in one line.
"""
import argparse
import contextlib
import inspect
import math
import os
import random
import sys
from concurrent.futures.process import BrokenProcessPool
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from engine import WORLD, peak_memory, pick_device, precision
from stage import (DISK_ERRORS, DISK_REMEDY, RANK, STAGES, FlagError, InputError, NoDataSet, find_record,
                   read_record_file, sweep)

WAIT = timedelta(hours=2)  # of the other processes while the first one scores


# ---------------------------------------------------------------- types of flags

def _number(kind, says, fits, high):
    says += f" and at most {high}" if high < math.inf else ""

    def read(text):
        with contextlib.suppress(ValueError, OverflowError):
            if fits(value := kind(text)) and value <= high and value < math.inf:
                return value
        raise argparse.ArgumentTypeError(f"{text} is no {says}")
    return read


def whole(low, high=math.inf):
    """An integer in [low, high]."""
    return _number(int, f"whole number of at least {low}", lambda value: low <= value, high)


def real(low, high=math.inf):
    """A finite number in [low, high]."""
    return _number(float, f"number of at least {low}", lambda value: low <= value, high)


def above(low, high=math.inf):
    """A finite number in (low, high]."""
    return _number(float, f"number above {low}", lambda value: low < value, high)


class Range(argparse.Action):
    """Two numbers, the first no greater than the second."""

    def __call__(self, parser, args, values, flag=None):
        if values[0] > values[1]:
            parser.error(f"argument {flag}: {values[0]} is more than {values[1]}")
        setattr(args, self.dest, tuple(values))


# ---------------------------------------------------------------- parser

class Help(argparse.RawDescriptionHelpFormatter):
    """Adds each flag's default; where it has none its text may say what is taken."""

    def _get_help_string(self, action):
        if action.default in (None, "", argparse.SUPPRESS):
            return action.help
        return action.help.split(" (default")[0] + " (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with a flag."""

    def error(self, message):
        self.exit(2, f"error: {message} ({self.prog} --help lists the flags)\n")

    def switch(self, flag, what, default=False):
        """--flag and --no-flag."""
        self.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=what)


class Commands:
    """argparse with presets: `add(function, summary)` gives a sub-command's parser, `run()` calls what was typed."""

    def __init__(self, doc, presets):
        self.parser = Parser(description=doc, formatter_class=Help)
        self.presets, self.commands, self.with_preset = presets, None, []

    def add(self, function, summary, common=True, card=True):
        """A sub-command; common: with the flags that all stages share; card: it computes on --device."""
        if self.commands is None:
            self.commands = self.parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
        parser = self.commands.add_parser(function.__name__, help=summary, formatter_class=Help,
                                          description=inspect.getdoc(function))
        parser.set_defaults(function=function, parser=parser, card=card)
        return self._add_common(parser) if common else parser

    def only(self, function, card=True):
        """The parser of a script of one command."""
        self.parser.set_defaults(function=function, parser=self.parser, card=card)
        return self._add_common(self.parser)

    def _add_common(self, parser):
        self.with_preset.append(parser)
        parser.add_argument("--data", type=Path, help="data set; if not given that of the run in --out, else data/toy")
        parser.add_argument("--out", type=Path, help="folder of all results; if not given out/NAME OF DATA")
        parser.add_argument("--preset", choices=self.presets, help="table of defaults, as shown here: voc and coco are "
                            "published, toy is the toy set's, small for some thousand small photos; if not "
                            "given that of the run in --out, or toy for data/toy, else voc")
        parser.add_argument("--device", help="cuda or cpu (default: cuda where it works)")
        parser.add_argument("--seed", type=whole(0, 2 ** 32 - 1), default=0, help="of all random numbers")
        parser.add_argument("--workers", type=whole(0, 256), default=min(8, os.cpu_count() or 1),
                            help="processes that load photos or run the CRF")
        parser.switch("--amp", "mixed precision (default: on cuda)", default=None)
        parser.switch("--deterministic", "the same bytes again on cuda too, more slowly")
        parser.add_argument("--fresh", action="store_true", help="make it anew, also where it is done")
        return parser

    def run(self):
        try:
            self._set_defaults()
            args = self.parser.parse_args()
            if "preset" in args:
                _prepare(args)
            args.function(args)
        except FlagError as error:
            args.parser.error(str(error))
        except InputError as error:  # from a loader's worker the message comes with a traceback in front
            line = str(error).strip().splitlines()[-1].removeprefix("stage.InputError: ")
            if isinstance(error, NoDataSet) and self.recorded:
                line += f"; the run in {args.out} was made from this folder: --data names its new place"
            sys.exit(f"error: {line}")
        except BrokenProcessPool:
            sys.exit("error: a worker process died, for want of memory perhaps: try fewer --workers")
        except (MemoryError, RuntimeError) as error:
            card = isinstance(error, torch.cuda.OutOfMemoryError)
            if not card and isinstance(error, RuntimeError) and "DefaultCPUAllocator" not in str(error):
                raise
            sys.exit(f"error: the {'card' if card else 'machine'} has too little memory after {peak_memory():.1f} GB: "
                     "try --micro-batch in training, a smaller --batch-size in cams, smaller photos or --scales")
        except OSError as error:
            if error.errno not in DISK_ERRORS:
                raise
            sys.exit(f"error: {error.filename or 'the disk'}: {error.strerror}: {DISK_REMEDY}")
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    def _set_defaults(self):
        """What --data, --out and --preset say of each other and of the other flags, before the help shows it."""
        where = Parser(add_help=False)
        where.add_argument("--data", type=Path, nargs="?")  # where a value is missing the whole parser says so
        where.add_argument("--out", type=Path, nargs="?")
        where.add_argument("--preset", nargs="?")
        typed, _ = where.parse_known_args()
        place = typed.out or Path("out") / (typed.data or Path("data/toy")).resolve().name
        record = {} if typed.data and typed.preset else _record_in(place)
        self.recorded = record.get("data") if typed.out and not typed.data else None
        folder, preset = typed.data or Path(self.recorded or "data/toy"), typed.preset or record.get("preset")
        if preset not in self.presets:
            preset = "toy" if folder.resolve() == Path("data/toy").resolve() else "voc"
        out = Path("out") / folder.resolve().name
        for parser in self.with_preset:
            flags = {action.dest for action in parser._actions}
            own = {key: value for key, value in self.presets[preset].items() if key in flags}
            parser.set_defaults(data=folder, out=out, preset=preset, **own)


def add_training_flags(parser):
    """Those that all trainings share."""
    parser.switch("--from-scratch", "start without weights")
    parser.add_argument("--micro-batch", type=whole(0), default=0,
                        help="images at a time through the network, 0: the batch at once")


def _record_in(out):
    """The first record of the run in this folder, else of the rows of results.py in it; {} where there is none."""
    paths = [folder / f"{name}{ending}" for folder in (out, *sorted((out / "rows").glob("*"))) for name in STAGES
             for ending in (".json", ".part.json")]
    return next(filter(None, map(read_record_file, paths)), {})


def _prepare(args):
    """Device, precision and random numbers of a command; what dead processes left in OUT is swept away."""
    if RANK == 0:
        sweep(args.out)
    args.device = pick_device(args.device, args.card)
    if WORLD > 1:
        dist.init_process_group("nccl" if args.device.type == "cuda" else "gloo", timeout=WAIT)
        for name in STAGES:
            find_record(args.out, name)  # the first process may have to bring one to its end
        dist.barrier()
    args.amp = args.card and (args.device.type == "cuda" if args.amp is None else args.amp)
    args.precision = precision(args.device, args.amp)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
