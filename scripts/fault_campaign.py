"""Serve drawn steps through the real strategies on simulated ranks, under faults that a seed draws (docs/trust.md).

    python scripts/fault_campaign.py --seeds 10000
    python scripts/fault_campaign.py --first 4711 --seeds 1      # one seed again; it takes the same course

Prints a row for each kind of fault. Exit status 1 if anything that must hold did not.
"""

import argparse
import multiprocessing
import sys
import time
from collections import Counter

import torch

from vllm_npu.tools.fault_campaign.campaign import Outcome, run_seed
from vllm_npu.tools.fault_campaign.report import table, violations

SEEDS_AT_ONCE = 10  # that a process takes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=500)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no seed after this time")
    given = parser.parse_args()
    if min(given.seeds, given.processes) < 1:
        parser.error("--seeds and --processes are 1 or more")
    started = time.perf_counter()
    outcomes = run(range(given.first, given.first + given.seeds), given.processes, started + given.seconds)
    seconds = time.perf_counter() - started
    print(table(outcomes))
    counts = sum((outcome.counts for outcome in outcomes), Counter())
    print(f"{len(outcomes):,} seeds in {seconds:.0f} s; {dict(counts)}")
    found = violations(outcomes)
    print("\n".join(found))
    return bool(found)


def run(seeds: range, processes: int, until: float) -> list[Outcome]:
    """Run the seeds until a time of time.perf_counter()."""
    with multiprocessing.get_context("spawn").Pool(processes, initializer=_one_thread) as pool:
        outcomes = []
        for outcome in pool.imap(run_seed, seeds, chunksize=SEEDS_AT_ONCE):
            outcomes.append(outcome)
            if time.perf_counter() > until:
                break
        return outcomes


def _one_thread() -> None:
    torch.set_num_threads(1)


if __name__ == "__main__":
    sys.exit(main())
