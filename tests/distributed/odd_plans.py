"""A run whose second process plans with another budget: `torchrun -m tests.distributed.odd_plans WORDS`."""

from __future__ import annotations

import os
import sys

from evs_train.errors import RecipeError, leave
from evs_train.uptrain import Run
from tests.runs import recipe_of

if __name__ == "__main__":
    budget = 300 + 10 * int(os.environ["RANK"])
    try:
        Run(recipe_of([*sys.argv[1:], f"data.max_tokens_per_batch={budget}"])).train()
    except RecipeError as error:
        print(error)
    leave(0)
