"""The steps of the GPU report, and how they are run and written down."""
