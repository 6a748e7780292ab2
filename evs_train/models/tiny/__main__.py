"""`python -m evs_train.models.tiny --family qwen3_vl --out DIR [--seed 0]`."""

from __future__ import annotations

import argparse
from pathlib import Path

from evs_train.models.tiny import TINY_FAMILIES, build_tiny


def main() -> None:
    """`python -m evs_train.models.tiny --family qwen3_vl --out DIR [--seed 0]`."""
    parser = argparse.ArgumentParser(description="Write a tiny randomly initialised checkpoint.")
    parser.add_argument("--family", required=True, choices=sorted(TINY_FAMILIES))
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(build_tiny(arguments.family, arguments.out, seed=arguments.seed))


if __name__ == "__main__":
    main()
