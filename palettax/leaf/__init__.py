"""One leaf: the data type, its granularity and its packing."""

from palettax.leaf.blocks import merge_blocks as merge_blocks
from palettax.leaf.blocks import split_blocks as split_blocks
from palettax.leaf.dense import level_numbers as level_numbers
from palettax.leaf.dense import multiply_scales as multiply_scales
from palettax.leaf.dense import same_bits as same_bits
from palettax.leaf.dense import spread as spread
from palettax.leaf.granularity import PER_TENSOR as PER_TENSOR
from palettax.leaf.granularity import Granularity as Granularity
from palettax.leaf.granularity import channel_axes as channel_axes
from palettax.leaf.packing import pack as pack
from palettax.leaf.packing import packed_size as packed_size
from palettax.leaf.packing import unpack as unpack
from palettax.leaf.palettized_array import PalettizedArray as PalettizedArray
from palettax.leaf.palettized_array import depalettize as depalettize
from palettax.leaf.palettized_array import is_palettized as is_palettized
from palettax.leaf.scales import as_numpy as as_numpy
from palettax.leaf.scales import has_levels as has_levels
from palettax.leaf.scales import scaled_lut as scaled_lut
from palettax.leaf.scales import shift_tables as shift_tables
from palettax.leaf.scales import table_scale as table_scale
from palettax.leaf.scales import tables_per_scale as tables_per_scale
