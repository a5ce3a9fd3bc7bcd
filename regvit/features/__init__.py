"""Features of images under a run, made once and kept.

`extract` fills a store (`store`, `store_writer`) with what a `forward` gives, here (`extraction`) or on many devices
(`ray_engine`); `dense_features` says what one forward leaves for all measurements on single tokens, `dense_set` reads it;
`readouts` says what a probe is trained on, `stored_readouts` reads that without holding it all. It may import `regvit.files`,
`data`, `models` and `registers`. Whoever only reads stores needs neither torch nor timm.
"""
