"""What survives a crash?"""
