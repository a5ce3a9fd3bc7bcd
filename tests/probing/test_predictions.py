import numpy as np
import pytest
import zarr

from regvit.probing import predictions as module
from regvit.probing.predictions import Index, SetWriter, TestSet, image_keys, making_predictions, open_predictions
from regvit.probing.probes import InvalidProbes

FIRST = np.array([[3, 1, 2], [3, 1, 2], [0, 0, 1]], dtype=np.float32)
INDEX = Index(
    "original",
    ("ant", "bee", "çat"),
    {
        "home": TestSet("id", "h" * 64, (0, 1, 2)),
        "away": TestSet("ood", "a" * 64, (1, 2)),
        "alien": TestSet("anomaly", "x" * 64, ()),
    },
    (("cls", "linear", 4), ("cls", "linear", 5), ("cls", "knn", -1), ("a_mean", "linear", 4)),
    (("cls", "vim", 4), ("cls", "vim", 5), ("cls", "knn", -1)),
)
LABELS = {"home": np.array([0, 1, 2]), "away": np.array([2, 1, 2]), "alien": np.full(3, -1)}
LOGITS = (FIRST, -FIRST, FIRST, -FIRST)
SCORES = np.array([[0.5, np.inf, 1e-300], [-0.5, 0, 1], [3, 2, 1]])


def make(path, interrupt=False):
    with making_predictions(path, INDEX) as predictions:
        for name, labels in LABELS.items():
            writer = SetWriter(predictions, name, labels, image_keys("uvw" if name == "home" else "xvw"))
            for key, logits in zip(INDEX.classifiers, LOGITS, strict=True):
                for rows in (slice(0, 2), slice(2, 3)):
                    writer.write(key, rows, logits[rows])
            writer.finish({} if name == "away" else dict(zip(INDEX.detectors, SCORES, strict=True)))
            if interrupt:
                raise KeyboardInterrupt
    return predictions if path is None else open_predictions(path)


@pytest.fixture(params=[None, "kept.zarr"])
def predictions(request, tmp_path):
    return make(request.param and tmp_path / "features" / request.param)


def test_predictions_come_back_as_they_were_written(predictions):
    assert predictions.index == INDEX and predictions.readouts == ("cls", "a_mean")
    assert predictions.classifiers("cls") == ("linear", "knn") and predictions.classifiers("a_mean") == ("linear",)
    assert predictions.named("id", "ood") == ("home", "away") and predictions.named("anomaly") == ("alien",)
    assert all(np.array_equal(predictions.labels(name), labels) for name, labels in LABELS.items())
    assert np.array_equal(predictions.scores("alien", "cls", "vim"), SCORES[:2])
    assert np.array_equal(predictions.scores("home", "cls", "knn"), SCORES[2:])
    ((rows, logits),) = predictions.logit_blocks("alien", "cls")
    assert rows == slice(0, 3) and np.array_equal(logits, [FIRST, -FIRST]) and logits.dtype == np.float32


def test_only_classes_that_the_data_set_has_are_predicted(predictions):
    assert predictions.correct("home", "cls").tolist() == [[True, False, True], [False, True, False]]
    assert predictions.correct("home", "cls", "knn").tolist() == [[True, False, True]]
    assert predictions.correct("away", "cls")[0].tolist() == [True, False, True]  # class 0 is not among those of `away`
    with pytest.raises(ValueError, match="read-only"):
        predictions.labels("home")[0] = 1


def test_logits_come_block_by_block(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 6)  # two images at once
    found = list(make(tmp_path / "x.zarr").logit_blocks("home", "cls", "knn"))
    assert [rows for rows, _ in found] == [slice(0, 2), slice(2, 3)]
    assert np.array_equal(np.concatenate([logits[0] for _, logits in found]), FIRST)


def test_the_same_predictions_are_the_same_bytes(tmp_path):
    files = []
    for name in ("one", "two"):
        make(tmp_path / name)
        files.append({path.relative_to(tmp_path / name): path.read_bytes()
                      for path in (tmp_path / name).rglob("*") if path.is_file()})  # fmt: skip
    assert files[0] == files[1] and len(files[0]) < 40


def test_an_interruption_leaves_what_was_there(tmp_path):
    make(tmp_path / "x.zarr")
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "x.zarr", interrupt=True)
    assert open_predictions(tmp_path / "x.zarr").index == INDEX
    assert [path.name for path in tmp_path.iterdir()] == ["x.zarr"]


def test_what_was_not_predicted_is_named(predictions):
    with pytest.raises(ValueError, match=r"data set 'alien' has no labels \(an anomaly set\)"):
        predictions.correct("alien", "cls")
    with pytest.raises(ValueError, match="no predictions of a_mean/knn; there are cls/linear, cls/knn, a_mean/linear"):
        predictions.correct("home", "a_mean", "knn")


def test_what_holds_no_predictions_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="run the evaluate stage"):
        open_predictions(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidProbes, match="is no zarr group; expected predictions of format 3; run the evaluate"):
        open_predictions(tmp_path / "empty")
    zarr.create_group(tmp_path / "old", attributes={"format_version": 2})
    with pytest.raises(InvalidProbes, match="holds something else, of format 2; expected predictions of format 3"):
        open_predictions(tmp_path / "old")
