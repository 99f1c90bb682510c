"""Repeat what docs/claims.md reports and print its tables: `make claims`, or `python recipes/claims/run.py PART ...`.

Two jobs run at a time, of one thread each; the last part compares times, so it has the machine to itself. What a part
found before is deleted when it starts. A job that fails is named at the end, and the others go on.
"""

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
SEEDS = ("0", "1", "2")


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What repeats a claim."""

    jobs: dict[str, str]
    """Arguments of python by name; {out} is the folder of results, {here} this one."""
    results: str = ""
    """Pattern of the files that they write."""


PARTS = {  # the longest first, so that none is left over at the end
    "generations": Part(
        jobs={"generations": "{here}/generations.py --out {out}"},
        results="generations.json",
    ),
    "rl": Part(
        jobs={
            f"{task}-{seed}": f"{{here}}/rl/learn.py {task} --seeds {seed} --out {{out}}"
            for seed in SEEDS
            for task in ("cartpole", "acrobot", "mountaincar")
        },
        results="rl.jsonl",
    ),
    "ppo": Part(
        jobs={
            f"ppo-{task}-{seed}": f"{{here}}/rl/ppo.py {task} --seeds {seed} --out {{out}}"
            for seed in SEEDS
            for task in ("cartpole", "acrobot")
        },
        results="ppo.jsonl",
    ),
    "integer": Part(
        jobs={
            f"integer-{seed}": f"-m eggroll_llm.integer --seed {seed} --out {{out}}/integer_{seed}.json"
            for seed in SEEDS
        },
        results="integer_?.json",
    ),
    "rank": Part(jobs={"rank": "{here}/rank_error.py --out {out}"}, results="rank_error.json"),
    "population": Part(
        jobs={"population": "-m eggroll_llm.integer --generation 262144 --out {out}/population.json"},
        results="population.json",
    ),
    "theory": Part(jobs={"theory": "-m pytest -q {here}/../../tests/es/test_theory.py"}),
    "throughput": Part(jobs={"throughput": "{here}/rl/throughput.py --out {out}"}, results="throughput.json"),
}
ALONE = "throughput"


def run(name: str, arguments: str, out: Path) -> bool:
    """Run a job with its output in NAME.log; return whether it went well."""
    words = [word.format(here=HERE, out=out) for word in arguments.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
    start = time.monotonic()
    with (out / f"{name}.log").open("wb") as log:
        status = subprocess.run(
            [sys.executable, *words], stdout=log, stderr=subprocess.STDOUT, env=environment, check=False
        ).returncode
    print(f"{name}: {time.monotonic() - start:.0f} s{f', FAILED, see {log.name}' if status else ''}", flush=True)
    return status == 0


def main() -> int:
    """Run the parts and print the tables; return 1 when a job failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"default: all of {', '.join(PARTS)}")
    parser.add_argument("--out", type=Path, default=Path("build/claims"), help="folder of all results")
    options = parser.parse_args()
    if unknown := sorted(set(options.parts) - PARTS.keys()):
        parser.error(f"{', '.join(unknown)}: the parts are {', '.join(PARTS)}")
    parts = {name: part for name, part in PARTS.items() if name in (options.parts or PARTS)}
    if "ppo" in parts and not (find_spec("gymnasium") and find_spec("stable_baselines3")):
        print('ppo: left out, it needs the extra rl: pip install ".[rl]"')
        del parts["ppo"]
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for part in parts.values():
        for old in out.glob(part.results) if part.results else ():
            old.unlink()
    jobs = {name: words for part in parts.values() for name, words in part.jobs.items()}
    last = jobs.pop(ALONE, None)
    with ThreadPoolExecutor(2) as pool:
        went_well = dict(zip(jobs, pool.map(lambda name: run(name, jobs[name], out), jobs), strict=True))
    if last:
        went_well[ALONE] = run(ALONE, last, out)
    subprocess.run([sys.executable, str(HERE / "tables.py"), str(out)], check=True)
    if failed := [name for name, well in went_well.items() if not well]:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
