"""Several processes of one run on this machine: each runs the same source, as on the hosts of a pod."""

import os
import socket
import subprocess
import sys

DEVICES_EACH = 2
# Gloo writes to standard output from C++, in the middle of lines: it goes to standard error, and Python alone prints.
APART = "import os, sys; sys.stdout = os.fdopen(os.dup(1), 'w', buffering=1); os.dup2(2, 1)\n"


def launch(source: str, *arguments: object, count: int) -> list[subprocess.Popen]:
    """Starts `count` processes that find each other through the environment; `arguments` are in sys.argv."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES_EACH}"
    started = []
    for index in range(count):
        if count > 1:
            environment |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
            environment["JAX_PROCESS_ID"] = str(index)
        command = [sys.executable, "-c", APART + source, *map(str, arguments)]
        started.append(subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True, bufsize=1))
    return started


def outputs(processes: list[subprocess.Popen], *, seconds: float = 120) -> list[str]:
    """What each process printed; fails with what it complained of if one did not end well."""
    try:
        printed = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, complaints) in zip(processes, printed, strict=True):
        assert process.returncode == 0, complaints[-3000:]
    return [text for text, _ in printed]
