"""What every test stands on: CPU, eight virtual devices, strict ranks, a TPU compiler that looks for no TPU."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile many small programs and run each once or twice: LLVM's expensive passes would cost more than they save.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8"
    " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
)
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
