"""A tiny run's rows and settings, as a caller of the Python API writes them; paths are in the folder of `tests/api`."""

ROWS = [{"prompt": f"Tom has {n} ", "completion": "dogs" * (n % 3 + 1)} for n in range(12)]
SETTINGS = {
    "model": {"path": "model", "dtype": "float32", "compute_dtype": "float32", "remat": "none"},
    "method": {"name": "lora", "r": 4, "lora_alpha": 8},
    "data": {"train": "train.jsonl", "max_length": 64},
    "optimizer": {"learning_rate": 1e-2},
    "training": {"max_steps": 4, "global_batch_size": 4, "logging_steps": 1, "report_to": []},
}
