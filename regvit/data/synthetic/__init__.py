"""What the default run draws: emoji in several styles, scenes of emoji with boxes and masks, rooms with depth."""
