"""`python -m eggroll_llm.integer`: pretrain the integer model on the text inside Python, and print what it has learned.

`--reference` trains the float model beside it by back-propagation; `--generation 262144` is one step of a population of
that size, for its time and memory.
"""

import argparse
import json
import resource
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from eggroll_llm.errors import UserError
from eggroll_llm.integer.model import PARAMETERS, WIDTH
from eggroll_llm.integer.pretrain import Pretraining, Settings
from eggroll_llm.integer.reference import STEP, float_bits_per_byte
from eggroll_llm.integer.text import load_text, unigram_bits
from eggroll_llm.system.files import check_output_file, write_output_file

_OF_A_RUN = {
    **{"tokens": 60_000_000, "population": 1024, "last_fraction": 0.125},
    **{"fitness": "centered", "reference": None},
}
"""Flags that one step of `--generation` has no use for, and their defaults."""


def main() -> int:
    """Run the command; return the exit status."""
    options = _options()
    try:
        if options.out:
            check_output_file(options.out, "integer.json")
        result = _generation(options) if options.generation else _pretrain(options)
        if options.out:
            write_output_file(options.out, json.dumps(result, indent=2) + "\n")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m eggroll_llm.integer", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seed", type=_seed, default=0)
    parser.add_argument("--tokens", type=_positive, help="default: 60000000")
    parser.add_argument("--population", type=_members, help="even; default: 1024")
    parser.add_argument("--length", type=_positive, help="bytes that a member predicts in a step; default: 50")
    parser.add_argument("--last-fraction", type=_fraction, help="of weights that move in the last step; default: 0.125")
    parser.add_argument("--fitness", choices=("centered", "sign"), help="default: centered")
    parser.add_argument("--journal", type=Path, metavar="FILE", help="record fitness: `Pretraining.replay` rebuilds")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write what is printed")
    parser.add_argument("--reference", type=_reference, metavar="TOKENS", help="train the float model, too")
    parser.add_argument("--generation", type=_members, metavar="N", help="only one step of N members of 16 bytes")
    options = parser.parse_args()
    for name, default in _OF_A_RUN.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
        elif options.generation:
            flag = f"--{name.replace('_', '-')}"
            parser.error(f"{flag}: --generation is one step of its own population, with fitness 'sign': leave it out")
    return options


def _seed(text: str) -> int:
    number = int(text)
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"{text}: must be from 0 to {2**32 - 1}")
    return number


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return number


def _fraction(text: str) -> float:
    number = float(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text}: must be above 0 and at most 1")
    return number


def _reference(text: str) -> int:
    number = int(text)
    if number < STEP:
        raise argparse.ArgumentTypeError(f"{text}: must be at least {STEP}, the tokens of one step")
    return number


def _members(text: str) -> int:
    number = int(text)
    if number < 2 or number % 2:
        raise argparse.ArgumentTypeError(f"{text}: must be even and at least 2, as members come in pairs")
    return number


def _pretrain(options: argparse.Namespace) -> dict[str, object]:
    train_T, held_out_T = load_text()
    length = options.length or 50
    steps = max(1, options.tokens // (options.population * length))
    settings = Settings(
        seed=options.seed,
        population=options.population,
        length=length,
        steps=steps,
        last_fraction=options.last_fraction,
        fitness=options.fitness,
    )
    run = Pretraining(train_T, settings, options.journal)
    unigram = unigram_bits(train_T, held_out_T)
    print(f"{PARAMETERS} int8 weights, width {WIDTH}; {len(train_T)} bytes to train on, {len(held_out_T)} held out")
    print(f"unigram entropy: {unigram:.3f} bits/byte")
    start, processor = time.perf_counter(), time.process_time()
    for step in range(1, steps + 1):
        loss = run.take_step()
        if step == steps or step % max(1, steps // 10) == 0:
            tokens, seconds = step * options.population * length, time.perf_counter() - start
            held_out = run.bits_per_byte(held_out_T)
            print(
                f"step {step}: {tokens / 1e6:.1f} M tokens, members {loss:.3f}, held out {held_out:.3f} bits/byte, "
                f"{seconds:.0f} s, {tokens / seconds / 1e6:.2f} M tokens/s",
                flush=True,
            )
    run.close()
    result: dict[str, object] = {
        **asdict(settings),
        "tokens": tokens,
        "seconds": round(seconds, 1),
        "processor_seconds": round(time.process_time() - processor, 1),
        "threads": torch.get_num_threads(),
        "held_out_bits_per_byte": round(held_out, 4),
        "unigram_bits_per_byte": round(unigram, 4),
        "checksum": run.checksum(),
    }
    if options.reference:
        bits = float_bits_per_byte(train_T, held_out_T, seed=options.seed, tokens=options.reference)
        print(f"float, back-propagation, {options.reference / 1e6:.2f} M tokens: {bits:.3f} bits/byte")
        result |= {"reference_tokens": options.reference, "reference_bits_per_byte": round(bits, 4)}
    return result


def _generation(options: argparse.Namespace) -> dict[str, object]:
    length = options.length or 16
    settings = Settings(seed=options.seed, population=options.generation, length=length, steps=1, fitness="sign")
    train_T, held_out_T = load_text()
    small = Settings(population=2, length=length, steps=1)
    Pretraining(train_T, small).take_step()  # libraries are loaded
    before, start, processor = _peak_mib(), time.perf_counter(), time.process_time()
    run = Pretraining(train_T, settings, options.journal)
    run.take_step()
    run.close()
    result: dict[str, object] = {
        "population": options.generation,
        "tokens": options.generation * length,
        "seconds": round(time.perf_counter() - start, 1),
        "processor_seconds": round(time.process_time() - processor, 1),
        "peak_mib_above_start": round(_peak_mib() - before, 1),
        "held_out_bits_per_byte": round(run.bits_per_byte(held_out_T), 4),
        "checksum": run.checksum(),
    }
    print(*(f"{key}: {value}" for key, value in result.items()), sep="\n")
    return result


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    sys.exit(main())
