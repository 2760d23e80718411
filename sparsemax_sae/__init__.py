__version__ = "0.1.0"

from sparsemax_sae.saes.base import SAE, SAEOutput, make_sae, recipes
