"""A plugin for pytest: what a test of tests/techniques makes lies on the device of STRATA_TEST_DEVICE.

Tests draw on the processor, so that a seed gives the same numbers everywhere; the mode brings them to the device where
the test's own file has made them, and back where it asks for NumPy. What the code under test makes stays where that
puts it.

    STRATA_TEST_DEVICE=cuda PYTHONPATH=tests python -m pytest -p on_card tests/techniques
"""

import os
import sys
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

TESTS = str(Path(__file__).parent)
DEVICE = torch.device(os.environ.get("STRATA_TEST_DEVICE", "cpu"))
MADE = {*_device_constructors(), torch.from_numpy}
BACK = {torch.Tensor.numpy, torch.Tensor.__array__}


class OnCard(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in BACK:
            return func(args[0].cpu(), *args[1:], **kwargs)
        found = func(*args, **kwargs)
        own = sys._getframe(1).f_code.co_filename.startswith(TESTS)
        if own and func in MADE and kwargs.get("device") is None and isinstance(found, torch.Tensor):
            return found.to(DEVICE)
        return found


@pytest.fixture(autouse=True)
def _on_card():
    with OnCard():
        yield
