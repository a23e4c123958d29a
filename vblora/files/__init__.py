"""Files of adapters, without a model: directories, packed files, plain LoRA."""
