"""Kill a short run (-9) at random moments of both phases, and restart it each time until it ends.

    python tests/kill_test.py --kills 20

Its metrics, networks, optimizer and stored transitions must be bit-identical to those of an
uninterrupted run. Otherwise the differences are printed, and the exit code is 1.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers import RUN, differences, finish, read_records, start_run, step_reached, wait_until


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the moments, default %(default)s")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as left_alone, tempfile.TemporaryDirectory() as killed:
        finish(start_run(Path(left_alone), *RUN))
        for step in sorted(rng.randrange(370) for _ in range(args.kills)):
            process = start_run(Path(killed), *RUN)
            wait_until(process, step_reached(Path(killed), step))
            time.sleep(rng.uniform(0.0, 0.1))
            process.kill()
            last = read_records(Path(killed))[-1]["step"]
            print(f"killed after step {last}:", finish(process).stdout)
        print(finish(start_run(Path(killed), *RUN)).stdout)
        different = differences(Path(left_alone), Path(killed))
    print(f"{args.kills} kills, {len(different)} differences", *different, sep="\n")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
