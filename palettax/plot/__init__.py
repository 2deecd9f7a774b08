"""Figures: each takes what the library returns and gives back matplotlib axes."""

from palettax.plot.training import lut_trajectories as lut_trajectories
from palettax.plot.trees import accuracy_against_size as accuracy_against_size
from palettax.plot.trees import rate_distortion as rate_distortion
from palettax.plot.trees import report_heat_map as report_heat_map
from palettax.plot.weights import error_against_bits as error_against_bits
from palettax.plot.weights import histogram as histogram
