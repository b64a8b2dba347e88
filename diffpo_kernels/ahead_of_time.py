"""`python -m diffpo_kernels.ahead_of_time [--out FILE]`: what every GPU kernel takes, as a table, without a GPU and without a driver."""

import argparse
from pathlib import Path

from diffpo_kernels import resource_usage


def main() -> None:
    """Compile every kernel for every architecture, print the table, and keep it as JSON where `--out` says. Fails where a budget breaks."""
    parser = argparse.ArgumentParser(prog="python -m diffpo_kernels.ahead_of_time", description=main.__doc__)
    parser.add_argument("--out", type=Path, help="JSON file, such as benchmarks/results/aot/<name>.json")
    if not resource_usage.report(parser.parse_args().out):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
