"""XLA's flags for tests: programs of a few thousand numbers run once or twice, so that compiling them is most of the work.

LLVM does not optimise, and elementwise fusions take the older way to machine code, which is several times as quick to take.
What XLA makes of a program before that, where a change of ours can go wrong, is as users have it. Processes that tests start
get the same flags: where a result is compared to the bit, both sides are compiled alike.
"""

from importlib.metadata import version

# Later versions have the newer way alone, and end the process at a flag that they do not know.
OLDER_WAY = ["--xla_cpu_use_fusion_emitters=false"] if version("jaxlib").startswith("0.10.") else []

QUICK = " ".join([
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
    *OLDER_WAY,
])  # fmt: skip
