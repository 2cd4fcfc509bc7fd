"""Adapter folders: reading, writing, combining, and fitting them to their base model."""
