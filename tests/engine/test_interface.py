"""Members, problems and samples become requests in a fixed order, and completions find their way back."""

from collections.abc import Generator, Sequence
from itertools import islice

import pytest

from eggroll_llm.engine.interface import Completion, Decoding, Request
from eggroll_llm.engine.sampling import Rollout, sample_population, sampling_seed
from eggroll_llm.errors import EngineError

PROMPTS = [(1, 2, 3), (4,)]
DECODING = Decoding(max_tokens=5, temperature=0.7)


class Echo:
    """Answers with what it was asked."""

    def stream(self, requests: Sequence[Request], decoding: Decoding) -> Generator[tuple[int, Completion]]:
        """The last first."""
        self.requests, self.decoding = list(requests), decoding
        for i in reversed(range(len(requests))):
            request = requests[i]
            text = f"{request.member} {request.prompt_ids} {request.seed}"
            yield i, Completion(text=text, token_ids=(0,), truncated=False, prompt_tokens=len(request.prompt_ids))


def sample(population: int = 3, samples: int = 2, seed: int = 0, step: int = 1) -> tuple[Echo, list[Rollout]]:
    engine = Echo()
    return engine, sample_population(engine, PROMPTS, range(population), samples, DECODING, seed=seed, step=step)


def test_requests_are_member_major() -> None:
    engine, _ = sample()
    asked = [(request.member, request.prompt_ids) for request in engine.requests]
    assert asked == [(m, prompt) for m in (0, 1, 2) for prompt in PROMPTS for _ in range(2)]
    assert engine.decoding is DECODING


def test_pairs_may_have_prompts_of_their_own() -> None:
    prompts = tuple((n,) for n in range(6))
    rollouts = sample_population(Echo(), prompts, range(6), 1, DECODING, seed=3, step=4, own=2)
    assert [(r.member, r.prompt) for r in rollouts] == [(m, p) for m in range(6) for p in (m // 2 * 2, m // 2 * 2 + 1)]
    for rollout in rollouts:  # twins draw alike
        seed = sampling_seed(3, 4, rollout.prompt, 0)
        assert rollout.completion.text == f"{rollout.member} {prompts[rollout.prompt]} {seed}"


def test_rollouts_are_member_major_and_know_their_member_prompt_and_sample() -> None:
    _, rollouts = sample(seed=3, step=4)
    places = [(rollout.member, rollout.prompt, rollout.sample) for rollout in rollouts]
    assert places == [(m, p, s) for m in range(3) for p in range(2) for s in range(2)]
    for rollout, (m, p, s) in zip(rollouts, places, strict=True):
        assert rollout.completion.text == f"{m} {PROMPTS[p]} {sampling_seed(3, 4, p, s)}"


def test_seeds_are_equal_across_members_and_differ_in_all_else() -> None:
    engine, _ = sample()
    seeds = [request.seed for request in engine.requests]
    assert seeds[:4] == seeds[4:8] == seeds[8:]
    assert len(set(seeds[:4])) == 4
    others = [sample(seed=1), sample(step=2)]
    everything = {*seeds, *(request.seed for engine, _ in others for request in engine.requests)}
    assert len(everything) == 12


def test_seeds_do_not_change_between_versions() -> None:
    """A resumed run draws what it would have drawn."""
    assert [sampling_seed(0, 1, 0, 0), sampling_seed(1, 2, 3, 4)] == [8272751639424031979, 5666911239229641685]
    assert all(0 <= sampling_seed(0, step, 0, 0) < 2**63 for step in range(1000))


def test_each_rollout_and_the_progress_are_passed_on_as_they_arrive() -> None:
    seen: list[tuple[int, int]] = []
    arrived: list[tuple[int, Rollout]] = []
    rollouts = sample_population(
        Echo(),
        PROMPTS,
        range(4),
        1,
        DECODING,
        seed=0,
        step=1,
        on_progress=lambda *both: seen.append(both),
        on_rollout=lambda *both: arrived.append(both),
    )
    assert seen == [(done, 8) for done in range(1, 9)]
    assert arrived == list(enumerate(rollouts))[::-1]


def test_an_engine_that_answers_too_little_is_noticed() -> None:
    class Forgetful(Echo):
        def stream(self, requests: Sequence[Request], decoding: Decoding) -> Generator[tuple[int, Completion]]:
            yield from islice(super().stream(requests, decoding), 3)

    with pytest.raises(EngineError, match="returned 3 completions for 4 requests"):
        sample_population(Forgetful(), PROMPTS, range(2), 1, DECODING, seed=0, step=1)
