"""Torch in and out: palettizers, state dicts, the buffers Core ML reads, and the layouts of flax and torch."""

from palettax.torch import _backend as _backend
from palettax.torch.configs import DKMPalettizerConfig as DKMPalettizerConfig
from palettax.torch.configs import PostTrainingPalettizerConfig as PostTrainingPalettizerConfig
from palettax.torch.configs import SKMPalettizerConfig as SKMPalettizerConfig
from palettax.torch.conversion import fast_conversion as fast_conversion
from palettax.torch.fisher import fisher_diagonal as fisher_diagonal
from palettax.torch.layout import from_flax as from_flax
from palettax.torch.layout import to_flax as to_flax
from palettax.torch.load import load_into as load_into
from palettax.torch.module_configs import ModuleDKMPalettizerConfig as ModuleDKMPalettizerConfig
from palettax.torch.module_configs import ModulePostTrainingPalettizerConfig as ModulePostTrainingPalettizerConfig
from palettax.torch.module_configs import ModuleSKMPalettizerConfig as ModuleSKMPalettizerConfig
from palettax.torch.post_training import PostTrainingPalettizer as PostTrainingPalettizer
from palettax.torch.post_training import SKMPalettizer as SKMPalettizer
from palettax.torch.state_dict import to_params as to_params
from palettax.torch.state_dict import to_state_dict as to_state_dict
from palettax.torch.trained import DKMPalettizer as DKMPalettizer
