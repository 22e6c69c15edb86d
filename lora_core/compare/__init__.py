"""Methods compared on one task, a process each: what every one gives, and what it costs.

what is compared   config, variants, shots
what is shared     task
one variant        worker, measures, latency
all of them        run, results
to look at         rows, table, report
"""

from lora_core.compare.config import CompareConfig
from lora_core.compare.latency import Latency, measure_latency
from lora_core.compare.report import leave
from lora_core.compare.results import Results
from lora_core.compare.run import Compared, compare
from lora_core.compare.variants import METHODS, Method, Variant

__all__ = [
    "METHODS",
    "CompareConfig",
    "Compared",
    "Latency",
    "Method",
    "Results",
    "Variant",
    "compare",
    "leave",
    "measure_latency",
]
