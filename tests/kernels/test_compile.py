"""Triton's interpreter takes what its compiler does not: kernels compile for GPUs that need not be there."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "support" / "compile_kernels.py"


WIDEST_LOADS = {"_shrink": 128, "_expand": 128, "_rms_norm": 128, "_silu_and_mul": 64}
"""Bits that a thread loads at a time, of what is next to each other in memory."""


def test_every_kernel_compiles_for_ampere_hopper_and_blackwell(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    path = [str(SCRIPT.parents[2]), *filter(None, [environment.get("PYTHONPATH")])]
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(path)}
    ran = subprocess.run([sys.executable, SCRIPT, "80", "90", "100"], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    variants = [json.loads(line) for line in ran.stdout.splitlines()]
    # Of a block seven for each rank, whatever the batch; one of the noise, for any seed; two of the fold; the sampler.
    assert [sum(variant["sm"] == sm for variant in variants) for sm in (80, 90, 100)] == [18, 18, 18]
    for variant in variants:
        # A fused multiply-add in the noise would be other noise than a CPU's.
        assert (variant["fma"] == 0) == (variant["kernel"] == "_place")
        assert variant["spilled"] <= 4
        assert max(variant["loads"]) >= WIDEST_LOADS.get(variant["kernel"], 0)
