"""W&B: runs and artifacts, what an evaluation logs there, and the dashboard."""
