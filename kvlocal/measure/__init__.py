"""Speed and memory: measured, or planned before a run."""
