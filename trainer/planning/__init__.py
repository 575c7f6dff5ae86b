"""What will a run do, and does it fit? Nothing here loads weights."""
