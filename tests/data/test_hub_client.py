"""`hub:` data sets through the real client, against a hub on this machine."""

import io
import time

import datasets
import numpy as np
import pytest
from hub_server import serving
from PIL import Image

from regvit.data.packages import DownloadFailed

datasets.disable_progress_bars()
SHARD = "data/test-00000-of-00001.parquet"


def shard(count: int) -> dict[str, bytes]:
    """A repository's files: so many small pictures of cats and dogs."""
    rng, columns = np.random.default_rng(count), {"image": [], "label": [i % 2 for i in range(count)]}
    for _ in range(count):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)).save(file, "PNG")
        columns["image"].append({"bytes": file.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    table = io.BytesIO()
    datasets.Dataset.from_dict(columns, features=features).to_parquet(table)
    return {SHARD: table.getvalue()}


def test_a_revision_is_that_revision_also_without_the_hub(make, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with serving() as hub:
        old, new = hub.push("datasets/me/pinned", shard(2)), hub.push("datasets/me/pinned", shard(3))
        assert len(make(f"hub:me/pinned@{old}", "old", role="ood").dataset) == 2
        assert len(make("hub:me/pinned", "newest", role="ood").dataset) == 3
    assert len(make(f"hub:me/pinned@{old}", "old_again", role="ood").dataset) == 2
    assert len(make("hub:me/pinned", "newest_again", role="ood").dataset) == 3
    with pytest.raises(DownloadFailed, match="me/pinned could not be had from the hub"):  # though another one is there
        make(f"hub:me/pinned@{new[:-1]}0", "third", role="ood")


def test_what_breaks_off_or_is_busy_is_asked_for_again(make, hub):
    hub.push("datasets/me/shaky", shard(40))
    hub.cut[SHARD] = 500
    hub.busy["datasets/me/shaky"] = 2
    assert len(make("hub:me/shaky", role="ood").dataset) == 40


@pytest.mark.parametrize(
    ("source", "status", "said"),
    [
        ("hub:me/none", None, "'me/none' doesn't exist on the Hub or cannot be accessed; check its name"),
        ("hub:me/kept@abc", None, "it has no such revision"),
        ("hub:me/kept", 401, "'me/kept' is a gated dataset on the Hub"),
        ("hub:me/kept", 429, "the hub was asked too often from here: wait some minutes"),
        ("hub:me/empty", None, "doesn't contain any data files"),
    ],
)
def test_every_refusal_is_a_sentence_with_its_cure(make, hub, source, status, said):
    hub.push("datasets/me/kept", shard(2))
    hub.push("datasets/me/empty", {"README.md": b""})
    hub.refuse = {"datasets/me/kept": status} if status else {}
    with pytest.raises(DownloadFailed, match=said) as refused:
        make(source, role="ood")
    assert "\n" not in str(refused.value)
