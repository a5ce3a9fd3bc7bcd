"""Backbones that are trained here: registers added to a model that has none (`register_tokens`), learned alone or with the
model on the ID train split (`finetuning`, by a `recipe`), and what norms do meanwhile (`norms_by_step`). The result is a plain
timm model. Imports `regvit.files`, `data`, `models` and `registers`.
"""
