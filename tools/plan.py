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
    parser.add_argument(
        "--memory", type=float, required=True, metavar="GB", help="of each GPU, in 10^9 bytes"
    )
    parser.add_argument(
        "--mfu",
        type=float,
        default=0.4,  # not from the paper
        help="share of the peak that the step's FLOPs, recomputed ones too, run at (default: 0.4)",
    )
    parser.add_argument(
        "--tflops",
        type=float,
        default=989.0,
        help="a GPU's peak (default: 989, H100 SXM, dense bf16, NVIDIA's data sheet)",
    )
    parser.add_argument(
        "--images", type=float, help="seen in the whole run (default: the config's length)"
    )
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="keys of the config")
    complete(parser)
    asked = parser.parse_intermixed_args()
    # here and not above, as importing torch takes seconds, which --help does not need
    from prepretrain.runs import capacity

    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    try:
        found = capacity.estimate(
            capacity.load(asked.stage, asked.overrides, asked.init),
            gpus=asked.gpus,
            gigabytes=asked.memory,
            mfu=asked.mfu,
            tflops=asked.tflops,
            images=asked.images,
        )
    except (ValueError, OSError) as error:
        sys.exit(f"plan: {error}")
    print(capacity.table(found))
    print(json.dumps(found))
    sys.exit(0 if found["fits"] else 1)


if __name__ == "__main__":
    main()
