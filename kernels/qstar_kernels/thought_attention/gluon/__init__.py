"""Packed thought attention for compute capability 9.0, in Gluon: copies and products that run beside the arithmetic."""
