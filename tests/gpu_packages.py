"""Which optional packages for GPUs are here; tests of what they compute need them."""

import pytest
from transformers.utils import is_flash_attn_2_available, is_flash_attn_4_available

FLASH_2 = pytest.mark.skipif(not is_flash_attn_2_available(), reason="flash-attn is not installed")
FLASH_4 = pytest.mark.skipif(not is_flash_attn_4_available(), reason="flash-attn-4 is not installed")
