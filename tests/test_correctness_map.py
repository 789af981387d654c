"""tests/README.md says which test would fail for which mistake: every test that it names is there."""

import re
from pathlib import Path

HERE = Path(__file__).parent


def test_every_test_that_the_map_names_exists():
    named = 0
    for file, names in re.findall(r"`(test_\w+)`: ([\w, ]+)", (HERE / "README.md").read_text()):
        defined = set(re.findall(r"^def test_(\w+)", (HERE / f"{file}.py").read_text(), re.M))
        missing = set(names.strip().split(", ")) - defined
        assert not missing, f"{file}: {sorted(missing)}"
        named += len(names.split(", "))
    assert named > 100, "the pattern reads the map no more"


def test_every_item_of_the_list_has_a_row():
    rows = {int(n) for n in re.findall(r"^\| (\d+) \|", (HERE / "README.md").read_text(), re.M)}
    assert rows == set(range(1, 34))
