"""What a model would take of devices that are not there: memory, bytes between them, time; nothing is run.

Pure arithmetic on shapes, for `switchkit plan` and for code: `plan(model, optimizer, Work(...), gpu, nodes=, gpus=)`.
"""

from __future__ import annotations

from switchkit.plan.activations import Activations, activations
from switchkit.plan.estimate import Arrangement, Estimate, Memory, Step, memory
from switchkit.plan.hardware import GPUS, PRECISIONS, Gpu, Precision, gpu_from, precision_named
from switchkit.plan.layouts import Plan, Refused, Work, plan
from switchkit.plan.optimizer import state_bytes
from switchkit.plan.traffic import Collective, Exchange, Group, ddp_collectives, fsdp_collectives, groups
from switchkit.plan.units import Unit, part, units

__all__ = [
    "GPUS",
    "PRECISIONS",
    "Activations",
    "Arrangement",
    "Collective",
    "Estimate",
    "Exchange",
    "Gpu",
    "Group",
    "Memory",
    "Plan",
    "Precision",
    "Refused",
    "Step",
    "Unit",
    "Work",
    "activations",
    "ddp_collectives",
    "fsdp_collectives",
    "gpu_from",
    "groups",
    "memory",
    "part",
    "plan",
    "precision_named",
    "state_bytes",
    "units",
]
