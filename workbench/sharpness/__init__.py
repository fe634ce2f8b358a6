"""The loss around a model: slices, Hessian-vector products, extreme eigenvalues."""
