"""Runs a stage of the pipeline.

python tools/launch.py --stage mae                                  one process, here
python tools/launch.py --stage mae --procs 8                        eight local processes
python tools/launch.py --stage mae --nodes 8 --procs 8 --slurm gpu  SLURM partition "gpu"
torchrun --nproc-per-node 8 tools/launch.py --stage mae             processes that are there
python tools/launch.py --stage wsp --init runs/mae optim.lr=1e-4    from weights; another option
python tools/launch.py --stage eval/suite --init runs/wsp           several evaluations
python tools/launch.py --stage mae --dry-run                        checks all, trains nothing
python tools/launch.py --status runs/mae                            how far a run is
python tools/launch.py --doctor --stage mae --procs 2               checks the machine and the data
python tools/launch.py --replay runs/mae/dumps/000001234            what was not finite in a step
python tools/launch.py --list                                       what a config can name
python tools/launch.py --list objectives                            one kind; or a name: its options
"""

import argparse
import gc
import sys
import traceback

from prepretrain.runs.completion import complete, stages


def main() -> None:
    """Parses the flags; everything else is a key of the config."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    stage = parser.add_argument(
        "--stage", help="a config: mae, wsp, eval/linear, … or a path to a .yaml"
    )
    stage.completer = stages
    parser.add_argument(
        "--init",
        help="weights to start from, or to evaluate: a run, a file or maws/vit_l16, [:encoder]",
    )
    parser.add_argument(
        "--branch",
        metavar="RUN",
        help="continue a run of a step schedule as if it had been trained to another length",
    )
    parser.add_argument(
        "--out", help="the run's folder (default: runs/<stage>, or the run that is evaluated)"
    )
    parser.add_argument("--nodes", type=int, default=1, help="machines")
    parser.add_argument("--procs", type=int, default=1, help="processes on each")
    parser.add_argument(
        "--slurm", metavar="PARTITION", help="submit to SLURM instead of running here"
    )
    parser.add_argument("--hours", type=float, default=72.0, help="time limit of a SLURM job")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, train nothing; the last line is JSON",
    )
    parser.add_argument("--status", metavar="RUN", help="say how far a run is, and start nothing")
    parser.add_argument(
        "--replay", metavar="DUMP", help="take a step of a run's dumps/ again, to see what failed"
    )
    parser.add_argument(
        "--doctor", action="store_true", help="check this machine, and the data of --stage"
    )
    parser.add_argument(
        "--list",
        nargs="?",
        const="",
        metavar="KIND|NAME",
        help="list stages, encoders, objectives, …; one kind; or a name with its options",
    )
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="keys of the config")
    complete(parser)
    given = vars(parser.parse_intermixed_args())
    modes = ("status", "replay", "doctor", "list")
    run, dump, doctor, what = (given.pop(name) for name in modes)
    others = [run is not None, dump is not None, doctor, what is not None]
    if sum(others) > 1 or (given["stage"] is None and not any(others)):
        parser.error("one of --stage, --status, --replay, --doctor and --list is needed")
    # here and not above, as importing torch takes seconds, which --help does not need
    gc.disable()  # what the imports make stays: to search it for garbage is a fifth of their time
    from prepretrain.cluster.slurm import STOPPED
    from prepretrain.runs.launch import examine, launch, look_again, status
    from prepretrain.runs.listing import listing
    from prepretrain.training.fit import Stopped
    from prepretrain.training.signals import INTERRUPTED

    gc.freeze()
    gc.enable()
    try:
        if run is not None:
            return print(status(run))
        if what is not None:
            return print(listing(what))
        if dump is not None:
            return look_again(dump, given["procs"])
        if doctor:
            said = {name: given[name] for name in ("out", "procs")}
            sys.exit(not examine(given["stage"], given["overrides"], **said))
        launch(given.pop("stage"), given.pop("overrides"), **given)
    except KeyboardInterrupt:
        print("launch: stopped by Ctrl-C; nothing was being trained.", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Stopped as stopped:
        print(f"launch: {stopped}", file=sys.stderr)
        sys.exit(STOPPED)
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        sys.exit(f"launch: {str(error) or repr(error)}")
    except Exception:
        traceback.print_exc()
        sys.exit("launch: the above is a fault of prepretrain, not of yours. Please report it.")


if __name__ == "__main__":
    main()
