"""What is said between peers and what makes it believable.

Pure: nothing here reads a clock, rolls dice, or touches a socket or a disk.
"""
