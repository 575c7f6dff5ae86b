"""Which images, in which order, with which captions?"""
