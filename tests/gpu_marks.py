"""Marks of tests that launch kernels."""

import pytest
import torch

from mxmoe_steps.kernels.architectures import BUILT, DEFAULT, NAMES, for_capability

HAS_KERNELS = torch.cuda.is_available() and for_capability(torch.cuda.get_device_capability()) is not None
needs_kernels = [pytest.mark.gpu, pytest.mark.skipif(not HAS_KERNELS, reason=f"needs a {NAMES} GPU")]

CAPABILITY = torch.cuda.get_device_capability() if HAS_KERNELS else DEFAULT.capability
RUN_HERE = [one for one in BUILT if one.capability == CAPABILITY]  # architectures whose kernels the GPU runs
