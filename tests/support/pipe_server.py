"""Imported in the process that engines are forked from: does once what takes seconds when it is done first."""

import dataclasses
from pathlib import Path

import torch
from fake_engine import CONFIG, MEMBERS, FakeEngine

from eggroll_llm.es.estimate import UpdateSpec
from eggroll_llm.es.noise import NoiseSpec
from eggroll_llm.training.plan import plan_of

torch.set_num_threads(1)
_engine = FakeEngine(dataclasses.replace(CONFIG, es=dataclasses.replace(CONFIG.es, optimizer="adam")), Path())
_engine.begin(NoiseSpec(seed=0, step=1, rank=2, sigma=0.1), MEMBERS)
_engine.replay([UpdateSpec.of(plan_of(CONFIG, 1), [float(m) for m in range(MEMBERS)])])
_engine.checksum()
