"""Prints what one MoE layer sends on the same steps: with vllm-ascend's own path, and with each of our strategies.

    scripts/setup.sh --ascend   # prints a python
    PYTHON -m tests.ascend.side_by_side [CHIP]

The table has the collectives and bytes of rank 0, and the difference of each path from a dense layer. It has no times, because
the device is emulated.
"""

import sys

from rich.console import Console
from rich.table import Table

from tests.ascend.test_layer import run

GRIDS = {
    "TP2": (2, 1, [[5], [16], [128]]),
    "DP2": (1, 2, [[5, 5], [1, 16], [128, 40], [600, 40]]),
}


def main(chip: str) -> None:
    """Launch the ranks of both grids, and print the table."""
    table = Table(title=f"One MoE layer, hidden size 1024, 8 experts, top 2, bfloat16, on emulated {chip}, rank 0")
    for header in ("grid", "tokens", "path", "collectives", "bytes sent", "from dense"):
        table.add_column(header, justify="right" if header in ("bytes sent", "from dense") else "left")
    for grid, (tp, dp, steps) in GRIDS.items():
        outcome, reports = run(chip, tp, dp, dtype="bfloat16", steps=steps)
        if outcome.code != 0:
            sys.exit(outcome.output)
        for number, counts in enumerate(steps):
            rows = reports[0]["rows"][number :: len(steps)]
            for row in rows:
                path = f"{row['path']} ({row['ran']})" if row["path"] == "vllm-ascend" else row["path"]
                table.add_row(
                    grid, str(counts), path, ", ".join(row["calls"]), f"{row['bytes']:,}", f"{row['from_dense']:.1e}"
                )
            table.add_section()
    console = Console()
    console.width = max(console.width, 130)
    console.print(table)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "A3")
