"""Counts as people read them."""

from consumer.wording import counted


def test_one_is_singular_and_every_other_number_plural_with_its_thousands_apart():
    assert [counted(number, "run") for number in (0, 1, 2, 1_234)] == ["0 runs", "1 run", "2 runs", "1,234 runs"]


def test_a_plural_that_is_no_noun_with_an_s_is_named():
    assert counted(1, "policy", "policies") == "1 policy"
    assert counted(2, "run still has", "runs still have") == "2 runs still have"
