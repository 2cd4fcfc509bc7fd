"""Adapter folders: read, written, combined, and fitted to their base model."""
