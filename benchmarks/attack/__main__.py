"""All attacks, one after the other, or those that are named.

python -m benchmarks.attack --write
python -m benchmarks.attack pursuit --scale 0.01
"""

import argparse
import importlib
import time

import pandas as pd

from benchmarks import measure

ATTACKS = ("pursuit", "folders", "kills", "text")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("attacks", nargs="*", default=ATTACKS, choices=ATTACKS)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    for name in arguments.attacks:
        started = time.perf_counter()
        rows = importlib.import_module(f"benchmarks.attack.{name}").run(arguments.scale, arguments.seed)
        seconds = round(time.perf_counter() - started, 1)
        print(f"\n{name}, {seconds} s\n{pd.DataFrame(rows).to_string(index=False)}", flush=True)
        if arguments.write:
            settings = {"scale": arguments.scale, "seed": arguments.seed}
            measure.write(f"attack_{name}", settings, seconds=seconds, figures=rows)
