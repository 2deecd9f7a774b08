"""Array maths: one lookup table for one array. Pure functions, safe under `jit` and `vmap`."""

from palettax.clustering.adjoints import Implicit as Implicit
from palettax.clustering.adjoints import OneStep as OneStep
from palettax.clustering.adjoints import Unrolled as Unrolled
from palettax.clustering.assignment import assign as assign
from palettax.clustering.assignment import lookup as lookup
from palettax.clustering.certificate import certify as certify
from palettax.clustering.curve import kmeans_curve as kmeans_curve
from palettax.clustering.fit import LutFit as LutFit
from palettax.clustering.kmeans import kmeans_lut as kmeans_lut
from palettax.clustering.soft import SoftFit as SoftFit
from palettax.clustering.soft import soft_kmeans_lut as soft_kmeans_lut
from palettax.clustering.uniform import uniform_lut as uniform_lut
from palettax.clustering.unique import unique_lut as unique_lut
