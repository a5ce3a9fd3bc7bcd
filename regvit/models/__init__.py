"""Vision transformers as they are: token layout (the only place that slices CLS, registers and patches), hooks, attention,
features from inside, arithmetic, tracing of NaN; backbones (the only caller of `timm.create_model`), where they come from
(`sources`) and how their weights are read (`checkpoints`). Imports `regvit.files` and `regvit.data`, and nothing else of ours.
"""
