"""What the parameters say of the comparison, as plain values for `report.study`."""

from pydantic_core import to_jsonable_python

from regvit.pipeline.schema import Params
from regvit.report.study import Study


def study_of(params: Params) -> Study:
    """The runs, and what is measured of them."""
    blocks = {
        "runs": params.runs,
        "backbones": params.backbones,
        "datasets": params.datasets,
        "scenes": params.scenes,
        "in_distribution": params.in_distribution,
        "seed": params.seed,
        "evaluate": params.evaluate,
        "compare": params.compare,
        "attention": params.attention,
        "tokens": params.tokens,
        "token_classes": params.token_classes,
        "discover": params.discover,
        "discover_published": params.discover_published,
        "segment": params.segment,
        "depth": params.depth,
        "hummingbird": params.hummingbird,
        "correspond": params.correspond,
        "retrieve": params.retrieve,
        "zeroshot": params.zeroshot,
        "zeroshot_segment": params.zeroshot_segment,
    }
    return Study.of(to_jsonable_python(blocks))
