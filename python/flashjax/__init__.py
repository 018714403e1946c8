"""Fast attention for JAX: one operation, compiled for CPU and CUDA, through XLA FFI."""

from flashjax._api import flash_mha as flash_mha
from flashjax._api import flash_mha_varlen as flash_mha_varlen
from flashjax._api import flash_mha_with_kvcache as flash_mha_with_kvcache
from flashjax._layouts import SequenceLayout as SequenceLayout
from flashjax._support import Support as Support
from flashjax._support import support as support

__version__ = "0.1.0"
