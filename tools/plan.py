"""Says whether a training run fits on so many GPUs, and how long it takes, before anyone has them.

python tools/plan.py --stage wsp model.encoder=vit_6.5b14 --gpus 64 --memory 80
python tools/plan.py --stage mae base=size/vit_2b14.yaml --gpus 8 --memory 40 --tflops 312

Simulated, not measured: a training step as one of so many processes, on tensors without storage.
The last line is JSON. Exit status: 0 if it fits, perhaps with the settings that are named; 1 if
nothing that was tried fits, or for a mistake in what was asked.
"""

import argparse
import json
import logging
import sys

from prepretrain.runs.completion import complete, stages

MACHINE = {  # a flag's option of capacity.Machine, which has the defaults: an H100 SXM's
    "--memory": ("gigabytes", "of each GPU, in 10^9 bytes (default: 80)"),
    "--tflops": ("tflops", "a GPU's peak, dense bf16 (default: 989)"),
    "--mfu": (
        "mfu",
        "share of the peak that the step's FLOPs run at (default: 0.4; one H200, compiled: 0.29 to 0.36 in MAE, 0.42 to 0.44 on hashtags)",
    ),
    "--bandwidth": ("bandwidth", "of a GPU's memory, in GB/s (default: 3350)"),
    "--per-node": ("per_node", "GPUs in a node (default: 8)"),
    "--inside": ("inside", "GB/s that a GPU sends inside its node (default: 450, NVLink)"),
    "--between": ("between", "GB/s that it sends to others (default: 50, one 400 Gbit/s adapter)"),
}


def main() -> None:
    """Parses the flags; everything else is a key of the config."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    stage = parser.add_argument(
        "--stage", required=True, help="a config: mae, wsp, … or a path to a .yaml"
    )
    stage.completer = stages
    parser.add_argument("--init", help="weights that the run starts from, as of tools/launch.py")
    parser.add_argument("--gpus", type=int, required=True, help="GPUs, one process on each")
    for flag, (name, text) in MACHINE.items():
        parser.add_argument(flag, type=int if name == "per_node" else float, dest=name, help=text)
    parser.add_argument(
        "--images", type=float, help="seen in the whole run (default: the config's length)"
    )
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="keys of the config")
    complete(parser)
    asked = parser.parse_intermixed_args()
    # here and not above, as importing torch takes seconds, which --help does not need
    from prepretrain.runs import capacity

    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    machine = {name: getattr(asked, name) for name, _ in MACHINE.values()}
    try:
        found = capacity.estimate(
            capacity.load(asked.stage, asked.overrides, asked.init),
            capacity.Machine(
                **{name: value for name, value in machine.items() if value is not None}
            ),
            gpus=asked.gpus,
            images=asked.images,
        )
    except (ValueError, OSError) as error:
        sys.exit(f"plan: {error}")
    print(capacity.table(found))
    print(json.dumps(found))
    sys.exit(0 if found["fits"] else 1)


if __name__ == "__main__":
    main()
