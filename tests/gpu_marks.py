"""Marks of tests that launch kernels."""

import pytest
import torch

from mxmoe_steps.kernels.architectures import NAMES, for_capability

HAS_KERNELS = torch.cuda.is_available() and for_capability(torch.cuda.get_device_capability()) is not None
needs_kernels = [pytest.mark.gpu, pytest.mark.skipif(not HAS_KERNELS, reason=f"needs a {NAMES} GPU")]
