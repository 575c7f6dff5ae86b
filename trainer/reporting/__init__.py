"""What is shown and recorded?"""
