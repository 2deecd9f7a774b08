"""One leaf: the data type, its granularity and its packing."""

from palettax.leaf.granularity import PER_TENSOR as PER_TENSOR
from palettax.leaf.granularity import Granularity as Granularity
from palettax.leaf.granularity import merge_blocks as merge_blocks
from palettax.leaf.granularity import split_blocks as split_blocks
from palettax.leaf.packing import pack as pack
from palettax.leaf.packing import packed_size as packed_size
from palettax.leaf.packing import unpack as unpack
from palettax.leaf.palettized_array import PalettizedArray as PalettizedArray
from palettax.leaf.palettized_array import depalettize as depalettize
from palettax.leaf.palettized_array import is_palettized as is_palettized
