"""What the proof trains and compares: its arms, and how much of them each size runs. Nothing is computed here."""

from __future__ import annotations

from dataclasses import dataclass

UNIFORM = "{kind: uniform, min: 0.0, max: 0.9}"
MIXTURE = "{kind: mixture, dense: 0.2, of: {kind: uniform, min: 0.3, max: 0.92}}"
HIGH = "{kind: mixture, dense: 0.2, of: {kind: uniform, min: 0.6, max: 0.92}}"
BETA = "{kind: beta, mode: 0.75, max: 0.83}"
FRAME = "{kind: unit_beta, mode: 0.75}"

PLUG = "plug-and-play"
DENSE = "dense SFT"
NVIDIA = "beta .75"
BEST = "dense and frame-based .75"


@dataclass(frozen=True)
class Arm:
    """One way to go on from the base.

    Attributes:
        overrides: of arm.yaml; None: the base is evaluated as it is.
        method: which pruner, in training and evaluation.
    """

    overrides: tuple[str, ...] | None
    method: str = "evs"


ARMS: dict[str, Arm] = {
    PLUG: Arm(None),
    DENSE: Arm(("evs.rate=0.0",)),
    "fixed .75": Arm(("evs.rate=0.75",)),
    "fixed .9": Arm(("evs.rate=0.9",)),
    "uniform": Arm((f"evs.rate={UNIFORM}",)),
    NVIDIA: Arm((f"evs.rate={BETA}",)),
    "frame-based .75": Arm((f"evs.rate={FRAME}",)),
    "mixture": Arm((f"evs.rate={MIXTURE}",)),
    "dense and high": Arm((f"evs.rate={HIGH}",)),
    "dense and beta .75": Arm((f"evs.rate={{kind: mixture, dense: 0.2, of: {BETA}}}",)),
    BEST: Arm((f"evs.rate={{kind: mixture, dense: 0.2, of: {FRAME}}}",)),
    "mixture + teacher": Arm((f"evs.rate={MIXTURE}", "objective.kind=teacher")),
    "sandwich": Arm((f"evs.rate={UNIFORM}", "objective.kind=sandwich")),
}
"""Every arm by the name that it has in the results. `beta` and `frame-based` are NVIDIA's published samplers. What
`fixed .9` reaches at .9 shows what can be read there at all."""

_FULL = tuple(ARMS)
METHODS: dict[str, str] = {
    "evs-threshold": "evs-threshold",
    "nvidia, cosine": "{kind: nvidia, metric: cos}",
    "nvidia, pixels": "{kind: nvidia, level: pixels}",
    "nvidia, iterative": "{kind: nvidia, variant: iterative, level: pixels}",
    "vidcom2": "vidcom2",
    "prunevid": "prunevid",
    "random tokens": "random",
    "whole units": "frames",
}
"""Pruners beside EVS by their names in the results, for the table of docs/pruners.md."""
for _name, _method in METHODS.items():
    ARMS[f"{PLUG}, {_name}"] = Arm(None, _method)
    ARMS[f"uniform, {_name}"] = Arm((f"evs.rate={UNIFORM}",), _method)


@dataclass(frozen=True)
class Size:
    """How much is run.

    Attributes:
        base_steps: of each training of the base, one after the other.
        rates: with 0 among them, with which everything is compared.
        batch: clips of a step.
        width: of the model, as a multiple of the small one's; learning rates are divided by it.
    """

    num_train: int
    num_heldout: int
    base_steps: tuple[int, ...]
    arm_steps: int
    seeds: tuple[int, ...]
    arms: tuple[str, ...]
    rates: tuple[float, ...]
    batch: int = 32
    width: int = 1


_RATES = (0.0, 0.25, 0.5, 0.7, 0.75, 0.8, 0.85, 0.9)
_DECIDING = (PLUG, DENSE, NVIDIA, BEST, f"{PLUG}, random tokens", f"{PLUG}, whole units")
_CONTROLS = tuple(f"{arm}, {name}" for arm in (PLUG, "uniform") for name in ("random tokens", "whole units"))
_OF_PRUNERS = (PLUG, "uniform", *(f"{arm}, {name}" for arm in (PLUG, "uniform") for name in METHODS))
SIZES: dict[str, Size] = {
    "mini": Size(6, 6, (2, 1), 3, (0,), (*_FULL, *_CONTROLS), (0.0, 0.75, 0.9), batch=4),
    "default": Size(4000, 600, (800, 400), 400, (0,), _DECIDING, _RATES),
    "full": Size(4000, 600, (800, 400), 400, (0, 1, 2), (*_FULL, *_CONTROLS), _RATES),
    "gpu": Size(20000, 2000, (4000, 2000), 2000, (0, 1, 2), (*_FULL, *_CONTROLS), _RATES, width=4),
    "pruners": Size(4000, 600, (800, 400), 400, (0, 1, 2), _OF_PRUNERS, (0.0, 0.5, 0.75, 0.83, 0.9)),
}
"""`full` goes on from `default`: same world, base and steps, so what that has done is not done again. `gpu` is for one
GPU: more clips, longer trainings, about 16 times the parameters. It needs a folder of its own and was never run.
`pruners` has other rates, at which .5, .25, .17 and .1 of the tokens stay, so it needs one, too."""
