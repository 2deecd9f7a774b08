"""Transforms over parameter trees: a triple of pure functions each, composed like optax."""

from palettax.transforms.base import PaletteTransformation as PaletteTransformation
from palettax.transforms.base import identity as identity
from palettax.transforms.channel_scale import with_channel_scale as with_channel_scale
from palettax.transforms.combining import by_path as by_path
from palettax.transforms.combining import chain as chain
from palettax.transforms.combining import masked as masked
from palettax.transforms.combining import partition as partition
from palettax.transforms.dkm import dkm as dkm
from palettax.transforms.dkm import straight_through as straight_through
from palettax.transforms.hard import custom as custom
from palettax.transforms.hard import kmeans as kmeans
from palettax.transforms.hard import uniform as uniform
from palettax.transforms.hard import unique as unique
from palettax.transforms.narrow import quantize_lut as quantize_lut
from palettax.transforms.trained import DkmState as DkmState
from palettax.transforms.zeros import keep_zeros as keep_zeros
