"""Register neurons put into a model on purpose: ground truth for finding and moving them (`plant`), the units that are
overwritten (`units`), and the direction along which they write (`sink`). Imports what `regvit.registers` may.
"""

from regvit.registers.planting.plant import Planted, PlantingRecipe, plant, unplant

__all__ = ["Planted", "PlantingRecipe", "plant", "unplant"]
