"""The command line: sub-commands, their flags and presets, and what stands around every command and every stage.

Every script's `main()` fills a `Commands`; its functions get `args`. What a user can mend ends in one line.
"""
import argparse
import inspect
import os
import random
import re
import sys
from concurrent.futures.process import BrokenProcessPool
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist

from wsss.pool import RANK, WORLD, device_name, peak_memory, pick_device, precision
from wsss.presets import LIST, PRESETS, RANGE, SETTINGS, SWITCH, defaults, settings_of, whole
from wsss.stage import DENIED, DISK_ERRORS, FlagError, InputError, Stage, digest, disk_remedy

TOY = Path("data/toy")
WAIT = timedelta(hours=2)  # of the other processes while the first one scores


# ---------------------------------------------------------------- parser

class Range(argparse.Action):
    """Two numbers, the first no greater than the second."""

    def __call__(self, parser, args, values, flag=None):
        if values[0] > values[1]:
            parser.error(f"argument {flag}: {values[0]} is more than {values[1]}")
        setattr(args, self.dest, tuple(values))


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

    def add_setting(self, name, kind, meaning):
        """A flag of the table in presets.py."""
        how = {"type": kind}
        if kind == SWITCH:
            how = {"action": argparse.BooleanOptionalAction}
        elif isinstance(kind, tuple) and kind[0] == LIST:
            how = {"type": kind[1], "nargs": "+"}
        elif isinstance(kind, tuple) and kind[0] == RANGE:
            how = {"type": kind[1], "nargs": 2, "action": Range}
        elif isinstance(kind, tuple):
            how = {"choices": kind}
        self.add_argument(f"--{name.replace('_', '-')}", help=meaning, **how)


class Commands:
    """argparse with presets: `add(function, summary)` gives a sub-command's parser, `run()` calls what was typed."""

    def __init__(self, doc, script):
        self.script, self.parser, self.commands = script, Parser(description=doc, formatter_class=Help), None

    def add(self, function, summary, is_run=True, computes=True):
        """A sub-command; is_run: with the flags of all that read or write OUT; computes: on --device."""
        if self.commands is None:
            self.commands = self.parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
        parser = self.commands.add_parser(function.__name__, help=summary, formatter_class=Help,
                                          description=inspect.getdoc(function))
        return self._fill(parser, f"{self.script} {function.__name__}", function, is_run, computes)

    def only(self, function, computes=True):
        """The parser of a script of one command."""
        return self._fill(self.parser, self.script, function, True, computes)

    def _fill(self, parser, name, function, is_run, computes):
        parser.set_defaults(function=function, parser=parser, name=name, computes=computes)
        if is_run:
            data, preset = _data_and_preset()
            parser.add_argument("--data", type=Path, default=data, help="data set")
            parser.add_argument("--out", type=Path, default=Path("out") / data.resolve().name,
                                help="folder of all results, out/NAME OF DATA if not given")
            parser.add_argument("--preset", choices=PRESETS, default=preset,
                                help="column of wsss/presets.py: table of defaults, as shown here; voc and coco are "
                                     "published, toy is the toy set's, small for some thousand small photos")
            parser.add_argument("--device", help="cuda or cpu (default: cuda where it works)")
            parser.add_argument("--workers", type=whole(0, 256), default=min(8, os.cpu_count() or 1),
                                help="processes that load photos or run the CRF")
            parser.add_argument("--fresh", action="store_true", help="make it again, also where it is done")
            for setting, (_, kind, meaning) in settings_of(name).items():
                parser.add_setting(setting, kind, meaning)
            parser.set_defaults(**defaults(name, preset))
        return parser

    def run(self):
        if sys.stderr is None:  # closed: whatever is opened next would become it
            sys.stderr = open(os.devnull, "w")
        args = SimpleNamespace(parser=self.parser)
        try:
            args = self.parser.parse_args()
            if "preset" in args:
                _prepare(args)
            args.function(args)
            print(end="", flush=True)  # here, where a pipe that is closed ends in no traceback
        except KeyboardInterrupt:
            print("\nstopped: the same command goes on from here", file=sys.stderr)
            sys.exit(130)
        except FlagError as error:
            args.parser.error(str(error))
        except InputError as error:  # from a loader's worker the message comes with a traceback in front
            sys.exit(f"error: {re.sub('^.*InputError: ', '', str(error).strip().splitlines()[-1])}")
        except BrokenProcessPool:
            sys.exit("error: a worker process died, for want of memory perhaps: try fewer --workers")
        except BrokenPipeError:  # `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        except (MemoryError, RuntimeError) as error:
            on_card = isinstance(error, torch.cuda.OutOfMemoryError)
            if not on_card and isinstance(error, RuntimeError) and "DefaultCPUAllocator" not in str(error):
                raise
            sys.exit(f"error: the {'card' if on_card else 'machine'} has too little memory after {peak_memory():.1f} "
                     "GB: try --micro-batch in training, a smaller --batch-size in cams, smaller photos or --scales")
        except OSError as error:
            if error.errno not in DISK_ERRORS | DENIED:
                raise
            sys.exit(f"error: {error.filename or 'the disk'}: {error.strerror}: {disk_remedy(error)}")
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def _data_and_preset():
    """What is typed of --data and --preset, before the help shows the defaults that follow from them."""
    where = Parser(add_help=False)
    for flag in ("--data", "--out", "--preset"):
        where.add_argument(flag, nargs="?")  # where a value is missing the whole parser says so
    typed, _ = where.parse_known_args()
    data = Path(typed.data or TOY)
    preset = "toy" if data.resolve() == TOY.resolve() else "voc"
    return data, typed.preset if typed.preset in PRESETS else preset


def _prepare(args):
    """Device, precision and random numbers of a command."""
    is_default = args.out.resolve() == (Path("out") / args.data.resolve().name).resolve()
    if not (is_default or any(word.split("=")[0] == "--data" for word in sys.argv)):
        raise FlagError("--out without --data would read the toy set: add --data")
    if WORLD > 1 and args.function.__name__ != "train":
        raise FlagError(f"{args.name} runs in one process: torchrun is for the trainings")
    args.device = pick_device(args.device, args.computes)
    if WORLD > 1:
        dist.init_process_group("nccl" if args.device.type == "cuda" else "gloo", timeout=WAIT)
    args.amp = args.computes and (args.device.type == "cuda" if args.amp is None else args.amp)
    args.precision, args.machine = precision(args.device, args.amp), device_name(args.device)
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)


# ---------------------------------------------------------------- a stage

def run_stage(args, name, work, dataset, reads=(), ids=None, ending=".png", ignore=(), hints={}, is_part=False):
    """What every stage does around its work: is it done, may it begin, how did it go.

    work(run), or work(run, todo) of a stage that makes one file a photo, of `ids`: its results for the record, or None
    ignore: settings that do not change this result; hints: {flag: how a message ends that tells which file fits}
    """
    settings = _settings(args, ignore, hints)
    settings["data_set"] = dataset.digest_of(settings.get("train_list", "train_aug"))
    run = _one_for_all(lambda: Stage(args.out, name, settings, dataset, args.preset, reads, args.fresh))
    todo = () if ids is None else run.todo(ids, ending, is_part)
    if run.complete and not todo:
        if RANK == 0:
            print(f"{run.folder}: done already")
        return
    results = (work(run) if ids is None else work(run, todo)) or {}
    if dist.is_initialized():
        dist.barrier()
    if RANK == 0:
        peak = max(run.record.get("peak_gb", 0), peak_memory())
        run.finish(**results, device=args.machine, precision=args.precision, peak_gb=peak)
        print(f"{name}: {run.record['seconds']:.0f} s, {peak:.1f} GB -> {run.done}", flush=True)


def _settings(args, ignore, hints):
    """What a result depends on: the rows of wsss/presets.py, weight files by their bytes, the precision."""
    found = {"seed": args.seed, "precision": args.precision}
    for key in SETTINGS[args.name]:
        value = getattr(args, key)
        if isinstance(value, Path) and not value.exists():
            raise InputError(f"no file {value}, named by --{key.replace('_', '-')}{hints.get(key, '')}")
        found[key] = digest(value) if isinstance(value, Path) and value.is_file() else value
    return {key: value for key, value in sorted(found.items()) if key not in ignore}


def _one_for_all(make):
    """The stage as the first process sees it; the others get its record, and write nothing."""
    run = make() if RANK == 0 else None
    if WORLD > 1:
        sent = [run and (run.name, run.record, run.complete, run.folder)]
        dist.broadcast_object_list(sent)
        name, record, complete, folder = sent[0]
        run = run or SimpleNamespace(name=name, what=name, record=record, complete=complete, folder=folder,
                                     start=lambda: None, save=lambda: None)
    return run
