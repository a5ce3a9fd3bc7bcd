"""Neurons from files: of a search, and of tables as others publish them."""

import json

import pytest

from regvit.registers.neurons_file import NeuronsFile, Overlap, read_neurons, read_table

SCORED = [[12, 40, 9.5], [3, 7, 8.0], [12, 2, 7.5], [20, 1, 7.0], [3, 1, 0.1]]
OURS = {
    "threshold": 30.0, "detect_layer": 22, "selected": {"3": [7], "12": [2, 40]},
    "neurons": [{"layer": layer, "neuron": unit, "activation": 1.0, "attribution": score} for layer, unit, score in SCORED],
}  # fmt: skip


@pytest.mark.parametrize(
    ("document", "options", "expected"),
    [
        (SCORED, "", {3: (1, 7), 12: (2, 40), 20: (1,)}),
        (SCORED, "?top_k=3", {3: (7,), 12: (2, 40)}),
        (SCORED, "?top_k=3&max_layer=17", {3: (7,), 12: (2, 40)}),
        (SCORED, "?top_k=2&max_layer=3", {3: (1, 7)}),
        ({"12": [40, 2], "3": [7]}, "", {3: (7,), 12: (2, 40)}),
        ({"12": [40, 2], "3": [7]}, "?max_layer=3", {3: (7,)}),
        (OURS, "", {3: (7,), 12: (2, 40)}),
        (OURS, "?top_k=1", {12: (40,)}),
    ],
)
def test_published_tables_and_our_own_files_are_read(tmp_path, document, options, expected):
    (tmp_path / "table.json").write_text(json.dumps(document))
    assert read_table(f"file:{tmp_path}/table.json{options}") == expected


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        (json.dumps(SCORED), "?best=3", r"has the option best; expected top_k=<number> or max_layer=<layer>"),
        (json.dumps(SCORED), "?top_k=many", "has the option top_k; expected"),
        (json.dumps({"3": [7]}), "?top_k=1", "ranks no neurons, so top_k cannot be taken of it"),
        (
            json.dumps([[0, unit, 1.0] for unit in range(1001)]),
            "",
            r"gives 1001 neurons, expected 1 to 1000; say how many",
        ),
        ("[]", "", "gives 0 neurons"),
        ("{", "", r"holds no neurons \(Expecting"),
        ('{"weights": "x"}', "", r"holds no neurons \(invalid literal .*expected what `regvit neurons` writes"),
        ("[3, 4]", "", "holds no neurons"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path, text, options, said):
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_table(f"file:{tmp_path}/table.json{options}")
    with pytest.raises(FileNotFoundError, match="the file of neurons, does not exist"):
        read_table(f"file:{tmp_path}/gone.json")


def test_the_overlap_with_a_search_is_shared_others_and_missing_with_their_ranks():
    searched = read_neurons(json.dumps(OURS))
    overlap = Overlap.of({12: [40], 20: [1], 5: [9]}, searched)
    assert (overlap.shared, overlap.others, overlap.missing) == (((12, 40),), ((5, 9), (20, 1)), ((3, 7), (12, 2)))
    assert overlap.sentence(searched.ranks) == (
        "1 of its 3 neurons are among those of the search here: 12.40 (rank 1); 2 are not: 20.1 (rank 4), 5.9 (rank over 5); "
        "2 of the search are missing: 3.7 (rank 2), 12.2 (rank 3)"
    )
    assert Overlap.of({}, NeuronsFile({})).sentence({}).startswith("0 of its 0 neurons")
