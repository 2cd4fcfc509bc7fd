"""The demo: a small model learns to turn messages into JSON on this machine. Its data and configuration are here."""
