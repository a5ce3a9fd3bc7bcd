import numpy as np
import pandas as pd
import pytest

from regvit.measures.tables import image_means, mean_figures, write_results
from regvit.stats.figures import read_figures


def test_means_over_chosen_patches_are_nan_where_none_is_chosen():
    values = np.array([[1.0, 3.0, 8.0], [1.0, 1.0, 1.0]])
    found = image_means(values, np.array([[True, True, False], [False] * 3]))
    assert found[0] == 2 and np.isnan(found[1])


def test_a_measurement_leaves_its_figures_and_a_row_an_image_with_empty_cells_for_what_is_not_defined(tmp_path):
    columns = {"rmse": np.array([1.0, np.nan, 2.0]), "none": np.full(3, np.nan)}
    figures = mean_figures(columns)
    write_results(tmp_path / "new", "original", "rooms", figures, ["a", "b", "c"], columns)
    table = read_figures(tmp_path / "new/figures.csv").set_index("metric")
    assert table.loc["rmse", "value"] == pytest.approx(1.5) and table.loc["rmse", "n"] == 2
    assert np.isnan(table.loc["none", "value"]) and set(table["dataset"]) == {"rooms"}
    images = pd.read_csv(tmp_path / "new/images.csv")
    assert images["image_id"].tolist() == ["a", "b", "c"]
    assert (tmp_path / "new/images.csv").read_text().splitlines()[2] == "b,,"
