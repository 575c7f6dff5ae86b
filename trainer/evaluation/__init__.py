"""Is it getting better? Samples and losses at fixed noise."""
