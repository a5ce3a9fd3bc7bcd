import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from regvit.measures.training_free.retrieval import (
    Sought,
    average_precision,
    columns,
    figures,
    listed,
    positive_ranks,
    same_name,
)


def published_ap(positives, ranking):
    """compute_ap of the Oxford buildings, line by line: areas of trapezoids."""
    old_recall, old_precision, area, found, seen = 0.0, 1.0, 0.0, 0, 0
    for image in ranking:
        found += image in positives
        recall, precision = found / len(positives), found / (seen + 1)
        area += (recall - old_recall) * (old_precision + precision) / 2
        old_recall, old_precision, seen = recall, precision, seen + 1
    return area


@pytest.fixture
def world():
    rng = np.random.default_rng(0)
    queries, gallery = rng.normal(size=(7, 6)), rng.normal(size=(40, 6)) * rng.uniform(0.1, 9, (40, 1))
    sought = []
    for query in range(7):
        order = rng.permutation(40)
        sought.append(Sought(query, order[: 1 + query], order[10 : 10 + 2 * query]))
    return queries, gallery, sought


def rankings(queries, gallery, sought):
    """Rows by cosine in float64, best first, without junk."""
    for one in sought:
        cosines = gallery @ queries[one.query] / np.linalg.norm(gallery, axis=1)
        yield [row for row in np.argsort(-cosines) if row not in one.junk]


def test_ranks_and_average_precision_are_those_of_independent_code(world):
    ranks = list(positive_ranks(*(each.astype(np.float32) for each in world[:2]), world[2]))
    for found, one, ranking in zip(ranks, world[2], rankings(*world), strict=True):
        hits = [row in one.positives for row in ranking]
        assert found.tolist() == (np.flatnonzero(hits) + 1).tolist()
        expected = average_precision_score(hits, -np.arange(len(hits)))
        assert average_precision(found) == pytest.approx(expected, abs=1e-12)
        assert average_precision(found, trapezoids=True) == pytest.approx(
            published_ap(set(one.positives), ranking), abs=1e-12
        )


def test_recall_asks_for_one_positive_among_the_first_and_figures_are_by_readout(world):
    ranks = [np.array([2, 9]), np.array([1]), np.array([6])]
    found = columns(ranks, (1, 5), trapezoids=False)
    assert found["recall1"].tolist() == [0, 1, 0] and found["recall5"].tolist() == [1, 1, 0]
    np.testing.assert_allclose(found["map"], [(1 / 2 + 2 / 9) / 2, 1, 1 / 6])
    told = {one.metric: one for one in figures({"cls": found, "patch_mean": found})}
    assert told["recall5_patch_mean"].value == pytest.approx(2 / 3) and told["map_cls"].n == 3


def test_an_image_is_sought_under_its_own_name():
    found = same_name(["b", "z", "a"], ["a", "b", "c"])
    assert [(one.query, one.positives.tolist()) for one in found] == [(0, [1]), (2, [0])]
    with pytest.raises(ValueError, match="no query has an image"):
        same_name(["z"], ["a"])


def test_lists_name_positives_and_junk_and_queries_stay_out_of_the_gallery(tmp_path):
    path = tmp_path / "relevant.csv"
    path.write_text("query,image_id,relation\nq,a,positive\nq,b,junk\nr,c,positive\nr,a,positive\n")
    found = listed(path, ["q", "a", "b", "c", "r"])
    assert [one.positives.tolist() for one in found] == [[1], [3, 1]]
    assert [one.junk.tolist() for one in found] == [[0, 2, 4], [0, 4]]
    for text, message in (("q,a,liked", "relation 'liked'"), ("q,x,positive", "'x', which is no image"),
                          ("q,a,junk", "'q' has no positive")):  # fmt: skip
        path.write_text(f"query,image_id,relation\n{text}\n")
        with pytest.raises(ValueError, match=message):
            listed(path, ["q", "a", "b"])
