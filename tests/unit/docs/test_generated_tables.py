"""The tables of the guides that are generated from the code are current."""

import re

import pytest
from guide_tables.tables import GUIDES as WITH_TABLES
from guide_tables.tables import TABLES, filled

from config.settings import describe
from consumer.metrics import Metrics
from tests.support.guides import GUIDES, read
from tests.unit.commands.test_command_line import ALL


@pytest.mark.parametrize("guide", WITH_TABLES)
def test_every_generated_table_matches_the_code(guide):
    assert read(guide) == filled(read(guide)), "run scripts/guide-tables"


def test_every_table_has_one_place_and_every_guide_with_a_place_is_written():
    places = {guide: re.findall(r"<!-- generated: (\w+) -->", read(guide)) for guide in GUIDES}
    assert sorted(name for names in places.values() for name in names) == sorted(TABLES)
    assert {guide for guide, names in places.items() if names} == set(WITH_TABLES)


def test_every_setting_metric_and_command_is_in_its_table():
    assert all(f"| `{name}` |" in read("config/README.md") for name, _, _ in describe())
    assert read("deploy/prometheus/README.md").count("\n| `closeout_") == len(Metrics().described)
    assert all(f"\n| `closeout {name}" in read("README.md") for name in ALL)


def test_a_stale_table_is_detected():
    guide = read("config/README.md")
    stale = guide.replace("`PREFETCH_COUNT` | `600`", "`PREFETCH_COUNT` | `601`")
    assert stale != guide
    assert filled(stale) == guide
