"""Students that learn from a teacher: the module, its loss, and how much of the teacher's gain is kept."""

from switchkit.distill.loss import Distilled, TopK, distillation_loss
from switchkit.distill.merit import Preserved, percent_preserved
from switchkit.distill.module import DistillModule
from switchkit.distill.student import Inherited
from switchkit.distill.teacher import Teacher, open_teacher

__all__ = [
    "DistillModule",
    "Distilled",
    "Inherited",
    "Preserved",
    "Teacher",
    "TopK",
    "distillation_loss",
    "open_teacher",
    "percent_preserved",
]
