"""Reports that people look at: figures, and one HTML file that needs nothing else.

the page      page, stylesheet, palette, cells (numbers and hostile text)
figures       plots (losses, comparisons, sweeps), weight_plots, spectrum_plot, drawing, labels
what is in    histogram (weights by 4-bit bin), updates (by layer), run (a finetune folder)
"""

from lora_core.report.cells import EstimateLike, estimate_text, number, visible
from lora_core.report.drawing import no_matplotlib, png, save
from lora_core.report.histogram import WeightHistogram, model_bins, weight_bins
from lora_core.report.page import Page
from lora_core.report.plots import (
    Point,
    bars,
    comparison,
    loss_curves,
    plot_loss,
    sweep,
)
from lora_core.report.run import run_report
from lora_core.report.spectrum_plot import plot_spectrum
from lora_core.report.updates import by_layer, relative_updates
from lora_core.report.weight_plots import update_sizes, weight_histogram

__all__ = [
    "EstimateLike",
    "Page",
    "Point",
    "WeightHistogram",
    "bars",
    "by_layer",
    "comparison",
    "estimate_text",
    "loss_curves",
    "model_bins",
    "no_matplotlib",
    "number",
    "plot_loss",
    "plot_spectrum",
    "png",
    "relative_updates",
    "run_report",
    "save",
    "sweep",
    "update_sizes",
    "visible",
    "weight_bins",
    "weight_histogram",
]
