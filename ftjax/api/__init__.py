"""The Python API: what `import ftjax` offers. The commands call the same functions."""
