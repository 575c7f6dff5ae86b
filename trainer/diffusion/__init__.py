"""What does the UNet learn to predict? Read objective.py first."""
