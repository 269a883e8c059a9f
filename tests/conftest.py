"""What holds for every test."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_precision() -> None:
    "torch's exporters refuse a process whose cuDNN precision an earlier test has set in two ways."
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    torch.backends.cudnn.rnn.fp32_precision = "tf32"
    torch.backends.cudnn.allow_tf32 = True
