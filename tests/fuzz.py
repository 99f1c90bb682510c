"""Coverage-guided fuzzing of the graders, which read what a model wrote.

    pip install --no-deps atheris==3.0.0
    python tests/fuzz.py TARGET --seconds 60 [--corpus DIR]

`support/fuzz_targets.py` says what must hold of each target; `test_fuzz.py` holds the same checks to random edits,
without atheris, whenever the tests run. Inputs that reach new code are kept in DIR. One that breaks a property is shown
and saved as TARGET-crash-HASH (or -timeout-, -oom-), beside DIR or else in the working directory; the status is then 1.
"""

import argparse
import importlib.util
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
INSTRUMENTED = ["rewards", "json"]
LONGEST = 8192
"""Bytes of an input."""
HANG_SECONDS = 10
MEMORY_MIB = 4096
INSIDE = "--inside"
"""First argument of the process in which libFuzzer runs."""
_PROGRESS = re.compile(r"#(\d+)\s.*cov: (\d+) ft: (\d+) corp: (\d+)/")
_SHOWN = re.compile(
    r"Uncaught Python exception|==\d+== ERROR|Traceback|^ |^\w+(\.\w+)*(Error|Exception)\b|Test unit written"
)


def main() -> int:
    """Run libFuzzer, which ends its process as it likes, in another one; tell what came of it."""
    from fuzz_targets import TARGETS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60, help="how long to try (default: %(default)s)")
    parser.add_argument("--corpus", type=Path, help="where inputs are kept, and found again")
    parser.add_argument("--seed", type=int, default=1, help="of libFuzzer's choices (default: %(default)s)")
    options = parser.parse_args()
    if importlib.util.find_spec("atheris") is None:
        parser.error("atheris is not installed: pip install --no-deps atheris==3.0.0")
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        corpus = options.corpus or Path(scratch, "corpus")
        corpus.mkdir(parents=True, exist_ok=True)
        beside = corpus.parent if options.corpus else Path()
        arguments = {
            "max_total_time": options.seconds,
            "seed": options.seed,
            "max_len": LONGEST,
            "timeout": HANG_SECONDS,
            "rss_limit_mb": MEMORY_MIB,
            "artifact_prefix": beside / f"{options.target}-",
        }
        inside = [sys.executable, __file__, INSIDE, options.target, scratch]
        return _watch(options.target, [*inside, *(f"-{key}={value}" for key, value in arguments.items()), str(corpus)])


def _watch(target: str, command: list[str]) -> int:
    tried = edges = features = kept = 0
    seconds = "?"
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if progress := _PROGRESS.match(line):
                tried, edges, features, kept = map(int, progress.groups())
            elif done := re.match(r"Done \d+ runs in (\d+) second", line):
                seconds = done[1]
            elif _SHOWN.search(line):
                print(line, end="")
    found = "nothing found" if child.returncode == 0 else f"stopped with status {child.returncode}"
    print(f"{target}: {tried} inputs, {edges} edges, {features} features, {kept} inputs kept, {seconds} s: {found}")
    return int(child.returncode != 0)


def _fuzz(name: str, scratch: Path, arguments: list[str]) -> NoReturn:
    """Fuzz in this process, which nothing but libFuzzer ends: whoever started it removes `scratch`."""
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED):
        from fuzz_targets import TARGETS, dictionary
    target, seeds, words = TARGETS[name], scratch / "seeds", scratch / "words"
    seeds.mkdir()
    for number, seed in enumerate(target.seeds()):
        (seeds / str(number)).write_bytes(seed)
    if target.words:
        words.write_text(dictionary(target.words))
        arguments.append(f"-dict={words}")
    atheris.Setup([sys.argv[0], *arguments, str(seeds)], target.check)
    atheris.Fuzz()
    sys.exit()


if __name__ == "__main__":
    if sys.argv[1:2] == [INSIDE]:
        _fuzz(sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
    sys.exit(main())
