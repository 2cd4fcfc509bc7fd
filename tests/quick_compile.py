"""Sets XLA flags for tests: programs on a few thousand numbers run once or twice, so compiling takes most of their time.

LLVM does not optimise, and fusions of elementwise operations use the older emitters, which compile several times as fast. XLA's
own passes, in which a change of ours can go wrong, are those of users. Processes started by tests get the same flags, so
bitwise comparisons use the same compiler settings on both sides.

By default XLA aborts a process whose devices wait 40 seconds for each other, as eight devices on two busy cores may.
"""

from importlib.metadata import version

# Later versions have only the newer emitters, and end the process at an unknown flag.
OLDER_WAY = ["--xla_cpu_use_fusion_emitters=false"] if version("jaxlib").startswith("0.10.") else []

QUICK = " ".join([
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_cpu_collective_call_terminate_timeout_seconds=300",
    *OLDER_WAY,
])  # fmt: skip
