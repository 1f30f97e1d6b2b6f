"""What a person looks at: pictures and a summary."""

from dyadlm.report.figures import draw_losses
from dyadlm.report.summary import write_report
from dyadlm.report.tower import draw_tower

__all__ = ["draw_losses", "draw_tower", "write_report"]
