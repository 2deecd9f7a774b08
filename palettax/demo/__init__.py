"""The whole way once, on real digits: train in Flax, palettize, convert to Core ML, read back, compare."""
