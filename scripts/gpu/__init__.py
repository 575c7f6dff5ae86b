"""The GPU report: its steps, the processes that run them, and its pages."""
