import pytest

from regvit.stats.figures import COLUMNS, Figure, figures_table, read_figures, write_figures


def test_figures_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "new" / "figures.csv"
    figures = [Figure("top1", 2 / 3, 0.6, 0.7, 12, readout="cls"), Figure("rmse", None, detector="")]
    write_figures(path, figures_table(figures, "original", "scenes"), figures_table([Figure("n", 1.0)], "other", "x"))
    table = read_figures(path)
    assert tuple(table.columns) == COLUMNS
    assert table["value"].tolist()[0] == pytest.approx(2 / 3, abs=1e-6)
    assert table["run"].tolist() == ["original", "original", "other"]
    assert table.loc[1, "value"] != table.loc[1, "value"]  # NaN: nothing to measure at
    assert table.loc[0, "readout"] == "cls" and table.loc[1, "readout"] == "" and table.loc[0, "n"] == 12


def test_no_figures_leave_a_table_without_rows(tmp_path):
    write_figures(tmp_path / "figures.csv")
    assert read_figures(tmp_path / "figures.csv").empty


def test_a_table_of_other_columns_is_refused(tmp_path):
    (tmp_path / "figures.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"has the columns a, b, expected run, dataset"):
        read_figures(tmp_path / "figures.csv")
