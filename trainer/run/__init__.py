"""How is a run put together and ended?"""
