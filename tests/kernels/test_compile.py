"""Triton's interpreter takes what its compiler does not: kernels compile for GPUs that need not be there."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "support" / "compile_kernels.py"


NUMBERS = {"_shrink": 0, "_expand": 1, "_rms_norm": 1, "_silu_and_mul": 2}
"""Numbers of h that a program of these reads one by one, for each rank of the term that it adds."""


def test_every_kernel_compiles_for_ampere_hopper_and_blackwell(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    path = [str(SCRIPT.parents[2]), *filter(None, [environment.get("PYTHONPATH")])]
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(path)}
    ran = subprocess.run([sys.executable, SCRIPT, "80", "90", "100"], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    variants = [json.loads(line) for line in ran.stdout.splitlines()]
    # Of a block seven for each shape and rank, for any batch; one of the noise, for any seed; two folds; a sampler.
    assert [sum(variant["sm"] == sm for variant in variants) for sm in (80, 90, 100)] == [25, 25, 25]
    for variant in variants:
        kernel, loads = variant["kernel"], variant["loads"]
        # A fused multiply-add in the noise would be other noise than a CPU's.
        assert (variant["fma"] == 0) == (kernel == "_place")
        assert variant["spilled"] <= 4
        if kernel in NUMBERS:  # what else is read is next to each other, by four values or more at a time
            assert set(loads) <= {32, 64, 128}
            assert loads.count(32) <= 1 + NUMBERS[kernel] * variant["rank"], (kernel, loads)
