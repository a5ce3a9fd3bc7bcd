"""Data sets: where they come from (`sources`, one file a kind of source; `synthetic`, what the default run draws), their
manifest, and how images become batches. `decoding` reads files of strangers, `transform` makes them a backbone's input.

The lowest room but for `regvit.files`: it imports nothing else of ours. `manifest` needs pandas, `transform` and
`batches` need torch, and nothing else here does.
"""
