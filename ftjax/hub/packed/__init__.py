"""Checkpoints whose weights other tools stored in few bits, read as the numbers that they represent."""
