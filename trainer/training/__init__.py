"""How does it learn? Read loop.py first, then step.py."""
