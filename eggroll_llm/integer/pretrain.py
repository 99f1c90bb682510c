"""Pretrain the integer model from scratch by evolution strategies: no back-propagation, and integers from end to end.

Twins read the same text, pairs read texts of their own, and only the difference between twins is their fitness
(`fitness.shape_twins`). A member goes through a text piece by piece, one a step, and carries its state. Floating-point
numbers remain where normals are drawn before they are rounded to int8, and in one fitness a member, a whole number of
eighths.

Noise, fitness and journal are those of every other run: weights are rebuilt from seed and journal, to the bit.

Shapes: M member, K antithetic pair, T byte.
"""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from eggroll_llm.errors import ConfigError, JournalError
from eggroll_llm.es.fitness import shape_twins
from eggroll_llm.integer import update
from eggroll_llm.integer.model import ONE, WIDTH, initial_weights
from eggroll_llm.integer.native import functions
from eggroll_llm.integer.text import identity
from eggroll_llm.records.journal import Journal, JournalEntry, JournalHeader, check_same_run, read_journal

TEXTS = 64
"""Of held-out bytes, that are read side by side."""
PIECES = 20
"""Steps for which a member follows a text."""
PART = 4096
"""Members computed at a time: memory for noise does not grow with the population."""
UNITS = 256  # of loss to a bit


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run depends on besides its text."""

    seed: int = 0
    population: int = 1024
    """Even: members come in pairs."""
    length: int = 50
    """Bytes that a member predicts in a step."""
    steps: int = 1200
    """Length of the schedule, too."""
    last_fraction: float = 0.125
    """Fraction of the weights that noise would move in the last step; in the first it is all of them."""
    fitness: Literal["centered", "sign"] = "centered"

    def fraction(self, step: int) -> float:
        """Return what fraction of the weights noise would move in a step, from 1: 1 / (1 + t), t growing evenly."""
        return 1 / (1 + (1 / self.last_fraction - 1) * (step - 1) / max(1, self.steps - 1))


class Pretraining:
    """A run: its weights, and the states of its members."""

    def __init__(self, train_T: Tensor, settings: Settings, journal: Path | None = None) -> None:
        """Start from scratch. Raises JournalError for a journal that has steps already: those can be replayed.

        Raises ConfigError where members' texts would not fit into `train_T`.
        """
        self.settings, self.step = settings, 0
        self.weights = initial_weights(settings.seed)
        if len(train_T) <= PIECES * settings.length:
            raise ConfigError(
                f"length = {settings.length}: {PIECES} pieces of it are more than the {len(train_T)} bytes there are"
            )
        self._train_T, self._start_K, self._texts_of = train_T, torch.empty(0), -1
        self._state_MD = torch.zeros(settings.population, WIDTH, dtype=torch.int8)
        hashed = hashlib.sha256(repr(sorted(asdict(settings).items())).encode()).hexdigest()
        self._header = JournalHeader(
            frozen_hash=hashed, base_model=f"integer {self.checksum()}", train=identity(train_T)
        )
        self._journal = None if journal is None else Journal.open(journal, self._header)
        if self._journal and self._journal.last_step:
            self._journal.close()
            raise JournalError(f"{journal}: has {self._journal.last_step} steps already. Name a new file")

    def take_step(self) -> float:
        """Evaluate the population and update the weights; return its mean loss in bits per byte."""
        loss_M = self._losses()
        shaped = shape_twins(-loss_M.double()[:, None], self.settings.fitness)
        fitness_M = update.whole_eighths(shaped.fitness_M)
        entry = JournalEntry(
            step=self.step + 1,
            noise_step=self.step + 1,
            fitness=tuple(fitness_M.tolist()),
            sigma=1 / ONE,
            learning_rate=self.settings.fraction(self.step + 1),
        )
        if self._journal:
            try:
                self._journal.append(entry)
            except BaseException:
                self._texts_of = -1  # members have read the bytes of this step
                raise
        self._apply(entry)
        return float(loss_M.sum()) / (UNITS * loss_M.numel() * self.settings.length)

    def replay(self, journal: Path) -> None:
        """Apply the updates of a journal from this step on, without evaluation. Raises JournalError.

        The run goes on from a multiple of `PIECES`, where texts begin: how members have read one is in no journal. One
        with a journal of its own replays nothing: that would lack the steps.
        """
        if self._journal:
            raise JournalError(f"{journal}: {self._journal.path} would lack its steps. Replay without a journal")
        contents = read_journal(journal)
        if contents.header is None:
            raise JournalError(f"{journal}: is empty. Name the journal of a run")
        check_same_run(journal, contents.header, self._header)
        for entry in contents.entries[self.step :]:
            self._apply(entry)
            self._texts_of = -1

    def bits_per_byte(self, held_out_T: Tensor) -> float:
        """Return the loss of the weights without noise, on a text cut into some that are read from a state of 0."""
        text_MT = held_out_T[: len(held_out_T) // TEXTS * TEXTS].view(TEXTS, -1).contiguous()
        loss_M = functions()[0](self.weights, text_MT, torch.zeros(TEXTS, WIDTH, dtype=torch.int8), None)
        return float(loss_M.sum()) / (UNITS * TEXTS * (text_MT.shape[1] - 1))

    def checksum(self) -> str:
        """Return 16 hexadecimal digits that identify the bits of the weights."""
        digest = hashlib.sha256()
        for weight in self.weights.values():
            digest.update(weight.numpy().tobytes())
        return digest.hexdigest()[:16]

    def close(self) -> None:
        """Close the journal."""
        if self._journal:
            self._journal.close()

    def _losses(self) -> Tensor:
        forward, _ = functions()
        length, piece = self.settings.length, self.step % PIECES
        if piece == 0:
            # Of a seed torch takes 32 bits; the factor is odd, so that runs differ in every step.
            mixed = (self.settings.seed * 0x9E3779B1 + self.step) % 2**32
            generator, last = torch.Generator().manual_seed(mixed), len(self._train_T) - PIECES * length
            self._texts_of = self.step
            self._start_K = torch.randint(last, (self.settings.population // 2,), generator=generator)
            self._state_MD.zero_()
        if self._texts_of != self.step - piece:
            raise JournalError(f"step {self.step} lies within a text: go on from a multiple of {PIECES} steps")
        byte_T = torch.arange(piece * length, (piece + 1) * length + 1)
        loss_M = torch.empty(self.settings.population, dtype=torch.int64)
        for pair_K in torch.arange(self.settings.population // 2).split(PART // 2):
            part = slice(2 * int(pair_K[0]), 2 * int(pair_K[-1]) + 2)
            text_MT = self._train_T[self._start_K[pair_K, None] + byte_T].repeat_interleave(2, dim=0)
            rows_KV = update.rows_of(self.settings.seed, self.step + 1, pair_K)
            loss_M[part] = forward(self.weights, text_MT, self._state_MD[part], rows_KV)
        return loss_M

    def _apply(self, entry: JournalEntry) -> None:
        _, add_pairs = functions()
        coefficient_K = update.coefficients(torch.tensor(entry.fitness))
        sums = update.zero_sums()
        for pair_K in torch.arange(len(coefficient_K)).split(PART // 2):
            rows_KV = update.rows_of(self.settings.seed, entry.noise_step, pair_K)
            add_pairs(sums, rows_KV, coefficient_K[pair_K])
        square = int(coefficient_K.long().square().sum())
        update.move(self.weights, sums, square, update.threshold(entry.learning_rate))
        self.step = entry.step
