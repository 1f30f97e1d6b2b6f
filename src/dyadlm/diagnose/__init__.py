"""The instrument: what any causal language model does wrong, in figures with intervals and known controls."""

from dyadlm.diagnose.contract import Subject
from dyadlm.diagnose.huggingface import HuggingFaceSubject
from dyadlm.diagnose.material import Material
from dyadlm.diagnose.pool import pool
from dyadlm.diagnose.probe import Budget, Control, Expected, NotApplicable, OverTime, Probe, Published
from dyadlm.diagnose.probes import PROBES, chosen
from dyadlm.diagnose.result import Curve, ProbeResult, Reading
from dyadlm.diagnose.run import Diagnosis, ask, diagnose
from dyadlm.diagnose.self_test import Check, self_test
from dyadlm.diagnose.trajectory import Trajectory

__all__ = [
    "PROBES",
    "Budget",
    "Check",
    "Control",
    "Curve",
    "Diagnosis",
    "Expected",
    "HuggingFaceSubject",
    "Material",
    "NotApplicable",
    "OverTime",
    "Probe",
    "ProbeResult",
    "Published",
    "Reading",
    "Subject",
    "Trajectory",
    "ask",
    "chosen",
    "diagnose",
    "pool",
    "self_test",
]
