"""Torch in and out: state dicts, the buffers Core ML reads, and the layouts of flax and torch."""

from palettax.torch import _backend as _backend
from palettax.torch.fisher import fisher_diagonal as fisher_diagonal
from palettax.torch.layout import from_flax as from_flax
from palettax.torch.layout import to_flax as to_flax
from palettax.torch.load import load_into as load_into
from palettax.torch.state_dict import to_params as to_params
from palettax.torch.state_dict import to_state_dict as to_state_dict
