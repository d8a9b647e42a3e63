"""Numbers and tensors: batched products, roots, scaling without overflow, quadrature. Imports torch
only."""
