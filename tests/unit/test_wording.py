"""Counts with their nouns."""

from consumer.wording import counted


def test_counts_are_pluralized_with_thousands_separators():
    assert [counted(number, "run") for number in (0, 1, 2, 1_234)] == ["0 runs", "1 run", "2 runs", "1,234 runs"]


def test_an_irregular_plural_can_be_given():
    assert counted(1, "policy", "policies") == "1 policy"
    assert counted(2, "run still has", "runs still have") == "2 runs still have"
