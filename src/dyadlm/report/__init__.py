"""What a person looks at: pictures and a summary."""

from dyadlm.report.figures import draw_losses, draw_tower
from dyadlm.report.summary import write_report

__all__ = ["draw_losses", "draw_tower", "write_report"]
