"""Lists of Oxford's and Paris's buildings (Philbin et al. 2007, 2008): queries, and which images show the same building.

`landmarks:<folder>` reads what the archives unpack to, wherever it lies in the folder:

    <image>.jpg
    <name>_query.txt                            <image> x0 y0 x1 y1; Oxford writes oxc1_ before the image
    <name>_good.txt, <name>_ok.txt, <name>_junk.txt   an image a line: good and ok are sought, junk does not count

A query is the part of its image in the box. Images are test rows, queries are val rows, and `relevant.csv` says who is
sought (`regvit.measures.training_free.retrieval`). The revisited lists are published as pickles, which are not opened here.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from regvit.data.dataset_builder import DatasetBuilder
from regvit.data.decoding import read_file, read_rgb
from regvit.data.manifest import Row
from regvit.files import write_text

PREFIX = "oxc1_"


def landmarks(builder: DatasetBuilder, rest: str) -> None:
    """Builds the source `landmarks:<folder>`.

    Raises:
        FileNotFoundError: there are no queries, or a list names an image that is not there.
    """
    root = Path(rest).expanduser()
    images = {path.stem: path for path in sorted(root.rglob("*.jpg"))}
    queries = sorted(root.rglob("*_query.txt"))
    if not queries:
        raise FileNotFoundError(f"there is no *_query.txt below {root}: unpack the ground truth of the buildings there")
    builder.refuse_classes()
    builder.credit_to(
        "images", "Oxford and Paris buildings, robots.ox.ac.uk", "Flickr terms of use", "Philbin et al. 2007"
    )
    relevant: list[tuple[str, str, str]] = []
    for path in queries:
        name = path.name.removesuffix("_query.txt")
        image, *box = path.read_text(encoding="utf-8").split()
        source = _image(images, image.removeprefix(PREFIX), path)
        builder.add(Row(f"query_{name}", "", "", "val"), read_rgb(source).crop([round(float(edge)) for edge in box]))
        for ending, relation in (("good", "positive"), ("ok", "positive"), ("junk", "junk")):
            listed = path.with_name(f"{name}_{ending}.txt")
            for each in listed.read_text(encoding="utf-8").split():
                _image(images, each, listed)
                relevant.append((f"query_{name}", each, relation))
    for row in builder.watched(builder.limit([Row(name, f"{name}.jpg", "", "test") for name in images])):
        builder.put(row, read_file(images[row.image_id]))
    kept = set(builder.rows.rows().column("image_id"))  # some of Paris's files are broken
    table = pd.DataFrame([row for row in relevant if row[1] in kept], columns=["query", "image_id", "relation"])
    write_text(builder.folder / "relevant.csv", table.to_csv(index=False))


def _image(images: dict[str, Path], name: str, named_in: Path) -> Path:
    if name not in images:
        raise FileNotFoundError(f"{named_in} names {name}, but there is no {name}.jpg: unpack the images beside it")
    return images[name]
