"""Files of adapters, without a model: directories, packed files, plain LoRA. Nothing here knows `vblora.adapter`."""

from vblora.storage.content import (
    Content,
    FileContent,
    check_floats,
    check_heads,
    check_tensors,
    check_weights,
    form_of,
    head_tensors,
)
from vblora.storage.directory import (
    CONFIG_FILE,
    FORMATS,
    FORMS,
    HEAD_PREFIX,
    METHOD_KEY,
    TENSOR_FILE,
    read_config,
    read_content,
    seed_of,
    to_files,
    write_directory,
    write_files,
)

__all__ = [
    "CONFIG_FILE",
    "FORMATS",
    "FORMS",
    "HEAD_PREFIX",
    "METHOD_KEY",
    "TENSOR_FILE",
    "Content",
    "FileContent",
    "check_floats",
    "check_heads",
    "check_tensors",
    "check_weights",
    "form_of",
    "head_tensors",
    "read_config",
    "read_content",
    "seed_of",
    "to_files",
    "write_directory",
    "write_files",
]
