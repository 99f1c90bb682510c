"""Which variants are measured, on how much work, and together with which."""

from contextlib import nullcontext

import pytest

from eggroll_llm.bench import plan
from eggroll_llm.bench.plan import Size, Variant, chosen_groups, population, waves
from eggroll_llm.errors import UserError

SIZE = Size(num_prompts=128, output_len=64)


@pytest.mark.parametrize("device", plan.GROUPS)
def test_names_say_what_differs(device: plan.Device) -> None:
    names = [v.name for v in plan.REFERENCES[device]] + [v.name for _, group in plan.GROUPS[device] for v in group]
    assert len(names) == len(set(names))
    assert population(2, 4, slots=2).name == "population of 4, rank 2, 2 slots"


def test_mixed_lengths_are_from_a_quarter_to_all_of_the_tokens_in_waves() -> None:
    assert SIZE.lengths("even") == [64] * 128
    mixed = SIZE.lengths("mixed")
    assert (len(mixed), min(mixed), max(mixed), sum(mixed)) == (512, 16, 64, 20_240)
    assert mixed != sorted(mixed)
    assert SIZE.lengths("mixed") == mixed
    for num_prompts, output_len, lengths in (
        (1, 2, [1, 1, 1, 2]),
        (2, 16, [4, 5, 7, 9, 10, 12, 14, 16]),
        (1, 1, [1] * 4),
    ):
        assert sorted(Size(num_prompts=num_prompts, output_len=output_len).lengths("mixed")) == lengths


def test_every_member_of_every_variant_answers_as_much() -> None:
    for num_prompts, wanted, refused in ((128, "", ""), (64, "population of 64", ""), (64, "", "128"), (100, "", "64")):
        size = Size(num_prompts=num_prompts, output_len=64)
        with pytest.raises(UserError, match=f"use a multiple of {refused}") if refused else nullcontext():
            for group in chosen_groups("cpu", wanted):
                plan.check_shares(size, group)


def test_ranks_and_members_make_a_table_of_their_own() -> None:
    ((workload, variants),) = chosen_groups("cuda", ranks=[1, 8], members=[64, 256], slots=128)
    assert workload == "even"
    assert [(v.population, v.rank, v.slots, v.compiled) for v in variants] == [
        (64, 1, 64, True),
        (64, 8, 64, True),
        (256, 1, 128, True),
        (256, 8, 128, True),
    ]
    assert chosen_groups("cpu", ranks=[3]) == [("even", (population(3),))]
    assert chosen_groups("cpu", members=[6]) == [("even", (population(1, 6),))]


def test_populations_that_cannot_be_are_refused_before_an_engine_starts() -> None:
    for sizes, said in (
        ({"members": [5]}, "--members 5: must be even"),
        ({"ranks": [1, 128]}, "--ranks 128: the kernels take ranks up to 64"),
        ({"ranks": [1, 1]}, "--ranks 1,1: names one twice"),
    ):
        with pytest.raises(UserError, match=said):
            chosen_groups("cpu", **sizes)


def test_a_name_that_no_variant_has_is_a_mistake() -> None:
    with pytest.raises(UserError, match="in none of these names:\n  population of 64, rank 1\n"):
        chosen_groups("cpu", "no such variant")


def alive(groups: list[plan.Group], capacity: float) -> list[str]:
    """The names of each wave, where the first letter of a name is its size."""
    together = waves(groups, [named("1e"), named("1c")], lambda variant: float(variant.name[0]), capacity)
    return [" ".join(variant.name for variant in variants) for _, variants in together]


def named(name: str) -> Variant:
    return Variant(name=name, kind="plain")


def test_as_many_are_alive_as_fit_beside_the_references() -> None:
    group = ("even", (named("2a"), named("2b"), named("3d")))
    assert alive([group], 9) == ["1e 1c 2a 2b 3d"]
    assert alive([group], 6) == ["1e 1c 2a 2b", "1e 1c 3d"]
    assert alive([group], 4) == ["1e 1c 2a", "2b", "3d"]  # too large for the references to stay
    assert alive([group], 1) == ["1e", "1c", "2a", "2b", "3d"]
    assert alive([group, ("mixed", (named("3f"),))], 9) == ["1e 1c 2a 2b 3d", "1e 1c 3f"]
