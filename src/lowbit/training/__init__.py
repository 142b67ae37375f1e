"""Pieces of training that `lowbit.qat` puts together. None knows the loop."""
